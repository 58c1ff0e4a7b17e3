"""How sure one can be of a metric: intervals from resampled problems, paired between models.

Everything that is measured is kept as sums per problem (group), so that one resampling of the problems serves every metric
and every model: intervals of ratios and differences are paired. B resamplings, R runs of one label, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.evaluate.metrics import Sums, values

RESAMPLINGS = 2000
LEAST_GROUPS = 5  # problems that an interval needs: resampling fewer says little about others


@dataclass(frozen=True)
class Estimate:
    """A number, and the 95% interval around it where there is one."""

    value: float
    interval: tuple[float, float] | None = None

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.value:.3g}"
        low, high = self.interval
        return f"{self.value:.3g} ({low:.3g} to {high:.3g})"


def bootstrap(sums: Sums, seed: int = 0) -> dict[str, np.ndarray]:
    """Return metric -> its value in each of B resamplings of the groups and, where there are several, of the runs.

    ``sums``: name -> (R, G, ...). The resamplings depend on G and R alone, so that those of two models on the same groups
    are paired. Groups are drawn with replacement (Efron 1979), each with everything that was measured on it. All values
    are NaN for fewer than LEAST_GROUPS groups, which have no interval.
    """
    runs, groups = next(iter(sums.values())).shape[:2]
    if groups < LEAST_GROUPS:
        return {name: np.array([np.nan]) for name in values({name: s[0, 0] for name, s in sums.items()})}
    group_counts = np.random.default_rng([seed, groups]).multinomial(groups, np.full(groups, 1 / groups), RESAMPLINGS)
    run_counts = np.random.default_rng([seed, runs, 1]).multinomial(runs, np.full(runs, 1 / runs), RESAMPLINGS)
    # A resampling is how often each run and each group was drawn: (B, R) and (B, G) times (R, G, ...) -> (B, ...)
    return values(
        {name: np.einsum("br,bg,rg...->b...", run_counts, group_counts, s, optimize=True) for name, s in sums.items()}
    )


def interval(resampled: np.ndarray) -> tuple[float, float] | None:
    """Return the middle 95% of a metric's resamplings [B]; None where it has no value."""
    finite = resampled[np.isfinite(resampled)]
    if not len(finite):
        return None
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)
