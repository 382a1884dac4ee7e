"""What the scores of several seeds say: a mean, how far it may be from that of all seeds, and whether two models differ.

`scripts/simulate_statistics.py` measures all of it: how often the intervals hold the true mean, how many false alarms the test gives,
and how often it finds a difference with as many seeds as `seeds_needed` says.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

LEVEL = 0.95
ALPHA = 0.05
POWER = 0.8
LOST = 0.02  # of the power of a t-test, at most, by flipping signs instead
BOOTSTRAP_FROM = 20
"""Seeds. Of fewer the bootstrap is too narrow: of 8 draws of a normal distribution it holds the true mean in 90 % of cases, of 3 in 74 %,
and Student's t in 95 %. From 20 on the two are about as good, and the bootstrap is better where some seeds learn and others do not."""
RESAMPLES = 9_999  # of a bootstrap
FLIPS = 10_000  # of signs, where all 2^n are more
MOST_SEEDS = 1_000  # that `seeds_needed` would name
METHOD = (
    f"mean over the seeds and its 95 % interval: Student's t of fewer than {BOOTSTRAP_FROM} seeds, "
    f"the bias-corrected bootstrap (BCa) from {BOOTSTRAP_FROM} on"
)
TEST = (
    "p: two-sided sign-flip test of the differences of each seed; Holm's correction over the pairs of a score at a length; the interval of "
    "a difference, of its pair alone: the differences that this test does not reject (Student's t of fewer than 6 seeds); "
    "effect: mean difference / its standard deviation, with Hedges' correction"
)


class Estimate(NamedTuple):
    """The mean of n values; low and high are None for fewer than two."""

    n: int
    mean: float
    low: float | None
    high: float | None


def in_figures(mean: float, low: float, high: float) -> str:
    """0.981 [0.950, 1.010], with two digits of its width."""
    digits = 3 if high <= low else max(3, 1 - math.floor(math.log10(high - low)))
    tiny = 0 < max(abs(mean), abs(low), abs(high)) < 1e-5
    form = ".1e" if tiny else f".{min(digits, 6)}f"
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def estimate(values: Sequence[float]) -> Estimate:
    """By METHOD. Equal values give an interval without width; the same values give the same interval, digit by digit.

    Student's t, mean +- t s / sqrt(n) with t of n - 1 degrees of freedom, takes the values as draws of a normal distribution: near a
    border, such as an accuracy of 1, the interval may go beyond it.
    """
    return _estimate(tuple(values))


@lru_cache(maxsize=10_000)
def _estimate(values: tuple[float, ...]) -> Estimate:
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return Estimate(n, mean, None, None)
    if min(values) == max(values):
        return Estimate(n, mean, mean, mean)
    if n >= BOOTSTRAP_FROM:
        return Estimate(n, mean, *_bootstrapped(values))
    from scipy import stats

    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * statistics.stdev(values) / n**0.5
    return Estimate(n, mean, mean - half, mean + half)


def _bootstrapped(values: tuple[float, ...]) -> tuple[float, float]:
    """BCa; the percentiles of the resampled means where it is not defined (all of them on one side of the mean)."""
    import warnings

    import numpy as np
    from scipy import stats

    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            found = stats.bootstrap(
                (np.asarray(values),), np.mean, n_resamples=RESAMPLES, confidence_level=LEVEL, method=method, rng=np.random.default_rng(0)
            ).confidence_interval
        if math.isfinite(found.low) and math.isfinite(found.high):
            break
    return float(found.low), float(found.high)


# ----------------------------------------------------------------------- two models


def paired_p(differences: Any) -> np.ndarray:
    """(..., n) differences of paired scores, (..., n) -> (...) two-sided p of the null hypothesis that the sign of each is chance.

    The paired permutation test. It is exact where all 2^n ways to flip the signs are at most FLIPS, up to n = 13; otherwise that many are
    drawn, the same ones each time.
    """
    import numpy as np

    differences = np.asarray(differences, dtype=np.float64)
    flipped = _flipped(differences.shape[-1])
    scale = np.abs(differences).max(-1, keepdims=True)
    # Scores in steps, such as accuracies, have many sums that are equal but for their rounding: rounded to ten digits they are equal. The
    # factor is one that puts no sum of fractions in the middle of two whole numbers.
    scaled = differences / np.where(scale > 0, scale, 1.0) * (math.pi * 1e9)
    sums = np.abs(np.rint(scaled @ (1.0 - 2.0 * flipped.T)))
    return np.asarray((sums >= np.abs(np.rint(scaled.sum(-1)))[..., None]).mean(-1))


