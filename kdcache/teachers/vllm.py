"""The vLLM engine as a teacher. It is driven step by step, so that it never waits for a shard to be written.

Given answers are scored with ``prompt_logprobs``. Sampled answers take their log-probabilities from decoding, so they
need no second pass. vLLM computes both before it applies the temperature (``raw_logprobs``), so both mean the same.

Shapes: T completion positions, K candidates per position; vLLM's arrays have K+1 columns, of which the first is the
token itself.
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

#: Defaults on a machine without a GPU: one process, which loads in seconds and schedules deterministically, and a small
#: KV cache.
CPU_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

#: An engine that runs out of memory is not tried again with fewer tokens per step than this.
SMALLEST_BATCH_TOKENS = 128


class VLLMTeacher:
    """A vLLM engine. ``options.extra`` is passed to ``vllm.LLM`` and wins over the defaults of this module."""

    def __init__(self, options: EngineOptions, say: Say = lambda _: None):
        on_cpu = not runs_on_gpu("vllm")
        if on_cpu:
            for name, value in CPU_ENVIRONMENT.items():
                os.environ.setdefault(name, value)
        try:
            import vllm
            from vllm.sampling_params import RequestOutputKind
        except ImportError as error:
            raise _cannot_import(error) from None

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
        """Use the array collector if it returns the same bits as vLLM's public outputs; else tell the user."""
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
                f"warning: the quick way to read log-probabilities from {self.version} failed its check at start-up "
                f"({difference}). vLLM's public way is used: the same numbers, for many times the processor time"
            )

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Answer | Refusal]]:
        """Yield answers as they are ready. Out of memory, the engine starts again with a batch of half the size."""
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
                        f"vLLM stopped: {reason}. Whole shards are kept; run the same command again to continue. "
                        "Out of memory? Lower --max-num-batched-tokens or --gpu-memory-utilization: no number changes."
                    ) from error
            self._say(
                "warning: vLLM ran out of memory; it starts again with steps of at most "
                f"{self._arguments['max_num_batched_tokens']} tokens and {self._arguments['max_num_seqs']} samples"
            )
            # Not inside the except block, whose traceback keeps the engine's memory alive.
            self.stop()
            self._start()
            waiting = itertools.chain([request for request, _ in running.values()], waiting)
            running.clear()

    def _steps(
        self, waiting: Iterator[Request], running: dict[str, tuple[Request, ArrayCollector | None]]
    ) -> Iterator[tuple[Request, Answer | Refusal]]:
        """Run the engine until all requests are answered. ``running`` holds those that it has and has not answered.

        The engine gets twice as many requests as it can run at a time, so that it never lacks one.
        """
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
                    except (VLLMClientError, ValueError) as error:  # such as a prompt that is too long
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
        """Hand a request to the engine; return the collector of its arrays, or None where vLLM's own outputs are read.

        With ``check`` the collector is fed beside vLLM's own processor, so that the two can be compared.
        """
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
        request_state: Any = engine.output_processor.request_states[internal]
        own_processor = request_state.logprobs_processor
        request_state.logprobs_processor = Both(own_processor, collector) if check else collector
        return collector

    def _params(self, request: Request) -> Any:
        """Return vLLM's SamplingParams: score the whole prompt and generate one token to be thrown away, or sample."""
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
        """Return the answer in a finished output, read from the collector or, without one, from vLLM's lists."""
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
        """Return rows ``first`` .. ``first + rows`` of vLLM's flat lists: ids, logprobs [rows, K+1], ranks [rows]."""
        width = self._k + 1
        part = slice(first * width, (first + rows) * width)
        return (
            np.array(flat.token_ids[part], dtype=np.int32).reshape(rows, width),
            np.array(flat.logprobs[part], dtype=np.float32).reshape(rows, width),
            np.array(flat.ranks[part][::width], dtype=np.int32),
        )

    def _collector_differs(self) -> str | None:
        """Return what the collector gets wrong, or None. Raises anything with a vLLM that it was not written for.

        One short text is scored and another is sampled. The very same outputs are read in both ways and compared.
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
                            return f"other values than the public way's, in a request to {name}"
                        waiting.remove(name)
            return None
        finally:
            engine.abort_request(list(probes))

    def _halve_the_batch(self) -> bool:
        """Halve the batch for the next start, and return whether there was a smaller one to try."""
        scheduler = self._llm.llm_engine.vllm_config.scheduler_config
        tokens, sequences = scheduler.max_num_batched_tokens // 2, max(scheduler.max_num_seqs // 2, 1)
        least = SMALLEST_BATCH_TOKENS if scheduler.enable_chunked_prefill else self._options.max_model_len
        if tokens < max(least, sequences):
            return False
        self._arguments |= {"max_num_batched_tokens": tokens, "max_num_seqs": sequences}
        return True

    def stop(self) -> None:
        """Free the engine's memory. No request can be run afterwards."""
        from vllm.distributed import cleanup_dist_env_and_memory

        with contextlib.suppress(Exception):  # the engine may have died
            self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()
        cleanup_dist_env_and_memory()


