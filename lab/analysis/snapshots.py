"""Snapshots of a run: what monitoring stored of a step, RUN/<kind>/step_00000100.npz, kind `phases`, `attention`, `state_spaces`
or `experts`.

phases      step, tokens (B, L), lengths (B,), prompt_len, theta (layers, B, L, H), omega and kappa (layers, H), r (layers, B, L)
attention   step, tokens (L,), prompt_len, attention (layers, H, L, L) in float16: of the first sample, without its padding
            of an encoder-decoder also cross_attention (layers, H, L, S), encoder_attention (layers, H, S, S), source (S,), and of each of
            the two its layers, such as cross_attention_layers
            both: layers, their numbers in the model

state_spaces    step; of the first sample's tokens, up to 512 of them: tokens (L,), labels (L,) as text, text whether the task is one,
                prompt_len; layers, the numbers i of those that are state spaces; and for each of these, c of its channels, evenly spaced in
                the order of their dt:
                eigenvalues_i (c, n, 2), pairs (re, im); S5: (1, n, 2), all states, which its channels share
                dt_i (c, 1), S5 (1, n); Mamba: the median over all real tokens of the samples
                dt_counts_i (80,), how many dt lie in each bin of lab.analysis.state_spaces.DT_EDGES, over all channels and real tokens
                channels_i (c,), their numbers
                kernel_i (1 or 2, c, L), not of Mamba; token_dt_i (L, c), B_i and C_i (L, n), of Mamba alone

experts     step, tokens (how many were looked at), usage (layers, E), the share of their choices that each expert has, probability
            (layers, E), the mean of the router's softmax; layers, their numbers in the model

A layer with fewer heads than another is filled up with NaN. prompt_len: the tokens up to the delimiter, it included; 0 where the task has
none. numpy alone: plots need neither torch nor Lightning.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from lab.files import write_bytes
from lab.training.run import RunError

RECORDED = {
    "phases": "phases",
    "attention": "attention weights",
    "state_spaces": "eigenvalues and time steps",
    "experts": "the choice of experts",
}


def write_snapshot(run: str | Path, kind: str, step: int, **arrays: Any) -> None:
    content = io.BytesIO()
    np.savez_compressed(content, step=step, **arrays)
    write_bytes(Path(run, kind) / f"step_{step:08}.npz", content.getvalue())


def snapshot_steps(run: str | Path, kind: str) -> dict[int, Path]:
    """The stored snapshots by step, in order."""
    return {int(file.stem.removeprefix("step_")): file for file in sorted(Path(run, kind).glob("step_*.npz"))}


def read_snapshot(run: str | Path, kind: str, step: int | None = None) -> dict[str, np.ndarray]:
    """The snapshot nearest to `step`, the earlier of two; None: the last one. RunError where there is none, or it cannot be read."""
    if not Path(run).is_dir():
        raise RunError(f"{run}: there is no such run folder")
    found = snapshot_steps(run, kind)
    if not found:
        missing = f"callbacks.{kind}.interval writes them, for models that record {RECORDED[kind]}"
        also = ", with callbacks.attention.maps=true" if kind == "attention" else ""
        raise RunError(f"{run} has no snapshots in {kind}/; {missing}{also}")
    file = found[max(found) if step is None else min(found, key=lambda known: (abs(known - step), known))]
    try:
        with np.load(file, allow_pickle=False) as stored:
            return dict(stored)
    except (OSError, ValueError, BadZipFile) as error:
        raise RunError(f"{file} cannot be read: {error}") from error
