"""Dolly: 15,011 instructions and answers by Databricks' employees, in English (CC BY-SA 3.0).

    kd cache-teacher --examples dolly --prompt-format alpaca --out data/dolly

Also MiniLLM's files of it (``instruction, input, output``). The problem is the instruction with its context.
"""

from __future__ import annotations

from kdcache.examples import files
from kdcache.examples.dataset import DataSet, Draft, optional, text
from kdcache.examples.near_duplicates import normalise
from kdcache.hashing import stable_hash

LAYOUTS = (("instruction", "context", "response"), ("instruction", "input", "output"))


def take(row: files.Row) -> Draft:
    instruction, answer = text(row, "instruction"), text(row, "response", "output")
    context = optional(row, "context", "input")
    # The translation of a row belongs on the side of the split where the original is.
    original = (
        optional(row, "instruction_original_en") or instruction,
        optional(row, "context_original_en") or context,
    )
    return Draft(
        instruction=instruction,
        input=context,
        completion=answer,
        reference=answer,
        group_id=f"{stable_hash(*map(normalise, original)):016x}",
        task=optional(row, "category") or "instruction",
    )


DATA_SETS = {"dolly": DataSet("databricks/databricks-dolly-15k", LAYOUTS, take)}
