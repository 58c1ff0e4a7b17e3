"""Drops rows that nearly repeat a row of another split, so that teacher and student are not tested on what was trained.

Evaluation rows stay: a validation row that repeats a test row is dropped, and a train row that repeats either. A row
repeats another if each part of its own text (without a template's words) is similar to the other's: the Jaccard
similarity of their shingles, which are runs of three words (Broder 1997), is at least 0.8. An exact index finds the
repetitions, so the result depends on nothing but the rows. A text without spaces between words is a single word, and so
is equal to another or not similar at all.

The prefix filter (Chaudhuri, Ganti and Kaushik 2006; Bayardo, Ma and Srikant 2007). Comparing every row with every
evaluation row would take days. Let a row have n shingles, and another row similarity J >= t = 0.8 with it. Then they
share s >= t * n of them: J = s / (size of the union), and the union is at least n. So at most n - ceil(t * n) of the
row's shingles are missing in the other row. Of any n - ceil(t * n) + 1 shingles, at least one is shared. It is
therefore enough to look up that many shingles, and we choose the rarest, which lead to the fewest rows.

Example, with n = 5 shingles, at most 5 - ceil(0.8 * 5) = 1 of them missing, so any 2 are looked up::

    the row's shingles         in how many evaluation rows (from the index)
    "write a poem"             90
    "a poem about"             70
    "poem about the"           40
    "about the tallest"         2    <- looked up: rows 7, 31
    "the tallest oak"           1    <- looked up: row 7

    Only rows 7 and 31 are compared with it in full. A row with neither of the two shingles misses 2 of the 5, so that
    its similarity is at most 3/5.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
import unicodedata
from dataclasses import dataclass

import numpy as np

from kdcache.cache.format import SPLITS
from kdcache.examples.types import BadRow, Example

NEAR_DUPLICATES = ("drop", "keep")
SHINGLE_WORDS = 3
MIN_JACCARD = 0.8

Shingles = np.ndarray  # uint64: the 64-bit hashes of a text's shingles, sorted, each once
Slices = dict[str, list[Example | BadRow]]  # by split


def normalise(text: str) -> str:
    """Return a text's words alone: NFKC, casefolded, one space between them. A text without words keeps its signs."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", text) or text.split())


def own_parts(example: Example) -> tuple[str, ...]:
    """Return the texts to compare: the example's own content, else what the user says.

    That is all turns of the user: two conversations that both end in "go on" are no duplicates.
    """
    if example.content is not None:
        return example.content
    users = [str(message.get("content")) for message in example.messages if message.get("role") == "user"]
    return ("\n".join(users or [str(example.messages[-1].get("content"))]),)


def shingles(text: str) -> Shingles:
    """Return all runs of SHINGLE_WORDS words, as hashes; a shorter text is one shingle."""
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
    """Return the share of the shingles of either text that both texts have."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


@dataclass(frozen=True)
class _EvaluationRow:
    split: str
    example: Example
    parts: tuple[Shingles, ...]


class _EvaluationRows:
    """The rows that another may not repeat, and an inverted index of their shingles: 20 bytes per shingle.

    The index has for each part (the instruction, its input) all shingles in order, and beside each the number of its
    row.
    """

    def __init__(self) -> None:
        self.rows: list[_EvaluationRow] = []
        self.index: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def add(self, rows: list[_EvaluationRow]) -> None:
        """Add rows and rebuild the index."""
        self.rows += rows
        by_part: dict[int, list[tuple[int, Shingles]]] = {}
        for row_number, row in enumerate(self.rows):
            for number, part in enumerate(row.parts):
                by_part.setdefault(number, []).append((row_number, part))
        for number, parts in by_part.items():
            all_shingles = np.concatenate([part for _, part in parts])
            row_numbers = np.repeat(
                np.array([row_number for row_number, _ in parts], dtype=np.int32), [len(part) for _, part in parts]
            )
            order = np.argsort(all_shingles, kind="stable")
            self.index[number] = all_shingles[order], row_numbers[order]

    def similar_to(self, parts: tuple[Shingles, ...]) -> tuple[_EvaluationRow, float] | None:
        """Return the first row whose every part is similar to these, with the lowest of the parts' similarities."""
        number = max(range(len(parts)), key=lambda n: len(parts[n]))  # a long part tells rows apart best
        if number not in self.index:
            return None
        indexed, row_numbers = self.index[number]
        # Shingle i of this part is at indexed[first[i]:last[i]], so last - first is the number of rows that have it.
        first, last = (np.searchsorted(indexed, parts[number], side) for side in ("left", "right"))
        size = len(parts[number])
        most_missing = size - math.ceil(MIN_JACCARD * size - 1e-9)  # 1e-9 undoes rounding errors before ceil
        rarest = np.argsort(last - first, kind="stable")[: most_missing + 1]
        for row_number in np.unique(np.concatenate([row_numbers[first[i] : last[i]] for i in rarest])).tolist():
            row = self.rows[row_number]
            if len(parts) == len(row.parts) and (similarity := min(map(jaccard, parts, row.parts))) >= MIN_JACCARD:
                return row, similarity
        return None


def drop_near_duplicates(by_split: Slices) -> tuple[Slices, int]:
    """Return the splits with a BadRow in place of each row that nearly repeats a row of a later split, and how many they are.

    Later is in the order train, validation, test: of two that are alike, the row of the evaluation split stays.
    """
    evaluation, dropped, result = _EvaluationRows(), 0, dict(by_split)
    for split in reversed(SPLITS):  # test, validation, train
        new: list[_EvaluationRow] = []
        rows: list[Example | BadRow] = []
        has_evaluation = bool(evaluation.rows)
        for row in by_split.get(split, []):
            if isinstance(row, Example) and (has_evaluation or split != "train"):
                parts = tuple(map(shingles, own_parts(row)))
                if match := evaluation.similar_to(parts):
                    other, similarity = match
                    row = BadRow(
                        row.source,
                        row.row_id,
                        f"near duplicate of {other.split} row {other.example.row_id} (similarity {similarity:.2f})",
                    )
                    dropped += 1
                elif split != "train":
                    new.append(_EvaluationRow(split, row, parts))
            rows.append(row)
        if new:
            evaluation.add(new)
        result[split] = rows
    return result, dropped


def parameters(near_duplicates: str) -> dict[str, float] | None:
    """Return the settings that decide which rows are dropped, for the fingerprint; None if all are kept."""
    return {"shingle_words": SHINGLE_WORDS, "min_jaccard": MIN_JACCARD} if near_duplicates == "drop" else None
