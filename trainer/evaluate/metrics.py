"""How near an answer is to another, and how sure one can be of a mean: Rouge-L, exact match, pass@k, ECE, bootstrap.

Whatever is measured is kept as sums over problems (groups), so that one resampling of the problems serves every metric
and every model: intervals of ratios and differences are paired. B resamplings, R runs of a kind, G groups.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from math import comb
from typing import Any

import numpy as np

from kdcache.judge.compare import nfc

RESAMPLINGS = 2000
LEAST_GROUPS = 5  # problems that an interval needs: resampling fewer says little of others
BINS = 15  # of the confidence, for ECE
ENTROPY_EDGES_NATS = (0.1, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0)  # between the buckets of the teacher's entropy

Sums = Mapping[str, np.ndarray]


# --- of one answer ----------------------------------------------------------------------------------------------------


class WordTokenizer:
    """Words of any language: runs of letters and digits (NFC), lower-cased, no stemming. rouge-score's own is ASCII."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", nfc(text).lower())


@cache
def _scorer(papers: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    if papers:
        return RougeScorer(["rougeL"], use_stemmer=True)
    return RougeScorer(["rougeL"], tokenizer=WordTokenizer())


def rouge_l(answer: str, target: str) -> float:
    """Rouge-L F1, 0 to 1, of the words that ``WordTokenizer`` sees."""
    return _scorer(False).score(target, answer)["rougeL"].fmeasure


def rouge_l_of_the_paper(answer: str, target: str) -> float:
    """Rouge-L as the paper took it: rouge-score's ASCII words with an English stemmer. An accent ends a word there."""
    return _scorer(True).score(target, answer)["rougeL"].fmeasure


def exact(answer: str, target: str) -> float:
    """1 where the texts are equal but for Unicode composition and white space, else 0."""
    a, b = (" ".join(nfc(text).split()) for text in (answer, target))
    return float(a == b)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that one of ``k`` of the samples is right, without bias (Chen et al. 2021, arXiv 2107.03374)."""
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples")
    return 1.0 - comb(samples - right, k) / comb(samples, k)


# --- of many ----------------------------------------------------------------------------------------------------------


def bin_of(confidence: np.ndarray) -> np.ndarray:
    """The ECE bin, 0 to BINS - 1, of probabilities."""
    return np.minimum((confidence * BINS).astype(np.int64), BINS - 1)


#: metric -> the two sums it is the ratio of
RATIOS = {
    "kl": ("kl", "tokens"),
    "agreement": ("agreement", "tokens"),
    "ce": ("ce", "tokens"),
    "rougeL": ("rougeL", "referenced"),
    "rougeL_paper": ("rougeL_paper", "referenced"),
    "rougeL_teacher": ("rougeL_teacher", "with_teacher"),
    "exact": ("exact", "referenced"),
}


def values(sums: Sums) -> dict[str, np.ndarray]:
    """Metric -> value, from sums that all groups went into; of leading axes (B,) or (). NaN where nothing was summed.

    kl, ce: nats a token. agreement: share of positions. perplexity: exp(ce). ece: expected calibration error of the
    best token's confidence, BINS bins. rougeL.., exact: mean over answers. pass@K: mean over prompts.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {name: sums[a] / sums[b] for name, (a, b) in RATIOS.items() if a in sums}
        for name in sums:
            if name.startswith("pass@"):
                found[name] = sums[name] / sums["verified"]
        if "ce" in found:
            found["perplexity"] = np.exp(found["ce"])
        if "confident" in sums:
            gaps = np.abs(sums["confident"] - sums["right"]).sum(axis=-1)
            found["ece"] = gaps / sums["tokens"]
    return found


def bootstrap(sums: Sums, seed: int = 0) -> dict[str, np.ndarray]:
    """Metric -> its value in each of B resamplings of the groups and, where there are several, of the runs.

    ``sums``: name -> (R, G, ...). The resamplings depend on G and R alone: those of two models on the same groups are
    paired. Groups are drawn with replacement (Efron 1979); a group counts with everything that was asked of it. NaN of fewer
    than LEAST_GROUPS groups, which have no interval.
    """
    runs, groups = next(iter(sums.values())).shape[:2]
    if groups < LEAST_GROUPS:
        return {name: np.array([np.nan]) for name in values({name: s[0, 0] for name, s in sums.items()})}
    drawn = np.random.default_rng([seed, groups]).multinomial(groups, np.full(groups, 1 / groups), RESAMPLINGS)
    of_runs = np.random.default_rng([seed, runs, 1]).multinomial(runs, np.full(runs, 1 / runs), RESAMPLINGS)
    return values({name: np.einsum("br,bg,rg...->b...", of_runs, drawn, s, optimize=True) for name, s in sums.items()})


def interval(resampled: np.ndarray) -> tuple[float, float] | None:
    """The middle 95% of a metric's resamplings; None where it has no value."""
    found = resampled[np.isfinite(resampled)]
    if not len(found):
        return None
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)
