"""Mixers used alone, and the convention every mixer follows."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from lab.mixers import Attention, GatedMLP, H3Layer, Lattice, MambaLayer, Mixer, Output, S4DLayer
from lab.models import Stack

MIXERS = [Attention, Lattice]


def sequence(B=3, L=8, D=16, dtype=torch.float32):
    return torch.randn(B, L, D, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("make", MIXERS)
def test_plain_tensor_or_output(make):
    mixer, x = make(16, n_heads=4).eval(), sequence()
    y = mixer(x)
    assert isinstance(y, torch.Tensor) and y.shape == x.shape
    for want in (("state",), ("losses",), ("record",), ("state", "losses", "record")):
        out = mixer(x, want=want)
        assert isinstance(out, Output) and torch.equal(out.y, y)
        assert (out.state is not None) == ("state" in want)
        assert set(out.losses) == set(mixer.loss_names if "losses" in want else ())
        assert "record" in want or not out.record
    out.losses["mine"] = y  # the dictionaries belong to the caller
    assert "mine" not in mixer(x, want=("losses",)).losses and "mine" not in Output(y).losses


class Generous(Mixer):
    """Returns everything every time, as a simple mixer may."""

    def mix(self, x, state, lengths, want):
        return Output(x, x, {"size": x.mean()}, {"x": x})


def test_the_base_returns_what_was_asked_for_alone():
    mixer, x = Generous(), sequence()
    assert mixer(x) is x and mixer.init_state(3) is None
    for want in (("state",), ("losses",), ("record",), ("state", "record")):
        out = mixer(x, want=want)
        assert (out.state is not None, bool(out.losses), bool(out.record)) == tuple(f in want for f in ("state", "losses", "record"))


def test_want_is_checked():
    for want in ("state", ("states",), ("state", "loss")):
        with pytest.raises(ValueError, match="expected a tuple with names out of state, losses, record, in_place"):
            Attention(16, n_heads=4)(sequence(), want=want)


@pytest.mark.parametrize("make", [partial(Attention, n_heads=2), MambaLayer, S4DLayer, partial(H3Layer, d_head=2), GatedMLP])
def test_the_input_is_checked(make):
    layer = make(16)
    for shape in ((2, 10, 8), (10, 16)):
        with pytest.raises(ValueError, match=rf"{type(layer).__name__}: x must be \(B, L, 16\), got {re.escape(str(shape))}$"):
            layer(torch.zeros(shape))


def test_tokens_and_lengths_are_checked():
    model, tokens = Stack(5, 16, 1, MambaLayer, position="none"), torch.zeros(2, 10, dtype=torch.long)
    for token in (5, -1):
        with pytest.raises(ValueError, match=rf"^Stack: token {token} is not in the vocabulary, 0\.\.4$"):
            model.generate(tokens + token, 3)
    for lengths in ([3, 11], [-1, 3]):
        with pytest.raises(ValueError, match=r"must lie in 0\.\.10, the length of the batch$"):
            model(tokens, lengths=torch.tensor(lengths))
    with pytest.raises(ValueError, match=r"lengths has shape \(1,\); expected \(2,\), one per row"):
        model(tokens, lengths=torch.tensor([3]))


def test_attention_against_torch():
    mixer, x = Attention(16, n_heads=4).double(), sequence(dtype=torch.float64)
    peer = torch.nn.MultiheadAttention(16, 4, bias=False, batch_first=True, dtype=torch.float64)
    peer.in_proj_weight.data = torch.cat([mixer.q.weight, mixer.k.weight, mixer.v.weight]).detach()
    peer.out_proj.weight.data = mixer.o.weight.detach()
    mask = torch.nn.Transformer.generate_square_subsequent_mask(8, dtype=torch.float64)
    want, _ = peer(x, x, x, attn_mask=mask, is_causal=True)
    torch.testing.assert_close(mixer(x), want)


@pytest.mark.parametrize("make", MIXERS)
@pytest.mark.parametrize("ragged", [False, True])
@torch.no_grad()
def test_in_place_steps_fill_a_reserved_cache(make, ragged):
    """The same outputs as pure steps, in tensors that keep their address."""
    mixer, x = make(16, n_heads=4).eval(), sequence()
    lengths = torch.tensor([1, 4, 2]) if ragged else None
    pure = mixer(x[:, :4], lengths=lengths, want=("state",)).state
    state = mixer.reserve(pure, 4)
    addresses = state["k"].data_ptr(), state["v"].data_ptr()
    assert state["k"].shape[1] == 8 and pure["k"].shape[1] == 4
    for t in range(4, 8):
        want = mixer(x[:, t : t + 1], pure, want=("state",))
        got = mixer(x[:, t : t + 1], state, want=("state", "in_place"))
        torch.testing.assert_close(got.y, want.y)
        pure, state = want.state, got.state
    assert addresses == (state["k"].data_ptr(), state["v"].data_ptr())
    assert state["v"].shape == state["k"].shape, "a step would widen all of v"
    torch.testing.assert_close(mixer(x[:, :2], state, want=("state",)).y, mixer(x[:, :2], pure))  # it can go on without "in_place"


@pytest.mark.parametrize("make", MIXERS)
def test_only_what_is_asked_for_is_computed(make, monkeypatch):
    """Training asks for losses alone and builds no cache; a step asks for the state alone and computes no losses."""
    mixer, x = make(16, n_heads=4), sequence()
    assert mixer.mix(x, None, None, ("losses",)).state is None
    out = mixer.mix(x, None, None, ("state",))
    assert not out.losses and not out.record


@pytest.mark.parametrize("make", MIXERS)
def test_chunks_of_any_length(make):
    """No token, one token, and a state without tokens."""
    mixer, x = make(16, n_heads=4).eval(), sequence()
    want = mixer(x)
    state, parts = mixer.init_state(3), []
    for start, stop in ((0, 0), (0, 1), (1, 1), (1, 5), (5, 8)):
        out = mixer(x[:, start:stop], state, want=("state",))
        state = out.state
        parts.append(out.y)
    torch.testing.assert_close(torch.cat(parts, 1), want)
    assert mixer(x[:, :0]).shape == (3, 0, 16)


@pytest.mark.parametrize("make", MIXERS)
def test_state_lives_where_it_is_asked_to(make):
    state = make(16, n_heads=4).init_state(2, device=torch.device("meta"), dtype=torch.bfloat16)
    assert all(t.is_meta and t.shape[0] == 2 for t in state.values())
    assert state["k"].dtype == state["v"].dtype == torch.bfloat16


@pytest.mark.parametrize("make", MIXERS)
def test_autocast(make):
    mixer, x = make(16, n_heads=4), sequence()
    want = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = mixer(x, want=("state", "losses", "record"))
        rest = mixer(x, out.state, want=("state",))
    torch.testing.assert_close(out.y.float(), want, rtol=0.05, atol=0.02)
    assert rest.y.shape == want.shape and all(loss.dtype == torch.float32 for loss in out.losses.values())
    assert all(t.dtype == torch.float32 for t in out.record.values())
    (out.y.float().square().mean() + sum(out.losses.values())).backward()
    assert all(torch.isfinite(p.grad).all() for p in mixer.parameters())


@pytest.mark.parametrize("make", MIXERS)
def test_attention_stays_on_the_fused_path(make):
    """Training without dropout on the weights builds no (L, L) matrix: wave and literal pad v to the head size of k."""
    mixer, x = make(16, n_heads=4), sequence()
    with torch.profiler.profile() as profile:
        mixer(x)
    names = {event.name for event in profile.events()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names and "aten::_scaled_dot_product_attention_math" not in names


def test_gain_is_an_inverse_temperature():
    mixer, x = Lattice(16, n_heads=4, phase_mode="gain", alpha=0.7), sequence()
    plain = Attention(16, n_heads=4)
    plain.load_state_dict({name: t for name, t in mixer.state_dict().items() if name in plain.state_dict()})
    theta = mixer(x, want=("record",)).record["theta"][0, 0]
    scale = (1 + 0.7 * theta.cos()).repeat_interleave(4)
    plain.q.weight.data *= scale[:, None]
    torch.testing.assert_close(mixer(x), plain(x))
    assert mixer.init_state(2)["k"].shape == (2, 0, 4, 4) and "theta" not in mixer.init_state(2)


def test_softmax_weights_sum_to_one_under_the_bias():
    """A constant value vector comes out unchanged, whatever the phases."""
    mixer = Lattice(16, n_heads=4, alpha=3.0)
    v = torch.ones(2, 8, 4, 4)
    q, k, _ = mixer.heads(sequence(2))
    theta = 6 * torch.rand(2, 8, 4)
    q, k = mixer.imprint(q, k, theta)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, scale=1.0)
    torch.testing.assert_close(y, torch.ones_like(y))
