"""What `kd quantize` can be told, with defaults and help texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.settings import REQUIRED, option

if TYPE_CHECKING:  # pyarrow is slow to import
    from kdcache.storage import Location


@dataclass(frozen=True)
class QuantizeConfig:
    """``from_cache``: its train split calibrates w4a16, and quality is measured on its test split."""

    student: str
    out: Path = option(REQUIRED, "Folder of the quantized student.")
    format: str = option(
        "nf4",
        "nf4 (4 bits), int8: for transformers. w4a16 (4 bits, calibrated on the cache's train split): for vLLM.",
        choices=("nf4", "int8", "w4a16"),
    )
    from_cache: tuple[Location, ...] = option(
        (),
        "A cache: its test split measures the quality, its train split calibrates w4a16. Repeat it for several.",
    )
    measure: bool = option(True, "Measure size, memory and speed before and after and, with --from-cache, the quality.")
    rounds: int = option(
        5, "How many times each of the two students is measured, alternating; the tables show medians.", low=1
    )
    overwrite: bool = option(False, "Delete a quantized student that is already there.")
