"""Dolly: 15,011 instructions and answers by Databricks' employees, in English (CC BY-SA 3.0).

    kd cache-teacher --examples dolly --prompt-format alpaca --out data/dolly

MiniLLM's files of Dolly (``instruction, input, output``) are read, too. A problem is an instruction with its context.
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
    # A row and its translation belong in the same split.
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
