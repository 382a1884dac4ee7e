"""S4, S4D, S5 and Mamba used alone: initialisations, and outputs against their formulas written as loops in complex double precision."""

from __future__ import annotations

import math
from functools import partial
from typing import get_args

import pytest
import torch
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from lab.analysis.conformance import randomise
from lab.export.graphs import graphs
from lab.layers.hippo import InitMethod, eigenvalues
from lab.mixers import MambaLayer, S4DLayer, S4Layer, S5Layer
from lab.models import Stack
from lab.training.optimizer import parameter_groups

METHODS = get_args(InitMethod)
LAYERS = [S4Layer, S4DLayer, S5Layer, MambaLayer]
LTI = [S4Layer, S4DLayer, S5Layer]


def sequence(B: int = 2, L: int = 19, D: int = 8) -> torch.Tensor:
    return torch.randn(B, L, D, generator=torch.Generator().manual_seed(0))


def pairs(x: torch.Tensor) -> torch.Tensor:
    """(..., 2) -> (...) complex128"""
    return torch.view_as_complex(x.detach().double())


# Initialisation


@pytest.mark.parametrize("make", LTI)
@pytest.mark.parametrize("d_state", [0, 7])
def test_states_come_in_pairs(make, d_state):
    with pytest.raises(ValueError, match=f"d_state={d_state} "):
        make(8, d_state=d_state)


@pytest.mark.parametrize("make", LAYERS)
def test_a_wrong_init_method_is_told(make):
    with pytest.raises(ValueError, match="init_method='hippo'; expected legs, legt, fourier, lin, inv, real, random"):
        make(8, init_method="hippo")


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize(
    ("dt_min", "dt_max"), [(0.1, 0.01), (0.0, 0.1), (-1.0, 0.1), (math.nan, 0.1), (0.1, math.inf)], ids=lambda value: str(value)
)
def test_time_steps_that_cannot_be(make, dt_min, dt_max):
    told = rf"^{make.__name__}: dt_min={dt_min} and dt_max={dt_max} must be above 0, and dt_max not below dt_min$"
    with pytest.raises(ValueError, match=told):
        make(8, dt_min=dt_min, dt_max=dt_max)
    make(8, dt_min=0.1, dt_max=0.1)


@pytest.mark.parametrize(
    ("make", "arguments", "told"),
    [
        *((make, {"d_model": 0}, "d_model=0 must be at least 1") for make in LAYERS),
        *((make, {"rate": rate}, f"rate={rate} must be above 0") for make in LTI for rate in (0.0, -1.0)),
        (S5Layer, {"d_state": -4}, "d_state=-4 must be at least 1"),
        (S5Layer, {"blocks": 0}, "blocks=0 must be at least 1"),
        *(
            (MambaLayer, {name: 0}, f"{name}=0 must be at least 1")
            for name in ("d_state", "d_conv", "dt_rank", "expand_factor", "n_layers")
        ),
        (MambaLayer, {"d_conv": 2.5}, "d_conv=2.5 must be an integer"),
    ],
)
def test_arguments_that_cannot_be(make, arguments, told):
    with pytest.raises(ValueError, match=f"^{make.__name__}: {told}$"):
        make(**{"d_model": 8} | arguments)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "random"])
def test_layers_start_as_documented(method):
    torch.manual_seed(0)
    wanted = eigenvalues(method, 8)
    s4d = S4DLayer(500, d_state=8, init_method=method)
    A = torch.complex(-s4d.log_A_re.exp(), s4d.A_im).to(torch.complex128)
    torch.testing.assert_close(A, wanted.expand(500, 4), rtol=1e-6, atol=1e-6)
    assert abs(pairs(s4d.C).abs().square().mean() - 1) < 0.1
    s5 = S5Layer(64, d_state=16, blocks=2, init_method=method)
    torch.testing.assert_close(torch.complex(-s5.log_A_re.exp(), s5.A_im).to(torch.complex128), wanted.repeat(2), rtol=1e-6, atol=1e-6)
    assert abs(64 * pairs(s5.B).abs().square().mean() - 1) < 0.2 and abs(16 * pairs(s5.C).abs().square().mean() - 1) < 0.2
    mamba = MambaLayer(256, d_state=4, init_method=method, n_layers=4)
    torch.testing.assert_close(-mamba.A_log.exp().double(), -wanted.abs().expand(512, 4), rtol=1e-6, atol=1e-6)
    assert mamba.dt_rank == 16 and mamba.dt_proj.weight.abs().max() <= 0.25
    assert (mamba.D == 1).all() and mamba.out_proj.weight.abs().max() <= 512**-0.5 / 2
    for dt in (s4d.log_dt.exp(), F.softplus(mamba.dt_proj.bias)):
        assert 9.9e-4 < dt.min() < 1.2e-3 and 0.08 < dt.max() < 0.1001
        assert abs(dt.log().mean() - math.log(1e-2)) < 0.15  # log-uniform


