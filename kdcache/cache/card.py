"""README.md of a cache: a data set card for the Hub and its viewer, with what is inside and how to open it."""

from __future__ import annotations

from typing import Any

from kdcache.cache.format import SPLITS
from kdcache.cache.layout import shards_pattern

_CARD = """---
{front_matter}
---

# Teacher cache: {teacher}

A teacher's next-token distributions, from which students are distilled: log-probabilities of its most likely tokens
at each position of {rows:,} completions ({tokens:,} tokens), written by kdcache (cache format {version}).

| | |
|---|---|
| teacher | {teacher}{revision} ({engine}, {dtype}) |
| mode | {mode} |
| candidates per position | {sparsify}, {precision} |
| samples | {rows:,} in {shards} of {planned} shards, {bytes:,} bytes |
| rejected rows | {rejected} (rejected.jsonl) |
| fingerprint | `{fingerprint}` |

The prompts and given answers keep the licence of their source. The log-probabilities are output of the teacher and come
under its licence. Check both before you share this cache.

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
`candidate_logprobs[t]` are the teacher's candidates at completion position t, best first, and `tail_logprobs[t]` is the
log of the mass outside them. `vocab.parquet` has the text of each token id.
"""


def render(plan: dict[str, Any], manifest: dict[str, Any]) -> str:
    """Return the card of a cache, from its plan and manifest."""
    fields = plan["fields"]
    # Only splits with rows are named: load_dataset raises for one that has none.
    filled = {shard["split"] for shard in manifest["shards"] if shard["rows"]}
    splits = [split for split in SPLITS if split in filled]
    front = ["tags:", "- distillation", "- logits", "- kdcache"]
    if splits:
        front += ["configs:", "- config_name: default", "  data_files:"]
        for split in splits:
            front += [f"  - split: {split}", f'    path: "{shards_pattern(split)}"']
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
