"""An example: a prompt as messages, with the answer given to it. Every data set yields these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdcache.settings import option


@dataclass(frozen=True)
class Example:
    """A prompt as chat messages, and the answer given to it, if any, with all that phase two needs to know of them."""

    source: str
    row_id: str
    messages: tuple[dict[str, Any], ...]  # all before the last assistant turn
    completion: str | None = None
    answer: dict[str, Any] | None = None  # the whole assistant turn, where it holds more than ``completion``
    tools: tuple[dict[str, Any], ...] = ()  # functions that the chat template describes to the model
    group_id: str | None = None  # the problem; default: a hash of the prompt
    reference: str | None = None
    task: str | None = None
    language: str | None = None
    verifier: str | None = None
    prompt: str | None = None  # the prompt as plain text, which no chat template renders
    content: tuple[str, ...] | None = None  # compared to find duplicates; default: what the user says

    @property
    def given(self) -> dict[str, Any] | None:
        """The row's whole assistant turn; None if it has none."""
        text = None if self.completion is None else {"role": "assistant", "content": self.completion}
        return self.answer or text


@dataclass(frozen=True)
class BadRow:
    """A row that cannot become an example, with the reason; it is counted and listed, never dropped silently."""

    source: str
    row_id: str
    reason: str


@dataclass(frozen=True)
class Columns:
    """The names of a table's columns, and the system prompt to put first."""

    prompt: str | None = option(
        None, "Column of the prompts, if it is not `prompt` or `messages`.", flag="--prompt-column"
    )
    completion: str | None = option(
        None, "Column of the given answers, if it is not `completion`.", flag="--completion-column"
    )
    system: str | None = option(None, "System prompt to put before every prompt.")
