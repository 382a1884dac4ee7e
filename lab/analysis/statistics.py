"""What the scores of several seeds say: a mean, and how far it may be from that of all seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

LEVEL = 0.95
METHOD = "mean over the seeds and its 95 % interval by Student's t"
"""Not the bootstrap: of three seeds it has ten different means, and its interval holds the true one in two cases of three."""


class Estimate(NamedTuple):
    """The mean of n values; low and high are None for fewer than two."""

    n: int
    mean: float
    low: float | None
    high: float | None


def estimate(values: Sequence[float]) -> Estimate:
    """mean +- t s / sqrt(n), t of n - 1 degrees of freedom, s the sample standard deviation. Equal values give an interval without width.

    The values are taken as draws of a normal distribution. Where they are near a border, such as an accuracy of 1, the interval may go
    beyond it.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(len(values), mean, None, None)
    from scipy import stats

    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return Estimate(len(values), mean, mean - half, mean + half)
