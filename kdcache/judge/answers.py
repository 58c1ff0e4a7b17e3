"""Where in a completion its answer is. Everything here takes linear time, whatever a model has written."""

from __future__ import annotations

import re

from kdcache.errors import KDError
from kdcache.judge import kinds
from kdcache.judge.kinds import Verifier

#: The names of a language behind the opening of a fenced block.
LANGUAGE_TAGS = {"python": ("python", "py", "python3"), "cpp": ("cpp", "c++", "cc", "cxx")}


def extract(completion: str, verifier: Verifier) -> str | None:
    """Return the part of a completion that is its answer; None if the completion stops before one.

    That is the text after the last ``</think>`` (a ``<think>`` that stays open has no answer), in it the last
    ``<answer>...</answer>`` if there is one, and in that:

    * for code, the last fenced block of the language, else the last that names no language, else, if nothing is fenced,
      all of it;
    * for exact, the last fenced block, if there is one;
    * for numeric, the last ``\\boxed{}``, if there is one.
    """
    answer = completion.rpartition("</think>")[2]
    if "<think>" in answer:
        return None
    if tagged := _between(answer, "<answer>", "</answer>"):
        answer = tagged[-1]
    if verifier.runs_code:
        if "```" in answer:
            blocks = _fenced_blocks(answer)
            named = [code for tag, code in blocks if tag.lower() in LANGUAGE_TAGS[verifier.language]]
            answer = (named or [code for tag, code in blocks if not tag] or [""])[-1]
    elif verifier.kind == "exact" and "```" in answer:
        answer = ([code for _, code in _fenced_blocks(answer)] or [answer])[-1]
    elif verifier.kind == "numeric" and (boxed := re.findall(r"\\boxed\{([^{}]*)\}", answer)):
        answer = boxed[-1]
    return answer if answer.strip() else None


def answer_in(completion: str, verifier: str | None) -> str:
    """Return the answer in a completion for a verifier in a cache's column: "" if there is no answer.

    Where no verifier says where to look, the whole completion is the answer.
    """
    try:
        parsed = kinds.parse(verifier)
    except KDError:
        parsed = None
    return completion if parsed is None else extract(completion, parsed) or ""


def _between(text: str, opening: str, closing: str) -> list[str]:
    """Return what is between each opening and the next closing. A regular expression would take quadratic time."""
    pieces, position = [], 0
    while (start := text.find(opening, position)) >= 0 and (end := text.find(closing, start + len(opening))) >= 0:
        pieces.append(text[start + len(opening) : end])
        position = end + len(closing)
    return pieces


_TAG = re.compile(r"[\w+#.-]*")


def _fenced_blocks(text: str) -> list[tuple[str, str]]:
    """Return tag and content of each closed fenced block of Markdown."""
    blocks: list[tuple[str, str]] = []
    tag, content = None, list[str]()
    for line in text.split("\n"):
        mark = line.strip(" \t\r")
        if tag is not None and mark == "```":
            blocks.append((tag, "".join(f"{content_line}\n" for content_line in content)))
            tag, content = None, []
        elif tag is not None:
            content.append(line)
        elif mark.startswith("```") and "`" not in mark[3:]:
            tag = _TAG.match(mark[3:].lstrip(" \t"))[0]  # type: ignore[index]  # it matches the empty text, too
    return blocks


_ANSWER = re.compile(r"\s*<answer>")


def has_reasoned_form(text: str) -> bool:
    """Return whether a text is <think>...</think><answer>...</answer>, neither of them empty, and nothing else."""
    text = text.strip()
    if not (text.startswith("<think>") and text.endswith("</answer>")):
        return False
    thoughts = text[len("<think>") : -len("</answer>")]
    end = len(thoughts) - len(thoughts.lstrip())  # where the thought begins: it may not end right here
    while (end := thoughts.find("</think>", end + 1)) >= 0:
        if opening := _ANSWER.match(thoughts, end + len("</think>")):
            return bool(thoughts[opening.end() :].strip())
    return False
