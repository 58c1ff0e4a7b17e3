"""Caches of completion policy 1: they are read as they are, and ``kd cache verify`` says where the new policy would matter.

Policy 1 tokenised completions by themselves and ended them in the id that generation_config.json named. Both are right for
most templates. What a cache shows of the others: a teacher that hardly expects the end-of-turn of given answers, answers
that begin a thought which the prompt has opened already, and answers to --reasoning without the tags that were asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from kdcache.prompts.thoughts import THINK, opens_thought
from kdcache.prompts.tokenize import COMPLETION_POLICY_VERSION

#: Below this median the teacher hardly expects an end where one stands. SmolLM2 gives the right mark -1.3 nats after six
#: given answers of the builtin examples (median), and <|endoftext|> in its place -11.8.
UNEXPECTED_END_NATS = -6.0


def is_old(plan: dict[str, Any]) -> bool:
    version = plan["fields"].get("completion_policy", 1)
    return isinstance(version, int) and version < COMPLETION_POLICY_VERSION


@dataclass
class OldPolicy:
    """What the rows of such a cache show, collected shard by shard."""

    end_logprobs: list[float] = field(default_factory=list)  # of the last token of each given answer, nats
    twice_opened: int = 0
    sampled: int = 0
    without_tags: int = 0

    def add(self, table: pa.Table, reasoned: bool) -> None:
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
        """What the user should know: that the policy is the old one, and each thing that it got wrong in this cache."""
        wrong = []
        end = float(np.median(self.end_logprobs)) if self.end_logprobs else 0.0
        if end < UNEXPECTED_END_NATS:
            wrong.append(f"the teacher hardly expects the end of given answers (median {end:.1f} nats)")
        if self.twice_opened:
            wrong.append(f"{self.twice_opened} answers begin a thought that their prompt has opened already")
        if self.sampled and self.without_tags == self.sampled:
            wrong.append("no sampled answer has the tags that --reasoning asks for: they may be special tokens")
        found = "; ".join(wrong)
        advice = (
            f"{found}. Capture again into another folder" if wrong else "nothing in it shows that this matters here"
        )
        return [f"made under completion policy 1 (now {COMPLETION_POLICY_VERSION}): {advice}"]
