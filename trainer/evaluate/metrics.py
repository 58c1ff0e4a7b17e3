"""The metrics of `kd evaluate`: one table, ``METRICS``, that everything else follows.

A new metric is one entry of the table, and MEASURES_VERSION one higher. The columns of forced.parquet and answers.parquet,
the sums, the tables of `kd compare` and the report are made from the entries.

    what is measured             a column per sample or answer     sums per problem        a value
    positions of a sample   ->   forced.parquet: kl           ->   kl, tokens         ->   kl / tokens
    an answer               ->   answers.parquet: rougeL      ->   rougeL, its count  ->   rougeL / count

Sums per problem are kept because one resampling of the problems then serves every metric (``bootstrap.py``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import comb
from typing import Any

import numpy as np

from kdcache.judge import answers, verifiers
from kdcache.judge.compare import nfc

#: Rises with every change of what is measured, so that an evaluation from before is not compared with one from after.
MEASURES_VERSION = 5

CHRF_ORDER = 6  # characters of the longest n-gram
BINS = 15  # of the confidence, for ECE
ENTROPY_EDGES_NATS = (0.1, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0)  # between the buckets of the teacher's entropy

Sums = Mapping[str, np.ndarray]


# --- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PositionScores:
    """One model at the T supervised positions of one sample: float64 [T] each."""

    entropy: np.ndarray  # nats, of the teacher
    kl: np.ndarray  # nats, KL(teacher || model)
    agreement: np.ndarray  # 1 where the model's best token is the teacher's, else 0
    ce: np.ndarray  # nats, of the completion's token
    confidence: np.ndarray  # probability of the model's best token
    right: np.ndarray  # 1 where the best token is the completion's, else 0


@dataclass(frozen=True)
class Attempt:
    """One answer to a prompt, and what it can be compared with."""

    text: str  # as it was generated
    turn: str  # the same after what the prompt opens of the turn
    judges: tuple[verifiers.Judge, ...]
    teacher_answer: str | None  # the first that the teacher sampled; None where the answer is the teacher's

    def best(self, score: Callable[[str, str], float]) -> float | None:
        """Return the best ``score(text, reference)`` over the references; None where there is no reference."""
        return max((score(self.text, reference) for _, reference in self.judges if reference is not None), default=None)


@dataclass(frozen=True)
class PositionSum:
    """A sum over the positions of a sample, which is a column of forced.parquet."""

    name: str
    values: Callable[[PositionScores], np.ndarray]  # [T]
    bucket: Callable[[PositionScores], np.ndarray] | None = None  # int [T]; None: all positions in one sum
    buckets: int = 0  # how many there are

    def of(self, scores: PositionScores) -> float | list[float]:
        """Return the sum, or one sum per bucket."""
        if self.bucket is None:
            return float(self.values(scores).sum())
        return np.bincount(self.bucket(scores), self.values(scores), self.buckets).tolist()


@dataclass(frozen=True)
class Metric:
    """How one metric is measured, becomes a value, and is shown.

    ``value`` gets the arrays that ``sums`` names. Their leading axes are (B,) resamplings or none.
    """

    name: str  # pass@k stands for pass@1, pass@2 and so on
    meaning: str  # for the legend of the report, after the name
    sums: tuple[str, ...]
    value: Callable[..., np.ndarray] = np.divide
    position_sums: tuple[PositionSum, ...] = ()
    of_answer: Callable[[Attempt], float | None] | None = None  # None: nothing to compare this answer with
    unit: str = ""
    less_is_better: bool = False
    retained: bool = False  # student / teacher says what the student kept: more is better and 0 is nothing
    by_entropy: bool = False  # summed by the teacher's entropy too; a distance to the teacher, who has none
    on_page: bool = True  # in the table of the report
    plot_title: str = ""  # of the report's plot; empty: it has none
    plot_axis: str = ""
    finding: str = ""  # what a difference is of, in the report's sentences; empty: no sentence


# --- of one answer ----------------------------------------------------------------------------------------------------


class WordTokenizer:
    """Words of any language: runs of letters and digits (NFC) in lower case, not stemmed. rouge-score's are ASCII."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", nfc(text).lower())


