"""One-digit sums and times tables, generated here: 162 problems that a very small model sometimes gets right.

    kd cache-teacher --examples arithmetic --mode both --samples 4 --temperature 0.8 --max-tokens 24 --out data/arithmetic

Every answer is judged by its number, so reinforcement learning can be tried on these in minutes.
"""

from __future__ import annotations

from collections.abc import Iterator

from kdcache.examples import files
from kdcache.examples.dataset import DataSet, Draft


def take(row: files.Row) -> Draft:
    a, sign, b = row["a"], row["sign"], row["b"]
    result = str(a + b if sign == "+" else a * b)
    return Draft(
        instruction=f"What is {a} {sign} {b}? Answer with the number.",
        completion=result,
        reference=result,
        group_id=f"arithmetic {min(a, b)} {sign} {max(a, b)}",  # 3 + 4 and 4 + 3 are one problem
        task="sum" if sign == "+" else "product",
        verifier={"kind": "numeric", "answer": result},
    )


def rows(*_: object) -> Iterator[files.Row]:
    for a in range(1, 10):
        for b in range(1, 10):
            for sign in "+×":
                yield {"id": f"{a}{sign}{b}", "a": a, "sign": sign, "b": b}


DATA_SETS = {"arithmetic": DataSet("made here", (("a", "sign", "b"),), take, rows=rows)}
