"""Check the options of a capture, as far as that needs neither a model nor data."""

from __future__ import annotations

import numpy as np

from kdcache.bounds import MOST_SAMPLES, MOST_SEED, check_sampling, check_whole
from kdcache.cache.format import PRECISIONS
from kdcache.capture.config import CaptureConfig
from kdcache.errors import UsageError
from kdcache.examples import near_duplicates

MODES = ("score", "sample", "both")

#: The default of --max-model-len on a CPU, where vLLM prefills a prompt in one piece and reserves memory for that.
CPU_MAX_MODEL_LEN = 2048

DTYPES = ("auto", "float32", "bfloat16", "float16", "float", "half")  # the last two are vLLM's names

#: Engine options that would make a cache's numbers mean something else, or that have another name here; why.
REFUSED_OPTIONS = {
    "model": "use --teacher",
    "tokenizer": "the teacher's own is used",
    "logprobs_mode": "a cache holds log-probabilities of the raw softmax",
    "skip_tokenizer_init": "the tokenizer is needed",
    "enable_prefix_caching": "vLLM cannot score a prompt whose start comes from that cache",
}

#: Engine options that change speed and memory but no numbers, so they are not part of the fingerprint.
SPEED_OPTIONS = frozenset(
    [
        "gpu_memory_utilization",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
        "max_num_seqs",
        "max_num_batched_tokens",
        "enforce_eager",
        "swap_space",
        "cpu_offload_gb",
        "kv_cache_memory_bytes",
        "disable_log_stats",
        "download_dir",
        "max_logprobs",
        "enable_chunked_prefill",
        "distributed_executor_backend",
    ]
)


def check(config: CaptureConfig) -> None:
    """Raise UsageError for values that cannot be, before anything is read or written."""
    ratios = config.split_ratios
    if len(ratios) != 3 or min(ratios) < 0 or not np.isclose(sum(ratios), 1.0):
        raise UsageError(
            f"--split-ratios {','.join(map(str, ratios))}: expected three shares (train,validation,test) that sum to 1"
        )
    if config.mode not in MODES:
        raise UsageError(f"--mode {config.mode}: expected one of {', '.join(MODES)}")
    if config.reasoning and config.prompt_format != "chat":
        raise UsageError("--reasoning asks in a chat message; it does not go with --prompt-format alpaca")
    if config.near_duplicates not in near_duplicates.NEAR_DUPLICATES:
        raise UsageError(
            f"--near-duplicates {config.near_duplicates}: expected one of {', '.join(near_duplicates.NEAR_DUPLICATES)}"
        )
    if config.precision not in PRECISIONS:
        raise UsageError(f"--precision {config.precision}: expected one of {', '.join(PRECISIONS)}")
    for name, reason in REFUSED_OPTIONS.items():
        if name in config.engine_extra:
            raise UsageError(f"--{name.replace('_', '-')} cannot be passed to the engine: {reason}")
    if config.plan_slice is not None:
        index, count = config.plan_slice
        if not 0 <= index < count:
            raise UsageError(f"--plan-slice {index}/{count}: expected I/N with I from 0 to N - 1, as in 0/4 .. 3/4")
        if config.overwrite:
            raise UsageError(
                "--overwrite would have each slice delete what the others wrote; delete the folder first, or use "
                "another --out"
            )
    for flag, value in (
        ("--teacher", config.teacher),
        ("--revision", config.revision),
        ("--examples", config.examples),
    ):
        if value == "":
            raise UsageError(f"{flag}: expected a name, found an empty text")
    check_whole("--samples", config.samples, 1, MOST_SAMPLES)
    check_whole("--rows-per-shard", config.rows_per_shard, 1)
    check_whole("--max-tokens", config.sampling.max_tokens, 1)
    check_whole("--limit", config.limit, 1)
    check_whole("--capture-k", config.capture_k, 1)
    check_whole("--max-model-len", config.max_model_len, 2)
    check_whole("--seed", config.seed, 0, MOST_SEED)
    check_sampling(config.sampling.temperature, config.sampling.top_p)
    if config.dtype not in DTYPES:
        raise UsageError(f"--dtype {config.dtype}: expected one of {', '.join(DTYPES)}")
