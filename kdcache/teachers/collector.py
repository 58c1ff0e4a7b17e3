"""Collect vLLM's log-probabilities as arrays, before its front end turns them into Python objects.

For each request vLLM's engine hands arrays [R, K+1] to a ``LogprobsProcessor``, which makes lists of them: several
microseconds per token, in one thread, for what we would turn into arrays again. ``ArrayCollector`` takes its place. It
relies on vLLM's internals, so ``vllm.py`` uses it only after a comparison at start-up, in which ``Both`` feeds the two
side by side, has shown that the results are equal to the bit.

Shapes: R positions of one request, K candidates per position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]

# A step's output is a view into the arrays of the whole batch: it costs nothing to take, but keeps the batch in memory.
# After this many steps the views are copied into one array and released.
MOST_VIEWS = 256


class ArrayCollector:
    """Collect rows ``first`` .. ``first + rows`` of one request's log-probabilities; with ``rows`` None, all of them.

    Each row is laid out as in vLLM: the token itself, then the K best.
    """

    # vLLM reads these attributes of a processor; None says that there is nothing to turn into text or lists.
    tokenizer = logprobs = prompt_logprobs = cumulative_logprob = prompt_token_id_logprobs = None

    def __init__(self, k: int, first: int = 0, rows: int | None = None):
        self._width = k + 1
        self._rows = slice(first, None if rows is None else first + rows)
        self._views: list[Sequence[np.ndarray]] = []
        self._joined: list[Arrays] = []

    def update_from_output(self, output: Any) -> None:
        """Take one output of the engine for this request. vLLM calls this after every step."""
        if output.new_logprobs is not None:
            self._views.append(output.new_logprobs)
            if len(self._views) == MOST_VIEWS:
                self._joined.append(self._join(self._views))
                self._views = []
        if output.new_prompt_logprobs_tensors is not None:
            self._views.append([tensor.numpy() for tensor in output.new_prompt_logprobs_tensors[:3]])

    def arrays(self) -> Arrays:
        """Return ids [R, K+1] int32, logprobs [R, K+1] float32, and the rank of the token itself [R] int32."""
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
    """Feed vLLM's own processor and a collector from the same outputs, so that they can be compared."""

    def __init__(self, public: Any, collector: ArrayCollector):
        self._public, self.collector = public, collector

    def update_from_output(self, output: Any) -> None:
        self._public.update_from_output(output)
        self.collector.update_from_output(output)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._public, name)
