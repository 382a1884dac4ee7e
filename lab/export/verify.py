"""The files give the model's logits: loaded in a process that has no lab, at batches and lengths other than the recorded ones.

Graphs that are right at the size they were recorded with and wrong at others are the rule, not the exception: a loop over time that was
unrolled, a batch of 1 taken for a constant, a mask of fixed size. So every graph runs at several batches and lengths, and the step runs
token by token, from a prefill and from the state before the first token.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lab.export.graphs import EXAMPLE
from lab.models import SequenceModel
from lab.training.run import RunError

RTOL, ATOL = 1e-4, 1e-4  # of the logits, float32
SOURCE_OF = "source-of "  # before the name of a case: the source that goes with it
TIMEOUT = 1800  # seconds for all cases; what is usual is a few


def verify(model: SequenceModel, manifest: Path, document: Mapping[str, Any], longest: int) -> tuple[bool | None, dict[str, Any]]:
    """Runs the files that the manifest names and compares their logits with the model's. RunError with the figure where they differ.

    longest: the greatest length to try. Returns whether every graph refuses more than max_len tokens (None: there is no max_len), and
    what the manifest says about the comparison.
    """
    names = [graph["name"] for graph in document["graphs"]]
    from_nothing = "encoder" in names or any(spec["initial"] is not None for spec in document["state"])
    generator = torch.Generator().manual_seed(0)
    tokens = {
        f"{kind}.{k}.{B}x{L}": torch.randint(0, document["vocabulary"]["size"], (B, L), generator=generator)
        for kind, k, B, L in cases(names, longest, from_nothing)
    }
    max_len = document["limits"]["max_len"]
    too_long = {f"refuse.{name}": torch.zeros(1, max_len + 1, dtype=torch.long) for name in names if max_len is not None}
    sources = {}
    if "encoder" in names:
        del too_long["refuse.encoder"]
        limit = document["limits"]["max_source_len"] or 9
        for i, (case, inputs) in enumerate((tokens | too_long).items()):
            S = min(limit, (6, 1, 9, 4)[i % 4])
            sources[case] = torch.randint(
                0, source_vocabulary(model, document["vocabulary"]["size"]), (len(inputs), S), generator=generator
            )
    results = run_isolated(manifest, tokens | too_long | {f"{SOURCE_OF}{case}": source for case, source in sources.items()})
    with torch.no_grad():
        rows = [compare(case, t, results[case], model(t, source=sources.get(case)).numpy()) for case, t in tokens.items()]
    refused = all(bool(results[case]) for case in too_long) if too_long else None
    return refused, {"tolerance": {"absolute": ATOL, "relative": RTOL}, "cases": rows}


def source_vocabulary(model: SequenceModel, otherwise: int) -> int:
    embedding = getattr(getattr(model, "encoder", None), "embedding", None)
    return int(getattr(embedding, "num_embeddings", otherwise))


def cases(names: list[str], longest: int, from_nothing: bool) -> Iterator[tuple[str, int, int, int]]:
    """(what runs, tokens in the prefill, batch, length): batches 1 to 5, lengths 1, odd, even, the example's, and the longest one."""
    for name in ("sequence", "prefill", "decoder"):
        if name in names:
            sizes = [(1, 1), (3, 1), (1, 5), EXAMPLE, (5, 12), (2, longest)]
            yield from ((name, 0, B, L) for B, L in sorted({(B, L) for B, L in sizes if L <= longest}))
    if "step" in names:
        streams = [(0, 1, 6), (0, 3, 3), (1, 1, 9), (min(5, longest - 1), 4, 10), (max(1, longest - 3), 1, longest)]
        yield from (
            ("stream", k, B, L) for k, B, L in sorted({(k, B, min(L, longest)) for k, B, L in streams}) if k < L and (k or from_nothing)
        )


def run_isolated(manifest: Path, tokens: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """What isolated.py answers to the cases."""
    inputs, results = manifest.with_name("cases.npz"), manifest.with_name("results.npz")
    np.savez(inputs, allow_pickle=False, **{case: value.numpy() for case, value in tokens.items()})
    words = [sys.executable, "-I", str(Path(__file__).with_name("isolated.py")), str(manifest), str(inputs), str(results)]
    words += [folder for folder in sys.path if folder]  # -I leaves out what `pip install --user` and PYTHONPATH bring
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise RunError(f"the files gave no logits within {TIMEOUT:,} seconds; nothing was written") from None
    if done.returncode != 0:
        reason = ([line.strip() for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"])[-1]
        raise RunError(f"the files cannot be used in a process without lab: {reason}")
    with np.load(results) as answers:
        return {case: answers[case] for case in answers.files}


def compare(case: str, tokens: torch.Tensor, got: np.ndarray, want: np.ndarray) -> dict[str, Any]:
    """The row of the manifest for one case."""
    kind, prefilled, _ = case.split(".")
    B, L = tokens.shape
    what = f"the step graph, after {prefilled} tokens," if kind == "stream" else f"the {kind} graph"
    where = f"{what} at batch {B}, length {L}"
    if got.dtype.kind == "U":
        raise RunError(f"{where} fails: {got}; nothing was written")
    if got.shape != want.shape:
        raise RunError(f"{where} gives logits {got.shape}, the model {want.shape}; nothing was written")
    difference = np.abs(got - want)
    if not (difference <= ATOL + RTOL * np.abs(want)).all():  # NaN is not within it either
        raise RunError(
            f"{where} differs from the model by {difference.max():.3g}; allowed are {ATOL:g} + {RTOL:g} |logit|; nothing was written"
        )
    row: dict[str, Any] = {"graph": "step" if kind == "stream" else kind, "batch": B, "length": L}
    return row | ({"prefilled": int(prefilled)} if kind == "stream" else {}) | {"largest_difference": float(difference.max())}
