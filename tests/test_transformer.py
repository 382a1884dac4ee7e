"""Attention with its positions, windows and masks; the encoder-decoder and its documented calls."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from test_models import SOURCE, V, conform, random_tokens
from torch.nn import functional as F

import lab
from lab.analysis import conformance
from lab.layers import MLP, MoE, Sinusoidal
from lab.mixers import Attention, CrossAttention, MambaLayer
from lab.mixers.masks import slopes
from lab.models import Stack, TransformerDecoderLayer, TransformerEncoderLayer, TransformerModel, initialise

B, L, D, H = 3, 9, 16, 4
KINDS = [
    {},
    {"position": "rope"},
    {"position": "alibi"},
    {"window": 3},
    {"bidirectional": True},
    {"bidirectional": True, "window": 2, "position": "alibi"},
    {"bidirectional": True, "position": "rope"},
]


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def layer(cls=Attention, **options):
    module = cls(D, H, **options).double()
    conformance.randomise(module, 0)
    return module.eval()


def by_definition(attention: Attention, x: torch.Tensor, length: int) -> torch.Tensor:
    """One row (L, D), query by query, with plain loops."""
    d, rows = D // H, []
    q, k, v = (f(x).view(len(x), H, d) for f in (attention.q, attention.k, attention.v))

    def turn(z, t):
        w = 10_000 ** (-torch.arange(d // 2, dtype=torch.float64) / (d // 2))
        turned = torch.polar(torch.ones(d // 2, dtype=torch.float64), t * w) * torch.complex(z[: d // 2], z[d // 2 :])
        return torch.cat([turned.real, turned.imag])

    for t in range(len(x)):
        heads = []
        for h in range(H):
            scores, values = [], []
            for s in range(length):
                if (attention.causal and s > t) or (attention.window is not None and abs(t - s) >= attention.window):
                    continue
                a, b = (turn(q[t, h], t), turn(k[s, h], s)) if attention.position == "rope" else (q[t, h], k[s, h])
                slope = 2.0 ** (-8 * (h + 1) / H) if attention.position == "alibi" else 0.0
                scores.append(a @ b / math.sqrt(d) - slope * abs(t - s))
                values.append(v[s, h])
            heads.append(torch.stack(scores).softmax(0) @ torch.stack(values) if scores else torch.zeros(d, dtype=torch.float64))
        rows.append(attention.o(torch.cat(heads)))
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_attention_is_its_definition(options):
    attention, x, lengths = layer(**options), inputs(2, L, D), torch.tensor([L, 5])
    y = attention(x, lengths=lengths)
    for b, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(y[b, :n], by_definition(attention, x[b], n)[:n])
    weights = attention(x, lengths=lengths, want=("record",)).record["attention"]
    v = attention.v(x).unflatten(-1, (H, -1))
    again = attention.o(torch.einsum("bhls,bshd->blhd", weights.double(), v).flatten(-2))
    torch.testing.assert_close(again[0], y[0], rtol=1e-4, atol=1e-5)
    if attention.causal:
        state, steps = attention.init_state(2), []
        for t in range(L):
            out = attention(x[:, t : t + 1], state, want=("state",))
            steps.append(out.y)
            state = out.state
        torch.testing.assert_close(torch.cat(steps, 1)[0], y[0])


def test_slopes_are_the_published_ones():
    torch.testing.assert_close(slopes(8), 2.0 ** -torch.arange(1.0, 9))
    torch.testing.assert_close(slopes(3), torch.tensor([2.0**-4, 2.0**-8, 2.0**-2]))


def test_sinusoidal_positions():
    waves, t = Sinusoidal(6), torch.arange(50)
    want = torch.stack([f(t / 10_000 ** (i / 3)) for f in (torch.sin, torch.cos) for i in range(3)], -1) * 0.02 * math.sqrt(2)
    torch.testing.assert_close(waves(torch.zeros(1, 50, 6), t)[0], want)


@pytest.mark.parametrize(
    "options",
    [
        {"position": "sinusoidal"},
        {"position": "rope", "max_len": None},
        {"position": "alibi"},
        {"mixer": partial(Attention, n_heads=2, window=3)},
    ],
    ids=lambda options: str(options.get("position")),
)
def test_every_stack_has_them(options):
    conform(
        lambda: Stack(**{"vocab_size": V, "d_model": 16, "n_layers": 2, "mixer": partial(Attention, n_heads=4), "max_len": 24, **options})
    )


@torch.no_grad()
@pytest.mark.parametrize("position", ["sinusoidal", "rope", "alibi"])
def test_positions_have_no_last_one(position):
    model = Stack(V, 16, 1, partial(Attention, n_heads=2), position=position, max_len=None).eval()
    assert model.generate(random_tokens(2, 5), 40).shape == (2, 45)
    with pytest.raises(ValueError, match="needs length 9, but the model was built with max_len=8"):
        Stack(V, 16, 1, partial(Attention, n_heads=2), position=position, max_len=8)(random_tokens())


# Masks


MASKS = [(L, L), (B, L, L), (B, 1, L, L), (B, H, L, L), (B, 1, 1, L)]


@torch.no_grad()
@pytest.mark.parametrize("shape", MASKS, ids=str)
@pytest.mark.parametrize("make", [TransformerEncoderLayer, TransformerDecoderLayer])
def test_masks(make, shape):
    """Against scores of minus infinity; a token that may attend to nothing gets zeros from the attention, and no gradient is NaN."""
    module = make(D, H, 32).eval()
    conformance.randomise(module, 0)
    x, mask = inputs(B, L, D).float(), torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[..., 0, :] = False if shape[-2] == L else mask[..., 0, :]
    memory = inputs(B, 5, D).float()
    rest = (memory,) if make is TransformerDecoderLayer else ()
    y = module(x, *rest, mask)
    full = {2: mask[None, None], 3: mask[:, None] if mask.ndim == 3 else mask, 4: mask}[mask.ndim].expand(B, H, L, L)
    if make is TransformerDecoderLayer:
        full = full & torch.ones(L, L, dtype=torch.bool).tril()
    block = module.block
    q, k, v = (f(block.norm1(x)).unflatten(-1, (H, -1)).transpose(1, 2) for f in (block.mixer.q, block.mixer.k, block.mixer.v))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(D // H)).masked_fill(~full, -torch.inf).softmax(-1).nan_to_num(0)
    z = x + block.mixer.o((weights @ v).transpose(1, 2).flatten(-2))
    if make is TransformerDecoderLayer:
        z = z + block.cross(block.norm_cross(z), memory)
    torch.testing.assert_close(y, z + block.mlp(block.norm2(z)), rtol=1e-4, atol=1e-5)
    with torch.enable_grad():
        module(x, *rest, mask).sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@torch.no_grad()
def test_a_row_with_nothing_to_attend_to_gives_zeros():
    attention, x = layer(bidirectional=True), inputs(B, L, D)
    nothing = torch.zeros(L, L, dtype=torch.bool)
    assert not attention(x, mask=nothing).any()
    assert not attention(x, lengths=torch.tensor([0, 3, L]))[0].any()
    assert not attention(x, mask=nothing, want=("record",)).record["attention"].any()
    cross = layer(CrossAttention)
    assert not cross(x, x, mask=nothing).any() and not cross(x, x, lengths=torch.tensor([0, 3, L]))[0].any()


@torch.no_grad()
def test_masks_of_numbers_need_a_convention():
    x, mask = inputs(B, L, D).float(), torch.rand(L, L) < 0.7
    plain = TransformerEncoderLayer(D, H, 32).eval()
    for convention, numbers in (("attend", mask.float()), ("hide", (~mask).float()), ("attend", mask.long())):
        module = TransformerEncoderLayer(D, H, 32, mask_convention=convention).eval()
        module.load_state_dict(plain.state_dict())
        assert torch.equal(module(x, numbers), plain(x, mask)) and torch.equal(module(x, mask), plain(x, mask))
    with pytest.raises(
        ValueError, match="^Attention: the mask is torch.float32; a boolean one .* needs mask_convention, attend .* or hide"
    ):
        plain(x, mask.float())
    with pytest.raises(ValueError, match="values other than 0 and 1"):
        module(x, torch.where(mask, 0.0, -torch.inf))
    with pytest.raises(ValueError, match=r"the mask is \(9, 8\); expected \(9, 9\), \(3, 9, 9\) or \(3, 4, 9, 9\)"):
        plain(x, mask[:, :8])
    with pytest.raises(ValueError, match="mask_convention='keep'; expected attend"):
        TransformerEncoderLayer(D, H, 32, mask_convention="keep")
    with pytest.raises(ValueError, match="^MambaLayer is no attention: it takes no mask$"):
        MambaLayer(D)(x, mask=mask)
    causal = layer()
    with pytest.raises(ValueError, match="it cannot be given with a state"):
        causal(x.double(), causal.init_state(B), mask=mask)


# The encoder-decoder


def seq2seq(**options) -> TransformerModel:
    return TransformerModel(**{"vocab_size": V, "d_model": 16, "n_heads": 4, "n_layers": 2, "max_len": 24, **options})


def mamba_decoder() -> Stack:
    encoder = Stack(V, 8, 1, partial(Attention, n_heads=2, bidirectional=True), max_len=24, head=False)
    return Stack(V, 16, 2, MambaLayer, d_ff=0, position="none", encoder=encoder, cross=partial(CrossAttention, n_heads=2))


@pytest.mark.parametrize(
    "make",
    [
        *(partial(seq2seq, position=position) for position in ("sinusoidal", "rope", "alibi", "none")),
        partial(seq2seq, window=2, tied=True),
        partial(seq2seq, feed_forward=partial(MoE, d_ff=24, n_experts=3), d_ff=0),
        mamba_decoder,
    ],
    ids=["sinusoidal", "rope", "alibi", "none", "window", "experts", "mamba"],
)
def test_encoder_decoders_conform(make):
    conform(make)


def test_experts_of_the_decoder_leave_the_encoder_its_mlps():
    model = seq2seq(feed_forward=partial(MoE, d_ff=24, n_experts=3), d_ff=0)
    assert all(isinstance(block.mlp, MoE) for block in model.blocks) and model.loss_names == ("balance", "entropy", "z")
    assert all(isinstance(block.mlp, MLP) and block.mlp.up.out_features == 4 * 16 for block in model.encoder.blocks)


@torch.no_grad()
def test_it_is_torchs_own():
    """torch.nn's layers with the same weights, without its biases."""
    model = seq2seq(position="none").double().eval()
    conformance.randomise(model, 0)
    src, tgt = SOURCE, random_tokens()

    def copied(block, cls):
        theirs = cls(16, 4, 64, 0.0, F.gelu, batch_first=True, norm_first=True, dtype=torch.float64).eval()
        pairs = [(theirs.self_attn, block.mixer)] + ([(theirs.multihead_attn, block.cross)] if block.cross is not None else [])
        for attention, ours in pairs:
            attention.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.k.weight, ours.v.weight]))
            attention.in_proj_bias.zero_(), attention.out_proj.bias.zero_()
            attention.out_proj.weight.copy_(ours.o.weight)
        norms = [block.norm1, *([] if block.cross is None else [block.norm_cross]), block.norm2]
        for i, norm in enumerate(norms, 1):
            getattr(theirs, f"norm{i}").load_state_dict(norm.state_dict())
        theirs.linear1.load_state_dict(block.mlp.up.state_dict()), theirs.linear2.load_state_dict(block.mlp.down.state_dict())
        return theirs

    memory = model.encoder.embedding(src)
    for block in model.encoder.blocks:
        memory = copied(block, torch.nn.TransformerEncoderLayer)(memory)
    memory, y = model.encoder.norm(memory), model.embedding(tgt)
    for block in model.blocks:
        y = copied(block, torch.nn.TransformerDecoderLayer)(
            y, memory, tgt_mask=torch.nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64), tgt_is_causal=True
        )
    torch.testing.assert_close(model(src, tgt), model.head(model.norm(y)))


