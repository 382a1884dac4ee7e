"""PhaseMesh: positions as phases of coupled oscillators, from the start and continued."""

from __future__ import annotations

import math

import pytest
import torch

from lab.layers import PhaseMesh
from lab.models import initialise


@pytest.fixture
def mesh():
    """Coupled strongly enough to matter."""
    mesh = PhaseMesh(6, n_oscillators=5, seq_len=64)
    initialise(mesh, 0)
    with torch.no_grad():
        mesh.K.mul_(500)
    return mesh


def test_the_formula(mesh):
    embedding, last = mesh(40)
    assert embedding.shape == (1, 40, 6) and last.shape == (1, 5) and last.dtype == torch.float64
    omega, K, W, phi = mesh.omega.tolist(), mesh.K.tolist(), mesh.proj.weight, [0.0] * 5
    for t in range(40):
        torch.testing.assert_close(embedding[0, t], W @ torch.tensor([*map(math.cos, phi), *map(math.sin, phi)]))
        pull = [sum(K[p][q] * math.sin(phi[q] - phi[p]) for q in range(5)) for p in range(5)]
        phi = [phi[p] + max(-math.pi, min(math.pi, omega[p] + math.tanh(pull[p]))) for p in range(5)]
    torch.testing.assert_close(last[0].sin(), torch.tensor(phi, dtype=torch.float64).sin())


def test_it_starts_slow_to_fast_and_hardly_coupled():
    mesh = PhaseMesh(6, n_oscillators=4, seq_len=2048)
    first, second, third, last = mesh.omega.tolist()
    assert (first, last) == pytest.approx((2 * math.pi / 2048, math.pi / 2)) and second / first == pytest.approx(last / third)
    assert 0 < mesh.K.abs().max() < 0.01


def test_rows_continue_from_where_they_stand(mesh):
    whole, _ = mesh(60)
    start, _ = mesh(20)
    assert torch.equal(start, whole[:, :20])
    lengths = torch.tensor([0, 7, 20])
    _, phi = mesh(20, lengths=lengths)
    more, phi = mesh(10, phi, lengths=lengths // 2)
    more, last = mesh(20, phi)
    for row, done in enumerate((0, 10, 30)):
        torch.testing.assert_close(more[row], whole[0, done : done + 20])
        torch.testing.assert_close(last[row].cos(), mesh(done + 20)[1][0].cos())


def test_single_steps_stay_with_the_whole_sequence_far_out(mesh):
    whole, _ = mesh(20_010)
    _, phi = mesh(19_000)
    for _ in range(1010):
        one, phi = mesh(1, phi)
    torch.testing.assert_close(one[0, 0], whole[0, -1])


def test_gradients_reach_everything_and_nothing_is_kept(mesh):
    mesh(20)[0].square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in mesh.parameters())
    before = mesh(20)[0]
    with torch.no_grad():
        mesh.omega.mul_(1.1)
    assert (mesh(20)[0] - before).abs().max() > 1e-3


def test_under_autocast_and_in_half_precision_the_phases_keep_their_digits(mesh):
    want, last = mesh(500)
    with torch.autocast("cpu", torch.bfloat16):
        got, phi = mesh(500)
    assert torch.equal(phi, last) and got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.02, atol=0.02)


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="PhaseMesh: n_oscillators=0 and seq_len=8 must be positive"):
        PhaseMesh(4, 0, 8)


class Positions(torch.nn.Module):
    def __init__(self, mesh):
        super().__init__()
        self.mesh = mesh

    def forward(self, x, phi):
        """x (B, L, D), phi (B, P)"""
        embedding, last = self.mesh(x.shape[1], phi)
        return x + embedding, last


@pytest.mark.filterwarnings("ignore")  # as lab.export does: tracing warns of much
def test_an_exported_one_takes_any_length(mesh):
    module, phi = Positions(mesh), torch.rand(2, 5, dtype=torch.float64)
    example, free = torch.randn(2, 9, 6), {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    with torch.no_grad():
        exported = torch.export.export(module, (example, phi), dynamic_shapes={"x": free, "phi": {0: free[0]}}).module()
        traced = torch.jit.trace(module, (example, phi), check_trace=False)
        for B, L in ((1, 1), (2, 9), (3, 70)):
            x, phi = torch.randn(B, L, 6), torch.rand(B, 5, dtype=torch.float64)
            for graph in (exported, traced):
                torch.testing.assert_close(graph(x, phi), module(x, phi))


def test_embeddings_start_as_large_as_those_of_tokens():
    mesh = PhaseMesh(256)
    initialise(mesh, 0)
    assert 0.015 < mesh(2048)[0].std().item() < 0.025
