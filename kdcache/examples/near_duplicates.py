"""Which rows say nearly the same on two sides of a split, so that the teacher's and the student's test is honest.

The evaluation rows stay: a validation row that repeats a test row is dropped, and a train row that repeats either. A
row repeats another if each part of its own text (a template's words are not its own) shares enough word shingles with
the other's: Jaccard similarity (Broder 1997), counted (over 64-bit hashes) through an inverted index of the rows
already kept, so that the answer depends on the rows alone. Texts without spaces between words are one word each: equal or not.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
import unicodedata

import numpy as np

from kdcache.cache.format import SPLITS
from kdcache.examples.types import BadRow, Example

NEAR_DUPLICATES = ("drop", "keep")
SHINGLE_WORDS = 3
MIN_JACCARD = 0.8

Shingles = np.ndarray  # uint64, in order and each once: 64-bit hashes of them
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
    words = np.array([_hash(word) for word in normalise(text).split()], dtype=np.uint64)
    width = min(SHINGLE_WORDS, len(words))
    mixed = np.zeros(len(words) - width + 1, dtype=np.uint64)
    for start in range(width):
        mixed = mixed * _MIX + words[start : len(words) - width + 1 + start]  # modulo 2^64
    return np.unique(mixed)


_MIX = np.uint64(0x9E3779B97F4A7C15)


@functools.lru_cache(2**18)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def jaccard(a: Shingles, b: Shingles) -> float:
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


class _Kept:
    """The evaluation rows that a row may not repeat, and where each of their shingles is: 20 bytes a shingle."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, Example, tuple[Shingles, ...]]] = []  # (split, example, its parts)
        self.index: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by part: shingles in order, the row of each

    def add(self, split: str, examples: list[tuple[Example, tuple[Shingles, ...]]]) -> None:
        self.rows += [(split, example, parts) for example, parts in examples]
        by_part: dict[int, list[tuple[int, Shingles]]] = {}
        for row, (_, _, parts) in enumerate(self.rows):
            for number, part in enumerate(parts):
                by_part.setdefault(number, []).append((row, part))
        for number, found in by_part.items():
            all_shingles = np.concatenate([part for _, part in found])
            rows = np.repeat(np.array([row for row, _ in found], dtype=np.int32), [len(part) for _, part in found])
            order = np.argsort(all_shingles, kind="stable")
            self.index[number] = all_shingles[order], rows[order]

    def like(self, parts: tuple[Shingles, ...]) -> tuple[str, Example, float] | None:
        """The first kept row whose every part is like these, with the similarity of the part that differs most.

        One that is alike misses a fifth of the shingles at most, so it has one of any fifth and one more: the rarest
        are looked up, and what they lead to is compared (prefix filtering: Chaudhuri et al. 2006).
        """
        number = max(range(len(parts)), key=lambda n: len(parts[n]))  # the longest part has the fewest namesakes
        if number not in self.index:
            return None
        known, rows = self.index[number]
        first, last = (np.searchsorted(known, parts[number], side) for side in ("left", "right"))
        size = len(parts[number])
        rarest = np.argsort(last - first, kind="stable")[: size - math.ceil(MIN_JACCARD * size - 1e-9) + 1]
        for place in np.unique(np.concatenate([rows[first[i] : last[i]] for i in rarest])).tolist():
            split, example, others = self.rows[place]
            if len(parts) == len(others) and (similarity := min(map(jaccard, parts, others))) >= MIN_JACCARD:
                return split, example, similarity
        return None


def drop_near_duplicates(by_split: Slices) -> tuple[Slices, int]:
    """The same slices, in order, with a BadRow in place of each row that repeats one of a later split; and how many."""
    kept, dropped, result = _Kept(), 0, dict(by_split)
    for split in reversed(SPLITS):  # test, validation, train
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
        if taken:
            kept.add(split, taken)
        result[split] = rows
    return result, dropped


def parameters(near_duplicates: str) -> dict[str, float] | None:
    """What decides which rows are dropped: for the fingerprint."""
    return {"shingle_words": SHINGLE_WORDS, "min_jaccard": MIN_JACCARD} if near_duplicates == "drop" else None