def _arguments(options: EngineOptions, on_cpu: bool) -> dict[str, Any]:
    """Return the keyword arguments of ``vllm.LLM``. UsageError if --max-logprobs is too small."""
    arguments: dict[str, Any] = {
        "model": options.model,
        "trust_remote_code": models.code_is_trusted(),
        "dtype": options.dtype,
        "max_model_len": options.max_model_len,
        "max_logprobs": options.capture_k,
        "seed": options.seed,
        "use_tqdm_on_load": False,
        "enable_prefix_caching": False,  # a prompt whose start comes from that cache cannot be scored
    }
    if on_cpu:
        # vllm-cpu crashes if a seeded request's prompt is prefilled in two pieces: every prompt must fit in one step.
        arguments |= {
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(options.max_model_len, 2048),
        }
    else:
        # Scoring needs float32 logits of a whole prefill step, for which vLLM reserves no memory, so the step is small.
        arguments["max_num_batched_tokens"] = 2048
    arguments |= options.extra
    if not isinstance(arguments["max_logprobs"], int):
        raise UsageError(f"--max-logprobs {arguments['max_logprobs']}: expected a whole number")
    if arguments["max_logprobs"] < options.capture_k:
        raise UsageError(
            f"--max-logprobs {arguments['max_logprobs']} is below the {options.capture_k} candidates per position to "
            "capture; raise it or lower --sparsify/--capture-k"
        )
    return arguments


def _make_answer(
    completion_ids: Sequence[int], ids: np.ndarray, logprobs: np.ndarray, ranks: np.ndarray, finish_reason: str | None
) -> Answer:
    """Split vLLM's arrays. ``ids`` and ``logprobs`` [T, K+1]: each row is the token itself, then the K best."""
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


def _equal(left: Any, right: Any) -> bool:
    """Return whether two answers have the same arrays, to the bit."""
    names = ("ids", "logprobs", "token_logprobs", "token_ranks")
    pairs = [(getattr(left, name), getattr(right, name)) for name in names]
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


@contextlib.contextmanager
def _children_without_ctrl_c() -> Iterator[None]:
    """Hide Ctrl-C from the processes that are started inside: after the first Ctrl-C the engine must finish its shards.

    A signal that is blocked when a child starts stays blocked in it, whatever handler the child installs. A Ctrl-C that
    arrives while it is blocked is delivered afterwards.
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
    """Return whether an engine ran out of memory, or its process died, for which vLLM gives no reason."""
    name, text = type(error).__name__, str(error).lower()
    return (
        isinstance(error, MemoryError)
        or name in ("OutOfMemoryError", "EngineDeadError")
        or any(words in text for words in ("out of memory", "can't allocate memory", "cannot allocate memory"))
    )


def engine_options() -> dict[str, Any]:
    """Return the names of vLLM's own options with their defaults, against which passed-through options are checked."""
    try:
        import dataclasses

        from vllm.engine.arg_utils import EngineArgs
    except ImportError as error:
        raise _cannot_import(error) from None
    return {f.name: f.default for f in dataclasses.fields(EngineArgs)}


def _cannot_import(error: ImportError) -> KDError:
    package = extras.missing_package(error)
    why = extras.missing(package) if package else f"vLLM could not be imported: {first_line(error)}"
    return KDError(f"{why}. Or use --engine transformers")


def preferred_dtype(model_dtype: str | None) -> str:
    """Return the dtype that vLLM's ``auto`` chooses for a checkpoint on this device."""
    from vllm.platforms import current_platform

    supported = [str(dtype).removeprefix("torch.") for dtype in current_platform.supported_dtypes]
    wanted = supported[0] if model_dtype in (None, "float32") else model_dtype
    return wanted if wanted in supported else supported[0]


def _reason(error: Exception) -> str:
    """Return the line of an error that names it: vLLM wraps the cause in many others."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if "Error" in line or "error" in line), first_line(error))
