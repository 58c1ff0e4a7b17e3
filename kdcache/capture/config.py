"""What `kd cache-teacher` can be told: every option of a capture, with its default and its help text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.errors import UsageError
from kdcache.examples.types import Columns
from kdcache.settings import UNSAFE_EXEC_HELP, NameOrPath, option
from kdcache.teachers import Sampling

if TYPE_CHECKING:  # pyarrow is slow to import
    from kdcache.storage import Location


def parse_ratios(text: str) -> tuple[float, float, float]:
    """Return the shares of train, validation and test in a text like 0.9,0.05,0.05."""
    try:
        train, validation, test = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"--split-ratios {text}: expected three shares (train,validation,test), as in 0.9,0.05,0.05"
        ) from None
    return train, validation, test


def parse_slice(text: str) -> tuple[int, int]:
    """Return (I, N) of a text like I/N; I counts from 0."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and len(text) < 20):
        raise UsageError(f"--plan-slice {text}: expected I/N with I from 0 to N - 1, as in 0/4 .. 3/4")
    return int(index), int(count)


@dataclass(frozen=True)
class CaptureConfig:
    """Everything that ``kd cache-teacher`` can be told. The options stand in ``--help`` in this order."""

    teacher: NameOrPath = option("embedded", "Hub id, model folder, or `embedded` (SmolLM2-135M-Instruct).")
    revision: str | None = option(None, "Branch, tag or commit of a Hub teacher.")
    examples: NameOrPath = option(
        "builtin",
        "`builtin`; `dolly`, `dolly-es`, `bugnet-python`, `bugnet-cpp`, `pytorrent`, `codeforces-cots`, "
        "`codeforces-cots-cpp`, `codeforces`, `self-instruct`, `arithmetic`; a .jsonl/.parquet file; or a Hub data set id.",
    )
    data_path: NameOrPath | None = option(
        None, "File or folder (or another Hub id) of a named data set, in its own layout [default: its Hub id]."
    )
    prompt_format: str = option(
        "chat",
        "The teacher's chat template, or Stanford Alpaca's plain text (in Spanish for Spanish rows).",
        choices=("chat", "alpaca"),
    )
    bos: str = option(
        "auto",
        "What a prompt begins with. auto: whatever the tokenizer and the chat template put there. add: one BOS token, where "
        "there is none. never: no BOS token before text that no chat template rendered.",
        choices=("auto", "add", "never"),
    )
    columns: Columns = field(default_factory=Columns)
    limit: int | None = option(None, "Use only the first N examples.")
    shuffle: bool = option(False, "Order the examples at random (by --seed), so that --limit takes a random sample.")
    mode: str = option(
        "score", "Score given answers, sample the teacher's own, or both.", choices=("score", "sample", "both")
    )
    samples: int = option(1, "Answers to sample per prompt.")
    reasoning: bool = option(
        False, "Ask for the reasoning in <think> and the answer in <answer>, in the row's language."
    )
    verify: bool = option(
        True,
        "Judge the answers of rows that have a verifier (tests run in a sandbox), and store a reward for each answer.",
    )
    unsafe_exec: bool = option(False, UNSAFE_EXEC_HELP)
    sampling: Sampling = field(default_factory=Sampling)
    sparsify: str = option(
        "threshold:0.02",
        "What to keep of each distribution. threshold:TAU keeps the tokens with a probability above TAU and an unbiased sample of "
        "the others. topk:K keeps the K best tokens and the mass of the rest; topk:64 takes four times the bytes, and works "
        "with any divergence.",
    )
    capture_k: int | None = option(
        None, "Candidates per position to take from the engine [default: K for topk, 256 for threshold]."
    )
    precision: str = option(
        "q8",
        "How log-probabilities are stored: in a codebook of 256 values (q8), or exactly (f32).",
        choices=("q8", "f32"),
    )
    seed: int = option(0, "Seed of sampling and of the splits.")
    rows_per_shard: int = option(512, "Samples per shard. An interruption loses at most the shards that are open.")
    split_ratios: tuple[float, float, float] = option(
        (0.9, 0.05, 0.05),
        "Shares of train,validation,test. All rows of a problem are in the same split.",
        parse=parse_ratios,
    )
    near_duplicates: str = option(
        "drop",
        "Train rows that nearly repeat a validation or test row (and validation rows that nearly repeat a test row): reject "
        "and count them, or keep them.",
        choices=("drop", "keep"),
    )
    out: Location = option(Path("data/cache"), "Folder of the cache, or s3://bucket/folder.")
    plan_slice: tuple[int, int] | None = option(
        None,
        "Write only every N-th shard, starting with the I-th (from 0). N processes with the same --out fill one cache, as in "
        "--plan-slice $SLURM_ARRAY_TASK_ID/8 for --array=0-7. Run kd cache info afterwards.",
        metavar="I/N",
        parse=parse_slice,
    )
    overwrite: bool = option(False, "Delete a cache that is already there.")
    strict: bool = option(False, "Fail at the first row that cannot be used, instead of listing it.")
    engine: str = option(
        "vllm", "vLLM, or plain transformers where vLLM cannot be installed.", choices=("vllm", "transformers")
    )
    max_model_len: int | None = option(
        None,
        "Most tokens of prompt and completion together; longer rows are rejected and counted [default: the model's limit, on a "
        "CPU at most 2048].",
    )
    dtype: str = option("auto", "Data type of the teacher's weights.")
    engine_extra: dict[str, Any] = field(default_factory=dict)  # the engine's own options, by their own names