def paired_interval(differences: Sequence[float]) -> Estimate:
    """The mean difference of paired scores and the 95 % interval that goes with `paired_p`: all shifts of the differences that the test
    does not reject. It holds zero exactly where p is above ALPHA. Of fewer seeds than can be significant, that of `estimate`.

    A shift below the mean is rejected when too few of the means of the flipped differences are below it, so the ends of the interval are
    such means (Hartigan 1969, doi:10.1080/01621459.1969.10501057).
    """
    import numpy as np

    n = len(differences)
    if smallest_p(n) > ALPHA or min(differences) == max(differences):
        return estimate(differences)
    flipped = _flipped(n)[1:]  # without the one that flips nothing
    sums = flipped @ np.asarray(differences, dtype=np.float64)
    sums[np.abs(sums) < 1e-10 * max(map(abs, differences))] = 0.0  # as in paired_p: it is rounding alone
    means = np.sort(sums / flipped.sum(-1))
    outside = math.floor(ALPHA / 2 * (len(flipped) + 1))
    return Estimate(n, statistics.fmean(differences), float(means[outside - 1]), float(means[-outside]))


@lru_cache(maxsize=64)
def _flipped(n: int) -> np.ndarray:
    """(ways, n) 1 for each sign that is flipped, 0 for the others. The first flips nothing, and with each there is its opposite."""
    import numpy as np

    if 2**n <= FLIPS:
        return np.asarray((np.arange(2**n)[:, None] >> np.arange(n)) & 1, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(0, 2, (FLIPS, n)).astype(np.float64)
    drawn = drawn[(drawn.sum(-1) > 0) & (drawn.sum(-1) < n)]  # those that flip nothing, or all, are there once
    half = np.concatenate([np.zeros((1, n)), drawn[: FLIPS // 2 - 1]])
    return np.concatenate([half, 1 - half])


@lru_cache(maxsize=10_000)
def p_of(differences: tuple[float, ...]) -> float:
    """That of one pair; 1 where no seed differs."""
    return float(paired_p(differences)) if any(differences) else 1.0


def smallest_p(n: int) -> float:
    """Of n seeds: that of differences with the same sign, however large they are."""
    return 2.0 ** (1 - n) if 2**n <= FLIPS else 2 / FLIPS


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the smallest times their number, the next one times one less, ..., never below the one before, at most
    1. Below ALPHA for any true null hypothesis in at most ALPHA of all cases, however the tests depend on each other."""
    corrected, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda index: p[index])):
        largest = max(largest, min(1.0, p[index] * (len(p) - rank)))
        corrected[index] = largest
    return corrected


def effect_size(differences: Sequence[float]) -> float | None:
    """Cohen's d of paired differences, mean / standard deviation, times Hedges' correction 1 - 3 / (4 n - 5), for that of few is too
    large. None of fewer than three, and where all are the same, which have no spread to measure by."""
    n = len(differences)
    if n < 3 or (spread := statistics.stdev(differences)) <= 1e-12 * max(map(abs, differences)):
        return None
    return statistics.fmean(differences) / spread * (1 - 3 / (4 * n - 5))


def seeds_needed(effect: float, tests: int = 1) -> int | None:
    """The fewest seeds with which a difference of this effect size is found in at least POWER of all cases; None: more than MOST_SEEDS.

    By the power of the paired t-test (noncentral t) at the level that the sign flips of n seeds can attain: p comes in steps of
    2^(1 - n), and below 2^(1 - n) there is none. tests: of how many pairs the smallest p must hold after Holm's correction.
    """
    import numpy as np
    from scipy import stats

    if (fewest := fewest_seeds(tests)) is None:
        return None
    n = np.arange(fewest, MOST_SEEDS + 1)
    steps = 2.0 ** (np.minimum(n, 60) - 1)
    level = np.where(2.0 ** np.minimum(n, 60) <= FLIPS, np.floor(ALPHA / tests * steps) / steps, ALPHA / tests)
    critical = stats.t.ppf(1 - level / 2, n - 1)
    power = stats.nct.sf(critical, n - 1, abs(effect) * np.sqrt(n))  # the other side counts for nothing where it matters
    enough = np.flatnonzero(power >= POWER + LOST)
    return int(n[enough[0]]) if len(enough) else None


def fewest_seeds(tests: int = 1) -> int | None:
    """With fewer, none of so many pairs can be significant, however large the difference is; None: with any number, of so many pairs."""
    return next((n for n in range(2, MOST_SEEDS) if tests * smallest_p(n) <= ALPHA), None)
