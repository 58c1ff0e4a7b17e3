"""What a model answers to the cache's prompts: through phase one's vLLM engine where it is installed, else transformers.

Prompts arrive as the cache's own token ids. An answer depends on its prompt, its temperature and its seed alone where
vLLM is asked; transformers samples a batch from one seed, and batches are the same in every run.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kdcache import machine, models
from kdcache.bounds import LARGEST
from kdcache.errors import KDError, UsageError
from kdcache.hashing import request_seed
from kdcache.models import identity
from kdcache.prompts.tokenize import completion_text
from trainer.student.load import load_student, quantized_by, stop_ids

ENGINES = ("auto", "vllm", "transformers")


@dataclass(frozen=True)
class Ask:
    """One answer wanted: greedy at temperature 0."""

    prompt_id: str
    prompt_ids: Sequence[int]
    temperature: float
    seed: int  # counts the answers to one prompt


@dataclass(frozen=True)
class Decoding:
    top_p: float
    max_new_tokens: int
    stop_ids: tuple[int, ...]  # that end an answer, besides the model's own; the first is the cache's end-of-turn
    batch_size: int  # of transformers
    dtype: str


def resolve(engine: str, models: Sequence[str] = (), dtype: str = "float32") -> str:
    """The engine for all ``models`` of a table, so that like is set beside like: ``auto`` is vLLM where it is installed.

    vLLM 0.32 reads no bitsandbytes weights, and computes with compressed-tensors' 4 bits in 16 bits only; so with a
    quantized model among them ``auto`` is transformers.
    """
    if engine not in ENGINES:
        raise KDError(f"--engine {engine}: expected one of {', '.join(ENGINES)}", 2)
    quantized = {model: method for model in models if (method := quantized_by(model)) is not None}
    if engine == "auto":
        return "vllm" if importlib.util.find_spec("vllm") is not None and not quantized else "transformers"
    for model, method in quantized.items() if engine == "vllm" else ():
        if method == "bitsandbytes":
            raise UsageError(
                f"--engine vllm: {model} is quantized by bitsandbytes, which vLLM does not read; use transformers"
            )
        if dtype == "float32":
            raise UsageError(
                f"--engine vllm: it computes with the 4 bits of {model} in 16; add --dtype bfloat16 or float16"
            )
    return engine


def answers(
    model: str,
    asks: Sequence[Ask],
    decoding: Decoding,
    engine: str,
    progress: Callable[[int, int], None],
    say: Callable[[str], None] = lambda _: None,
) -> list[str]:
    """The answers, in the order asked, as text without what ended them."""
    if not asks:
        return []
    longest = max(len(ask.prompt_ids) for ask in asks)
    positions = _positions(model)
    if positions is not None and longest >= positions:
        raise KDError(
            f"{model} has {positions:,} positions, and the longest prompt has {longest:,} tokens: no room to answer"
        )
    if engine == "vllm":
        return _from_vllm(model, asks, decoding, positions, progress, say)
    return _from_transformers(model, asks, decoding, positions, progress)


def _positions(model: str) -> int | None:
    """How many tokens a prompt and its answer may have together, where the model says so."""
    config = models.config(identity.model_folder(model)).get_text_config()
    return getattr(config, "max_position_embeddings", None)


def _from_vllm(
    model: str,
    asks: Sequence[Ask],
    decoding: Decoding,
    positions: int | None,
    progress: Callable[[int, int], None],
    say: Callable[[str], None],
) -> list[str]:
    from kdcache.teachers import EngineOptions, Refusal, Request, Sampling
    from kdcache.teachers.vllm import VLLMTeacher

    folder, longest = identity.model_folder(model), max(len(ask.prompt_ids) for ask in asks)
    tokenizer = models.tokenizer(folder)
    engine = VLLMTeacher(
        EngineOptions(
            model=folder,
            capture_k=1,
            max_model_len=min(longest + decoding.max_new_tokens, positions or LARGEST),
            dtype=decoding.dtype,
            stop_token_ids=decoding.stop_ids,
        ),
        say,
    )
    try:
        requests = (
            Request(
                (str(number), ask.prompt_id),
                ask.prompt_ids,
                seed=request_seed(0, ask.prompt_id, ask.seed),
                sampling=Sampling(ask.temperature, decoding.top_p, decoding.max_new_tokens),
            )
            for number, ask in enumerate(asks)
        )
        found: dict[int, str] = {}
        for request, answer in engine.run(requests):
            if isinstance(answer, Refusal):
                raise KDError(f"{model} could not answer prompt {request.key[1]}: {answer.reason}")
            ids = answer.completion_ids
            ended = [*decoding.stop_ids, *(ids[-1:] if answer.finish_reason == "stop" else [])]
            found[int(request.key[0])] = completion_text(tokenizer, ids, set(ended))
            progress(len(found), len(asks))
    finally:
        engine.stop()
    return [found[number] for number in range(len(asks))]


def _from_transformers(
    model: str,
    asks: Sequence[Ask],
    decoding: Decoding,
    positions: int | None,
    progress: Callable[[int, int], None],
) -> list[str]:
    """Prompts of one temperature and of like length share a batch, padded on the left."""
    student, tokenizer = load_student(model, decoding.dtype)
    student.to(machine.torch_device()).eval()
    stops = stop_ids(student, tokenizer, decoding.stop_ids)
    found: dict[int, str] = {}
    order = sorted(range(len(asks)), key=lambda i: (asks[i].temperature, len(asks[i].prompt_ids), i))
    while order:
        temperature = asks[order[0]].temperature
        batch = [i for i in order[: decoding.batch_size] if asks[i].temperature == temperature]
        order = order[len(batch) :]
        texts = _generate(student, tokenizer, [asks[i] for i in batch], decoding, stops, positions)
        found.update(zip(batch, texts))
        progress(len(found), len(asks))
    del student
    gc.collect()
    return [found[i] for i in range(len(asks))]


@torch.no_grad()
def _generate(
    student: Any, tokenizer: Any, asks: list[Ask], decoding: Decoding, stops: list[int], positions: int | None
) -> list[str]:
    width = max(len(ask.prompt_ids) for ask in asks)
    pad = decoding.stop_ids[0]
    ids = torch.full((len(asks), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for line, ask in enumerate(asks):
        ids[line, width - len(ask.prompt_ids) :] = torch.as_tensor(ask.prompt_ids)
        mask[line, width - len(ask.prompt_ids) :] = 1
    temperature = asks[0].temperature
    greedy = temperature == 0
    torch.manual_seed(request_seed(0, asks[0].prompt_id, asks[0].seed))
    output = student.generate(
        ids.to(student.device),
        attention_mask=mask.to(student.device),
        do_sample=not greedy,
        temperature=None if greedy else temperature,
        top_p=None if greedy else decoding.top_p,
        top_k=None if greedy else 0,
        max_new_tokens=min(decoding.max_new_tokens, (positions or LARGEST) - width),
        repetition_penalty=1.0,  # an answer is the student's own, whatever its generation_config says
        eos_token_id=stops,
        pad_token_id=pad,
    )
    return [completion_text(tokenizer, answer, {*stops, pad}) for answer in output[:, width:].tolist()]
