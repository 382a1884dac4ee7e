"""Every model in configs/model, shrunk, must conform; so must the stack with every combination of the lattice's options."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from lab.analysis import conformance
from lab.config import compose
from lab.mixers import Attention, Lattice, Mixer, Output
from lab.models import Stack, initialise
from lab.models.create import ARCHITECTURES

CONFIGS = Path(__file__).parents[1] / "configs"
MODELS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
SIZES = {name for name in MODELS if set(OmegaConf.load(CONFIGS / "model" / f"{name}.yaml").model) <= {"d_model", "n_layers"}}
KINDS = [name for name in MODELS if name not in SIZES]  # shrunk, the sizes of one architecture are the same model
SHRUNK = {  # besides the words of from_yaml
    "gated_mlp": ("model.mixer.expand_factor=1",),
    "h3": ("model.mixer.d_state=8",),
    "h3_attention": ("model.n_layers=3", "model.mixer.h3.d_state=8"),
}
OPTION = {"serriformnet": "serriform"}  # in configs/model, of an architecture of another name
V, L = 11, 9
SOURCE = torch.randint(0, V, (3, 7), generator=torch.Generator().manual_seed(4))


def random_tokens(batch: int = 3, length: int = L) -> torch.Tensor:
    return torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(1))


def compose_yaml(name: str, *words: str):
    return OmegaConf.create(compose([f"model={name}", *words]).config)


def from_yaml(name: str, seq_len: int = 32) -> Stack:
    words = f"task.vocab_size={V}", f"task.seq_len={seq_len}", "model.d_model=32", "model.n_layers=2", *SHRUNK.get(name, ())
    return instantiate(compose_yaml(name, *words).model)


def lattice(n_heads: int = 4, d_model: int = 16, position: str = "learned", dropout: float = 0.0, **options) -> Stack:
    return Stack(V, d_model, 2, partial(Lattice, n_heads=n_heads, **options), max_len=24, position=position, dropout=dropout)


def vanilla(d_model: int = 16, n_heads: int = 4, **options) -> Stack:
    return Stack(V, d_model, 2, partial(Attention, n_heads=n_heads), max_len=24, **options)


OPTIONS = [
    {"phase_mode": mode, "neighborhood": neighborhood, "boundary": boundary, "drive": drive}
    for mode, neighborhood, boundary, drive in itertools.product(
        ("wave", "gain", "literal"), ("moore", "von_neumann"), ("open", "periodic"), (True, False)
    )
    if mode == "wave" or drive  # drive acts in wave only
]
OPTIONS += [{"position": "none"}, {"phase_mode": "gain", "position": "none"}, {"lattice_shape": [1, 4], "dt": 0.5, "coupling": 2.0}]


def with_source(model):
    """A model of tokens alone."""
    return conformance.WithSource(model, SOURCE.to(next(model.parameters()).device)) if model.takes_source else model


def conform(make, device: str = "cpu") -> None:
    model = make()
    initialise(model, 0)
    conformance.randomise(model, 0)
    model, tokens = model.to(device), random_tokens().to(device)
    if model.takes_source:
        conformance.check_source(model, tokens, SOURCE.to(device))
    model = with_source(model)
    for check in conformance.CHECKS:
        if check is conformance.check_gradients:
            for mode in (True, False):
                check(model.train(mode), tokens, without=conformance.idle(model))
        else:
            check(model, tokens)
    conformance.check_checkpoint(model, lambda: with_source(make()).to(device), tokens)


@pytest.mark.parametrize("name", KINDS)
def test_yaml_conforms(name):
    conform(lambda: from_yaml(name))


@pytest.mark.parametrize("name", [*ARCHITECTURES, "serriformnet", "mamba_attention"])
def test_yaml_conforms_across_the_borders_of_chunks(name):
    model = from_yaml(OPTION.get(name, name), seq_len=conformance.LONG)
    initialise(model, 0)
    conformance.randomise(model, 0)
    conformance.check_borders(model, random_tokens(3, conformance.LONG))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_options_conform(options):
    conform(lambda: lattice(dropout=0.1, **options))


def test_dropout_of_the_weights_acts_in_training_only():
    model = Stack(V, 16, 1, partial(Attention, n_heads=2, dropout=0.5), max_len=24)
    assert not torch.equal(model(random_tokens()), model(random_tokens()))
    model.eval()
    assert torch.equal(model(random_tokens()), model(random_tokens()))


# The checks find what they are for: a running mean, right or with one fault, must fail the check of that name.


class Mean(Mixer):
    loss_names = ("size",)

    def __init__(self, d_model: int, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.linear = nn.Linear(d_model, d_model)
        self.idle = nn.Parameter(torch.ones(d_model)) if fault == "gradients" else None
        self.register_buffer("calls", torch.zeros(()))

    def mix(self, x, state, lengths, want):
        B, length, _ = x.shape
        fresh = state is None  # what init_state of the base gives
        state = {"total": x.new_zeros(B, self.linear.in_features), "count": torch.zeros(B, dtype=torch.long)} if fresh else state
        new = torch.full((B,), length) if lengths is None else lengths
        x = torch.tanh(self.linear(x))
        total = state["total"][:, None] + x.cumsum(1)
        y = total / (state["count"][:, None] + torch.arange(1, length + 1))[..., None]
        after = {"total": total[torch.arange(B), new - 1], "count": state["count"] + new}
        loss = y.square().mean(-1)
        if lengths is not None:
            loss = loss[torch.arange(length) < lengths[:, None]]
        match self.fault:
            case "causality":
                y = y + x.flip(1)
            case "continuation" if not fresh:
                after["count"] = state["count"]
            case "state_is_pure" if not fresh:
                state["total"].mul_(2)
            case "batch_independence":
                y = y + x.mean(0)
            case "padding":
                after["total"] = total[:, -1]
            case "state_rows" if not fresh:
                y = y * (1 + torch.arange(B))[:, None, None]
            case "no_memory":
                self.calls += 1
                y = y * self.calls
            case "record" if "record" in want:
                y = y * 1.1
        return Output(y, after, {"size": loss.mean()})


def broken(fault: str = "") -> Stack:
    model = Stack(V, 16, 2, partial(Mean, fault=fault), max_len=24)
    initialise(model, 0)
    return model


def test_a_right_model_passes_every_check():
    conform(broken)


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda c: c.__name__.removeprefix("check_"))
def test_a_wrong_model_fails_its_check(check):
    model = broken(check.__name__.removeprefix("check_"))
    with pytest.raises(AssertionError):
        check(model, random_tokens())


# What the training loop does to a model


def total_loss(model):
    out = model(random_tokens()[:, :-1], want=("losses",))
    return nn.functional.cross_entropy(out.y.flatten(0, 1), random_tokens()[:, 1:].flatten()) + sum(out.losses.values())


def loss_and_gradients(model):
    model.zero_grad()
    torch.manual_seed(0)
    loss = total_loss(model)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture(params=[vanilla, lattice])
def model(request):
    model = request.param(dropout=0.1)
    initialise(model, 0)
    return model.train()


def test_activation_checkpointing_changes_nothing_but_memory(model):
    want = loss_and_gradients(model)
    calls = []
    model.blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    loss_and_gradients(model)
    assert len(calls) == 1
    model.activation_checkpointing = True
    torch.testing.assert_close(loss_and_gradients(model), want, rtol=0, atol=0)
    assert len(calls) == 3, "a block runs again in the backward pass"
    model.eval()
    total_loss(model)
    assert len(calls) == 4, "nothing is recomputed outside training"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch hides it, but not from "error"
@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_compile_one_by_one_and_hooks_fire(model, checkpointing):
    torch._dynamo.reset()
    want = loss_and_gradients(model)
    counter = CompileCounterWithBackend("aot_eager")
    fired = {"block": torch.zeros(()), "mixer": torch.zeros(())}  # tensors: a hook that grows a list would be compiled anew each time

    def count(name):
        def hook(*_):
            fired[name].add_(1)

        return hook

    count_block, count_mixer = count("block"), count("mixer")
    for block in model.blocks:
        block.register_forward_hook(count_block)
        block.mixer.register_forward_hook(count_mixer)
        block.compile(fullgraph=True, backend=counter)
    model.activation_checkpointing = checkpointing
    for _ in range(2):
        torch.testing.assert_close(loss_and_gradients(model), want, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 2, "the blocks are alike: one graph serves all; the other is the hook on a block"
    runs = 2 * len(model.blocks)  # the second run of a block in the backward pass ends before its own hook
    assert fired == {"block": runs, "mixer": 2 * runs if checkpointing else runs}


# The stack


@torch.no_grad()
def test_the_trunk_written_out():
    model, tokens = vanilla(dropout=0.1).double().eval(), random_tokens()
    conformance.randomise(model, 0)
    p = dict(model.named_parameters())

    def linear(name, x):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(name, x):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]

    def gelu(x):
        return x * (1 + torch.erf(x / 2**0.5)) / 2

    x = p["embedding.weight"][tokens] + p["position.weight"][:L]
    for i, block in enumerate(model.blocks):
        x = x + block.mixer(norm(f"blocks.{i}.norm1", x))
        x = x + linear(f"blocks.{i}.mlp.down", gelu(linear(f"blocks.{i}.mlp.up", norm(f"blocks.{i}.norm2", x))))
    torch.testing.assert_close(model(tokens), linear("head", norm("norm", x)))


def test_documented_sizes_and_names():
    with torch.device("meta"):
        model = instantiate(compose_yaml("lot", "task.vocab_size=1000").model)
    assert [tuple(t.shape) for t in (model.embedding.weight, model.position.weight, model.head.weight)] == [
        (1000, 256),
        (128, 256),
        (1000, 256),
    ]
    assert len(model.blocks) == 6 and model.blocks[0].mlp.up.weight.shape == (1024, 256)
    mixer = model.blocks[0].mixer
    assert {name for name, _ in mixer.named_parameters()} == {
        *(f"{name}.weight" for name in ("q", "k", "v", "o", "drive")), "omega", "kappa", "alpha",
    }  # fmt: skip
    assert (mixer.n_heads, mixer.W.shape, model.dropout.p, model.max_len) == (8, (8, 8), 0.1, 128)
    weights = compose_yaml("lot", "task.vocab_size=1000").loss_weights
    assert dict(weights) == {"sync": 0.02, "diversity": 0.01} and set(weights) == set(model.loss_names)


PUBLISHED = {"mamba_130m": 129_135_360, "mamba_370m": 371_516_416}  # parameters with a vocabulary of 50,280


@pytest.mark.parametrize("name", MODELS)
def test_every_yaml_at_its_own_size(name):
    with torch.device("meta"):
        model = instantiate(compose_yaml(name, "task.vocab_size=50280").model)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == PUBLISHED.get(name, parameters)


def test_public_names_of_mamba():
    """Those of the public weights, but for the prefix and the embedding."""
    layer = "in_proj.weight conv1d.weight conv1d.bias x_proj.weight dt_proj.weight dt_proj.bias A_log D out_proj.weight".split()
    want = {"embedding.weight", "norm.weight", "head.weight"}
    want |= {f"blocks.{i}.{name}" for i in range(2) for name in ("norm1.weight", *(f"mixer.{name}" for name in layer))}
    model = from_yaml("mamba")
    assert set(model.state_dict()) == want and model.head.weight is model.embedding.weight
    assert model.state_dict()["blocks.0.mixer.conv1d.weight"].shape == (64, 1, 4)


def test_derived_metrics():
    model = lattice()
    losses = model(random_tokens(), want=("losses",)).losses
    assert model.derived_metrics(losses)["sync_order"] == 1 - losses["sync"]
    assert vanilla().loss_names == () and vanilla().derived_metrics({}) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_layers": 0}, "n_layers=0 must be at least 1"),
        ({"d_model": 0}, "^Stack: d_model=0 must be at least 1"),
        ({"d_model": None}, "^Stack: d_model=None must be an integer"),
        ({"d_ff": -1}, "^Stack: d_ff=-1 must be at least 0"),
        ({"vocab_size": 0}, "^Stack: vocab_size=0 must be at least 1"),
        ({"max_len": 0}, "^Stack: max_len=0 must be at least 1"),
        ({"max_len": None}, 'position="learned" needs max_len'),
        ({"position": "rotary"}, "position='rotary'; expected learned, sinusoidal, rope, alibi, none, gate, rotate"),
    ],
)
def test_wrong_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Stack(**{"vocab_size": V, "d_model": 16, "n_layers": 1, "mixer": partial(Attention, n_heads=4), "max_len": 8, **options})


@pytest.mark.parametrize("name", ["transformer", "laminar", "serriform"])
def test_calls_that_cannot_be_are_one_sentence(name):
    model, tokens = from_yaml(name).eval(), random_tokens()
    state = model.init_state(3)
    own = type(model).__name__
    calls = {
        r"tokens must be integers \(B, L\), got torch.int64 \(9,\)": lambda: model(tokens[0]),
        r"tokens must be integers \(B, L\), got torch.float32 \(3, 9\)": lambda: model(tokens.float()),
        r"step takes one token of each row, \(B,\) or \(B, 1\), got \(3, 2\)": lambda: model.step(tokens[:, :2], state),
        "the state has 3 rows, the tokens have 2": lambda: model(tokens[:2], state),
        "the state has 3 rows, the tokens have 1": lambda: model.step(tokens[:1, 0], state),
    }
    for sentence, call in calls.items():
        with pytest.raises(ValueError, match=f"^{own}: {sentence}$"):
            call()
    with pytest.raises(ValueError, match=f"^{own} is a decoder without cross-attention: it takes no source$"):
        model(tokens, source=tokens)
    floats = Stack(None, 16, 1, partial(Attention, n_heads=4), max_len=8)
    with pytest.raises(ValueError, match=r"^Stack: step takes one vector of each row, \(B, D\) or \(B, 1, D\), got \(3, 2, 16\)$"):
        floats.step(torch.zeros(3, 2, 16), floats.init_state(3))


def test_a_source_is_refused():
    for call in (lambda m: m(random_tokens(), source=random_tokens()), lambda m: m.init_state(3, source=random_tokens())):
        with pytest.raises(ValueError, match="it takes no source"):
            call(vanilla())
