"""Codeforces problems with DeepSeek-R1's reasoning: the given answer is the data set's own trace (CC BY 4.0, open-r1).

    kd cache-teacher --examples codeforces-cots --max-model-len 16384 --out data/cots

Traces are as R1 wrote them, right or wrong; unfinished ones are rejected. The tests are the examples of the problem's
statement, so a wrong program may pass: the verdict is weaker than that of ``codeforces``.
"""

from __future__ import annotations

from functools import partial

from kdcache.examples import files
from kdcache.examples.data_sets import codeforces
from kdcache.examples.dataset import DataSet, Draft, Rejected, text

LAYOUT = ("prompt", "generation", "examples")


def take(row: files.Row, language: str) -> Draft:
    prompt, trace = text(row, "prompt"), text(row, "generation")
    if row.get("finish_reason") == "length":
        raise Rejected("its reasoning was cut off (finish_reason 'length')")
    if not trace.rpartition("</think>")[2].strip() or "</think>" not in trace:
        raise Rejected("its reasoning does not come to an answer (nothing after </think>)")
    return Draft(
        instruction=prompt,
        completion=trace,
        group_id=codeforces.problem(row),
        task="competition",
        verifier=codeforces.verifier_of(row, row.get("examples"), language),
        content=codeforces.own_words(row, prompt),
    )


def _config(language: str, config: str) -> DataSet:
    return DataSet(
        "open-r1/codeforces-cots", (LAYOUT,), partial(take, language=language), config=config, within=f"{config}/*"
    )


DATA_SETS = {"codeforces-cots": _config("python", "solutions_py"), "codeforces-cots-cpp": _config("cpp", "solutions")}
