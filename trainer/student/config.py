"""What every training of a student can be told: the options that `kd train` and `kd grpo` share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kdcache.settings import DTYPES, FROM_CACHE_HELP, REQUIRED, WHERE_HELP, NameOrPath, option

if TYPE_CHECKING:  # pyarrow is slow to import
    from kdcache.storage import Location


@dataclass(frozen=True)
class StudentConfig:
    """The options of a training run; ``arguments`` are its library's own options, by their own names."""

    from_cache: tuple[Location, ...] = option(REQUIRED, FROM_CACHE_HELP)
    student: NameOrPath = option(REQUIRED, "Hub id or folder of the student to start from.")
    output_dir: Path = option(REQUIRED, "Folder of the run.")
    where: str | None = option(None, WHERE_HELP)
    dtype: str = option(
        "float32",
        "Data type of the student's weights (--bf16 keeps them in float32 and computes in bfloat16).",
        choices=DTYPES,
    )
    lora_r: int | None = option(None, "Train LoRA matrices of this rank; they are merged at the end.", low=1)
    lora_alpha: int | None = option(
        None, "LoRA's update is scaled by this value over the rank [default: twice the rank].", low=1
    )
    lora_dropout: float = option(0.0, "Dropout on LoRA's input, during training.", low=0, below=1)
    lora_target_modules: str = option(
        "all-linear", "Names of the layers that get LoRA, with commas; all-linear: every linear layer but the head."
    )
    load_in_4bit: bool = option(False, "QLoRA: keep the frozen weights in 4 bits (NF4, bitsandbytes). Needs --lora-r.")
    overwrite: bool = option(False, "Delete a run that is already there.")
    arguments: dict[str, Any] = field(default_factory=dict)

    #: Fields that do not change the result: where files are, and whether they may be deleted.
    places: ClassVar[tuple[str, ...]] = ("from_cache", "output_dir", "overwrite")

    def as_json(self) -> dict[str, Any]:
        """Return the fields that decide the result."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self.places}

    def as_yaml(self) -> str:
        """Return the options as a file for ``--config``."""
        import yaml  # not needed by `kd --help`

        options = {**self.as_json(), "from_cache": [str(path) for path in self.from_cache]}
        options |= options.pop("arguments")
        return yaml.safe_dump({k: v for k, v in options.items() if v is not None}, sort_keys=False)
