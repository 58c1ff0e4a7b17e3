"""README.md of a cache: a data set card that says what is inside and how to open it."""

from __future__ import annotations

from typing import Any

from kdcache.cache.format import SPLITS

_CARD = """---
{front_matter}
---

# Teacher cache: {teacher}

What a teacher said, once, for distilling students from: top-k log-probabilities of {rows:,} completions
({tokens:,} tokens), written by kdcache (cache format {version}).

| | |
|---|---|
| teacher | {teacher}{revision} ({engine}, {dtype}) |
| mode | {mode} |
| candidates a position | {sparsify}, {precision} |
| samples | {rows:,} in {shards} of {planned} shards, {bytes:,} bytes |
| rejected rows | {rejected} (rejected.jsonl) |
| fingerprint | `{fingerprint}` |

The prompts and given answers keep the licence of their source; the log-probabilities are output of the teacher, under
its licence. Check both before you share this.

## Open it

```sql
-- duckdb, in this folder
SELECT sample_id, completion, list_max(entropies) AS most_uncertain_nats FROM 'data/*.parquet' LIMIT 5;
```

```python
from datasets import load_dataset

cache = load_dataset("path/to/this/folder")
```

Log-probabilities are natural logs of the full-vocabulary softmax at temperature 1. `candidate_ids[t]` and
`candidate_logprobs[t]` are the teacher's candidates at completion position t, best first; `tail_logprobs[t]` is the log
of the mass outside them; token ids are named in `vocab.parquet`.
"""


def render(plan: dict[str, Any], manifest: dict[str, Any]) -> str:
    """The card of a cache, from its plan and manifest."""
    fields = plan["fields"]
    # Naming a split that has no rows makes load_dataset raise.
    splits = [s for s in SPLITS if any(x["split"] == s and x["rows"] for x in manifest["shards"])]
    front = ["tags:", "- distillation", "- logits", "- kdcache"]
    if splits:
        front += ["configs:", "- config_name: default", "  data_files:"]
        for split in splits:
            front += [f"  - split: {split}", f'    path: "data/{split}-*.parquet"']
    return _CARD.format(
        front_matter="\n".join(front),
        version=plan["format_version"],
        rows=manifest["rows"],
        tokens=manifest["completion_tokens"],
        shards=len(manifest["shards"]),
        planned=manifest["shards_planned"],
        bytes=manifest["bytes"],
        rejected=manifest["rejected"],
        revision=f", revision {plan['teacher_revision']}" if plan["teacher_revision"] else "",
        fingerprint=manifest["fingerprint"],
        **{name: fields[name] for name in ("teacher", "engine", "dtype", "mode", "sparsify", "precision")},
    )
