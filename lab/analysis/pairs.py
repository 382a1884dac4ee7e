"""The pairs of models of a comparison: whether they differ by a score, seed by seed, and a sentence in plain words. It imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lab.analysis.statistics import (
    ALPHA,
    MOST_SEEDS,
    effect_size,
    fewest_seeds,
    holm,
    in_figures,
    p_of,
    paired_interval,
    seeds_needed,
    smallest_p,
)

HIGHER = ("accuracy", "token_accuracy", "exact_match", "exact_match_free")
LOWER = ("ce_loss", "loss", "bits_per_byte", "perplexity")
"""Scores of which it is known what is better; of all others, such as those that a model adds, only what is higher."""


def pairs(
    scores: Mapping[str, Mapping[int, float]], planned: Sequence[tuple[str, str]], metric: str, length: int, seeds: int
) -> list[dict[str, Any]]:
    """Those of the planned pairs that have a seed in common. scores: {model: {seed: score}} of those that are there. seeds: how many there
    should be.

    {a, b, metric, length, n, difference (a - b), low, high, p, p_holm, effect, text}; p is None of one seed, p_holm also where a seed is
    missing, effect of fewer than three and where all differences are equal. Holm's correction is over all that are planned, of which those
    that lack a seed count as p = 1.
    """
    found: list[dict[str, Any]] = []
    for a, b in planned:
        mine, theirs = scores.get(a, {}), scores.get(b, {})
        differences = tuple(mine[seed] - theirs[seed] for seed in sorted(mine) if seed in theirs)
        if differences:
            n, mean, low, high = paired_interval(differences)
            line: dict[str, Any] = {"a": a, "b": b, "metric": metric, "length": length, "n": n}
            line |= {"difference": mean, "low": low, "high": high}
            line |= {"p": p_of(differences) if n > 1 else None, "p_holm": None, "effect": effect_size(differences)}
            found.append(line)
    tested = [line for line in found if line["n"] == seeds > 1]  # what a pair lacks may be those that do badly, and must help no other
    absent = [1.0] * (len(planned) - len(tested))
    corrected = holm([line["p"] for line in tested] + absent)
    for line, p_holm in zip(tested, corrected, strict=False):
        line["p_holm"] = p_holm
    for line in found:
        line["text"] = _sentence(line, len(planned), seeds)
    return found


def _sentence(line: Mapping[str, Any], tests: int, seeds: int) -> str:
    """tests: how many pairs there are. seeds: how many of each there should be."""
    a, b, n, name = line["a"], line["b"], line["n"], line["metric"].partition("/")[2]
    if n < seeds:  # those that fail may be those that do badly
        return f"{a} and {b}: cannot tell, for of {seeds} seeds {n} {'is' if n == 1 else 'are'} paired"
    if n < 2:
        return f"{a} and {b}: cannot be significant with 1 seed, which has no spread"
    if line["p_holm"] <= ALPHA:
        a_is_it = (line["difference"] < 0) == (name in LOWER)
        low, high = sorted(end if (line["difference"] > 0) else -end for end in (line["low"], line["high"]))
        more = "better" if name in (*HIGHER, *LOWER) else "higher"
        first, second = (a, b) if a_is_it else (b, a)
        return f"{first} is {more} than {second} by {in_figures(abs(line['difference']), low, high)}"
    if tests * smallest_p(n) > ALPHA:
        corrected = f", {min(1.0, tests * smallest_p(n)):.3g} for one of {tests} pairs" if tests > 1 else ""
        smallest = f"the smallest two-sided p is {smallest_p(n):.3g}{corrected}"
        fewest = fewest_seeds(tests)
        return f"{a} and {b}: cannot be significant with {n} seeds ({smallest}); it takes {fewest or 'fewer pairs'}"
    return f"{a} and {b}: not distinguishable with {n} seeds; {_needed(line, tests)}"


def _needed(line: Mapping[str, Any], tests: int) -> str:
    if line["effect"] is None:  # equal differences that are not 0 have the smallest p
        return "they differ in none"
    needed = seeds_needed(line["effect"], tests)
    if needed is None:
        return f"more than {MOST_SEEDS:,} would be needed"
    return f"about {max(needed, line['n'] + 1)} would be needed"
