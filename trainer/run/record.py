"""What a run writes about itself: ``kdcache.json``, its record, and ``run.yaml``, its options for ``kd train --config``.

The record says what decides the result (options, fingerprints of the caches), what the run was made on, and whether it is
finished. It is written before the first step, copied into every checkpoint of ``kd train``, and replaced when the student
is saved. A run resumes only where the settings in its record are those of the new command.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdcache import machine
from kdcache.cache.format import FORMAT_VERSION
from kdcache.cache.reader import Cache
from kdcache.storage import folders
from trainer.student.config import StudentConfig

RUN_FILE = folders.RUN.marker
CONFIG_FILE = "run.yaml"


def new_record(config: StudentConfig, caches: Sequence[Cache], **entries: Any) -> dict[str, Any]:
    """Return the record of a run that has not started; ``entries`` are what one command alone records."""
    return {
        "format_version": FORMAT_VERSION,
        "config": config.as_json(),
        "caches": [{"path": str(cache.path), "fingerprint": cache.fingerprint} for cache in caches],
        "made_with": made_with(),
        "finished": False,
        **entries,
        **bos_of(caches),
    }


def made_with() -> dict[str, str]:
    """Return the device and the versions that a run was made with."""
    return {"device": machine.device_name(), **machine.versions()}


def bos_of(caches: Sequence[Cache]) -> dict[str, str]:
    """Return how the caches' prompts begin, if that was chosen: `kd chat` prompts the student in the same way."""
    chosen = [cache.plan["fields"]["bos"] for cache in caches if "bos" in cache.plan["fields"]]
    return {"bos": chosen[0]} if chosen else {}


def fingerprints(record: dict[str, Any]) -> list[str]:
    """Return the fingerprints of the caches in a record; KeyError or TypeError if it is damaged."""
    return [cache["fingerprint"] for cache in record["caches"]]
