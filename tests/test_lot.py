"""The lattice oscillator transformer against independent float64 code, and the failures its public relatives had."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from lab.analysis.conformance import randomise
from lab.mixers import Attention, Lattice
from lab.mixers.lattice import most_square, neighbour_weights, order_parameter
from lab.models import Stack, initialise
from lab.ops import kuramoto_scan

V, L = 11, 12
TOKENS = torch.randint(0, V, (3, L), generator=torch.Generator().manual_seed(0))


def stack(mixer=Lattice, n_layers=2, **options) -> Stack:
    model = Stack(V, 32, n_layers, partial(mixer, n_heads=8, **options), max_len=L)
    initialise(model, 0)
    return model.eval()


def lattice(**options) -> Lattice:
    """float64, randomised; phases far apart, strong coupling and bias, so that every term matters."""
    mixer = Lattice(24, 6, lattice_shape=[2, 3], dt=0.3, coupling=0.7, alpha=1.5, **options)
    initialise(mixer, 3)
    randomise(mixer, 4)
    return mixer.double().eval()


# Formulas


def brute_force_weights(shape, neighborhood, boundary):
    """Walks the offsets from every cell; of several ways to the same head the shortest counts."""
    R, C = shape
    W = torch.zeros(R * C, R * C, dtype=torch.float64)
    for r in range(R):
        for c in range(C):
            for dr in (-1, 0, 1):
                for dc in (-1, 0, 1):
                    if neighborhood == "von_neumann" and dr and dc:
                        continue
                    r2, c2 = r + dr, c + dc
                    if boundary == "periodic":
                        r2, c2 = r2 % R, c2 % C
                    if 0 <= r2 < R and 0 <= c2 < C and (r2, c2) != (r, c):
                        i, j = r * C + c, r2 * C + c2
                        W[i, j] = max(W[i, j], math.exp(-math.hypot(dr, dc)))
    return W


@pytest.mark.parametrize("boundary", ["open", "periodic"])
@pytest.mark.parametrize("neighborhood", ["moore", "von_neumann"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (1, 5), (2, 2), (2, 4), (4, 2), (3, 3), (3, 4), (5, 6)], ids=str)
def test_neighbour_weights(shape, neighborhood, boundary):
    W = neighbour_weights(shape, neighborhood, boundary)
    torch.testing.assert_close(W.double(), brute_force_weights(shape, neighborhood, boundary), rtol=1e-7, atol=0)


def test_neighbour_weights_of_the_specification():
    W = neighbour_weights((2, 4), "moore", "open")
    assert sorted({round(w, 4) for w in W.flatten().tolist()}) == [0.0, 0.2431, 0.3679]
    assert (W > 0).sum(1).tolist() == [3, 5, 5, 3, 3, 5, 5, 3]
    assert [most_square(n) for n in (1, 2, 7, 8, 12, 16)] == [(1, 1), (1, 2), (1, 7), (2, 4), (3, 4), (4, 4)]


def dense(mixer, x):
    """Attention of the mixer by loops, with the (L, L) bias written out: y (B, L, D) and the phases (B, L, H)."""
    H, d = mixer.n_heads, mixer.d_head
    omega, kappa, alpha, theta0 = (t.detach() for t in (mixer.omega, mixer.kappa, mixer.alpha, mixer.theta0))
    W = neighbour_weights((2, 3), "moore", "open").double()

    def advance(theta, u):
        pull = torch.stack([sum(W[i, j] * torch.sin(theta[j] - theta[i]) for j in range(H)) for i in range(H)])
        return theta + mixer.dt * (omega + u + kappa * pull)

    rows, phases = [], []
    for row in x:
        length = len(row)
        if mixer.phase_mode == "wave":
            drive = row @ mixer.drive.weight.T if mixer.drive is not None else torch.zeros(length, H, dtype=x.dtype)
            theta = [theta0]
            for u in drive[:-1]:
                theta.append(advance(theta[-1], u))
            theta = torch.stack(theta)
        else:
            last = theta0
            for _ in range(mixer.n_steps):
                last = advance(last, 0)
            theta = last.expand(length, H)
        heads = []
        for h in range(H):
            q, k, v = (row @ f.weight[h * d : (h + 1) * d].T for f in (mixer.q, mixer.k, mixer.v))
            scores = q @ k.T / math.sqrt(d)
            if mixer.phase_mode == "wave":
                scores = scores + alpha[h] * torch.cos(theta[:, None, h] - theta[None, :, h])
            elif mixer.phase_mode == "gain":
                scores = scores * (1 + alpha[h] * torch.cos(theta[0, h]))
            else:
                scores = scores + alpha[h] * torch.cos(theta[0, h])
            mask = torch.ones(length, length, dtype=torch.bool).triu(1)
            heads.append(torch.softmax(scores.masked_fill(mask, -math.inf), -1) @ v)
        rows.append(torch.cat(heads, -1) @ mixer.o.weight.T)
        phases.append(theta)
    return torch.stack(rows), torch.stack(phases)


@pytest.mark.parametrize("options", [{}, {"drive": False}, {"phase_mode": "gain"}, {"phase_mode": "literal"}], ids=str)
@torch.no_grad()
def test_attention_with_the_bias_written_out(options):
    mixer = lattice(**options)
    x = torch.randn(2, 10, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    y, theta = dense(mixer, x)
    out = mixer(x, want=("record", "losses"))
    torch.testing.assert_close(out.y, y, rtol=1e-6, atol=1e-7)  # W is held in float32
    turn = torch.remainder(out.record["theta"] - theta + math.pi, 2 * math.pi) - math.pi
    assert turn.shape == (2, 10, 6) and turn.abs().max() < 1e-6
    r = torch.exp(1j * theta).mean(-1).abs()
    torch.testing.assert_close(out.record["sync_order"], r, rtol=0, atol=1e-6)
    torch.testing.assert_close(out.losses["sync"], 1 - r.mean(), rtol=0, atol=1e-6)
    torch.testing.assert_close(mixer.derived_metrics(out.losses)["sync_order"], r.mean(), rtol=0, atol=1e-6)
    omega = mixer.omega.tolist()
    mean = sum(omega) / len(omega)
    variance = sum((w - mean) ** 2 for w in omega) / len(omega)
    want = math.exp(-variance / ((1.1 - 0.9) ** 2 / 12))
    assert out.losses["diversity"].item() == pytest.approx(want, rel=1e-4)


def test_order_parameter():
    theta = torch.linspace(0, 2 * math.pi, 5, dtype=torch.float64)[:4]
    assert order_parameter(torch.full((3, 8), 1.234)).tolist() == pytest.approx([1, 1, 1])
    assert order_parameter(theta).item() == pytest.approx(0, abs=1e-12)
    assert order_parameter(torch.tensor([0.0, math.pi / 2])).item() == pytest.approx(math.sqrt(0.5))


def test_the_order_parameter_has_a_finite_gradient_at_zero():
    angle = torch.linspace(0.1, 1.5, 200)[:, None]
    theta = torch.cat([angle, -angle, math.pi - angle, angle - math.pi], 1).requires_grad_()  # opposed pairs: r = 0 but for rounding
    r = order_parameter(theta)
    assert (r == 0).any() and (r < 1e-6).all()
    r.sum().backward()
    assert torch.isfinite(theta.grad).all()


def test_losses_are_means_over_layers_and_real_tokens():
    model = stack(n_layers=3)
    lengths = torch.tensor([12, 5, 1])
    out = model(TOKENS, lengths=lengths, want=("losses", "record"))
    r = [layer[b, t] for layer in out.record["sync_order"] for b in range(3) for t in range(lengths[b])]
    assert out.losses["sync"].item() == pytest.approx(1 - sum(r).item() / len(r), abs=1e-6)
    alone = [block.mixer(torch.zeros(1, 1, 32), want=("losses",)).losses["diversity"] for block in model.blocks]
    assert out.losses["diversity"].item() == pytest.approx(sum(alone).item() / 3)
    assert len({a.item() for a in alone}) == 3, "layers are independent lattices"


def test_phases_start_at_theta0_before_the_first_drive():
    model = stack()
    for layer, theta in zip(model.mixers, model(TOKENS, want=("record",)).record["theta"], strict=True):
        assert torch.equal(theta[:, 0], layer.theta0.expand(3, -1))
        assert not torch.allclose(theta[:, 1], theta[:1, 1]), "the drive does not reach the phases"
    (still, _) = stack(drive=False)(TOKENS, want=("record",)).record["theta"]
    assert torch.equal(still, still[:1].expand(3, -1, -1)), "without drive the phases do not depend on the content"


def test_phases_that_rows_share_are_computed_once(monkeypatch):
    sizes = []

    def spy(theta0, drive, *rest):
        sizes.append(tuple(drive.shape))
        return kuramoto_scan(theta0, drive, *rest)

    monkeypatch.setattr("lab.mixers.lattice.kuramoto_scan", spy)
    x = torch.randn(5, 7, 32)
    for options in ({}, {"drive": False}, {"phase_mode": "gain"}, {"phase_mode": "literal", "n_steps": 3}):
        Lattice(32, 8, **options)(x, lengths=torch.arange(1, 6), want=("losses",))
    assert sizes == [(5, 7, 8), (1, 7, 8), (1, 8, 8), (1, 3, 8)]


# The null control and the failures of the public code


@pytest.mark.parametrize(("dtype", "alpha", "atol"), [(torch.float32, 0.1, 1e-6), (torch.float64, 5.0, 1e-12)])
@torch.no_grad()
def test_literal_equals_vanilla(dtype, alpha, atol):
    plain = stack(Attention).to(dtype)
    want = plain(TOKENS)
    for mode in ("literal", "gain", "wave"):
        model = stack(phase_mode=mode, alpha=alpha).to(dtype)
        assert not model.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
        for seed in range(3):  # whatever the phases are
            difference = (model(TOKENS) - want).abs().max()
            assert difference < atol if mode == "literal" else difference > 1e-4, f"{mode}: {difference}"
            for layer in model.mixers:
                layer.theta0.uniform_(0, 2 * math.pi, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mode", ["wave", "gain", "literal"])
def test_phases_and_losses_have_gradients(mode):
    model = stack(phase_mode=mode, n_layers=1)
    out = model(TOKENS[:, :-1], want=("losses",))
    mixer = model.mixers[0]
    parameters = {"omega": mixer.omega, "kappa": mixer.kappa, "alpha": mixer.alpha}
    if mode == "wave":
        parameters["drive"] = mixer.drive.weight
    cross_entropy = F.cross_entropy(out.y.flatten(0, 1), TOKENS[:, 1:].flatten())

    def sizes(loss):
        grads = torch.autograd.grad(loss, parameters.values(), retain_graph=True, materialize_grads=True)
        return {name: grad.abs().max().item() for name, grad in zip(parameters, grads, strict=True)}

    moved_by_logits = sizes(cross_entropy)
    for name, size in moved_by_logits.items():
        assert (size < 1e-6) if mode == "literal" else (size > 1e-6), f"{name}: {size}"
    by_sync, by_diversity = sizes(out.losses["sync"]), sizes(out.losses["diversity"])
    assert by_sync["omega"] > 1e-4 and by_sync["kappa"] > 1e-4 and by_sync["alpha"] == 0
    assert by_diversity["omega"] > 1e-4 and by_diversity["kappa"] == 0
    assert mode != "wave" or by_sync["drive"] > 1e-6


def test_the_losses_move_what_they_are_for():
    model = stack()
    optimizer = torch.optim.Adam([p for m in model.mixers for p in (m.omega, m.kappa)], lr=0.01)
    before = model(TOKENS, want=("losses",)).losses
    for _ in range(20):
        optimizer.zero_grad()
        losses = model(TOKENS, want=("losses",)).losses
        losses["sync"].backward()
        optimizer.step()
    assert model(TOKENS, want=("losses",)).losses["sync"] < before["sync"] - 0.01


def test_positions_are_a_table_that_is_never_redrawn():
    model = stack()
    table = model.position.weight.clone()
    model.train()(TOKENS)
    assert torch.equal(model.position.weight, table)
    with pytest.raises(ValueError, match="Stack: the sequence needs length 13, but the model was built with max_len=12"):
        model(torch.zeros(1, L + 1, dtype=torch.long))
    free = Stack(V, 32, 1, partial(Lattice, n_heads=8), max_len=L, position="none")
    assert free.max_len is None and free(torch.zeros(1, 3 * L, dtype=torch.long)).shape == (1, 3 * L, V)


def test_weights_are_constants_of_the_configuration():
    names = set(stack().state_dict())
    assert "blocks.0.mixer.theta0" in names and not any(name.endswith(".W") for name in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lattice_shape": [2, 3]}, r"lattice_shape=\[2, 3\] must be two sides whose product is n_heads=8"),
        ({"lattice_shape": [8]}, r"lattice_shape=\[8\]"),
        ({"lattice_shape": [-2, -4]}, r"lattice_shape=\[-2, -4\]"),
        ({"phase_mode": "waves"}, "phase_mode='waves'; expected wave, gain or literal"),
        ({"neighborhood": "hex"}, "neighborhood='hex'; expected moore or von_neumann"),
        ({"boundary": "closed"}, "boundary='closed'; expected open or periodic"),
        ({"init_freq_range": [1.0, 1.0]}, r"init_freq_range=\[1.0, 1.0\]; expected \[low, high\] with low < high"),
        ({"n_heads": 7}, "d_model=32 must be a multiple of n_heads=7"),
    ],
)
def test_wrong_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Lattice(32, **{"n_heads": 8, **options})


def test_the_matched_baseline_has_as_many_parameters():
    """At the documented size; the bare Transformer lacks the 0.24 % of the drive."""

    def count(mixer, d_ff=None, **options):
        with torch.device("meta"):
            model = Stack(1000, 256, 6, partial(mixer, n_heads=8, **options), d_ff=d_ff, max_len=128)
        return sum(p.numel() for p in model.parameters())

    wave, matched, bare = count(Lattice), count(Attention, d_ff=4 * 256 + 8 // 2), count(Attention)
    assert abs(wave - matched) / wave < 1e-4
    assert 0.002 < (wave - bare) / wave < 0.003
    for mode in ("gain", "literal"):
        other = count(Lattice, phase_mode=mode)
        assert abs(other - bare) / other < 1e-4