@cache
def _scorer(of_paper: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    if of_paper:
        return RougeScorer(["rougeL"], use_stemmer=True)
    return RougeScorer(["rougeL"], tokenizer=WordTokenizer())


def rouge_l(answer: str, target: str) -> float:
    """Return Rouge-L F1, 0 to 1, over the words that ``WordTokenizer`` finds."""
    return _scorer(False).score(target, answer)["rougeL"].fmeasure


def rouge_l_of_the_paper(answer: str, target: str) -> float:
    """Return Rouge-L as in the paper: rouge-score's ASCII words with an English stemmer. An accent ends a word there."""
    return _scorer(True).score(target, answer)["rougeL"].fmeasure


def chrf(answer: str, target: str, beta: float = 2.0) -> float:
    """Return chrF, 0 to 1: F-beta over n-grams of 1 to CHRF_ORDER characters, white space left out (Popović 2015, W15-3049).

    As sacrebleu's chrF2 without word n-grams: precision and recall are averaged over the orders that both texts reach.
    """
    texts = ["".join(text.split()) for text in (answer, target)]
    precisions, recalls = [], []
    for n in range(1, min(CHRF_ORDER, *map(len, texts)) + 1):
        of_answer, of_target = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in texts)
        matches = (of_answer & of_target).total()
        precisions.append(matches / of_answer.total())
        recalls.append(matches / of_target.total())
    if not any(precisions):
        return 0.0
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def exact(answer: str, target: str) -> float:
    """Return 1 where the texts are equal apart from Unicode composition and white space, else 0."""
    a, b = (" ".join(nfc(text).split()) for text in (answer, target))
    return float(a == b)


