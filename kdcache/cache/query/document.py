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
        lines += ["", f"## {signature(view)}", "", parts["answers"]]
        for part in ("parameters", "columns", "note"):
            if part in parts:
                lines += ["", f"*{part}*: {parts[part]}"]
        lines += ["", "```sql", parts["example"], "```"]
    return "\n".join(lines) + "\n"