@torch.no_grad()
def test_the_documented_calls():
    model = lab.create_model("transformer", d_model=32, num_layers=2, max_seq_len=20, vocab_size=V)
    assert type(model) is TransformerModel and not model.eval().encoder.head.state_dict()
    src, tgt, lengths = SOURCE, random_tokens(), torch.tensor([7, 2, 4])
    logits = model(src, tgt)
    assert logits.shape == (3, 9, V) and torch.equal(logits, model(tgt, source=src))
    padding = torch.arange(7) < lengths[:, None]
    masked = model(src, tgt, src_mask=padding[:, None, None], tgt_mask=torch.ones(9, 9, dtype=torch.bool).tril())
    torch.testing.assert_close(masked, model(src, tgt, source_lengths=lengths))
    torch.testing.assert_close(model(src, tgt, src_mask=torch.ones(7, 7, dtype=torch.bool)), logits)
    assert not torch.allclose(model(src, tgt, memory_mask=torch.ones(9, 7, dtype=torch.bool).tril()), logits)
    floats = lab.create_model("transformer", d_model=32, num_layers=1)
    assert floats(torch.randn(2, 5, 32), torch.randn(2, 4, 32)).shape == (2, 4, 32)
    encoder = lab.create_model(
        "transformer", d_model=32, num_layers=1, vocab_size=V, architecture_kwargs={"kind": "encoder", "position": "rope"}
    )
    assert not encoder.causal and encoder(src).shape == (3, 7, V) and encoder.mixers[0].position == "rope"
    with pytest.raises(NotImplementedError, match="Attention reads the whole sequence"):
        encoder.init_state(3)


