"""The README.md of a trained student: where it comes from, what was measured, how to load it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdcache.cache import query
from trainer.distill.plan import Run
from trainer.run.record import CONFIG_FILE, RUN_FILE

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- distillation
- kdcache
---

# {name}

{student}, {how} by kdcache from the cached outputs of its teacher {teacher}.

| | |
|---|---|
| teacher | {teacher} |
| student before | {student} |
| loss | {loss} |
| trained on | {samples:,} samples, {tokens:,} completion tokens, {steps:,} steps of {samples_per_step} samples |
| cache | {caches} |
| settings | `{config}` (for `kd train --config`), `{record}` |

{metrics}
The student inherits terms from three sides: the licence of the student that it started from, the licence of the teacher
whose outputs it learned, and those of the prompts and answers in the cache ({sources}). Check them before you share it.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""

_NAMES = {
    "eval_kl": "KL to the stored part of the teacher, nats per token (on a threshold cache too high by a constant, see kd evaluate)",
    "eval_ce": "cross-entropy of the completions, nats per token",
    "eval_agreement": "agreement with the teacher's best token",
}


def render(run: Run, history: Sequence[dict[str, float]]) -> str:
    """Return the card of a run, from its settings and Trainer's log."""
    config, caches = run.config, run.train.caches
    plans = [cache.plan["fields"] for cache in caches]
    loss = "cross-entropy"
    if run.alpha:
        loss = f"{1 - run.alpha:g} cross-entropy + {run.alpha:g} {config.divergence} to the teacher"
    return _CARD.format(
        name=config.output_dir.resolve().name,
        student=Path(config.student).name if Path(config.student).exists() else config.student,
        how="distilled" if run.alpha else "fine-tuned",
        teacher=", ".join(sorted({str(plan["teacher"]) for plan in plans})),
        sources=", ".join(sorted({s for c in caches for s in query.sources(c.path, config.where)})),
        loss=loss,
        samples=len(run.train),
        tokens=int(run.train.completion_tokens.sum()),
        steps=int(history[-1]["step"]),
        samples_per_step=run.samples_per_step,
        caches=", ".join(f"`{c.fingerprint}` ({p['sparsify']})" for c, p in zip(caches, plans)),
        config=CONFIG_FILE,
        record=RUN_FILE,
        metrics=_metrics(history),
    )


def _metrics(history: Sequence[dict[str, float]]) -> str:
    """Return a table of the held-out measurements: the first, the best by KL, the last."""
    measured = [entry for entry in history if "eval_kl" in entry]
    if not measured:
        return "Nothing was measured: the cache has no validation split.\n"
    shown = {"first": measured[0], "best KL": min(measured, key=lambda e: e["eval_kl"]), "last": measured[-1]}
    columns = [f"{name} (step {int(entry['step'])})" for name, entry in shown.items()]
    lines = [
        f"On {int(measured[-1]['eval_tokens']):,} held-out tokens (validation split):\n",
        f"| | {' | '.join(columns)} |",
        "|---|" + "---|" * len(shown),
    ]
    lines += [f"| {text} | {' | '.join(f'{e[key]:.4f}' for e in shown.values())} |" for key, text in _NAMES.items()]
    return "\n".join(lines) + "\n"
