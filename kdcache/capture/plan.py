"""What will be in which shard, as data: fixed before the first request, and the same for every run of one command.

The examples of a split, in their order, are cut into equal slices, one slice per shard. The plan follows from the
configuration and the examples alone, so that processes on different machines agree on the shards without talking.
``kdcache.capture.resolve`` makes a plan; plan.json in the cache's folder records it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from datetime import date
from typing import Any

from kdcache import models, storage
from kdcache.cache import sparsify
from kdcache.cache.format import FORMAT_VERSION
from kdcache.cache.layout import shard_name
from kdcache.capture.config import CaptureConfig
from kdcache.examples.types import BadRow, Example
from kdcache.models import identity
from kdcache.prompts.template import TemplateFacts
from kdcache.prompts.tokenize import Prompts
from kdcache.storage import seal
from kdcache.teachers import EngineOptions


@dataclass(frozen=True)
class Shard:
    """The examples of one file of the cache, in order."""

    split: str
    number: int  # from 0, within the split
    examples: tuple[Example | BadRow, ...]

    @property
    def name(self) -> str:
        return shard_name(self.split, self.number)


@dataclass(frozen=True)
class Plan:
    """A configuration, resolved against its teacher and its examples. It can be pickled: it holds no tokenizer."""

    config: CaptureConfig
    model: str  # the teacher's folder
    vocab_size: int  # V, the rows of the teacher's head
    dtype: str
    max_model_len: int
    template_date: date  # that chat templates are told
    facts: TemplateFacts  # what the chat template does around an answer
    fields: dict[str, Any]  # that are hashed into the fingerprint
    fingerprint: str
    shards: tuple[Shard, ...]
    example_count: int  # that were loaded, those that cannot be used included
    near_duplicates: int  # examples that were dropped because they nearly repeat one of another split
    introduction: Introduction
    notes: tuple[str, ...]  # sentences that the user should read before the teacher runs

    @property
    def sparsifier(self) -> sparsify.Policy:
        return sparsify.parse(self.config.sparsify, self.config.capture_k)

    @property
    def samples_per_example(self) -> int:
        return samples_per_example(self.config)

    def open_prompts(self) -> Prompts:
        """Open the teacher's tokenizer and chat template, told the plan's date."""
        return Prompts(self.model, open_tokenizer(self.model), self.template_date, self.config.bos)

    def engine_options(self) -> EngineOptions:
        return EngineOptions(
            model=self.model,
            capture_k=self.sparsifier.capture_k,
            max_model_len=self.max_model_len,
            dtype=self.dtype,
            seed=self.config.seed,
            sampling=self.config.sampling,
            stop_token_ids=self.facts.stop_ids,
            extra=self.config.engine_extra,
        )

    # --- which shards

    def assigned_shards(self) -> tuple[Shard, ...]:
        """Return the shards that this process writes: all, or with --plan-slice I/N every N-th from the I-th on."""
        first, step = self.config.plan_slice or (0, 1)
        return self.shards[first::step]

    def todo(self) -> list[Shard]:
        """Return the assigned shards that are not written yet. Resuming a capture is this difference of two sets."""
        assigned = self.assigned_shards()
        return list(assigned) if self.config.overwrite else self.missing(assigned)

    def missing(self, shards: tuple[Shard, ...]) -> list[Shard]:
        """Return those of ``shards`` that have no file in the cache."""
        written = storage.files(self.config.out / "data")
        return [shard for shard in shards if shard.name.removeprefix("data/") not in written]

    # --- plan.json

    def as_json(self) -> dict[str, Any]:
        """Return the content of plan.json, with its checksum."""
        tokenizer = open_tokenizer(self.model)
        content = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "fields": self.fields,
            "date": str(self.template_date),
            "teacher_revision": identity.revision(self.model),
            "end_of_turn": self.facts.end_of_turn,
            "stop_ids": list(self.facts.stop_ids),
            "chat_template": tokenizer.chat_template,
            "vocab_size": self.vocab_size,
            "tokenizer": identity.tokenizer_identity(tokenizer),
            "near_duplicates_dropped": self.near_duplicates,
            "shards": self.shards_as_json(),
        }
        return seal.with_checksum(content)

    def shards_as_json(self) -> list[dict[str, Any]]:
        return [{"name": shard.name, "examples": len(shard.examples)} for shard in self.shards]


@dataclass(frozen=True)
class Introduction:
    """What the teacher will be asked, for the user to look at before it is."""

    template: str  # what the chat template does
    first_prompt: str | None  # of the first example, with the answer given to it; None: no example can be used

    def lines(self) -> list[str]:
        return [f"template: {self.template}", f"asks first: {self.first_prompt}"]


def samples_per_example(config: CaptureConfig) -> int:
    """Return how many rows an example becomes: its given answer, the teacher's own answers, or both."""
    given = int(config.mode in ("score", "both"))
    return given + (config.samples if config.mode in ("sample", "both") else 0)


def open_tokenizer(model: str) -> Any:
    """Return the tokenizer of a model's folder. Reading it takes up to a second, so a process reads each one once."""
    return _read_tokenizer(model, identity.tokenizer_hash(model), models.code_is_trusted())


@functools.lru_cache(maxsize=2)
def _read_tokenizer(model: str, files_hash: str, trusts_code: bool) -> Any:
    """Read a tokenizer; the hash of its files is an argument so that a changed tokenizer is read again."""
    return models.tokenizer(model)
