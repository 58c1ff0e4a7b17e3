"""Caches of completion policy 1, and signs in them that the newer policy would have mattered.

Policy 1 tokenised completions by themselves and ended them in the id that generation_config.json named. For most chat
templates both are right, so such caches are read as they are. ``kd cache verify`` looks for three signs of a template
for which they are wrong::

    the teacher hardly expects the end-of-turn mark of given answers
    answers begin a thought that their prompt has opened already
    answers to --reasoning lack the tags that it asks for
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from kdcache.prompts.thoughts import THINK, opens_thought
from kdcache.prompts.tokenize import COMPLETION_POLICY_VERSION

#: Below this median log-probability the teacher hardly expects an end. After given answers of the builtin examples,
#: SmolLM2 gives the right mark -1.3 nats (median of six), and <|endoftext|> in its place -11.8.
UNEXPECTED_END_NATS = -6.0


def is_old(plan: Mapping[str, Any]) -> bool:
    """Say whether a cache was made under an earlier completion policy."""
    version = plan["fields"].get("completion_policy", 1)
    return isinstance(version, int) and version < COMPLETION_POLICY_VERSION


@dataclass
class OldPolicy:
    """Signs of the old policy in a cache, collected row group by row group."""

    end_logprobs: list[float] = field(default_factory=list)  # of the last token of each given answer, nats
    twice_opened: int = 0  # answers that begin a thought in a prompt with an open one
    sampled: int = 0  # sampled answers
    without_tags: int = 0  # of these, answers to --reasoning without its tags

    def add(self, table: pa.Table, reasoned: bool) -> None:
        """Count the rows of a row group; ``reasoned``: the capture used --reasoning."""
        columns = ("origin", "prompt", "completion", "token_logprobs")
        for row in table.select(columns).to_pylist():
            completion = row["completion"] or ""
            self.twice_opened += opens_thought(row["prompt"]) and completion.lstrip().startswith(THINK)
            if row["origin"] == "given":
                self.end_logprobs.append(row["token_logprobs"][-1])
            else:
                self.sampled += 1
                self.without_tags += reasoned and "<answer>" not in completion

    def sentences(self) -> list[str]:
        """Return what the user should know: that the policy is the old one, and what it got wrong in this cache."""
        signs = []
        end = float(np.median(self.end_logprobs)) if self.end_logprobs else 0.0
        if end < UNEXPECTED_END_NATS:
            signs.append(f"the teacher hardly expects the end of given answers (median {end:.1f} nats)")
        if self.twice_opened:
            signs.append(f"{self.twice_opened} answers begin a thought that their prompt has opened already")
        if self.sampled and self.without_tags == self.sampled:
            signs.append("no sampled answer has the tags that --reasoning asks for: they may be special tokens")
        advice = "nothing in it shows that this matters here"
        if signs:
            advice = f"{'; '.join(signs)}. Capture again into another folder"
        return [f"made under completion policy 1 (now {COMPLETION_POLICY_VERSION}): {advice}"]
