"""What the students kept, on the cache's held-out split; the teacher's row comes from the cache, no teacher is loaded.

    kd evaluate data/student data/sft data/kd --from-cache data/cache

Teacher-forced: KL to the teacher (bucket form), top-1 agreement with the teacher's choice, cross-entropy and perplexity
of the completions. Generated greedily: Rouge-L against the reference, and against the teacher's own cached answer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdcache import query
from kdcache.errors import KDError
from kdcache.format import SPLITS
from trainer.batches import in_order, open_caches, select
from trainer.distill import attach_loss, detach_loss, measure
from trainer.student import check_tokenizer, load_student, stop_ids

Progress = Callable[[str, int, int], None]  # what, done, of how many


@dataclass(frozen=True)
class EvaluateConfig:
    students: tuple[str, ...]
    from_cache: tuple[Path, ...]
    split: str = "test"
    where: str | None = None
    max_length: int = 2048
    batch_size: int = 8
    generate: int | None = None  # prompts to generate for; None: all, 0: none
    max_new_tokens: int = 128
    dtype: str = "float32"


class WordTokenizer:
    """Rouge's words for any language: runs of letters and digits, lower-cased, no stemming (rouge-score's own is ASCII)."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


def evaluate(config: EvaluateConfig, progress: Progress = lambda *_: None) -> list[dict[str, Any]]:
    """One row a student, the teacher's (from the cache) first."""
    if config.split not in SPLITS:
        raise KDError(f"--split {config.split}: expected one of {', '.join(SPLITS)}", 2)
    caches = open_caches(config.from_cache)
    for student in config.students:
        check_tokenizer(student, caches[0])
    units = select(caches, config.split, config.where, config.max_length)
    if not len(units):
        raise KDError(f"the {config.split} split has no sample to evaluate on (--where, --max-length, --split-ratios?)")
    prompts = _prompts(config)
    rows = [_teacher_row(config, prompts)]
    for name in config.students:
        rows.append(_student_row(config, name, units, prompts, caches[0].plan["end_of_turn"], progress))
    return rows


def _student_row(
    config: EvaluateConfig, name: str, units: Any, prompts: list[Prompt], end_of_turn: int, progress: Progress
) -> dict[str, Any]:
    student, tokenizer = load_student(name, config.dtype)
    student.to("cuda" if torch.cuda.is_available() else "cpu")
    head_rows = student.get_output_embeddings().weight.shape[0]
    batches = -(-len(units) // config.batch_size)

    def counted() -> Any:
        for done, batch in enumerate(in_order(units, head_rows, config.batch_size), 1):
            progress(f"{name}: held-out KL", done, batches)
            yield batch

    attach_loss(student, alpha=0.0)
    held_out = measure(student, counted())
    detach_loss(student)
    answers = _generate(student, tokenizer, prompts, config, end_of_turn, lambda *at: progress(f"{name}: answers", *at))
    return {
        "model": name,
        "kl": held_out["kl"],
        "agreement": held_out["agreement"],
        "ce": held_out["ce"],
        "perplexity": math.exp(held_out["ce"]),
        "rougeL_reference": rouge_l(answers, [p.reference for p in prompts]),
        "rougeL_teacher": rouge_l(answers, [p.teacher for p in prompts]),
        "samples": len(units),
        "tokens": int(held_out["tokens"]),
        "generated": len(answers),
    }


# --- what the cache knows ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    reference: str | None
    teacher: str | None  # the teacher's own answer, where one was sampled


def _rows(config: EvaluateConfig, columns: str, rest: str = "") -> list[tuple[Any, ...]]:
    """``columns`` of the chosen samples, of all caches together."""
    rest = f"AND prompt_tokens + completion_tokens <= {config.max_length:d} {rest}"
    tables = [query.select(path, columns, config.where, config.split, rest) for path in config.from_cache]
    return [tuple(row.values()) for table in tables for row in table.to_pylist()]


def _prompts(config: EvaluateConfig) -> list[Prompt]:
    """Each prompt of the split once, in a fixed order that spreads over sources (by the prompt's hash)."""
    if config.generate == 0:
        return []
    rows = _rows(
        config,
        "prompt_id, any_value(prompt_ids), any_value(reference), "
        "arg_min(completion, sample_index) FILTER (origin = 'sampled')",
        "GROUP BY prompt_id ORDER BY prompt_id",
    )
    return [Prompt(*row[1:]) for row in rows[: config.generate]]


def _teacher_row(config: EvaluateConfig, prompts: list[Prompt]) -> dict[str, Any]:
    sums = _rows(config, "-sum(list_sum(token_logprobs)), sum(completion_tokens)::BIGINT, count(*)")
    nats, tokens, samples = (sum(row[i] or 0 for row in sums) for i in range(3))
    ce = nats / tokens
    return {
        "model": "teacher (cache)",
        "kl": 0.0,
        "agreement": 1.0,
        "ce": ce,
        "perplexity": math.exp(ce),
        "rougeL_reference": rouge_l([p.teacher for p in prompts], [p.reference for p in prompts]),
        "rougeL_teacher": None,
        "samples": samples,
        "tokens": int(tokens),
        "generated": sum(p.teacher is not None for p in prompts),
    }


# --- generation -------------------------------------------------------------------------------------------------------


def _generate(
    student: Any,
    tokenizer: Any,
    prompts: list[Prompt],
    config: EvaluateConfig,
    end_of_turn: int,
    progress: Callable[[int, int], None],
) -> list[str]:
    """Greedy answers, in the prompts' order; prompts of like length share a batch, padded on the left."""
    answers: dict[int, str] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    student.eval()
    stops = stop_ids(student, end_of_turn)
    device = next(student.parameters()).device
    for start in range(0, len(order), config.batch_size):
        picked = order[start : start + config.batch_size]
        width = max(len(prompts[i].ids) for i in picked)
        ids = torch.zeros((len(picked), width), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for line, i in enumerate(picked):
            ids[line, width - len(prompts[i].ids) :] = torch.tensor(prompts[i].ids)
            mask[line, width - len(prompts[i].ids) :] = 1
        with torch.no_grad():
            output = student.generate(
                ids.to(device),
                attention_mask=mask.to(device),
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=config.max_new_tokens,
                repetition_penalty=1.0,  # a greedy answer is the student's own, whatever its generation_config says
                eos_token_id=stops,
                pad_token_id=end_of_turn,
            )
        for i, text in zip(picked, tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)):
            answers[i] = text
        progress(min(start + config.batch_size, len(order)), len(order))
    return [answers[i] for i in range(len(prompts))]


def rouge_l(answers: Sequence[str | None], targets: Sequence[str | None]) -> float | None:
    """Mean Rouge-L F1 over the pairs that have both texts, 0 to 1; None without any."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=WordTokenizer())
    pairs = [(t, a) for t, a in zip(targets, answers) if t is not None and a is not None]
    if not pairs:
        return None
    return sum(scorer.score(target, answer)["rougeL"].fmeasure for target, answer in pairs) / len(pairs)
