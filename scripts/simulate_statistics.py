"""Measures what the statistics of lab-compare promise, on scores whose truth is known:

    python scripts/simulate_statistics.py            half a minute of one core

- how often the 95 % intervals hold the true mean, by Student's t and by the bootstrap;
- how often two names for the same model are told apart, in 1,000 comparisons, which may be at most 50 and the chance of 1,000 draws;
- how often a planted difference is found with as many seeds as are said to be needed for it, which is to be 80 %.

The score of a seed is that of its data and first weights, which all models share, and a part of each model's own.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from itertools import combinations

import numpy as np
from scipy import stats

from lab.analysis.statistics import ALPHA, holm, paired_p, seeds_needed

DRAWS: dict[str, tuple[Callable[[np.random.Generator, tuple[int, int]], np.ndarray], float]] = {
    "normal": (lambda rng, size: rng.normal(size=size), 0.0),
    "accuracy near 1": (lambda rng, size: 1 - rng.gamma(0.5, 0.02, size), 0.99),
    "loss, log-normal": (lambda rng, size: np.exp(rng.normal(0, 0.5, size)), float(np.exp(0.125))),
    "4 of 5 seeds learn": (
        lambda rng, size: np.where(rng.random(size) < 0.8, 0.95 + 0.02 * rng.normal(size=size), 0.3 + 0.05 * rng.normal(size=size)), 0.82
    ),
}  # fmt: skip
"""What the scores of seeds look like, and their true mean."""


def coverage(kind: str, n: int, sims: int = 2000) -> dict[str, float]:
    """The share of the intervals of n seeds that hold the true mean, by method."""
    rng = np.random.default_rng(n)
    draw, truth = DRAWS[kind]
    scores = draw(rng, (sims, n))
    mean, half = scores.mean(1), stats.t.ppf(0.975, n - 1) * scores.std(1, ddof=1) / n**0.5
    found = {"t": float(((mean - half <= truth) & (truth <= mean + half)).mean())}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        for method in ("percentile", "BCa"):
            interval = stats.bootstrap(
                (scores,), np.mean, axis=-1, n_resamples=999, method=method, vectorized=True, batch=100, rng=rng
            ).confidence_interval
            found[method] = float(((interval.low <= truth) & (truth <= interval.high)).mean())
    return found


def comparisons(n: int, models: int, effect: float, sims: int, seed: int) -> np.ndarray:
    """(sims, models, n) scores; the first model is better by `effect` standard deviations of the difference of two."""
    rng = np.random.default_rng(seed)
    shared, own = rng.normal(size=(sims, 1, n)), rng.normal(size=(sims, models, n))
    scores = shared + own
    scores[:, 0] += effect * 2**0.5
    return scores


def found(n: int, models: int = 2, effect: float = 0.0, sims: int = 1000, seed: int = 0) -> int:
    """In how many of `sims` comparisons at least one pair is told apart, after Holm's correction."""
    scores = comparisons(n, models, effect, sims, seed)
    p = np.stack([paired_p(scores[:, a] - scores[:, b]) for a, b in combinations(range(models), 2)], axis=-1)
    return sum(min(holm(row.tolist())) <= ALPHA for row in p)


def power(effect: float, tests: int, n: int, sims: int = 1000, seed: int = 0) -> float:
    """The share of comparisons that find a pair of this effect, where its p must hold for one of `tests` pairs."""
    differences = np.random.default_rng(seed).normal(effect, 1, (sims, n))
    return float((tests * paired_p(differences) <= ALPHA).mean())


def main() -> None:
    print("share of the 95 % intervals that hold the true mean: Student's t / bootstrap, percentile / bootstrap, BCa\n")
    print("| seeds | " + " | ".join(DRAWS) + " |\n|---" + "|---" * len(DRAWS) + "|")
    for n in (3, 5, 8, 10, 15, 20, 30, 50):
        cells = [" / ".join(f"{value:.2f}" for value in coverage(kind, n).values()) for kind in DRAWS]
        print(f"| {n} | {' | '.join(cells)} |", flush=True)
    print("\nfalse alarms in 1,000 comparisons of names for the same model\n")
    print("| seeds | 2 names | 3 names | 5 names |\n|---|---|---|---|")
    for n in (5, 6, 8, 10, 12):
        cells = [str(found(n, models)) for models in (2, 3, 5)]
        print(f"| {n} | {' | '.join(cells)} |", flush=True)
    print("\na planted difference of d standard deviations: the seeds that are said to be needed, and how often it is found with them\n")
    print("| d | one pair | one of 3 pairs | one of 10 pairs |\n|---|---|---|---|")
    for effect in (3.0, 2.0, 1.5, 1.0, 0.75):
        cells = [f"{n}: {power(effect, tests, n):.1%}" for tests in (1, 3, 10) if (n := seeds_needed(effect, tests))]
        print(f"| {effect:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
