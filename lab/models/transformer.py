"""The encoder-decoder Transformer, and its layers alone.                                  arXiv:1706.03762; pre-norm arXiv:2002.04745

    encoder   x = x + Attention(norm(x)) over all of the source;  x = x + MLP(norm(x));  a final norm
    decoder   y = y + Attention(norm(y)), causal;  y = y + CrossAttention(norm(y), x);  y = y + MLP(norm(y));  a final norm;  the head

Both are Stacks of `lab.mixers.Attention`, each with a final norm of its own; nothing here computes anything else. The decoder-only
Transformer is a Stack of attention, the encoder-only one a Stack of attention with bidirectional=True.

B = batch, L = length of the target, S = length of the source, D = d_model, V = vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from lab.layers import MLP, FeedForward
from lab.mixers import Attention, CrossAttention, Output, State
from lab.mixers.masks import MaskConvention, may_attend
from lab.models.block import Block
from lab.models.stack import Position, Stack
from lab.ops.program import NotCompiled, Program, Value


class TransformerEncoderLayer(nn.Module):
    """layer(x, mask): x (B, L, D) -> (B, L, D), each token attends to all, as far as the mask allows it (lab/mixers/masks.py). dropout: on
    both branches; attention_dropout: on the attention weights."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ff: int,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        mask_convention: MaskConvention | None = None,
    ) -> None:
        super().__init__()
        attention = Attention(d_model, num_heads, attention_dropout, bidirectional=True, mask_convention=mask_convention)
        self.block = Block(d_model, attention, MLP(d_model, d_ff), dropout, nn.LayerNorm)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.block(x, mask=mask)
        return y


class TransformerDecoderLayer(nn.Module):
    """layer(x, memory, tgt_mask, memory_mask): x (B, L, D), memory (B, S, D) -> (B, L, D). It is causal by itself: tgt_mask (L, L) hides
    more, never less. memory_mask (L, S): which of the memory each token may attend to. The rest as of the encoder's layer."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ff: int,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        mask_convention: MaskConvention | None = None,
    ) -> None:
        super().__init__()
        attention = Attention(d_model, num_heads, attention_dropout, mask_convention=mask_convention)
        cross = CrossAttention(d_model, num_heads, attention_dropout, mask_convention=mask_convention)
        self.block = Block(d_model, attention, MLP(d_model, d_ff), dropout, nn.LayerNorm, cross)

    def forward(self, x: Tensor, memory: Tensor, tgt_mask: Tensor | None = None, memory_mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.block(x, held=memory, mask=tgt_mask, memory_mask=memory_mask)
        return y


class TransformerModel(Stack):
    """Two calls: model(src, tgt, src_mask=..., tgt_mask=...), the documented one, and that of every model, model(tokens, source=...).

    vocab_size: of both sides, None for floats (B, S, D) and (B, L, D). n_encoder_layers: None: n_layers. d_ff: None: 4 d_model.
    source_max_len: None: max_len. attention_dropout: on the attention weights. position: of both sides; learned, sinusoidal, rope (turns q
    and k within each side), alibi or none. window: of the attention of both sides within themselves. source_vocab_size: where that of the
    source is another. feed_forward: in place of the MLP of the decoder's blocks; d_ff must then be 0 or None, and the MLPs of the
    encoder are 4 d_model wide, since an encoder with auxiliary losses cannot be trained."""

    def __init__(
        self,
        vocab_size: int | None,
        d_model: int = 256,
        n_heads: int = 8,
        n_layers: int = 4,
        n_encoder_layers: int | None = None,
        d_ff: int | None = None,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        max_len: int | None = 2048,
        source_max_len: int | None = None,
        position: Position = "learned",
        window: int | None = None,
        source_vocab_size: int | None = None,
        tied: bool = False,
        feed_forward: Callable[..., FeedForward] | None = None,
        mask_convention: MaskConvention | None = None,
    ) -> None:
        attention = partial(Attention, n_heads=n_heads, dropout=attention_dropout, window=window, mask_convention=mask_convention)
        encoder = Stack(
            vocab_size if source_vocab_size is None else source_vocab_size,
            d_model,
            n_layers if n_encoder_layers is None else n_encoder_layers,
            partial(attention, bidirectional=True),
            d_ff=d_ff if feed_forward is None else None,
            dropout=dropout,
            max_len=max_len if source_max_len is None else source_max_len,
            position=position,
            head=False,
        )
        super().__init__(
            vocab_size,
            d_model,
            n_layers,
            attention,
            d_ff=d_ff,
            dropout=dropout,
            max_len=max_len,
            position=position,
            tied=tied,
            feed_forward=feed_forward,
            encoder=encoder,
            cross=partial(CrossAttention, n_heads=n_heads, dropout=attention_dropout, mask_convention=mask_convention),
        )
        self.n_heads, self.mask_convention = n_heads, mask_convention

    def forward(
        self,
        tokens: Tensor,
        state: State | Tensor = None,
        *,
        lengths: Tensor | None = None,
        source: Tensor | None = None,
        source_lengths: Tensor | None = None,
        want: tuple[str, ...] = (),
        mask: Tensor | None = None,
        source_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
    ) -> Tensor | Output:
        """model(src, tgt): src (B, S), tgt (B, L) -> logits (B, L, V). src_mask (S, S) or, of padding, (B, 1, 1, S): a token of the source
        that it hides from all of the source is hidden from the target too, unless memory_mask (L, S) says something else. tgt_mask
        (L, L): beside causality. The other names are those of a Stack."""
        if isinstance(state, Tensor):
            if source is not None:
                raise ValueError("TransformerModel: model(src, tgt) has its source already; source= belongs to model(tgt, source=src)")
            source, tokens, state = tokens, state, None
        elif state is None and source is None:
            raise ValueError("TransformerModel is an encoder-decoder: call it as model(src, tgt), one tensor alone is not enough")
        source_mask, mask = (given if named is None else named for given, named in ((source_mask, src_mask), (mask, tgt_mask)))
        if source_mask is not None and memory_mask is None and source is not None:
            S = source.shape[1]
            source_mask = may_attend("TransformerModel", source_mask, self.mask_convention, (source.shape[0], self.n_heads, S, S))
            memory_mask = source_mask.any(-2, keepdim=True)
        return super().forward(
            tokens,
            state,
            lengths=lengths,
            source=source,
            source_lengths=source_lengths,
            want=want,
            mask=mask,
            source_mask=source_mask,
            memory_mask=memory_mask,
        )

    def program(self, p: Program, state: State) -> Value:
        raise NotCompiled("cross-attention has no program")
