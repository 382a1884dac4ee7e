"""The mixture of experts: against loops over tokens in float64, its losses, and what a stack makes of it."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from export_checks import at_once, check, export  # noqa: F401 (fixture)
from op_checks import compare, numbers, of
from test_models import V, conform, random_tokens
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from lab.layers import MLP, FeedForward, MoE
from lab.mixers import Attention, MambaLayer, Output
from lab.models import Stack, initialise
from lab.models.create import create_model
from lab.ops import grouped_matmul, use
from lab.ops.grouped_matmul import backward_op, torch_backend
from lab.training.module import LabModule

B, L, D, F = 3, 7, 5, 6
LENGTHS = torch.tensor([4, 7, 1])
ACT = {"gelu": nn.functional.gelu, "silu": nn.functional.silu, "relu": torch.relu}


def stack(d_model: int = 16, mixer=None, n_layers: int = 2, **options) -> Stack:
    feed = partial(MoE, **{"d_ff": 8, **options})
    return Stack(V, d_model, n_layers, mixer or partial(Attention, n_heads=2), max_len=24, d_ff=0, feed_forward=feed)


def loop(moe: MoE, x: torch.Tensor, lengths: torch.Tensor, capacity: int | None = None) -> torch.Tensor:
    """y, token by token, choice by choice: the first choices of all tokens, then the second ones."""
    y = torch.zeros_like(x)
    room = dict.fromkeys(range(moe.n_experts), capacity)
    for j in range(moe.top_k):
        for b in range(len(x)):
            for t in range(int(lengths[b])):
                p = torch.softmax(moe.router.weight @ x[b, t], 0)
                best = p.argsort(descending=True)[: moe.top_k]
                e = int(best[j])
                if room[e] == 0:
                    continue
                room[e] = None if room[e] is None else room[e] - 1
                share = p[e] / p[best].sum() if moe.top_k > 1 else p[e]
                y[b, t] += share * (ACT[moe.activation](x[b, t] @ moe.up[e]) @ moe.down[e])
    return y


def layer(routing: str = "any", **options) -> tuple[MoE, torch.Tensor]:
    """In float64, and its x (B, L, D)."""
    torch.manual_seed(0)
    moe, x = MoE(D, F, **options).double(), torch.randn(B, L, D, dtype=torch.float64)
    with torch.no_grad():
        if routing != "any":
            x[..., 0] = 1
            moe.router.weight[:, 0] = 0
            moe.router.weight[2, 0] = 50 if routing == "to one" else -50  # all tokens to expert 2, or none
    return moe, x.requires_grad_()


CASES = {
    "plain": {},
    "one choice": {"top_k": 1},
    "all experts": {"top_k": 4},
    "one expert": {"n_experts": 1, "top_k": 1},
    "many experts": {"n_experts": 30, "top_k": 3, "activation": "silu"},
    "all to one": {"routing": "to one", "top_k": 1, "activation": "relu"},
    "an expert without tokens": {"routing": "not to one"},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("ragged", [False, True], ids=["whole", "ragged"])
def test_values_and_gradients(case, ragged):
    moe, x = layer(**case)
    lengths = LENGTHS if ragged else torch.full((B,), L)
    real = torch.arange(L) < lengths[:, None]
    weight = torch.where(real[..., None], torch.randn(B, L, D, dtype=torch.float64), 0)
    y = moe(x, lengths=LENGTHS if ragged else None)
    want = loop(moe, x, lengths)
    torch.testing.assert_close(y[real], want[real])
    inputs = [x, *moe.parameters()]
    got, of_loop = (torch.autograd.grad((weight * out).sum(), inputs, materialize_grads=True) for out in (y, want))
    for g, w in zip(got, of_loop, strict=True):
        torch.testing.assert_close(g, w)
    assert case.get("n_experts") == 1 or case.get("routing") == "to one" or got[1].abs().max() > 1e-3  # the router learns
    if case.get("routing") == "not to one":
        assert not got[2][2].any()
    torch.testing.assert_close(moe.dense(x.flatten(0, 1), *routed(moe, x)).view(B, L, D)[real], want[real])  # of exported files


def routed(moe, x):
    logits = x.flatten(0, 1) @ moe.router.weight.T
    weight, choice = logits.softmax(-1).topk(moe.top_k)
    return logits, weight / weight.sum(-1, keepdim=True) if moe.top_k > 1 else weight, choice


@pytest.mark.parametrize(("factor", "ragged"), [(0.5, False), (0.5, True), (1.0, True), (100.0, True)])
def test_capacity_drops_in_order_and_in_training_alone(factor, ragged):
    moe, x = layer(capacity_factor=factor)
    lengths = LENGTHS if ragged else torch.full((B,), L)
    given = LENGTHS if ragged else None
    capacity = math.ceil(factor * int(lengths.sum()) * 2 / 4)
    real = torch.arange(L) < lengths[:, None]
    free, kept = loop(moe, x, lengths), loop(moe, x, lengths, capacity)
    y = moe(x, lengths=given)
    torch.testing.assert_close(y[real], kept[real])
    assert torch.equal(free, kept) == (factor > 1)
    got, want = (torch.autograd.grad(out[real].square().sum(), [x, *moe.parameters()]) for out in (y, kept))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(moe.eval()(x, lengths=given)[real], free[real])


def test_noise_acts_in_training_alone():
    moe, x = layer(router_noise=3.0, n_experts=8)
    torch.manual_seed(1)
    noisy, other = moe(x, want=("losses",)), moe(x, want=("losses",))
    assert not torch.equal(noisy.y, other.y)
    torch.manual_seed(1)
    again = moe(x, want=("losses",))
    assert torch.equal(again.y, noisy.y)
    clean = moe.eval()(x, want=("losses",))
    assert torch.equal(clean.y, moe(x))
    for name in ("P", "z"):
        assert torch.equal(clean.means[name], noisy.means[name])
    assert not torch.equal(clean.means["f"], noisy.means["f"])


@pytest.mark.parametrize("ragged", [False, True], ids=["whole", "ragged"])
def test_losses_and_record(ragged):
    moe, x = layer(top_k=3, n_experts=5)
    lengths = LENGTHS if ragged else torch.full((B,), L)
    real = torch.arange(L) < lengths[:, None]
    logits = (x @ moe.router.weight.T)[real]
    p = logits.softmax(-1)
    f = torch.stack([(p.topk(3).indices == e).any(-1).double().mean() / 3 for e in range(5)])
    want = {
        "balance": 5 * (f * p.mean(0)).sum(),
        "entropy": math.log(5) + (p.mean(0) * p.mean(0).log()).sum(),
        "z": logits.exp().sum(-1).log().square().mean(),
    }
    out = moe(x, lengths=LENGTHS if ragged else None, want=("losses", "record"))
    assert set(out.losses) == set(want) == set(moe.loss_names)
    for name, value in want.items():
        torch.testing.assert_close(out.losses[name], value)
        got, expected = (torch.autograd.grad(loss, [x, moe.router.weight], retain_graph=True) for loss in (out.losses[name], value))
        torch.testing.assert_close(got, expected)
    assert not out.means["f"].requires_grad
    torch.testing.assert_close(out.record["router"][real], p)
    assert torch.equal(out.record["experts"][real], p.topk(3).indices)


def test_balanced_experts_have_balance_1_and_entropy_0():
    even = torch.full((4,), 0.25)
    losses = MoE(D).losses({"f": even, "P": even, "z": torch.tensor(2.0)})
    assert losses["balance"] == 1 and losses["entropy"].abs() < 1e-6 and losses["z"] == 2
    one = torch.tensor([0.0, 0, 1, 0])
    losses = MoE(D).losses({"f": one, "P": one, "z": torch.tensor(0.0)})
    assert losses["balance"] == 4 and losses["entropy"] == pytest.approx(math.log(4))


def test_a_row_without_tokens_and_a_batch_without_any():
    moe, x = layer()
    out = moe(x, lengths=torch.tensor([0, 3, 0]), want=("losses",))
    torch.testing.assert_close(out.losses, moe(x[1:2, :3], want=("losses",)).losses)
    none = moe(x, lengths=torch.zeros(3, dtype=torch.long), want=("losses",))
    assert not none.y.any() and all(torch.isfinite(loss) for loss in none.losses.values())


def test_padding_that_is_no_number_is_nowhere_in_the_gradients():
    moe, x = layer()
    real = (torch.arange(L) < LENGTHS[:, None])[..., None]
    grads = []
    for padding in (0.0, math.nan):
        padded = torch.where(real, x, padding)
        out = moe(padded, lengths=LENGTHS, want=("losses",))
        grads.append(torch.autograd.grad(out.y.square().sum() + sum(out.losses.values()), [x, *moe.parameters()]))
    torch.testing.assert_close(*grads, rtol=0, atol=0)
    assert all(torch.isfinite(g).all() for g in grads[1])


# ---- in a stack


@pytest.mark.parametrize(
    "options",
    [{"top_k": 1}, {"n_experts": 6, "top_k": 3, "capacity_factor": 9.0}, {"mixer": partial(MambaLayer, d_state=4)}],
    ids=["attention, one choice", "attention, three of six", "mamba"],
)
def test_stacks_conform(options):
    conform(lambda: stack(**options))


def test_the_losses_of_a_model_follow_from_its_means():
    """Over layers; and those of a batch from the means of its pieces, averaged by their real tokens."""
    model, tokens, lengths = stack(), random_tokens(4, 9), torch.tensor([9, 2, 5, 1])
    whole = model(tokens, lengths=lengths, want=("losses",))
    assert {name: tuple(mean.shape) for name, mean in whole.means.items()} == model.mean_shapes == {"f": (2, 4), "P": (2, 4), "z": (2,)}
    torch.testing.assert_close(model.losses_of(whole.means), whole.losses)
    pieces = [model(tokens[rows], lengths=lengths[rows], want=("losses",)) for rows in (slice(0, 1), slice(1, 4))]
    means = {name: (9 * pieces[0].means[name] + 8 * pieces[1].means[name]) / 17 for name in whole.means}
    torch.testing.assert_close(model.losses_of(means), whole.losses)
    assert abs((9 * pieces[0].losses["balance"] + 8 * pieces[1].losses["balance"]) / 17 - whole.losses["balance"]) > 1e-4
    assert not model(tokens, want=("record",)).means and Stack(V, 8, 1, MambaLayer, position="none").losses_of({}) == {}


def test_ranks_have_the_loss_of_all_their_tokens():
    """`_over_ranks` as two processes would call it: the mean of their gradients is the gradient of the whole batch."""
    model, tokens, lengths = stack().double(), random_tokens(4, 9), torch.tensor([9, 2, 5, 1])
    parameters = [p for name, p in model.named_parameters() if "router" in name]
    whole = sum(model(tokens, lengths=lengths, want=("losses",)).losses.values())
    shares = [(slice(0, 2), 11), (slice(2, 4), 6)]
    outs = [model(tokens[rows], lengths=lengths[rows], want=("losses",)) for rows, _ in shares]
    both = [
        torch.cat([*(mean.detach().flatten() * n for mean in out.means.values()), torch.tensor([n])])
        for out, (_, n) in zip(outs, shares, strict=True)
    ]

    class Rank:
        trainer = type("Trainer", (), {"world_size": 2})

        def _of_all_ranks(self, mine):
            assert any(torch.equal(mine, one) for one in both)
            return torch.stack(both)

    grads = []
    for out, (_, n) in zip(outs, shares, strict=True):
        means, of_all = LabModule._over_ranks(Rank(), out.means, n)
        loss = sum(model.losses_of(means).values())
        assert of_all == 17
        torch.testing.assert_close(loss, whole)
        grads.append(torch.autograd.grad(loss, parameters))
    for one, other, want in zip(*grads, torch.autograd.grad(whole, parameters), strict=True):
        torch.testing.assert_close((one + other) / 2, want)


def test_a_block_compiles_into_one_graph():
    torch._dynamo.reset()
    model = stack(n_layers=1, capacity_factor=1.0)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.blocks[0], backend=counter, fullgraph=True)
    for seed in (0, 1):  # other numbers of tokens for each expert: the same graph
        torch.manual_seed(seed)
        x, want = torch.randn(B, L, 16), ("losses",)
        outs = [block(x, lengths=LENGTHS, want=want) for block in (model.blocks[0], compiled)]
        torch.testing.assert_close(outs[1].y, outs[0].y)
        torch.testing.assert_close(outs[1].losses, outs[0].losses)
        grads = [torch.autograd.grad(out.y.sum() + sum(out.losses.values()), list(model.blocks[0].parameters())) for out in outs]
        torch.testing.assert_close(grads[1], grads[0])
    assert counter.frame_count == 1


def test_checkpointing_draws_the_same_noise_again():
    model, tokens = stack(router_noise=2.0), random_tokens()
    grads = []
    for model.activation_checkpointing in (False, True):
        torch.manual_seed(0)
        out = model(tokens, want=("losses",))
        grads.append(torch.autograd.grad(out.y.square().sum() + sum(out.losses.values()), list(model.parameters())))
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_autocast():
    model, tokens = stack(), random_tokens()
    initialise(model, 0)
    want = model(tokens, want=("losses", "record"))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens, want=("losses", "record"))
    assert (out.y - want.y).abs().max() < 2e-2 * want.y.std()
    assert all(loss.dtype == torch.float32 for loss in out.losses.values()) and out.record["router"][0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16), use(grouped_matmul="torch"):
        x = torch.randn(4, D)
        assert grouped_matmul(x, torch.randn(2, D, F), torch.tensor([1, 3])).dtype == torch.bfloat16
        assert grouped_matmul(x.double(), torch.randn(2, D, F), torch.tensor([1, 3])).dtype == torch.float64


@pytest.mark.parametrize(
    "format", ["torchscript", pytest.param("onnx", marks=pytest.mark.slow), pytest.param("pt2", marks=pytest.mark.slow)]
)
def test_it_exports(format, tmp_path, at_once):  # noqa: F811
    check(export(stack(8, n_layers=1, capacity_factor=0.1, router_noise=1.0), format, tmp_path))


def test_create_model():
    model = create_model("mamba", d_model=16, num_layers=1, vocab_size=V, architecture_kwargs={"feed_forward": partial(MoE, n_experts=3)})
    assert model.blocks[0].mlp.up.shape == (3, 16, 64) and model.loss_names == ("balance", "entropy", "z")
    assert model(random_tokens()).shape == (3, 9, V)


class Doubling(FeedForward):
    def __init__(self, d_model: int) -> None:
        super().__init__()

    def feed(self, x, lengths, want):
        return Output(2 * x)


def test_any_feed_forward():
    model = Stack(V, 16, 2, partial(Attention, n_heads=2), max_len=24, feed_forward=Doubling)
    assert isinstance(model.blocks[1].mlp, Doubling) and model.loss_names == () and not model.mean_shapes
    out = model(random_tokens(), want=("losses", "record"))
    assert out.losses == {} and out.means == {} and set(out.record) == {"attention"}
    mlp, x = MLP(D, F), torch.randn(2, D)
    torch.testing.assert_close(mlp(x, want=("losses",)).y, mlp(x))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"top_k": 5}, "MoE: top_k=5 must be at most n_experts=4, as a token goes to different experts"),
        ({"top_k": 0}, "MoE: top_k=0 must be at least 1"),
        ({"n_experts": 2.0}, "MoE: n_experts=2.0 must be an integer"),
        ({"d_ff": 0}, "MoE: d_ff=0 must be at least 1"),
        ({"capacity_factor": 0.0}, "MoE: capacity_factor=0.0 must be above 0, or None for no limit"),
        ({"capacity_factor": math.nan}, "MoE: capacity_factor=nan must be above 0, or None for no limit"),
        ({"router_noise": -1.0}, "MoE: router_noise=-1.0 must be 0 or more"),
        ({"activation": "tanh"}, "MoE: activation='tanh'; expected silu, gelu, relu"),
    ],
)
def test_mistakes_are_one_sentence(arguments, sentence):
    with pytest.raises(ValueError) as error:
        MoE(D, **arguments)
    assert str(error.value) == sentence


def test_mistakes_of_use_are_one_sentence():
    with pytest.raises(ValueError, match=r"MoE: x must be \(B, L, 5\), got \(4, 5\)"):
        MoE(D)(torch.randn(4, D))
    with pytest.raises(ValueError, match="Stack: d_ff=32 is the width of the MLP, in whose place feed_forward stands"):
        Stack(V, 16, 1, partial(Attention, n_heads=2), max_len=8, d_ff=32, feed_forward=MoE)
    for x, weight, counts in ((torch.ones(3, 2), torch.ones(2, 3, 2), [1, 2]), (torch.ones(3, 2), torch.ones(2, 2, 2), [3])):
        with pytest.raises(ValueError, match=r"grouped_matmul: expected x \(T, D\), weight \(E, D, F\) and counts \(E,\)"):
            grouped_matmul(x, weight, torch.tensor(counts))
    with pytest.raises(ValueError, match="grouped_matmul: counts must be integers, got torch.float32"):
        grouped_matmul(torch.ones(3, 2), torch.ones(1, 2, 2), torch.ones(1))


# ---- the op


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("counts", [[2, 0, 5], [0, 0, 0], [0, 9, 0], [3, 3, 3], [0, 1, 0]], ids=str)
@pytest.mark.parametrize("name", of(grouped_matmul))
def test_grouped_matmul(name, counts, dtype):
    """Nine rows: where the counts add up to less, the last ones give zeros."""
    g = torch.Generator().manual_seed(0)
    args = [numbers(*size, dtype=torch.float64, g=g).to(dtype).requires_grad_() for size in ((9, 4), (3, 4, 5))]
    compare(grouped_matmul, name, args, dtype, call=lambda x, weight: (grouped_matmul(x, weight, torch.tensor(counts)),))


def test_grouped_matmul_without_rows_and_of_views():
    assert grouped_matmul(torch.ones(0, 2), torch.ones(3, 2, 4), torch.zeros(3, dtype=torch.long)).shape == (0, 4)
    x, weight, counts = torch.randn(4, 6).T, torch.randn(2, 5, 4).transpose(1, 2), torch.tensor([2, 4])
    want = torch.cat([x[:2] @ weight[0], x[2:] @ weight[1]])
    torch.testing.assert_close(grouped_matmul(x, weight, counts), want)
    x.requires_grad_()
    grouped_matmul(x, weight, counts).sum().backward()  # whose gradient is expanded


def test_the_operator_as_the_compiler_sees_it():
    args = (torch.randn(7, 4, requires_grad=True), torch.randn(3, 4, 5, requires_grad=True), torch.tensor([2, 0, 3]))
    torch.library.opcheck(torch_backend, args)
    torch.library.opcheck(backward_op, (torch.randn(7, 5), *(t.detach() for t in args)), test_utils=("test_schema", "test_faketensor"))
    y = torch_backend(*args)
    (gx,) = torch.autograd.grad(y.square().sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="grouped_matmul: no second derivative; use\\(grouped_matmul='reference'\\) has one"):
        gx.sum().backward()
