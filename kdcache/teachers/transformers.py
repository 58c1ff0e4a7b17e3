"""The reference engine: plain transformers, with one forward pass per given answer and ``generate`` for sampled ones.

It is slow and readable. Tests compare vLLM's candidates with its own, for given and sampled answers.
Shapes: L tokens of prompt and completion, T completion positions, V vocabulary, K candidates per position.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from kdcache import models
from kdcache.errors import UsageError
from kdcache.machine import has_gpu
from kdcache.prompts.vocabulary import ids_in
from kdcache.teachers import Answer, EngineOptions, Request


class TransformersTeacher:
    """A causal language model on one device."""

    def __init__(self, options: EngineOptions):
        import torch
        import transformers

        if options.extra:
            names = ", ".join("--" + name.replace("_", "-") for name in options.extra)
            raise UsageError(f"{names}: an option of vLLM; --engine transformers does not take it")
        self.version = f"transformers {transformers.__version__}"
        self._torch = torch
        self._k = options.capture_k
        self._options = options
        self._device = "cuda" if has_gpu(forks_later=True) else "cpu"
        self._model = models.causal_lm(options.model, dtype=options.dtype).to(self._device).eval()

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Answer]]:
        """Yield answers in the order of the requests, one at a time."""
        with self._torch.inference_mode():
            for request in requests:
                yield request, self._score(request) if request.completion_ids is not None else self._sample(request)

    def _score(self, request: Request) -> Answer:
        completion = list(request.completion_ids or ())
        prompt = len(request.prompt_ids)
        ids = self._torch.tensor([[*request.prompt_ids, *completion]], device=self._device)
        logits = self._model(input_ids=ids, use_cache=False).logits[0]  # (L, V)
        # The logits at position i predict token i + 1.
        return self._arrays(completion, logits[prompt - 1 : prompt - 1 + len(completion)], None)

    def _sample(self, request: Request) -> Answer:
        torch, sampling = self._torch, self._options.sampling
        ids = torch.tensor([list(request.prompt_ids)], device=self._device)
        torch.manual_seed(request.seed or 0)
        greedy = sampling.temperature == 0
        choice = {} if greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        stops = ids_in(self._model.generation_config.eos_token_id, self._options.stop_token_ids)
        output = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=not greedy,
            max_new_tokens=min(sampling.max_tokens, self._options.max_model_len - ids.shape[1]),
            eos_token_id=stops or None,
            pad_token_id=self._model.generation_config.pad_token_id or 0,
            repetition_penalty=1.0,  # the one in generation_config would change what is sampled
            output_logits=True,  # before temperature and top-p
            return_dict_in_generate=True,
            **choice,
        )
        completion = output.sequences[0, ids.shape[1] :].tolist()
        reason = "stop" if completion and completion[-1] in stops else "length"
        return self._arrays(completion, torch.stack([step[0] for step in output.logits]), reason)

    def _arrays(self, completion: list[int], logits: Any, finish_reason: str | None) -> Answer:
        """Return the answer with the arrays computed from ``logits`` (T, V)."""
        torch = self._torch
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        best = logprobs.topk(self._k, dim=-1)
        token_logprobs = logprobs.gather(1, torch.tensor(completion, device=logprobs.device)[:, None])  # (T, 1)
        ranks = (logprobs >= token_logprobs).sum(dim=-1)  # 1-based; ties count against the token
        return Answer(
            completion_ids=completion,
            ids=best.indices.cpu().numpy().astype(np.int32),
            logprobs=best.values.cpu().numpy(),
            token_logprobs=token_logprobs[:, 0].cpu().numpy(),
            token_ranks=ranks.cpu().numpy().astype(np.int32),
            finish_reason=finish_reason,
        )
