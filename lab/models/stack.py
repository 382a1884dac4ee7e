"""The trunk: token embedding, positions, n pre-norm blocks of a mixer and an MLP, final norm, untied head.

With `lab.mixers.Attention` this is the decoder-only Transformer, with `lab.mixers.Lattice` the lattice oscillator transformer (LOT), with
`lab.mixers.MambaLayer`, no MLP and RMS norms Mamba, with `lab.mixers.Serriform` and positions that gate SerriformNet. Layers may have
different mixers. With an encoder, another model of tokens, it is the decoder of an encoder-decoder: each block attends to the source.
With n_classes the head reads the whole input at once, (B, C): a classifier.
B = batch, L = length, S = tokens of the source, D = d_model, V = vocab_size. State: {"position": (B,), "layers": [state of each mixer]},
with an encoder also "source": {"length": (B,), "layers": [k and v (B, S, H, d) of each cross-attention]}, which stay as they are.
Record: lists over the layers, with those of the encoder as encoder_attention and the like.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lab.config.errors import hint
from lab.layers import MLP, Embedding, FeedForward, Gate, Rotate, Sinusoidal
from lab.layers.embedding import looked_up
from lab.mixers import CrossAttention
from lab.mixers.base import Mixer, Output, State, check_at_least, check_want
from lab.models.base import SequenceModel, last_real
from lab.models.block import Block
from lab.models.pooled import Pool, PooledHead
from lab.ops import recording
from lab.ops.program import NotCompiled, Program, Value, part, without_dropout

Position = Literal["learned", "sinusoidal", "rope", "alibi", "none", "gate", "rotate"]
OF_MIXER = ("rope", "alibi")  # positions that a mixer takes as its argument `position`
NORMS: dict[str, Callable[..., nn.Module]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


class Encoded(NamedTuple):
    """A source as the blocks hold it."""

    layers: Sequence[Mapping[str, Tensor]]
    lengths: Tensor | None  # (B,); None: all of the source is real
    record: Mapping[str, list[Any]] = {}

    def state(self, batch_size: int) -> State:
        k = self.layers[0]["k"]
        length = torch.full((batch_size,), k.shape[1], device=k.device) if self.lengths is None else self.lengths
        return {"length": length, "layers": list(self.layers)}


class Stack(SequenceModel):
    """vocab_size: None for a model without embedding and head, which maps floats (B, L, D) to floats (B, L, D). mixer: called as
    mixer(d_model=d_model) once per layer, and with layer=i where it takes that; a list of mixers is used in turn, and of mixers with names
    `pattern` says which one each layer has; either repeats until n_layers, which must be a multiple. feed_forward: called as
    feed_forward(d_model=d_model) once per layer; None: an MLP of width d_ff, where None means 4 d_model, and 0 no MLP. dropout: on the
    embedding and both branches of a block. position: "learned" adds a table of max_len rows; "gate" and "rotate" project the embedding and
    let the place act on it, "sinusoidal" adds fixed waves (lab/layers/rotary.py), "rope" and "alibi" are the business of the mixers that
    take a `position`, of attention (lab/mixers/attention.py); all of these with max_len as a limit, None for none; "none" has no positions
    and no limit. A sequence beyond the limit is an error. norm: "layer" or "rms"; norm_eps is added to the variance or the mean square.
    tied: the head shares its weights with the embedding, and has no bias; head=False: none, the model ends with its norm. encoder: a model
    of the source without a head; each block then has cross-attention to it, called as cross(d_model=d_model, d_source=encoder.d_model).
    n_classes: a head of its own weights, logits (B, C) from the mean, or the last, of the real tokens, by `pool`; n_answers > 1: (B,
    n_answers, C), from the same vector. Such a model has no state, no step and no generation."""

    def __init__(
        self,
        vocab_size: int | None,
        d_model: int,
        n_layers: int,
        mixer: Callable[..., Mixer] | Sequence[Callable[..., Mixer]] | Mapping[str, Callable[..., Mixer]],
        pattern: Sequence[str] | None = None,
        d_ff: int | None = None,
        dropout: float = 0.0,
        max_len: int | None = None,
        position: Position = "learned",
        norm: Literal["layer", "rms"] = "layer",
        tied: bool = False,
        norm_eps: float = 1e-5,
        feed_forward: Callable[..., FeedForward] | None = None,
        head: bool = True,
        encoder: SequenceModel | None = None,
        cross: Callable[..., CrossAttention] | None = None,
        n_classes: int | None = None,
        pool: Pool = "mean",
        n_answers: int = 1,
    ) -> None:
        super().__init__()
        check_at_least("Stack", 1, d_model=d_model, n_layers=n_layers)
        if d_ff is not None:
            check_at_least("Stack", 0, d_ff=d_ff)
        if feed_forward is not None and d_ff:
            raise ValueError(f"Stack: d_ff={d_ff} is the width of the MLP, in whose place feed_forward stands; that has a width of its own")
        if vocab_size is not None:
            check_at_least("Stack", 1, vocab_size=vocab_size)
        if position != "none" and max_len is not None:
            check_at_least("Stack", 1, max_len=max_len)
        if position not in get_args(Position):
            raise ValueError(f"Stack: position={position!r}; expected {', '.join(get_args(Position))}")
        if norm not in NORMS:
            raise ValueError(f"Stack: norm={norm!r}; expected layer or rms")
        if not norm_eps > 0:
            raise ValueError(f"Stack: norm_eps={norm_eps} must be above 0")
        if position == "learned" and max_len is None:
            raise ValueError('Stack: position="learned" needs max_len, the rows of the table; position="none" works without')
        if (encoder is None) != (cross is None):
            raise ValueError("Stack: encoder and cross belong together: what encodes the source, and how the blocks attend to it")
        if encoder is not None and encoder.loss_names:
            raise ValueError(f"Stack: an encoder with auxiliary losses ({', '.join(encoder.loss_names)}) cannot be trained here")
        if n_classes is not None and (not head or encoder is not None):
            raise ValueError("Stack: n_classes is a head of its own, for a model without an encoder of a source")
        if vocab_size is None and tied:
            raise ValueError("Stack: tied=True shares the weights of an embedding, and without vocab_size there is none")
        self.d_model = d_model
        self.max_len = max_len if position != "none" else None
        self.embedding = nn.Identity() if vocab_size is None else Embedding(vocab_size, d_model)
        self.position = _position(position, d_model, max_len)
        self.dropout = nn.Dropout(dropout)
        makes, make_norm = per_layer(mixer, pattern, n_layers), partial(NORMS[norm], eps=norm_eps)
        feed = feed_forward or (None if d_ff == 0 else partial(MLP, d_ff=4 * d_model if d_ff is None else d_ff))
        options: list[dict[str, Any]] = [{"layer": i} if takes(make, "layer") else {} for i, make in enumerate(makes)]
        if position in OF_MIXER:
            options = [of | ({"position": position} if takes(make, "position") else {}) for of, make in zip(options, makes, strict=True)]
            if not any("position" in of for of in options):
                raise ValueError(f"Stack: position={position} is for mixers that take a position, such as attention, and here is none")
        self.encoder = encoder
        self.takes_source = encoder is not None
        self.blocks = nn.ModuleList(
            Block(
                d_model,
                make(d_model=d_model, **of),
                None if feed is None else feed(d_model=d_model),
                dropout,
                make_norm,
                None if encoder is None or cross is None else cross(d_model=d_model, d_source=encoder.d_model),
            )
            for make, of in zip(makes, options, strict=True)
        )
        self.norm = make_norm(d_model)
        self.n_classes, self.n_answers = n_classes, n_answers
        if n_classes is not None:
            self.head: nn.Module = PooledHead(d_model, n_classes, pool, n_answers)
        else:
            self.head = nn.Linear(d_model, vocab_size, bias=not tied) if head and vocab_size is not None else nn.Identity()
        if tied and head and n_classes is None:
            self.head.weight = self.embedding.weight
        self.causal = n_classes is None and all(mixer.causal for mixer in self.mixers)
        layers: list[Mixer | FeedForward] = [*self.mixers, *self.feed_forwards]
        self.loss_names = tuple(dict.fromkeys(name for layer in layers for name in layer.loss_names))
        self.mean_shapes = {name: (n_layers, *shape) for layer in self.feed_forwards[:1] for name, shape in layer.mean_shapes().items()}

    def forward(
        self,
        tokens: Tensor,
        state: State = None,
        *,
        lengths: Tensor | None = None,
        source: Tensor | None = None,
        source_lengths: Tensor | None = None,
        want: tuple[str, ...] = (),
        mask: Tensor | None = None,
        source_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor | Output:
        """As of every model. Masks are those of lab/mixers/masks.py, for stacks of attention: `mask` of the tokens among themselves,
        `source_mask` of the encoder, `memory_mask` of the tokens to the source."""
        check_want(want)
        self.check_call(tokens, state, lengths, source)
        if state is not None or "state" in want:
            self.check_states()
        encoded = None
        if self.encoder is not None:
            if state is None:
                encoded = self.encode(tokens.shape[0], source, source_lengths, source_mask, want)
            else:
                encoded = Encoded(state["source"]["layers"], state["source"]["length"])
        x = self.dropout(self.embed(tokens, state, lengths, "in_place" in want))
        layers = [None] * len(self.blocks) if state is None else state["layers"]
        outputs = []
        for i, (block, before) in enumerate(zip(self.blocks, layers, strict=True)):
            given: dict[str, Any] = {"lengths": lengths, "want": want, "mask": mask}
            if encoded is not None:
                given |= {"held": encoded.layers[i], "source_lengths": encoded.lengths, "memory_mask": memory_mask}
            if self.activation_checkpointing and self.training and torch.is_grad_enabled():
                out = checkpoint(block, x, before, **given, use_reentrant=False)
            else:
                out = block(x, before, **given)
            x = out.y if want else out
            outputs.append(out)
        if "last" in want and self.n_classes is None:
            x = last_real(x, lengths)
        x = self.norm(x)
        logits = self.head(x, lengths) if self.n_classes is not None else self.head(x)
        if not want:
            return logits
        after, losses, record, means = self.collect(outputs, tokens, state, lengths, want)
        if encoded is not None:
            record |= {f"encoder_{name}": layers for name, layers in encoded.record.items()}
            if after is not None:
                after["source"] = encoded.state(tokens.shape[0])
        return Output(logits, after, losses, record, means)

    def encode(
        self, batch_size: int, source: Tensor | None, lengths: Tensor | None, mask: Tensor | None = None, want: tuple[str, ...] = ()
    ) -> Encoded:
        """What the blocks hold of a source (B, S) with its lengths (B,)."""
        assert self.encoder is not None
        if source is None:
            raise ValueError(f"{type(self).__name__} translates a source: it needs one, (B, S), or a state that holds one")
        if not recording() and len(source) != batch_size:
            raise ValueError(f"{type(self).__name__}: the source has {len(source)} rows, expected {batch_size}")
        looks: tuple[str, ...] = ("record",) if "record" in want else ()
        out = self.encoder(source, lengths=lengths, want=looks, **({} if mask is None else {"mask": mask}))
        memory, record = (out.y, out.record) if looks else (out, {})
        layers = [cast(CrossAttention, block.cross).hold(memory) for block in self.blocks]
        return Encoded(layers, None if lengths is None else lengths.to(memory.device, torch.long), record)

    def embed(self, tokens: Tensor, state: State, lengths: Tensor | None, checked: bool) -> Tensor:
        """tokens (B, L), or floats (B, L, D) where there is no vocabulary -> (B, L, D)"""
        x = looked_up(self.embedding, tokens, type(self).__name__)
        if self.position is None and self.max_len is None:
            return x
        L = tokens.shape[1]
        if state is None:
            if not recording():
                self.check_length(L, "the sequence")
            if self.position is None:  # of the mixers
                return x
            if isinstance(self.position, Embedding):
                return x + self.position.weight[:L]
            return self.position(x, torch.arange(L, device=tokens.device))
        if not checked and not recording() and self.max_len is not None:  # generate has checked: reading a position back stalls a GPU
            self.check_length(int((state["position"] + (L if lengths is None else lengths)).max()), "the state with the new tokens")
        if self.position is None:
            return x
        offset = torch.arange(L, device=tokens.device)
        place = state["position"][:, None] + offset
        if not isinstance(self.position, Embedding):
            return self.position(x, place)
        if lengths is not None:
            place = torch.where(offset < lengths[:, None], place, 0)  # padding may reach beyond the table
        return x + self.position(place)

    def collect(
        self, outputs: list[Output], tokens: Tensor, state: State, lengths: Tensor | None, want: tuple[str, ...]
    ) -> tuple[State, dict[str, Tensor], dict[str, list[Any]], dict[str, Tensor]]:
        """The layers' outputs -> state, losses (means over the layers that have them), record (lists over all layers), means (stacked)."""
        after: State = None
        if "state" in want:
            start = 0 if state is None else state["position"]
            B, L = tokens.shape[:2]
            new = torch.full((B,), L, device=tokens.device) if lengths is None else lengths.to(tokens.device, torch.long)
            after = {"position": start + new, "layers": [out.state for out in outputs]}
        losses = {
            name: torch.stack([loss for loss in of_layers if loss is not None]).mean()
            for name, of_layers in gathered([out.losses for out in outputs]).items()
        }
        means = {name: torch.stack([out.means[name] for out in outputs]) for name in self.mean_shapes if "losses" in want}
        return after, losses, gathered([out.record for out in outputs]), means

    def losses_of(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: loss.mean() for name, loss in self.feed_forwards[0].losses(means).items()} if means else {}

    def init_state(
        self,
        batch_size: int,
        source: Tensor | None = None,
        source_lengths: Tensor | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        self.check_states()
        position = torch.zeros(batch_size, dtype=torch.long, device=device or next(self.parameters()).device)
        state = {"position": position, "layers": [mixer.init_state(batch_size, device, dtype) for mixer in self.mixers]}
        if self.encoder is None:
            self.check_no_source(source)
        else:
            state["source"] = self.encode(batch_size, source, source_lengths).state(batch_size)
        return state

    def reserve(self, state: State, n: int) -> State:
        layers = [mixer.reserve(layer, n) for mixer, layer in zip(self.mixers, state["layers"], strict=True)]
        return state | {"layers": layers}

    def check_no_source(self, source: Tensor | None) -> None:
        if self.encoder is None:
            super().check_no_source(source)

    def program(self, p: Program, state: State) -> Value:
        if isinstance(self.embedding, nn.Identity):
            raise NotCompiled("a Stack without vocab_size has no tokens to decode")
        without_dropout(self.dropout)
        learned = self.position if isinstance(self.position, Embedding) else None
        x = p.embed(cast(Embedding, self.embedding), learned)
        if self.position is not learned:
            x = part(self.position).program(p, x, state["position"])
        for block, layer in zip(self.blocks, state["layers"], strict=True):
            with p.scratch():
                part(block).program(p, x, layer)
        return p.linear(cast(nn.Linear, self.head), p.norm(self.norm, x))

    @property
    def mixers(self) -> list[Mixer]:
        return [cast(Mixer, block.mixer) for block in self.blocks]

    @property
    def feed_forwards(self) -> list[FeedForward]:
        return [cast(FeedForward, block.mlp) for block in self.blocks if block.mlp is not None]

    def derived_metrics(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for mixer in self.mixers for name, value in mixer.derived_metrics(losses).items()}


def _position(kind: Position, d_model: int, max_len: int | None) -> Embedding | Gate | Rotate | Sinusoidal | None:
    match kind:
        case "learned":
            return Embedding(cast(int, max_len), d_model)
        case "gate":
            return Gate(d_model)
        case "rotate":
            return Rotate(d_model)
        case "sinusoidal":
            return Sinusoidal(d_model)
    return None


def takes(make: Callable[..., Mixer], name: str) -> bool:
    """Whether a mixer is made with an argument of this name, `layer` or `position`, that the stack knows; not where it was given one."""
    return name in inspect.signature(make).parameters and name not in getattr(make, "keywords", {})


def per_layer(mixer: Any, pattern: Sequence[str] | None, n_layers: int) -> list[Callable[..., Mixer]]:
    """What makes the mixer of each layer, from the arguments of Stack."""
    what = "mixer"
    if isinstance(mixer, Mapping):
        what = "pattern"
        if pattern is None:
            raise ValueError(f"Stack: pattern is missing; it says which of {', '.join(mixer)} each layer has, such as {list(mixer)}")
        for name in pattern:
            if name not in mixer:
                raise ValueError(f"Stack: pattern has {name}, but there is no mixer of that name{hint(name, mixer)}")
        makes = [mixer[name] for name in pattern]
    elif pattern is not None:
        raise ValueError("Stack: pattern chooses among mixers that have names, and here mixer has none")
    else:
        makes = list(mixer) if isinstance(mixer, Sequence) else [mixer]
    if not makes:
        raise ValueError(f"Stack: {what} is empty; it must say which mixer the layers have")
    if n_layers % len(makes):
        raise ValueError(f"Stack: n_layers={n_layers} must be a multiple of the length of {what}, {len(makes)}, which repeats")
    return makes * (n_layers // len(makes))


def gathered(of_layers: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The values of each name, a list over the layers, None for one that has no such value."""
    names = dict.fromkeys(name for one in of_layers for name in one)
    return {name: [one.get(name) for one in of_layers] for name in names}
