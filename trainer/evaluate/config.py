"""What `kd evaluate` can be told, with defaults and help texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.settings import (
    DTYPES,
    FROM_CACHE_HELP,
    MAX_LENGTH_HELP,
    REQUIRED,
    UNSAFE_EXEC_HELP,
    WHERE_HELP,
    option,
)

if TYPE_CHECKING:  # pyarrow is slow to import
    from kdcache.storage import Location


@dataclass(frozen=True)
class EvaluateConfig:
    """``models``: (label, folder or Hub id); models with one label are runs of one kind.

    What is None or empty is decided as the teacher was sampled.
    """

    models: tuple[tuple[str, str], ...]
    from_cache: tuple[Location, ...] = option(REQUIRED, FROM_CACHE_HELP)
    out: Path = option(
        Path("data/evaluation"),
        "Folder of the measurements, for kd compare. Models that were measured with the same settings are skipped.",
    )
    split: str = option("test", "Split to measure on.", choices=("train", "validation", "test"))
    where: str | None = option(None, WHERE_HELP)
    max_length: int = option(2048, MAX_LENGTH_HELP)
    batch_size: int = option(8, "Samples per forward pass.", low=1)
    generate: int | None = option(
        None,
        "Generate answers for N prompts; 0 generates none, so that Rouge-L is not reported [default: all prompts].",
        low=0,
    )
    temperatures: tuple[float, ...] = option(
        (),
        "Temperature of generated answers, 0 is greedy; repeat it for several [default: the teacher's in the cache, else 0].",
        flag="--temperature",
        low=0,
    )
    top_p: float | None = option(
        None, "Sample from the most probable tokens that together have this probability [default: the teacher's]."
    )
    seeds: int | None = option(
        None, "Answers per prompt, at temperatures above 0 [default: as many as the teacher's].", low=1
    )
    max_new_tokens: int | None = option(
        None, "Most tokens of a generated answer [default: the teacher's, else 128].", low=1
    )
    dtype: str = option("float32", "Data type of the student's weights.", choices=DTYPES)
    engine: str = option(
        "auto",
        "What generates the answers; auto is vLLM where it is installed.",
        choices=("auto", "vllm", "transformers"),
    )
    unsafe_exec: bool = option(False, UNSAFE_EXEC_HELP)