CALLS = {
    "call it as model\\(src, tgt\\), one tensor alone is not enough": lambda m: m(random_tokens()),
    "belongs to model\\(tgt, source=src\\)": lambda m: m(SOURCE, random_tokens(), source=SOURCE),
    "the state holds a source already": lambda m: m(random_tokens(), m.init_state(3, SOURCE), source=SOURCE),
    "it needs one, \\(B, S\\), or a state that holds one": lambda m: m.init_state(3),
    "the source has 2 rows, expected 3": lambda m: m(SOURCE[:2], random_tokens()),
    "generate needs a source": lambda m: m.generate(random_tokens(3, 1), 2),
    "lengths has shape \\(2,\\); expected \\(3,\\)": lambda m: m(SOURCE, random_tokens(), source_lengths=torch.tensor([1, 2])),
}


@pytest.mark.parametrize("sentence", CALLS)
def test_calls_that_cannot_be_are_one_sentence(sentence):
    with pytest.raises(ValueError, match=sentence):
        CALLS[sentence](seq2seq())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Attention(16, 4, position="learned"), "position='learned'; expected none, rope or alibi"),
        (lambda: Attention(12, 4, position="rope"), "the 3 of each head must be even"),
        (lambda: Attention(16, 4, window=0), "window=0 must be at least 1"),
        (lambda: Stack(V, 16, 1, MambaLayer, position="rope"), "position=rope is for mixers that take a position"),
        (lambda: Stack(V, 16, 1, MambaLayer, position="none", encoder=seq2seq()), "encoder and cross belong together"),
        (lambda: seq2seq(d_model=15), "d_model=15 must be a multiple of n_heads=4"),
    ],
)
def test_wrong_options_are_errors(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@torch.no_grad()
def test_generate_reads_its_source():
    model = seq2seq().eval()
    initialise(model, 0), conformance.randomise(model, 0)
    start, lengths = torch.ones(3, 1, dtype=torch.long), torch.tensor([7, 2, 4])
    out = model.generate(start, 6, source=SOURCE, source_lengths=lengths)
    assert torch.equal(out[:, 1:], model(SOURCE, out, source_lengths=lengths)[:, :-1].argmax(-1))
    for b, n in enumerate(lengths.tolist()):
        assert torch.equal(model.generate(start[:1], 6, source=SOURCE[b : b + 1, :n])[0], out[b])
