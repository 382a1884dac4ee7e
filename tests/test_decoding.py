"""Decoding in C++ (lab/ops/program.py): the same numbers and tokens as the model's own step, and when the model itself decodes."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from lab import ops
from lab.analysis.conformance import randomise
from lab.layers import FeedForward, MoE
from lab.mixers import Attention, GatedMLP, H3Layer, Lattice, MambaLayer, S4DLayer, S4Layer, S5Layer, Serriform
from lab.mixers.base import Output
from lab.models import Stack, initialise
from lab.models.decoding import Continuation
from lab.ops import interpreter, native
from lab.ops.interpreter import Loaded
from lab.ops.program import INSTRUCTIONS, Program, Value

V = 23
built = pytest.mark.skipif(native.LIBRARY is None, reason="the C++ kernels are not built")
STATE_SPACE = {"d_ff": 0, "norm": "rms", "tied": True}
MODELS = {
    "mamba": (partial(MambaLayer, d_state=5, d_conv=3), STATE_SPACE),
    "s4": (partial(S4Layer, d_state=6), {"d_ff": 0}),
    "s4, rank 2": (partial(S4Layer, d_state=6, init_method="fourier"), {"d_ff": 0}),
    "h3": (partial(H3Layer, d_state=6), {}),
    "h3 with s5": (partial(H3Layer, d_state=4, ssm_layer=partial(S5Layer, d_state=6)), {"norm": "rms"}),
    "gated mlp": (partial(GatedMLP, expand_factor=2), {"d_ff": 0}),
    "gated mlp with mamba": (partial(GatedMLP, activation="relu", ssm_layer=partial(MambaLayer, d_state=3)), {"d_ff": 0}),
    "mamba with s4": (partial(MambaLayer, ssm_layer=partial(S4Layer, d_state=6)), STATE_SPACE),
    "s4d": (partial(S4DLayer, d_state=6), {"d_ff": 0}),
    "s5": (partial(S5Layer, d_state=6), {"d_ff": 0}),
    "attention": (partial(Attention, n_heads=4), {"position": "learned", "max_len": 96}),
    "wave": (partial(Lattice, n_heads=4), {}),
    "no drive": (partial(Lattice, n_heads=4, drive=False), {}),
    "gain": (partial(Lattice, n_heads=2, phase_mode="gain"), {}),
    "literal": (partial(Lattice, n_heads=2, phase_mode="literal"), {}),
    "serriform": (Serriform, {"d_ff": 0, "norm": "rms", "position": "gate"}),
    "experts": (Serriform, {"d_ff": 0, "norm": "rms", "position": "gate", "feed_forward": partial(MoE, d_ff=300)}),
    "one expert": (partial(Attention, n_heads=4), {"feed_forward": partial(MoE, d_ff=24, n_experts=5, top_k=1, activation="silu")}),
    "serriform beside": (partial(Serriform, topology="parallel", conv_kernel_size=4), {"norm": "rms", "position": "rotate"}),
    "serriform without": (partial(Serriform, use_conv=False, use_lowrank_ff=False, activation="relu"), {"d_ff": 0}),
    "mixed": ([partial(MambaLayer, d_conv=1), partial(Attention, n_heads=2)], {}),
}


def make(name: str, d_model: int = 20, n_layers: int = 2, vocabulary: int = V) -> Stack:
    mixer, options = MODELS[name]
    model = Stack(vocabulary, d_model, n_layers, mixer, **{"position": "none", **options})
    initialise(model, 0)
    randomise(model, 0)
    return model.eval()


@pytest.fixture(params=MODELS)
def model(request) -> Stack:
    return make(request.param)


def continuation(model: Stack, B: int = 1, P: int = 7, lengths: torch.Tensor | None = None, n: int = 41) -> Continuation:
    prompt = torch.randint(0, V, (B, P), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = model(prompt, lengths=lengths, want=("state", "last"))
    return Continuation(model, out.state, out.y[:, 0], n)


def loaded(c: Continuation) -> Loaded:
    assert isinstance(c.program, Program), c.program
    return Loaded(c.program)


@torch.no_grad()
def follow(c: Continuation) -> None:
    """Forty steps of given tokens, against the model in float64: within 1e-5 of the largest logit, unless its own step is not either."""
    exact, run, plain = copy.deepcopy(c.model).double(), loaded(c), c.state
    state = exact.map_state(lambda t: t.double() if t.is_floating_point() else t, c.state)
    tokens = torch.randint(0, V, (c.n - 1, len(c.last)), generator=torch.Generator().manual_seed(2))
    off, own_off, largest = [], [], []
    for token in tokens:
        want, state = exact.step(token, state)
        own, plain = c.model.step(token, plain)
        off.append((run.step(token).double() - want).abs().max())
        own_off.append((own.double() - want).abs().max())
        largest.append(want.abs().max())
    assert max(off) <= max(1e-5 * max(largest), 2 * max(own_off))


@built
@pytest.mark.parametrize("B", [1, 5])
def test_steps_are_those_of_the_model(model, B):
    follow(continuation(model, B))


@built
def test_rows_of_different_lengths(model):
    follow(continuation(model, 6, lengths=torch.tensor([3, 7, 1, 5, 2, 6])))


@built
@pytest.mark.parametrize("name", ["mamba", "wave"])
@pytest.mark.parametrize("d_model", [4, 32, 36])
def test_widths_that_fill_vectors_and_leave_a_rest(name, d_model):
    follow(continuation(make(name, d_model), 4))


@built
@pytest.mark.parametrize("B", [1, 3, 4])
def test_packed_weights_lose_nothing_that_counts(monkeypatch, B):
    """Of odd shapes, and a matrix with an outlier is left as it is."""
    monkeypatch.setattr(interpreter, "PACKED", range(1 << 40))
    monkeypatch.setattr(interpreter, "WORTH", 0)
    model = make("mamba", 52)
    c = continuation(model, B)
    assert len(loaded(c).packed) > 2 * 2, "in_proj and out_proj of each layer at least"
    follow(c)
    with torch.no_grad():
        model.blocks[0].mixer.in_proj.weight[3, 5] = 1e3
    assert len(loaded(continuation(model, B)).packed) == len(loaded(c).packed)  # the weights are read when a program is loaded
    follow(continuation(model, B))


@built
def test_small_models_and_short_texts_are_not_packed():
    assert not loaded(continuation(make("mamba"), n=200)).packed
    large = make("s5", 256, 4)
    assert loaded(continuation(large, n=200)).packed and not loaded(continuation(large, n=20)).packed


OPTIONS = [
    {},
    {"temperature": 1.3},
    {"temperature": 0.7, "top_k": 5, "top_p": 0.8},
    {"lengths": torch.tensor([7, 1, 4]), "pad_token": -1},
    {"stop_token": 3, "pad_token": -1},
]


@built
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["mixed", "wave", "h3 with s5"])
def test_generate_gives_the_same_tokens(name, options):
    model = make(name)
    prompt = torch.randint(0, V, (3, 7), generator=torch.Generator().manual_seed(3))
    texts = []
    for backend in ("native", "torch"):
        with ops.use(decode=backend):
            texts.append(model.generate(prompt, 40, generator=torch.Generator().manual_seed(4), **options))
        assert ops.used()["decode"] == backend
    assert torch.equal(*texts)


@built
def test_a_stream_comes_in_small_parts(monkeypatch):
    """Greedy tokens are computed several at once, and no more than were asked for."""
    model, asked = make("mamba"), []
    greedy = Loaded.greedy
    monkeypatch.setattr(Loaded, "greedy", lambda self, token, n: asked.append(n) or greedy(self, token, n))
    monkeypatch.setattr("lab.models.decoding.AT_ONCE", 10 * sum(p.numel() for p in model.parameters()))
    stream = model.stream(torch.zeros(1, 4, dtype=torch.long), 26)
    next(stream), next(stream)
    assert asked == [10]
    assert len(list(stream)) == 24 and asked == [10, 10, 5]


@built
@pytest.mark.parametrize("name", ["mixed", "s4"])
def test_weights_may_change_between_calls(name):
    model = make(name)
    prompt = torch.zeros(2, 3, dtype=torch.long)
    model.generate(prompt, 8)
    randomise(model, 5, 0.5)
    with ops.use(decode="torch"):
        want = model.generate(prompt, 20)
    assert torch.equal(model.generate(prompt, 20), want)


@built
@pytest.mark.parametrize("name", ["mixed", "s4"])
def test_a_state_that_is_kept_does_not_change(name):
    model = make(name)
    c = continuation(model, 2)
    before = model.map_state(torch.clone, c.state)
    loaded(c).greedy(torch.zeros(2, dtype=torch.long), 10)
    torch.testing.assert_close(c.state, before, rtol=0, atol=0)


@built
@pytest.mark.parametrize("function", ["sigmoid", "silu", "gelu", "softplus", "relu", "tanh"])
def test_functions(function):
    """Against float64, relative to the number or to its argument; and where the exponential ends."""
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([-1e4, -200.0, -88.0, 0.0, 88.0, 200.0, 1e4])])
    p = Program(1, 1)
    y = p.apply(function, p.constant(x))
    run = Loaded(p.ends(y, torch.zeros(1)))
    got = run.step(torch.zeros(1, dtype=torch.long))[0].double()
    want = getattr(torch, function, None) or getattr(nn.functional, function)
    want = want(x.double())
    assert ((got - want).abs() <= 4e-7 * torch.maximum(want.abs(), x.double().abs().clamp(max=1))).all()
    if function == "softplus":  # the time step of a bias of -6 is a small number, whose digits count
        assert ((got - want).abs() <= (5e-7 + 1e-7 * x.double().abs()) * want + 1e-37).all()


# When the model decodes itself, and why


class Louder(MambaLayer):
    def mix(self, x, state, lengths, want):
        return super().mix(2 * x, state, lengths, want)


class Plain(MambaLayer):
    """It changes nothing but how it is made."""

    def __init__(self, d_model: int):
        super().__init__(d_model, d_state=3)


class Unwritten(FeedForward):
    def feed(self, x, lengths, want):
        return Output(torch.tanh(x))


class Adapted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + x[..., :1]


def hooked(model):
    model.blocks[0].mixer.register_forward_hook(lambda module, args, out: None)


def adapted(model):
    old = model.blocks[0].mixer.out_proj
    model.blocks[0].mixer.out_proj = Adapted(old.in_features, old.out_features).eval()


def replaced(model):
    model.blocks[0].forward = model.blocks[0].forward


REASONS = [
    (lambda model: model.train(), "is in training mode"),
    (hooked, r"blocks.0.mixer \(MambaLayer\) has hooks, which must see every step"),
    (adapted, "Adapted stands where Linear is expected"),
    (replaced, r"blocks.0 \(Block\) has a forward of its own"),
    (lambda model: model.double(), "torch.float64 is not among torch.float32"),
    (lambda model: setattr(model.blocks[0].mixer, "mix", model.blocks[0].mixer.mix), "has a mix of its own"),
    (lambda model: setattr(model, "dropout", nn.Tanh().eval()), "Tanh stands where Dropout is expected"),
]


@built
@pytest.mark.parametrize(("change", "reason"), REASONS, ids=[reason for _, reason in REASONS])
def test_what_only_the_model_can_do(change, reason):
    model = make("mamba")
    change(model)
    with pytest.raises(RuntimeError, match=f"op decode: no forced backend can compute this .native: .*{reason}"), ops.use(decode="native"):
        model.generate(torch.zeros(1, 2, dtype=torch.long), 3)
    model.generate(torch.zeros(1, 2, dtype=torch.long), 3)
    assert ops.used()["decode"] == "torch"


@built
def test_a_part_without_a_program():
    model = make("attention")
    model.blocks[0].mlp = Unwritten().eval()
    assert continuation(model).program == "Unwritten has no program"
    assert model.generate(torch.zeros(1, 2, dtype=torch.long), 3).shape == (1, 5)


@built
def test_hooks_of_all_modules_see_every_step():
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        make("mamba").generate(torch.zeros(1, 2, dtype=torch.long), 3)
    finally:
        handle.remove()
    assert ops.used()["decode"] == "torch" and sum(isinstance(module, Stack) for module in seen) == 3


@built
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(dtype):
    """The kernel gets addresses: an arena of another dtype would be too small, or misread."""
    model, prompt = make("mamba"), torch.zeros(2, 3, dtype=torch.long)
    want = model.generate(prompt, 20)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(model.generate(prompt, 20), want) and ops.used()["decode"] == "native"
    finally:
        torch.set_default_dtype(before)


def test_no_rows_and_other_integers():
    model = make("attention")
    assert model.generate(torch.zeros(0, 3, dtype=torch.long), 5).shape == (0, 8)
    out = model.generate(torch.zeros(2, 3, dtype=torch.int32), 5)
    assert out.dtype == torch.int32 and torch.equal(out.long(), model.generate(torch.zeros(2, 3, dtype=torch.long), 5))


@built
def test_a_class_that_changes_what_its_program_says():
    for mixer, reason in ((Louder, "Louder changes mix of a class whose program it inherits"), (Plain, None)):
        model = Stack(V, 8, 2, mixer, position="none").eval()
        c = continuation(model)
        assert c.program == reason if reason else isinstance(c.program, Program)


@built
def test_autocast_and_no_kernels(monkeypatch):
    model = make("attention")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert continuation(model).program in ("autocast is on", "torch.bfloat16 is not among torch.float32")
    monkeypatch.setattr(native, "LIBRARY", None)
    monkeypatch.setattr(native, "SAYS", "the C++ kernels are not built")
    assert continuation(model).program == "the C++ kernels are not built"


# The program itself


@built
def test_it_can_be_read():
    lines = str(continuation(make("mamba")).program).splitlines()
    assert lines[0].split()[0] == "embed" and lines[-1].split()[0] == "linear"
    assert [line.split()[0] for line in lines].count("scan") == 2
    assert native.function("decode_instructions")() == len(INSTRUCTIONS)


@built
def test_mistakes_are_told_before_anything_runs():
    p = Program(2, 4)
    x = p.value(6)
    with pytest.raises(ValueError, match="linear of v0 with 6 numbers does not fit"):
        p.linear(torch.zeros(3, 5), x)
    with pytest.raises(ValueError, match="v0 has 6 numbers, not 4 to 8"):
        x.part(4, 4)
    with pytest.raises(ValueError, match="a state of 3 rows in a batch of 2"):
        p.state(torch.zeros(3, 1))
    p.apply("silu", Value("elsewhere", 6, 16, "scratch", 1000))
    with pytest.raises(ValueError, match="elsewhere ends at 1022, outside of its region"):
        Loaded(p.ends(x, torch.zeros(2)))
    run = loaded(continuation(make("attention"), n=3))
    with pytest.raises(IndexError, match="not in its table"):
        run.step(torch.tensor([V]))
    with pytest.raises(ValueError, match="2 tokens .* with room for 1"):
        run.greedy(torch.tensor([0]), 2)