# Outputs


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_s4d_by_its_formula(method, bidirectional):
    layer, x = S4DLayer(8, d_state=6, init_method=method, dropout=0.5, bidirectional=bidirectional).eval(), sequence()
    randomise(layer, 0)
    A = torch.complex(-layer.log_A_re.double().exp(), layer.A_im.double())  # (D, n)
    dt, C, D = layer.log_dt.double().exp()[:, None], pairs(layer.C), layer.D.double()

    def scan(u, C):
        h, ys = torch.zeros(len(u), *A.shape, dtype=A.dtype), []
        for u_t in u.unbind(1):
            h = torch.exp(dt * A) * h + (torch.exp(dt * A) - 1) / A * u_t[..., None]
            ys.append(2 * (C * h).sum(-1).real)
        return torch.stack(ys, 1)

    u = x.double()
    y = scan(u, C[0]) + D * u
    if bidirectional:
        y = y + scan(u.flip(1), C[1]).flip(1)
    a, b = (F.gelu(y) @ layer.out.weight.double().T + layer.out.bias.double()).chunk(2, -1)
    torch.testing.assert_close(layer(x).double(), a * torch.sigmoid(b), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_s5_by_its_formula(method, bidirectional):
    layer, x = S5Layer(8, d_state=12, blocks=2, init_method=method, bidirectional=bidirectional).eval(), sequence()
    randomise(layer, 0)
    A = torch.complex(-layer.log_A_re.double().exp(), layer.A_im.double())  # (P,)
    dt, B, C = layer.log_dt.double().exp(), pairs(layer.B), pairs(layer.C)

    def scan(u, C):
        h, ys = torch.zeros(len(u), len(A), dtype=A.dtype), []
        for u_t in u.unbind(1):
            h = torch.exp(dt * A) * h + (torch.exp(dt * A) - 1) / A * (u_t.to(B.dtype) @ B.T)
            ys.append(2 * (h @ C.T).real)
        return torch.stack(ys, 1)

    u = x.double()
    y = scan(u, C[0]) + layer.D.double() * u
    if bidirectional:
        y = y + scan(u.flip(1), C[1]).flip(1)
    g = F.gelu(y)
    want = g * torch.sigmoid(g @ layer.gate.weight.double().T + layer.gate.bias.double())
    torch.testing.assert_close(layer(x).double(), want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_mamba_by_its_formula(method):
    layer, x = MambaLayer(8, d_state=5, dt_rank=3, d_conv=3, init_method=method), sequence()
    randomise(layer, 0)
    p = {name: t.double() for name, t in layer.named_parameters()}
    u, z = (x.double() @ p["in_proj.weight"].T).chunk(2, -1)
    padded = F.pad(u, (0, 0, 2, 0))
    u = F.silu(sum(p["conv1d.weight"][:, 0, k] * padded[:, k : k + u.shape[1]] for k in range(3)) + p["conv1d.bias"])
    delta, B, C = (u @ p["x_proj.weight"].T).split([3, 5, 5], -1)
    dt = F.softplus(delta @ p["dt_proj.weight"].T + p["dt_proj.bias"])
    A, h, ys = -p["A_log"].exp(), torch.zeros(2, 16, 5, dtype=torch.float64), []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt * u)[:, t, :, None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(-1) + p["D"] * u[:, t])
    want = (torch.stack(ys, 1) * F.silu(z)) @ p["out_proj.weight"].T
    torch.testing.assert_close(layer(x).double(), want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("make", [*LAYERS, partial(S4Layer, rate=2.0), partial(S4DLayer, rate=2.0), partial(S5Layer, rate=2.0, blocks=2)])
@pytest.mark.parametrize("method", METHODS)
def test_steps_go_on_from_a_prefill_whatever_the_start(make, method):
    layer, x = make(8, d_state=8, init_method=method).eval(), sequence(L=21)
    randomise(layer, 1)
    want, state = layer(x), layer.init_state(2)
    for start, stop in ((0, 0), (0, 7), (7, 8), (8, 9), (9, 18), (18, 19), (19, 20), (20, 21)):
        out = layer(x[:, start:stop], state, want=("state",))
        state = out.state
        torch.testing.assert_close(out.y, want[:, start:stop], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("make", LTI)
def test_both_directions(make):
    """Every output depends on every input of its own row, padding excepted; there is no state, and whoever asks for one is told."""
    layer, x = make(8, d_state=8, bidirectional=True).eval(), sequence()
    want, lengths = layer(x), torch.tensor([19, 7])
    for t in (0, 18):
        changed = x.clone()
        changed[:, t] += 1
        assert ((layer(changed) - want).abs().amax((0, 2)) > 1e-7).all()
    padded = layer(torch.where(torch.arange(19)[:, None] < lengths[:, None, None], x, 100.0), lengths=lengths)
    torch.testing.assert_close(padded[0], want[0])
    torch.testing.assert_close(padded[1, :7], layer(x[1:, :7])[0])
    for call in (partial(layer, x, want=("state",)), partial(layer.init_state, 2)):
        with pytest.raises(NotImplementedError, match="Layer reads the whole sequence, the future too, so it has no state and no step"):
            call()
    assert not layer.causal and make(8, d_state=8).causal
    mixed = {"both": partial(make, d_state=8, bidirectional=True), "one": partial(make, d_state=8)}
    models = [Stack(11, 8, 2, mixed, pattern=pattern, position="none") for pattern in (["one"], ["one", "both"])]
    assert [model.causal for model in models] == [True, False]
    assert [[graph.name for graph in graphs(model).graphs] for model in models] == [["sequence", "prefill", "step"], ["sequence"]]


@torch.no_grad()
@pytest.mark.parametrize("make", LTI)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_state_space_alone(make, bidirectional, monkeypatch):
    """mixing=False gives what otherwise goes into GELU, from the same parameters without those of the projection."""
    layer, x = make(8, d_state=8, bidirectional=bidirectional).eval(), sequence()
    alone = make(8, d_state=8, bidirectional=bidirectional, mixing=False)
    projection = {"out.weight", "out.bias", "gate.weight", "gate.bias"}
    weights = layer.state_dict()
    alone.load_state_dict({name: t for name, t in weights.items() if name not in projection})
    assert len(weights) == len(alone.state_dict()) + 2
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(F, "gelu", lambda y: seen.append(y) or y)
        layer(x)
    assert torch.equal(alone(x), seen[0])
    assert alone(x.bfloat16()).dtype == torch.bfloat16


def test_dropout_has_no_place_without_mixing():
    with pytest.raises(ValueError, match="^S4DLayer: dropout=0.1 belongs to the mixing, which mixing=False leaves out; it must be 0$"):
        S4DLayer(8, dropout=0.1, mixing=False)


# Change of sampling rate


@torch.no_grad()
@pytest.mark.parametrize("make", LTI)
def test_rate_two_is_twice_the_time_step(make):
    x = sequence()
    once, twice = make(8, d_state=8).eval(), make(8, d_state=8, rate=2.0).eval()
    twice.load_state_dict(once.state_dict())
    assert not torch.allclose(twice(x), once(x), atol=1e-3)
    once.log_dt += math.log(2)
    torch.testing.assert_close(twice(x), once(x), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(twice(x, want=("state",)).state["h"], once(x, want=("state",)).state["h"], rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("make", LTI)
def test_a_smooth_signal_sampled_half_as_often_gives_the_same_output(make):
    torch.manual_seed(0)
    t = torch.arange(512)[None, :, None]
    x = torch.sin(t * torch.linspace(0.002, 0.02, 8) + torch.arange(8))
    layer, coarse = make(8, d_state=8, dt_max=0.02).eval(), make(8, d_state=8, dt_max=0.02, rate=2.0).eval()
    coarse.load_state_dict(layer.state_dict())
    want = layer(x)[:, 1::2]  # a step of the coarse layer ends where every second one of the fine layer does
    error, other = ((y - want).norm() / want.norm() for y in (coarse(x[:, 1::2]), layer(x[:, 1::2])))
    assert error < 0.03 < 0.1 < other


# As parts of other programs


def test_words_of_the_documentation():
    x = torch.randn(2, 10, 256)
    assert MambaLayer(d_model=256, d_state=16, expand_factor=2, init_method="inv")(x).shape == x.shape
    assert S5Layer(256)(x).shape == S4DLayer(256)(x).shape == x.shape
    assert S4Layer(d_model=256, d_state=64, init_method="legs", bidirectional=False)(x).shape == x.shape


@torch.no_grad()
@pytest.mark.parametrize("make", LAYERS)
def test_the_state_does_not_grow(make):
    layer = make(8).eval()
    sizes, state = [], layer.init_state(2)
    for length in (0, 1, 300, 1):
        out = layer(torch.randn(2, length, 8), state, want=("state",))
        assert out.y.shape == (2, length, 8)
        state = out.state
        sizes.append({name: (t.shape, t.dtype, t.untyped_storage().nbytes()) for name, t in state.items()})
    first = {name: (t.shape, t.dtype, t.untyped_storage().nbytes()) for name, t in layer.init_state(2).items()}
    assert all(size == first for size in sizes) and all(dtype == torch.float32 for _, dtype, _ in first.values())
    assert all(t.is_meta for t in pytree.tree_leaves(layer.init_state(2, device=torch.device("meta"))))


@pytest.mark.parametrize("make", LAYERS)
def test_autocast(make):
    """The states stay in float32, the output is near that of float32, and every parameter has a finite gradient."""
    layer, x = make(16), sequence(D=16)
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, want=("state",))
    torch.testing.assert_close(out.y.float(), want, rtol=0.05, atol=0.03)
    assert all(t.dtype == torch.float32 for t in out.state.values())
    out.y.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


BOTH_WAYS = [partial(make, bidirectional=True) for make in LTI]


@pytest.mark.parametrize("make", [*LAYERS, *BOTH_WAYS])
def test_double_precision(make):
    """Gradients hold to what float32 could not show, and steps give the outputs of forward as exactly."""
    layer, x = make(4, d_state=4).double(), sequence(L=5, D=4).double()
    randomise(layer, 0)
    assert torch.autograd.gradcheck(layer, x.requires_grad_(), eps=1e-6, atol=1e-8, rtol=1e-6)
    parameters = dict(layer.named_parameters())
    names = ["A_log", "D", "dt_proj.bias"] if "A_log" in parameters else ["log_A_re", "A_im", "log_dt", "C", "D"]

    def of_parameters(*values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x.detach(),))

    assert torch.autograd.gradcheck(of_parameters, [parameters[name] for name in names], eps=1e-6, atol=1e-8, rtol=1e-6)
    if not layer.causal:
        return
    state = layer.init_state(2)
    with torch.no_grad():
        want = layer(x)
        for start, stop in ((0, 2), (2, 3), (3, 5)):
            assert all(t.dtype == torch.float64 for t in state.values())
            out = layer(x[:, start:stop], state, want=("state",))
            state = out.state
            torch.testing.assert_close(out.y, want[:, start:stop], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", LAYERS)
def test_an_empty_state_has_the_type_that_is_asked_for(make):
    of = {dtype: {t.dtype for t in make(4, d_state=4).init_state(2, dtype=dtype).values()} for dtype in (torch.bfloat16, torch.float64)}
    assert of == {torch.bfloat16: {torch.float32}, torch.float64: {torch.float64}}
    assert {t.dtype for t in make(4, d_state=4).bfloat16().init_state(2).values()} == {torch.float32}


def test_what_state_spaces_learn_slowly_and_without_decay():
    """A, B and dt: no weight decay, lr 1e-3 at most; of Mamba, A_log and D are not decayed."""
    slow = {
        S4Layer: {"log_dt", "log_A_re", "A_im", "P", "B"},
        S4DLayer: {"log_dt", "log_A_re", "A_im"},
        S5Layer: {"log_dt", "log_A_re", "A_im", "B"},
        MambaLayer: set(),
    }
    undecayed = {
        S4Layer: {"D", "out.bias"},
        S4DLayer: {"D", "out.bias"},
        S5Layer: {"D", "gate.bias"},
        MambaLayer: {"A_log", "D", "conv1d.bias", "dt_proj.bias"},
    }
    for make in LAYERS:
        model = Stack(11, 16, 1, partial(make, d_state=4), d_ff=0, position="none")
        for lr in (1e-2, 1e-4):
            of = {id(p): (group["lr"], group["weight_decay"]) for group in parameter_groups(model, lr, 0.1) for p in group["params"]}
            got = {name: of[id(p)] for name, p in model.mixers[0].named_parameters()}
            for name, (own_lr, decay) in got.items():
                assert own_lr == (min(lr, 1e-3) if name in slow[make] else lr), name
                assert decay == (0.0 if name in slow[make] | undecayed[make] else 0.1), name
