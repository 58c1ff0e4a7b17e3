"""vLLM's log-probabilities as the arrays they are, before its front end makes Python objects of them.

vLLM's engine hands [rows, K+1] arrays to a ``LogprobsProcessor`` a request, which turns them into lists: several
microseconds a token, in one thread, for what we turn into arrays again. ``ArrayCollector`` stands in for it. It leans on
vLLM's inside, so ``vllm.py`` uses it only after ``Both`` has shown at start-up that it gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]

# What a step adds is a view of the whole batch's arrays: cheap to take, dear to keep. So many are held, then copied.
VIEWS = 256


class ArrayCollector:
    """Rows ``first`` .. ``first + rows`` of a request's log-probabilities; all rows with ``rows`` None.

    Row layout, as vLLM has it: the token itself, then the K best.
    """

    tokenizer = logprobs = prompt_logprobs = cumulative_logprob = prompt_token_id_logprobs = None

    def __init__(self, k: int, first: int = 0, rows: int | None = None):
        self._width = k + 1
        self._rows = slice(first, None if rows is None else first + rows)
        self._views: list[Sequence[np.ndarray]] = []
        self._joined: list[Arrays] = []

    def update_from_output(self, output: Any) -> None:
        """What vLLM calls with each of the engine's outputs for the request."""
        if output.new_logprobs is not None:
            self._views.append(output.new_logprobs)
            if len(self._views) == VIEWS:
                self._joined.append(self._join(self._views))
                self._views = []
        if output.new_prompt_logprobs_tensors is not None:
            self._views.append([tensor.numpy() for tensor in output.new_prompt_logprobs_tensors[:3]])

    def arrays(self) -> Arrays:
        """ids [R, K+1] int32, logprobs [R, K+1] float32, rank of the token itself [R] int32."""
        ids, logprobs, ranks = self._join([*self._joined, *self._views])
        return ids[self._rows], logprobs[self._rows], ranks[self._rows]

    def _join(self, parts: Sequence[Sequence[np.ndarray]]) -> Arrays:
        ids, logprobs, ranks, *_ = zip(*parts)
        return (
            np.concatenate(ids, dtype=np.int32)[:, : self._width],
            np.concatenate(logprobs, dtype=np.float32)[:, : self._width],
            np.concatenate(ranks, dtype=np.int32),
        )

    def pop_prompt_logprobs(self) -> None: ...

    def pop_prompt_token_id_logprobs(self) -> None: ...


class Both:
    """vLLM's own processor and a collector, fed from the very same outputs, to be compared."""

    def __init__(self, public: Any, collector: ArrayCollector):
        self._public, self.collector = public, collector

    def update_from_output(self, output: Any) -> None:
        self._public.update_from_output(output)
        self.collector.update_from_output(output)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._public, name)