def _exact_answer(attempt: Attempt) -> float | None:
    """Return whether the part of the turn that the verifier looks at is one of the references, word for word."""
    pairs = [(verifier, reference) for verifier, reference in attempt.judges if reference is not None]
    return max((exact(answers.answer_in(attempt.turn, v), reference) for v, reference in pairs), default=None)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return the unbiased chance that one of ``k`` of the samples is right (Chen et al. 2021, arXiv 2107.03374)."""
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples")
    return 1.0 - comb(samples - right, k) / comb(samples, k)


# --- of one position --------------------------------------------------------------------------------------------------


def bin_of(confidence: np.ndarray) -> np.ndarray:
    """Return the ECE bin, 0 to BINS - 1, of each probability."""
    return np.minimum((confidence * BINS).astype(np.int64), BINS - 1)


def _confidence_bin(scores: PositionScores) -> np.ndarray:
    return bin_of(scores.confidence)


def _entropy_bucket(scores: PositionScores) -> np.ndarray:
    return np.searchsorted(ENTROPY_EDGES_NATS, scores.entropy, side="right")


TOKENS = PositionSum("tokens", lambda scores: np.ones(len(scores.ce)))


# --- the table --------------------------------------------------------------------------------------------------------


def count_of(name: str) -> str:
    """Return the name of the sum that counts the answers which have a metric."""
    return f"{name}_count"


def _mean_over_answers(name: str, of_answer: Callable[[Attempt], float | None], meaning: str, **display: Any) -> Metric:
    return Metric(name, meaning, (name, count_of(name)), of_answer=of_answer, **display)


#: In the order in which they are shown.
METRICS = (
    Metric(
        "kl",
        "nats per token from the teacher to the model, on the cache's completions",
        ("kl", "tokens"),
        position_sums=(PositionSum("kl", lambda scores: scores.kl),),
        unit="nats/token",
        less_is_better=True,
        by_entropy=True,
        plot_title="Distance to the teacher",
        plot_axis="KL to the teacher, nats per token (less is nearer)",
        finding="nats per token of KL to the teacher",
    ),
    Metric(
        "agreement",
        "share of positions where the model's best token is the teacher's",
        ("agreement", "tokens"),
        position_sums=(PositionSum("agreement", lambda scores: scores.agreement),),
        by_entropy=True,
        plot_title="Agreement",
        plot_axis="share of positions that agree with the teacher's first choice",
        finding="of agreement with its first choice",
    ),
    Metric(
        "ce",
        "cross-entropy of the cache's completions in nats per token",
        ("ce", "tokens"),
        position_sums=(PositionSum("ce", lambda scores: scores.ce),),
        unit="nats/token",
        less_is_better=True,
    ),
    Metric(
        "perplexity",
        "exp of the cross-entropy",
        ("ce", "tokens"),
        lambda ce, tokens: np.exp(ce / tokens),
        less_is_better=True,
        on_page=False,
    ),
    Metric(
        "ece",
        "expected calibration error of the best token's probability",
        ("confident", "right", "tokens"),
        lambda confident, right, tokens: np.abs(confident - right).sum(axis=-1) / tokens,
        less_is_better=True,
        position_sums=(
            PositionSum("confident", lambda scores: scores.confidence, _confidence_bin, BINS),
            PositionSum("right", lambda scores: scores.right, _confidence_bin, BINS),
        ),
    ),
    _mean_over_answers(
        "rougeL",
        lambda attempt: attempt.best(rouge_l),
        "F1 of the longest common subsequence of words with the reference",
        retained=True,
        plot_title="Rouge-L",
        plot_axis="Rouge-L F1 with the reference",
        finding="of Rouge-L",
    ),
    _mean_over_answers(
        "rougeL_paper",
        lambda attempt: attempt.best(rouge_l_of_the_paper),
        "the same with ASCII words and an English stemmer, as in the paper",
        retained=True,
    ),
    _mean_over_answers(
        "rougeL_teacher",
        lambda attempt: None if attempt.teacher_answer is None else rouge_l(attempt.text, attempt.teacher_answer),
        "rougeL with the teacher's first own answer as the target",
    ),
    _mean_over_answers(
        "chrF",
        lambda attempt: attempt.best(chrf),
        "F2 of the n-grams of 1 to 6 characters that the answer shares with the reference",
        retained=True,
    ),
    _mean_over_answers(
        "exact", _exact_answer, "share of answers that equal the reference word for word", retained=True
    ),
    Metric(
        "pass@k",
        "chance that one of k answers to a prompt is right by its verifier",
        ("pass@k", "verified"),
        retained=True,
        plot_title="Right answers",
        plot_axis="share of answers that are right",
    ),
)
PASS = next(metric for metric in METRICS if metric.name == "pass@k")

ANSWER_METRICS = {metric.name: metric.of_answer for metric in METRICS if metric.of_answer is not None}
#: The columns of forced.parquet that are summed up further; those by entropy are for the report alone.
POSITION_SUMS = (TOKENS, *(part for metric in METRICS for part in metric.position_sums))
BY_ENTROPY = tuple(metric.name for metric in METRICS if metric.by_entropy)
SUMS_BY_ENTROPY = tuple(
    replace(part, name=f"{part.name}_by_entropy", bucket=_entropy_bucket, buckets=len(ENTROPY_EDGES_NATS) + 1)
    for part in (TOKENS, *(part for metric in METRICS if metric.by_entropy for part in metric.position_sums))
)


def metric_of(name: str) -> Metric:
    """Return the entry of the table for a name as it is shown, which may be pass@3."""
    return PASS if name.startswith("pass@") else {metric.name: metric for metric in METRICS}[name]


def ordered(names: Iterable[str]) -> list[str]:
    """Return names of metrics in the order in which they are shown, pass@k by its k."""
    places = [metric.name for metric in METRICS]

    def place(name: str) -> tuple[int, int]:
        return places.index(metric_of(name).name), int(name.removeprefix("pass@")) if name.startswith("pass@") else 0

    return sorted(names, key=place)


def values(sums: Sums) -> dict[str, np.ndarray]:
    """Return metric -> value from sums over all problems, of leading axes (B,) or (); NaN where nothing was summed."""
    passes = [replace(PASS, name=name, sums=(name, "verified")) for name in sums if name.startswith("pass@")]
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            metric.name: metric.value(*(sums[name] for name in metric.sums))
            for metric in (*METRICS, *passes)
            if all(name in sums for name in metric.sums)
        }
