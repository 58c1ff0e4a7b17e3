"""Self-Instruct's 252 user-oriented instructions (Wang et al. 2022, Apache-2.0): an evaluation set, all in the test split.

    kd cache-teacher --examples self-instruct --data-path user_oriented_instructions.jsonl --mode both --split-ratios 0,0,1

An evaluation set is cached once, like any other: so the table of an evaluation has the teacher's row and the KL to it.
"""

from __future__ import annotations

from typing import Any

from kdcache.examples import files
from kdcache.examples.dataset import DataSet, Draft, Rejected, optional, text


def take(row: files.Row) -> Draft:
    first = _first(row.get("instances"))
    answer = text(first, "output")
    return Draft(
        instruction=text(row, "instruction"),
        input=optional(first, "input"),
        completion=answer,
        reference=answer,
        task="instruction",
    )


def _first(instances: Any) -> files.Row:
    """Return the first instance: the file has a list of {input, output}, the Hub a dictionary of lists."""
    if isinstance(instances, dict):
        instances = [{name: values[0] for name, values in instances.items() if values}]
    if not isinstance(instances, list) or not instances or not isinstance(instances[0], dict):
        raise Rejected("column 'instances' holds no {input, output}")
    return instances[0]


DATA_SETS = {
    "self-instruct": DataSet(
        "yizhongw/self_instruct", (("instruction", "instances"),), take, config="human_eval", split="train"
    )
}
