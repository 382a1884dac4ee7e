"""Exported files against the model, with every model of configs/model, and with every kind of state."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from export_checks import GRAPHS, at_once, check, export  # noqa: F401 (fixtures)
from test_models import KINDS, V, from_yaml, lattice
from torch import nn

import lab
from lab.export import FORMATS
from lab.export.graphs import graphs
from lab.mixers import Attention, Mixer, Output
from lab.models import Stack
from lab.training import RunError

# Parity. TorchScript is quick; the other formats take 10 to 20 seconds, so that only one model of each is in the fast suite.


def in_every_format(names):
    fast = {("torchscript", name) for name in names}
    every = [(format, name) for format in FORMATS for name in names]
    return pytest.mark.parametrize(("format", "name"), [pytest.param(*c, marks=() if c in fast else pytest.mark.slow) for c in every])


@pytest.fixture
def isolated_unless_quick(format, request):
    """A new process for each format but the quick one, whose isolation has tests of its own."""
    if format == "torchscript":
        request.getfixturevalue("at_once")


@pytest.mark.usefixtures("isolated_unless_quick")
@in_every_format(KINDS)
def test_yaml_exports(format, name, tmp_path):
    check(export(from_yaml(name), format, tmp_path, 32))


MIXERS = {
    "h3_heads": partial(lab.mixers.H3Layer, d_head=2, d_state=4),
    "h3_mamba": partial(lab.mixers.H3Layer, d_state=4, ssm_layer=lab.mixers.MambaLayer),
    "mamba_s4d": partial(lab.mixers.MambaLayer, ssm_layer=partial(lab.mixers.S4DLayer, d_state=4)),
    "gated_mlp_alone": lab.mixers.GatedMLP,
}


@pytest.mark.usefixtures("isolated_unless_quick")
@in_every_format(list(MIXERS))
def test_slots_export(format, name, tmp_path):
    check(export(Stack(V, 8, 1, MIXERS[name], d_ff=0, position="none"), format, tmp_path))


LATTICES = {
    "no_drive": {"drive": False},
    "gain": {"phase_mode": "gain"},
    "literal": {"phase_mode": "literal", "boundary": "periodic"},
    "no_limit": {"position": "none", "dt": 0.5},
}


@pytest.mark.usefixtures("isolated_unless_quick")
@in_every_format(list(LATTICES))
def test_lattice_exports(format, name, tmp_path):
    manifest = export(lattice(**LATTICES[name]), format, tmp_path)
    check(manifest)
    assert manifest["limits"] == (
        {"max_len": None, "max_len_enforced": None} if name == "no_limit" else {"max_len": 24, "max_len_enforced": True}
    )


def test_pt2_exports_in_the_fast_suite_too(tmp_path):
    check(export(Stack(V, 16, 1, partial(lab.mixers.Lattice, n_heads=2), max_len=24), "pt2", tmp_path))
    program = torch.export.load(tmp_path / "model.pt2").module()
    with pytest.raises(AssertionError, match="Guard failed"):
        program(torch.zeros(1, 25, dtype=torch.long))


@pytest.mark.slow
@pytest.mark.parametrize("phase_mode", ["gain", "literal"])  # wave: the run of test_export_command.py, in the fast suite
def test_phase_modes_export_to_onnx(phase_mode, tmp_path):
    mixer = partial(lab.mixers.Lattice, n_heads=2, phase_mode=phase_mode, n_steps=2)
    check(export(Stack(V, 8, 1, mixer, max_len=12), "onnx", tmp_path, 12))


# Any state is served: its layout is seen in the tensors that the model returns.


class Turning(Mixer):
    """h_t = h_{t-1} + x_t e^{i phase}: a single complex tensor is the state."""

    def __init__(self, d_model: int, state: str = "complex") -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.linspace(0, 3, d_model))
        self.kind = state

    def mix(self, x, state, lengths, want):
        h = (x * torch.polar(torch.ones_like(self.phase), self.phase)).cumsum(1)
        if state is not None:
            h = h + state[:, None]
        return Output(torch.tanh(h.real - h.imag), state=h[:, -1])

    def init_state(self, batch_size, device=None, dtype=None):
        match self.kind:
            case "none":
                return None
            case "one way":
                raise NotImplementedError("no recurrent form")
        return torch.full((batch_size, len(self.phase)), -torch.inf if self.kind == "infinite" else 0, dtype=torch.complex64)


def turning(state: str) -> Stack:
    return Stack(V, 16, 1, partial(Turning, state=state), position="none")


def test_a_complex_state_is_real_outside(tmp_path, at_once):
    manifest = export(turning("complex"), "torchscript", tmp_path)
    check(manifest)
    assert manifest["state"][1] == {"name": "layers.0", "shape": ["batch", 16, 2], "dtype": "float32", "initial": 0}


def test_initial_values():
    assert graphs(turning("complex")).initial == (0, 0.0)
    assert graphs(turning("none")).initial is None  # a stream begins with a prefill
    start = graphs(turning("infinite")).initial[1]
    assert np.array_equal(np.asarray(start, "float32"), np.tile(np.float32([-np.inf, 0]), (16, 1))) and json.dumps(start, allow_nan=False)


def test_a_model_without_steps_has_the_sequence_graph_alone(tmp_path, at_once):
    manifest = export(turning("one way"), "torchscript", tmp_path)
    assert [graph["name"] for graph in manifest["graphs"]] == ["sequence"] and manifest["state"] == []
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.ts.pt", "model.ts.pt.json"]


def test_lengths_that_cannot_be_free(tmp_path):
    with pytest.raises(RunError, match="built with max_len=3; a graph of free length needs 4 or more"):
        graphs(Stack(V, 16, 1, partial(Attention, n_heads=2), max_len=3))

    class Halving(Turning):
        def mix(self, x, state, lengths, want):
            out = super().mix(x, state, lengths, want)
            return out._replace(state=torch.zeros(x.shape[0], x.shape[1] // 2))

    with pytest.raises(
        RunError, match=r"axis 1 of next.layers.0 has the sizes \(3, 3, 2\) at \(batch, length\) \(\(2, 7\), \(3, 7\), \(2, 5\)\)"
    ):
        graphs(Stack(V, 16, 1, partial(Halving, state="none"), position="none"))
