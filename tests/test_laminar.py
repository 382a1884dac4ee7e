"""LaminarNet: against its definition step by step, the properties of every model at many ratios, precision and training."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from test_models import V, loss_and_gradients, random_tokens

from lab.analysis import conformance
from lab.models import LaminarNet, LaminarNetConfig, initialise

RATIOS = [(1,), (1, 4), (1, 4, 16), (1, 2, 6)]


def small(ratios=(1, 4), n_layers: int = 2, **options) -> LaminarNet:
    sizes = {"vocab_size": V, "d_model": 16, "n_heads": 2, "n_layers": n_layers, "d_ff": 16, "n_oscillators": 3, "seq_len": 64}
    return LaminarNet(LaminarNetConfig(n_strata=len(ratios), strata_ratios=ratios, **(sizes | options)))


def random(model):
    initialise(model, 0)
    conformance.randomise(model, 0)
    return model.eval()


# Against the definition


def written_out(model: LaminarNet, tokens: torch.Tensor) -> torch.Tensor:
    """Token by token and row by row, from the parameters alone."""
    p, c, ratios = dict(model.named_parameters()), model.config, model.ratios
    D, H, S, m = c.d_model, c.n_heads, c.n_strata, c.d_model // 2

    def norm(name, x):
        return p[f"{name}.weight"] * x / (x.square().mean() + 1e-6).sqrt()

    def linear(name, x):
        return p[f"{name}.weight"] @ x + p.get(f"{name}.bias", 0)

    def gated(name, x):
        return torch.sigmoid(linear(name, x)) * x

    def field(name, x, memory):
        """memory: the last inputs and h"""
        inputs, h = memory
        inputs = [*inputs, x][-c.conv_kernel :]
        u = p[f"{name}.conv_bias"].clone()
        for back, one in enumerate(reversed(inputs)):
            u += p[f"{name}.conv_weight"][-1 - back] * one
        theta, delta, re, im, gate = linear(f"{name}.in_proj", u * torch.sigmoid(u)).split([m, m, m, m, D])
        a = torch.exp(-torch.log1p(torch.exp(delta + p[f"{name}.bias"])))
        turn = c.theta_max * torch.tanh(theta)
        h = a * torch.complex(turn.cos(), turn.sin()) * h + (1 - a) * torch.complex(re, im)
        heads = h.reshape(m // H, H)  # channel c belongs to head c mod H
        mixed = torch.complex(heads.real @ p[f"{name}.head_mixing"].T, heads.imag @ p[f"{name}.head_mixing"].T).reshape(m)
        return linear(f"{name}.out_proj", torch.stack([mixed.real, mixed.imag], -1).reshape(D) * torch.sigmoid(gate)), (inputs, h)

    def swiglu(name, x):
        gate = linear(f"{name}.gate", x)
        return linear(f"{name}.down", gate * torch.sigmoid(gate) * linear(f"{name}.up", x))

    logits = []
    for row in tokens:
        zeros, of_row = torch.zeros(D, dtype=torch.float64), []
        phi = torch.zeros(c.n_oscillators, dtype=torch.float64)
        inputs: list = [[] for _ in ratios]
        memory = [[([], torch.zeros(m, dtype=torch.complex128)) for _ in ratios] for _ in model.blocks]
        fine: list = [[[] for _ in ratios] for _ in model.blocks]  # normed tokens of each stratum, for the next one's windows
        held = [[zeros for _ in ratios] for _ in model.blocks]
        for t, token in enumerate(row):
            x = p["embedding.weight"][token]
            if c.position == "pme":
                x = x + linear("mesh.proj", torch.cat([phi.cos(), phi.sin()]))
                pull = (p["mesh.K"] * torch.sin(phi[None] - phi[:, None])).sum(1)
                phi = phi + (p["mesh.omega"] + torch.tanh(pull)).clamp(-math.pi, math.pi)
            elif c.position == "rope":
                angle = t * 10000.0 ** (-torch.arange(m, dtype=torch.float64) / m)
                a, b = x.chunk(2)
                x = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])
            inputs[0].append(x)
            h = {0: x}
            for s, ratio in enumerate(ratios):
                if s and (t + 1) % ratio == 0:
                    h[s] = torch.stack(inputs[0][-ratio:]).mean(0)
            for i in range(c.n_layers):
                for s in h:
                    y, memory[i][s] = field(f"blocks.{i}.fields.{s}", norm(f"blocks.{i}.norms.{s}", h[s]), memory[i][s])
                    h[s] = h[s] + y
                for s in range(S - 1):
                    if s in h:
                        fine[i][s].append(norm(f"blocks.{i}.routes.{s}.norm_fine", h[s]))
                    if s + 1 in h:
                        window = torch.stack(fine[i][s][-(ratios[s + 1] // ratios[s]) :]).mean(0)
                        h[s + 1] = h[s + 1] + gated(f"blocks.{i}.routes.{s}.gate_up", window)
                for s in reversed(range(S - 1)):
                    if s + 1 in h:
                        held[i][s] = gated(f"blocks.{i}.routes.{s}.gate_down", norm(f"blocks.{i}.routes.{s}.norm_coarse", h[s + 1]))
                    if s in h:
                        h[s] = h[s] + held[i][s]
                for s in h:
                    if s == 0 or i < c.n_layers - 1:
                        h[s] = h[s] + swiglu(f"blocks.{i}.feed_forwards.{s}", norm(f"blocks.{i}.norms_ff.{s}", h[s]))
            of_row.append(p["embedding.weight"] @ norm("norm", h[0]))
        logits.append(torch.stack(of_row))
    return torch.stack(logits)


@torch.no_grad()
@pytest.mark.parametrize(("ratios", "position"), [((1,), "none"), ((1, 4), "pme"), ((1, 4, 16), "rope"), ((1, 2, 6), "pme")])
def test_the_model_written_out(ratios, position):
    model, tokens = random(small(ratios, position=position).double()), random_tokens(2, 35)
    want = written_out(model, tokens)
    assert want.std() > 0.1
    torch.testing.assert_close(model(tokens), want, rtol=1e-8, atol=1e-9)
    lengths = torch.tensor([13, 35])  # a chunk that begins anywhere in a window, in each row elsewhere
    out = model(tokens, lengths=lengths, want=("state",))
    other = model(tokens[:, :22], out.state, lengths=torch.tensor([22, 5]))
    torch.testing.assert_close(other[0], written_out(model, torch.cat([tokens[:1, :13], tokens[:1, :22]], 1))[0, 13:], rtol=1e-8, atol=1e-9)


# The properties of every model


@pytest.mark.parametrize(
    ("ratios", "position", "length"),
    [
        ((1,), "rope", 5),
        ((1, 4), "none", 13),
        ((1, 2, 6), "pme", 19),
        pytest.param((1, 4, 16), "rope", 37, marks=pytest.mark.slow),
        *(pytest.param(ratios, position, 37, marks=pytest.mark.slow) for ratios in RATIOS for position in ("pme", "none")),
    ],
)
def test_ratios_conform(ratios, position, length):
    make = partial(small, ratios, 2 if length < 16 else 1, position=position, dropout=0.1)
    model = make()
    initialise(model, 0)
    conformance.randomise(model, 0)
    tokens = random_tokens(3, length)
    for check in conformance.CHECKS:
        if check is conformance.check_gradients and len(ratios) > 1 and ratios[-1] > 12:  # too slow a clock for a gradient of its memory
            continue
        check(model.train() if check is conformance.check_gradients else model, tokens)
    conformance.check_checkpoint(model, make, tokens)


@pytest.mark.parametrize("ratios", [(1, 4, 16), (1, 2, 6)])
def test_ratios_conform_across_the_borders_of_chunks(ratios):
    conformance.check_borders(random(small(ratios, 1)), random_tokens(3, 70), (15, 16, 17, 48, 63, 64, 65, 67))


@torch.no_grad()
@pytest.mark.parametrize("ratios", [*RATIOS, (1, 16), (1, 3, 3)])
def test_nothing_leaks_from_the_future(ratios):
    model, tokens = random(small(ratios)), random_tokens(1, 35)
    want = model(tokens)
    for t in range(1, 35):
        other = tokens.clone()
        other[:, t:] = (other[:, t:] + 1) % V
        assert torch.equal(model(other)[:, :t], want[:, :t])


@torch.no_grad()
def test_any_chunks_in_any_rows():
    """Rows that stand at different positions, in chunks that end and begin anywhere in a window, shorter than one too."""
    model, tokens = random(small((1, 2, 6))), random_tokens(4, 40)
    want, state = model(tokens), model.init_state(4)
    place, draw = torch.zeros(4, dtype=torch.long), torch.Generator().manual_seed(3)
    rows = torch.arange(4)[:, None]
    while (place < 40).any():
        lengths = torch.minimum(torch.randint(0, 8, (4,), generator=draw), 40 - place)
        index = (place[:, None] + torch.arange(8)).clamp(max=39)
        out = model(tokens[rows, index], state, lengths=lengths, want=("state",))
        real = torch.arange(8) < lengths[:, None]
        torch.testing.assert_close(out.y[real], want[rows, index][real], rtol=1e-4, atol=1e-5)
        state, place = out.state, place + lengths
    assert torch.equal(state["position"], place)


@torch.no_grad()
def test_the_state_does_not_grow_and_is_right_far_away():
    """At t = 10^6, where an angle or a sum of angles in float32 would be wrong."""
    model = random(small((1, 4, 16), position="pme"))
    sizes = [[t.shape for t in torch.utils._pytree.tree_leaves(model.prefill(random_tokens(2, n))[1])] for n in (1, 5, 40)]
    assert sizes[0] == sizes[1] == sizes[2]
    for position in ("pme", "rope"):
        model = random(small((1, 4, 16), position=position))
        exact = copy.deepcopy(model).double()
        _, state = model.prefill(random_tokens(2, 7))
        state["position"] += 10**6
        if position == "pme":
            state["phi"] = torch.linspace(0.1, 6.2, state["phi"].numel(), dtype=torch.float64).view_as(state["phi"])
        wide = model.map_state(lambda t: t.double() if t.is_floating_point() else t, state)
        tokens = random_tokens(2, 41)
        want, _ = exact.prefill(tokens, wide)
        torch.testing.assert_close(model.prefill(tokens, state)[0].double(), want, rtol=1e-4, atol=1e-4)
        for t in range(3):
            logits, state = model.step(tokens[:, t], state)
            torch.testing.assert_close(logits.double(), want[:, t], rtol=1e-4, atol=1e-4)


def test_a_step_computes_what_ticks_alone():
    model, calls = random(small((1, 4))), []
    for block in model.blocks:
        block.fields[1].register_forward_hook(lambda *_: calls.append(1))
    state = model.init_state(2)
    with torch.no_grad():
        for t in range(8):
            _, state = model.step(random_tokens(2, 8)[:, t], state)
            assert len(calls) == 2 * ((t + 1) // 4)
        state["position"] += torch.tensor([0, 1])
        model.step(random_tokens(2, 8)[:, 0], state)
    assert len(calls) == 6, "rows that do not agree: all is computed, and selected"


# Precision, training, compilation


@pytest.mark.parametrize("ratios", [(1, 4), (1, 4, 16)])
def test_half_precision_is_near(ratios):
    model, tokens = small(ratios, d_model=32), random_tokens(2, 64)
    initialise(model.eval(), 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        want = model(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(tokens, want=("state", "record"))
    assert (out.y.float() - want).abs().max() < 2e-2 * (want.max() - want.min())
    assert all(t.dtype in (torch.float32, torch.float64, torch.long) for t in torch.utils._pytree.tree_leaves(out.state))
    assert all(t.dtype == torch.float32 for t in out.record["retention.0"])
    half = copy.deepcopy(model).bfloat16()
    logits, state = half.prefill(tokens[:, :9])
    assert logits.dtype == torch.bfloat16 and half.step(tokens[:, 9], state)[0].isfinite().all()
    assert state["blocks"][0]["fields"][1]["h"].dtype == torch.float32


def test_checkpointed_blocks_give_the_same():
    model = small((1, 4), dropout=0.1)
    initialise(model, 0)
    want = loss_and_gradients(model.train())
    model.activation_checkpointing = True
    torch.testing.assert_close(loss_and_gradients(model), want, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_give_the_same(checkpointing):
    model = small((1, 4), dropout=0.1)
    initialise(model, 0)
    want = loss_and_gradients(model.train())
    model.activation_checkpointing = checkpointing
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(loss_and_gradients(model), want, rtol=1e-5, atol=1e-6)


def test_a_sequence_shorter_than_a_window_gives_every_parameter_a_gradient_in_training():
    model = small((1, 16)).train()
    model(random_tokens(2, 9)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_many_layers_start_well():
    model = small((1, 4), n_layers=24, d_model=32, d_ff=None)
    initialise(model, 0)
    _, gradients = loss_and_gradients(model)
    norms = torch.stack([torch.stack([g.norm() for n, g in gradients.items() if n.startswith(f"blocks.{i}.")]).norm() for i in range(24)])
    assert norms.isfinite().all() and norms.max() < 100 * norms.min()
