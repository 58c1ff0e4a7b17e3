"""An example: a prompt as messages, with the answer given to it. Every data set yields these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdcache.settings import option


@dataclass(frozen=True)
class Example:
    """A prompt as chat messages, and the answer given to it, if any. Everything phase two may ask for is here."""

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
    prompt: str | None = None  # the prompt as plain text, for which the chat template is not asked
    content: tuple[str, ...] | None = None  # what duplicates are told by; default: the last user message

    @property
    def given(self) -> dict[str, Any] | None:
        """The assistant's turn that stands in the row, whole; None if there is none."""
        text = None if self.completion is None else {"role": "assistant", "content": self.completion}
        return self.answer or text


@dataclass(frozen=True)
class BadRow:
    """A row that cannot become an example, with the reason; it is counted and listed, never dropped in silence."""

    source: str
    row_id: str
    reason: str


@dataclass(frozen=True)
class Columns:
    """How a table's columns are called, and the system prompt to put in front."""

    prompt: str | None = option(
        None, "Column of the prompts, if it is not `prompt` or `messages`.", flag="--prompt-column"
    )
    completion: str | None = option(
        None, "Column of the given answers, if it is not `completion`.", flag="--completion-column"
    )
    system: str | None = option(None, "System prompt to put before every prompt.")
