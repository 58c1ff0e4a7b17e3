"""Which rows say nearly the same on two sides of a split, so that the teacher's and the student's test is honest.

The evaluation rows stay: a validation row that repeats a test row is dropped, and a train row that repeats either. A
row repeats another if each part of its own text (a template's words are not its own) shares enough word shingles with
the other's: Jaccard similarity (Broder 1997), counted exactly through an inverted index of the rows already kept, so
that the answer depends on the rows alone. Texts without spaces between words are one word each: equal or not.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import defaultdict
from dataclasses import dataclass, field

from kdcache import format
from kdcache.examples import BadRow, Example

NEAR_DUPLICATES = ("drop", "keep")
SHINGLE_WORDS = 3
MIN_JACCARD = 0.8

Shingles = frozenset[tuple[str, ...]]
Slices = dict[str, list[Example | BadRow]]  # by split


def normalise(text: str) -> str:
    """The words alone: NFKC, casefolded, one space between. A text without words keeps its signs."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", text) or text.split())


def own_parts(example: Example) -> tuple[str, ...]:
    """What is compared: the example's own content, else what the user says (in all turns: "go on" is no duplicate)."""
    if example.content is not None:
        return example.content
    users = [str(message.get("content")) for message in example.messages if message.get("role") == "user"]
    return ("\n".join(users or [str(example.messages[-1].get("content"))]),)


def shingles(text: str) -> Shingles:
    """All runs of SHINGLE_WORDS words; a shorter text is one shingle."""
    words = normalise(text).split()
    return frozenset(zip(*(words[start:] for start in range(SHINGLE_WORDS)))) or frozenset([tuple(words)])


def jaccard(a: Shingles, b: Shingles) -> float:
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


@dataclass
class _Kept:
    """The evaluation rows that a row may not repeat, and where each of their shingles is."""

    rows: list[tuple[str, Example, tuple[Shingles, ...]]] = field(default_factory=list)  # (split, example, its parts)
    places: dict[tuple[int, tuple[str, ...]], list[int]] = field(default_factory=lambda: defaultdict(list))

    def add(self, split: str, example: Example, parts: tuple[Shingles, ...]) -> None:
        for number, part in enumerate(parts):
            for shingle in part:
                self.places[number, shingle].append(len(self.rows))
        self.rows.append((split, example, parts))

    def like(self, parts: tuple[Shingles, ...]) -> tuple[str, Example, float] | None:
        """The first kept row whose every part is like these, with the similarity of the part that differs most.

        One that is alike misses a fifth of the shingles at most, so it has one of any fifth and one more: the rarest
        are looked up, and what they lead to is compared (prefix filtering: Chaudhuri et al. 2006).
        """
        number = max(range(len(parts)), key=lambda n: len(parts[n]))  # the longest part has the fewest namesakes
        size = len(parts[number])
        rarest = sorted((self.places.get((number, shingle), []) for shingle in parts[number]), key=len)
        rarest = rarest[: size - math.ceil(MIN_JACCARD * size - 1e-9) + 1]
        for place in sorted(set().union(*rarest)):
            split, example, others = self.rows[place]
            if len(parts) == len(others) and (similarity := min(map(jaccard, parts, others))) >= MIN_JACCARD:
                return split, example, similarity
        return None


def drop_near_duplicates(by_split: Slices) -> tuple[Slices, int]:
    """The same slices, in order, with a BadRow in place of each row that repeats one of a later split; and how many."""
    kept, dropped, result = _Kept(), 0, dict(by_split)
    for split in reversed(format.SPLITS):  # test, validation, train
        taken: list[tuple[Example, tuple[Shingles, ...]]] = []
        rows: list[Example | BadRow] = []
        has_evaluation = bool(kept.rows)
        for row in by_split.get(split, []):
            if isinstance(row, Example) and (has_evaluation or split != "train"):
                parts = tuple(map(shingles, own_parts(row)))
                if found := kept.like(parts):
                    other_split, other, similarity = found
                    row = BadRow(
                        row.source,
                        row.row_id,
                        f"near duplicate of {other_split} row {other.row_id} (similarity {similarity:.2f})",
                    )
                    dropped += 1
                elif split != "train":
                    taken.append((row, parts))
            rows.append(row)
        for example, parts in taken:
            kept.add(split, example, parts)
        result[split] = rows
    return result, dropped


def parameters(near_duplicates: str) -> dict[str, float] | None:
    """What decides which rows are dropped: for the fingerprint."""
    return {"shingle_words": SHINGLE_WORDS, "min_jaccard": MIN_JACCARD} if near_duplicates == "drop" else None
