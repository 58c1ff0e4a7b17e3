"""The options that every training of a student shares: where it reads and writes, the student, its dtype and LoRA."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from kdcache.storage import Location


@dataclass(frozen=True)
class StudentConfig:
    """What every training of a student is asked for; ``arguments`` are its library's, by their own names."""

    from_cache: tuple[Location, ...]
    student: str
    output_dir: Path
    where: str | None = None
    dtype: str = "float32"
    lora_r: int | None = None
    lora_alpha: int | None = None
    lora_dropout: float = 0.0
    lora_target_modules: str = "all-linear"
    load_in_4bit: bool = False
    overwrite: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)

    #: Where things are, and what does not change the result.
    places: ClassVar[tuple[str, ...]] = ("from_cache", "output_dir", "overwrite")

    def as_json(self) -> dict[str, Any]:
        """What makes the result what it is."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self.places}

    def as_yaml(self) -> str:
        """For ``--config``."""
        options = {**self.as_json(), "from_cache": [str(path) for path in self.from_cache]}
        options |= options.pop("arguments")
        return yaml.safe_dump({k: v for k, v in options.items() if v is not None}, sort_keys=False)
