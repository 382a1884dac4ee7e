"""The trunk: token embedding, positions, n pre-norm blocks of a mixer and an MLP, final norm, untied head.

With `lab.mixers.Attention` this is the decoder-only Transformer, with `lab.mixers.Lattice` the lattice oscillator transformer (LOT), with
`lab.mixers.MambaLayer`, no MLP and RMS norms Mamba, with `lab.mixers.Serriform` and positions that gate SerriformNet. Layers may have
different mixers.
B = batch, L = length, D = d_model, V = vocab_size. State: {"position": (B,), "layers": [state of each mixer]}.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lab.config.errors import hint
from lab.layers import MLP, Embedding, FeedForward, Gate, Rotate
from lab.layers.embedding import looked_up
from lab.mixers.base import Mixer, Output, State, check_at_least, check_want
from lab.models.base import SequenceModel, last_real
from lab.ops import recording
from lab.ops.program import NotCompiled, Program, Value, part, without_dropout

Position = Literal["learned", "none", "gate", "rotate"]
NORMS: dict[str, Callable[..., nn.Module]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


class Block(nn.Module):
    """x + mixer(norm1(x)), then, where there is a feed-forward, x + mlp(norm2(x)); dropout on both branches. The convention of a mixer."""

    def __init__(
        self, d_model: int, mixer: Mixer, feed_forward: FeedForward | None, dropout: float, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.norm1 = norm(d_model)
        self.mixer = mixer
        self.norm2 = None if feed_forward is None else norm(d_model)
        self.mlp = feed_forward
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, state: State = None, *, lengths: Tensor | None = None, want: tuple[str, ...] = ()) -> Tensor | Output:
        mixed = self.mixer(self.norm1(x), state, lengths=lengths, want=want)
        x = x + self.dropout(mixed.y if want else mixed)
        if self.mlp is None or self.norm2 is None:
            return mixed._replace(y=x) if want else x
        fed = self.mlp(self.norm2(x), lengths=lengths, want=want)
        x = x + self.dropout(fed.y if want else fed)
        if not want:
            return x
        return Output(x, mixed.state, {**mixed.losses, **fed.losses}, {**mixed.record, **fed.record}, fed.means)

    def program(self, p: Program, x: Value, state: State) -> None:
        """One token; x is changed in place."""
        without_dropout(self.dropout)
        p.add(x, part(self.mixer).program(p, p.norm(self.norm1, x), state), onto=x)
        if self.mlp is not None and self.norm2 is not None:
            p.add(x, part(self.mlp).program(p, p.norm(self.norm2, x)), onto=x)


class Stack(SequenceModel):
    """vocab_size: None for a model without embedding and head, which maps floats (B, L, D) to floats (B, L, D). mixer: called as
    mixer(d_model=d_model) once per layer, and with layer=i where it takes that; a list of mixers is used in turn, and of mixers with names
    `pattern` says which one each layer has; either repeats until n_layers, which must be a multiple. feed_forward: called as
    feed_forward(d_model=d_model) once per layer; None: an MLP of width d_ff, where None means 4 d_model, and 0 no MLP. dropout: on the
    embedding and both branches of a block. position: "learned" adds a table of max_len rows; "gate" and "rotate" project the embedding and
    let the place act on it (lab/layers/rotary.py), with max_len as a limit, None for none; "none" has no positions and no limit. A sequence
    beyond the limit is an error. norm: "layer" or "rms"; norm_eps is added to the variance or the mean square. tied: the head shares its
    weights with the embedding, and has no bias."""

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
        if vocab_size is None and tied:
            raise ValueError("Stack: tied=True shares the weights of an embedding, and without vocab_size there is none")
        self.d_model = d_model
        self.max_len = max_len if position != "none" else None
        self.embedding = nn.Identity() if vocab_size is None else Embedding(vocab_size, d_model)
        self.position = _position(position, d_model, max_len)
        self.dropout = nn.Dropout(dropout)
        makes, make_norm = per_layer(mixer, pattern, n_layers), partial(NORMS[norm], eps=norm_eps)
        feed = feed_forward or (None if d_ff == 0 else partial(MLP, d_ff=4 * d_model if d_ff is None else d_ff))
        mixers = [make(d_model=d_model, **({"layer": i} if takes_layer(make) else {})) for i, make in enumerate(makes)]
        self.blocks = nn.ModuleList(
            Block(d_model, mixer, None if feed is None else feed(d_model=d_model), dropout, make_norm) for mixer in mixers
        )
        self.norm = make_norm(d_model)
        self.head = nn.Identity() if vocab_size is None else nn.Linear(d_model, vocab_size, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight
        self.causal = all(mixer.causal for mixer in self.mixers)
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
    ) -> Tensor | Output:
        check_want(want)
        self.check_call(tokens, state, lengths, source)
        x = self.dropout(self.embed(tokens, state, lengths, "in_place" in want))
        layers = [None] * len(self.blocks) if state is None else state["layers"]
        outputs = []
        for block, before in zip(self.blocks, layers, strict=True):
            if self.activation_checkpointing and self.training and torch.is_grad_enabled():
                out = checkpoint(block, x, before, lengths=lengths, want=want, use_reentrant=False)
            else:
                out = block(x, before, lengths=lengths, want=want)
            x = out.y if want else out
            outputs.append(out)
        if "last" in want:
            x = last_real(x, lengths)
        logits = self.head(self.norm(x))
        return Output(logits, *self.collect(outputs, tokens, state, lengths, want)) if want else logits

    def embed(self, tokens: Tensor, state: State, lengths: Tensor | None, checked: bool) -> Tensor:
        """tokens (B, L), or floats (B, L, D) where there is no vocabulary -> (B, L, D)"""
        x = looked_up(self.embedding, tokens, type(self).__name__)
        if self.position is None:
            return x
        L = tokens.shape[1]
        if state is None:
            if not recording():
                self.check_length(L, "the sequence")
            if isinstance(self.position, Embedding):
                return x + self.position.weight[:L]
            return self.position(x, torch.arange(L, device=tokens.device))
        if not checked and not recording() and self.max_len is not None:  # generate has checked: reading a position back stalls a GPU
            self.check_length(int((state["position"] + (L if lengths is None else lengths)).max()), "the state with the new tokens")
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
        self.check_no_source(source)
        position = torch.zeros(batch_size, dtype=torch.long, device=device or next(self.parameters()).device)
        return {"position": position, "layers": [mixer.init_state(batch_size, device, dtype) for mixer in self.mixers]}

    def reserve(self, state: State, n: int) -> State:
        layers = [mixer.reserve(layer, n) for mixer, layer in zip(self.mixers, state["layers"], strict=True)]
        return state | {"layers": layers}

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


def _position(kind: Position, d_model: int, max_len: int | None) -> Embedding | Gate | Rotate | None:
    match kind:
        case "learned":
            return Embedding(cast(int, max_len), d_model)
        case "gate":
            return Gate(d_model)
        case "rotate":
            return Rotate(d_model)
    return None


def takes_layer(make: Callable[..., Mixer]) -> bool:
    """Whether a mixer is made for its number in the stack; not one to which another number was given."""
    return "layer" in inspect.signature(make).parameters and "layer" not in getattr(make, "keywords", {})


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
