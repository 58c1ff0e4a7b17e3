"""The page docs/sql.md, generated from the headers of sql/ (``python -m kdcache.cache.query > docs/sql.md``)."""

from __future__ import annotations

import re

from kdcache.cache.query.views import VIEWS, described, header, signature

_INTRODUCTION = """# The views of a cache

<!-- Generated from the headers of sql/ by: python -m kdcache.cache.query > docs/sql.md -->

Each view is one file of sql/. Ask it with `kd sql`:

```
kd sql data/cache "SELECT * FROM captured_mass_curve"
```

The `duckdb` client (2.0 or newer) reads the files too: start it in the folder of a cache, and
`.read` them in the order of this table, because a view may use those before it.

Log-probabilities and entropies are in nats. All views understand both kinds of caches: in a
`topk:K` cache every position has K candidates; in a `threshold:TAU` cache the number varies, and
the candidates below TAU are a random sample.
"""


def document() -> str:
    """Return docs/sql.md: a table of all views, then one section each."""
    lines = [
        _INTRODUCTION,
        "| view | what it answers |",
        "|---|---|",
        *(f"| [{name}](#{re.sub('[^a-z_]', '', name)}) | {answers} |" for name, answers in described()),
    ]
    for view in VIEWS:
        parts = header(view)
        lines += ["", f"## {signature(view)}", "", _sentence(parts["answers"])]
        if "parameters" in parts:
            lines += ["", f"Parameter {_item(parts['parameters'])}"]
        lines += ["", *(f"* {_item(column)}" for column in _items(parts["columns"]))]
        if "note" in parts:
            lines += ["", parts["note"]]
        lines += ["", "```sql", parts["example"], "```"]
    return "\n".join(lines) + "\n"


def _items(columns: str) -> list[str]:
    """Cut the columns of a header into items: each begins on a line that names columns, ``name, name (unit): ``."""
    return re.split(r"\n(?=[\w, ()]+: )", columns)


def _item(text: str) -> str:
    """Return an item of a header as Markdown, with the names as code."""
    names, colon, meaning = text.partition(": ")
    if not colon:
        return text
    return re.sub(r"\b(?<!\()(\w+)\b(?!\))", r"`\1`", names) + colon + meaning.replace("\n", "\n  ")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
