"""LaminarNet: one sequence at several clocks (strata), each with a recurrence of its own, in exchange with the next coarser one.

    x_t = E[token_t] + W [cos phi_t; sin phi_t]                 position: phases of coupled oscillators (pme), a fixed rotation, or none
    stratum s has a token for every window of r_s tokens, when it is complete; the first input is the mean of its window
    block:  h_s += Dropout(GDF_s(RMSNorm(h_s)))                  lab/mixers/drift.py
            upwards, fine to coarse:    h_{s+1} += sigmoid(W_f p) * p,   p the mean of RMSNorm(h_s) over the window
            downwards, coarse to fine:  h_s += the newest sigmoid(W_c c) * c,   c = RMSNorm(h_{s+1})
            h_s += Dropout(SwiGLU_s(RMSNorm(h_s)))               in the last block for s = 0 alone: nobody reads the others
    logits = E RMSNorm(h_0)

With n_classes the head reads the whole input at once, (B, C): a classifier (lab/models/pooled.py), without a state.
B = batch, L = length, D = d_model, V = vocab_size, S = n_strata, P = n_oscillators, C = n_classes.
State, of fixed size: {"position": (B,), "phi": (B, P) of pme, "sums": S - 1 of (B, D), "blocks": a list of {"fields": S states of
GeometricDriftField, "sums": S - 1 of (B, D), "held": S - 1 of (B, D)}}. sums: of windows that have begun; held: messages that still hold.
Record: phases (L, P) of pme; for every stratum s and block retention.s and size.s, those of lab/mixers/drift.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lab.layers.embedding import Embedding, looked_up
from lab.layers.phase_mesh import PhaseMesh
from lab.layers.rotary import rotated
from lab.layers.strata import Route, Windows, windows_of
from lab.layers.swiglu import SwiGLU
from lab.mixers.base import Mixer, Output, State, check_at_least, check_want, state_type
from lab.mixers.drift import GeometricDriftField
from lab.models.base import SequenceModel, last_real
from lab.models.pooled import Pool, PooledHead
from lab.ops.backend import exporting, recording
from lab.ops.program import NotCompiled, Program, Value

EPS = 1e-6  # of the RMS norms


@dataclass
class LaminarNetConfig:
    """The arguments of the model."""

    vocab_size: int | None = 32000  # None: no embedding and no head, floats (B, L, d_model) to floats (B, L, d_model)
    d_model: int = 256
    n_heads: int = 8  # of each drift field; d_model must be a multiple of 2 n_heads
    n_layers: int = 6
    d_ff: int | None = None  # None: 4 d_model
    n_strata: int = 2
    strata_ratios: tuple[int, ...] | list[int] | None = None  # tokens of a window, of each stratum; None: 1, 4, 16, ...
    n_oscillators: int = 16
    seq_len: int = 2048  # one turn of the slowest oscillator; no limit
    dropout: float = 0.1  # on the embedding and on both branches of a block
    conv_kernel: int = 4
    theta_max: float = math.pi / 8  # the largest turn of a channel in a step
    dt_min: float = 1e-3  # where the time steps start
    dt_max: float = 1e-1
    position: Literal["pme", "rope", "none"] = "pme"
    n_classes: int | None = None  # a pooled head with weights of its own; None: the next token
    pool: Pool = "mean"  # of the classifier: the mean or the last of the real tokens
    n_answers: int = 1  # of the classifier; more: logits (B, n_answers, n_classes)


def checked_ratios(n_strata: int, ratios: Sequence[int] | None) -> tuple[int, ...]:
    check_at_least("LaminarNet", 1, n_strata=n_strata)
    if ratios is None:
        return tuple(4**s for s in range(n_strata))
    told = f"LaminarNet: strata_ratios={list(ratios)}"
    if len(ratios) != n_strata:
        raise ValueError(f"{told} must have one ratio for each of n_strata={n_strata} strata")
    check_at_least("LaminarNet", 1, **{f"strata_ratios[{s}]": ratio for s, ratio in enumerate(ratios)})
    if ratios[0] != 1:
        raise ValueError(f"{told} must begin with 1: the finest stratum has every token")
    for before, ratio in zip(ratios, ratios[1:], strict=False):
        if ratio % before:
            raise ValueError(f"{told}: {ratio} is no multiple of {before}, the ratio before it; windows would end within windows")
    return tuple(int(ratio) for ratio in ratios)


class LaminarBlock(nn.Module):
    """One block over all strata. last: without feed-forward layers of the coarse ones."""

    def __init__(self, config: LaminarNetConfig, last: bool) -> None:
        super().__init__()
        D, S = config.d_model, config.n_strata
        self.norms = nn.ModuleList(nn.RMSNorm(D, eps=EPS) for _ in range(S))
        self.fields = nn.ModuleList(
            GeometricDriftField(D, config.n_heads, config.conv_kernel, config.theta_max, config.dt_min, config.dt_max) for _ in range(S)
        )
        self.routes = nn.ModuleList(Route(D, EPS) for _ in range(S - 1))
        d_ff = 4 * D if config.d_ff is None else config.d_ff
        self.norms_ff = nn.ModuleList(nn.RMSNorm(D, eps=EPS) for _ in range(1 if last else S))
        self.feed_forwards = nn.ModuleList(SwiGLU(D, d_ff) for _ in self.norms_ff)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, strata: list[Tensor], state: State, windows: list[Windows], lengths: list[Tensor | None], want: tuple[str, ...]
    ) -> tuple[list[Tensor], State, dict[str, Tensor]]:
        """strata: (B, tokens, D) of each; lengths: those that are no padding, (B,) or None -> the same, the state, the record. A state that
        is wanted continues one, be it that before the first token."""
        S, wanted = len(strata), "state" in want
        strata = list(strata)
        nothing: list[Any] = [None] * S
        fields, sums, held = (nothing[:] if state is None else list(state[name]) for name in ("fields", "sums", "held"))
        record: dict[str, Tensor] = {}
        # A stratum without tokens stands still, most strata at most steps; not in training, where every parameter has a gradient.
        moves = [x.shape[1] > 0 or (self.training and torch.is_grad_enabled()) for x in strata]
        for s, (norm, field) in enumerate(zip(self.norms, self.fields, strict=True)):
            if moves[s]:
                out = field(norm(strata[s]), fields[s], lengths=lengths[s], want=want)
                strata[s] = strata[s] + self.dropout(out.y if want else out)
                if want:
                    fields[s] = out.state
                    record |= {f"{name}.{s}": value for name, value in out.record.items()}
        routes = [(s, cast(Route, route)) for s, route in enumerate(self.routes) if moves[s]]
        for s, route in routes:
            strata[s + 1], sums[s] = route.up(strata[s], strata[s + 1], windows[s], sums[s], wanted)
        for s, route in reversed(routes):
            strata[s], held[s] = route.down(strata[s], strata[s + 1], windows[s], held[s], wanted)
        for s, (norm, feed_forward) in enumerate(zip(self.norms_ff, self.feed_forwards, strict=True)):
            if moves[s]:
                strata[s] = strata[s] + self.dropout(feed_forward(norm(strata[s])))
        return strata, {"fields": fields, "sums": sums, "held": held} if wanted else None, record


@dataclass(eq=False, repr=False)
class Laminar(SequenceModel, LaminarNetConfig):
    """The model whose arguments are the fields of LaminarNetConfig. `LaminarNet(config)` is the same model."""

    __eq__, __hash__ = object.__eq__, object.__hash__  # as every module, not by the fields

    def __post_init__(self) -> None:
        SequenceModel.__init__(self)
        check_at_least("LaminarNet", 1, d_model=self.d_model, n_layers=self.n_layers)
        if self.vocab_size is not None:
            check_at_least("LaminarNet", 1, vocab_size=self.vocab_size)
        if self.d_ff is not None:
            check_at_least("LaminarNet", 1, d_ff=self.d_ff)
        if self.position not in ("pme", "rope", "none"):
            raise ValueError(f"LaminarNet: position={self.position!r}; expected pme, rope or none")
        self.ratios = checked_ratios(self.n_strata, self.strata_ratios)
        D, V = self.d_model, self.vocab_size
        self.embedding = nn.Identity() if V is None else Embedding(V, D)
        self.mesh = PhaseMesh(D, self.n_oscillators, self.seq_len) if self.position == "pme" else None
        self.embedding_dropout = nn.Dropout(self.dropout)
        self.blocks = nn.ModuleList(LaminarBlock(self, last=i == self.n_layers - 1) for i in range(self.n_layers))
        self.norm = nn.RMSNorm(D, eps=EPS)
        self.causal = self.n_classes is None
        if self.n_classes is not None:
            self.head: nn.Module = PooledHead(D, self.n_classes, self.pool, self.n_answers)
        else:
            self.head = nn.Identity() if V is None else nn.Linear(D, V, bias=False)
            if V is not None:
                self.head.weight = self.embedding.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Tokens and positions start equally large, and larger than elsewhere: with tied weights and N(0, 0.02^2) the first block's
        branches drown them."""
        if isinstance(self.embedding, Embedding):
            nn.init.normal_(self.embedding.weight, std=self.d_model**-0.5)
            if self.mesh is not None:
                nn.init.normal_(self.mesh.proj.weight, std=(self.d_model * self.n_oscillators) ** -0.5)

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
        if state is not None or "state" in want:
            self.check_states()
        (B, L), wanted = tokens.shape[:2], "state" in want
        real = None if lengths is None else lengths.to(tokens.device, torch.long)
        start = self.start(state, B, tokens.device)
        x, phases, phi = self.embed(tokens, state, start, real)
        windows = windows_of(self.ratios, L, start, real, free=exporting() and state is None)
        if wanted and state is None:
            state = self.init_state(B, device=tokens.device)
        strata, sums = [self.embedding_dropout(x)], []
        for i, window in enumerate(windows):
            mean, begun = window.means(strata[-1], None if state is None else state["sums"][i], wanted)
            strata.append(mean)
            sums.append(begun)
        every = [real, *(window.complete for window in windows)]
        outputs = []
        for i, block in enumerate(self.blocks):
            before = None if state is None else state["blocks"][i]
            if self.activation_checkpointing and self.training and torch.is_grad_enabled():
                out = checkpoint(block, strata, before, windows, every, want, use_reentrant=False)
            else:
                out = block(strata, before, windows, every, want)
            strata = out[0]
            outputs.append(out)
        y = strata[0]
        if "last" in want and self.n_classes is None:
            y = last_real(y, real)
        y = self.norm(y)
        logits = self.head(y, real) if self.n_classes is not None else self.head(y)
        if not want:
            return logits
        after = None
        if wanted:
            after = {"position": state["position"] + (L if real is None else real)}
            after |= {} if phi is None else {"phi": phi.expand(B, -1)}
            after |= {"sums": sums, "blocks": [out[1] for out in outputs]}
        record: dict[str, list[Any]] = {}
        if "record" in want:
            record = {name: [out[2][name] for out in outputs] for name in outputs[0][2]}
            record |= {} if phases is None else {"phases": [phases[0] if len(phases) == 1 else phases]}
        return Output(logits, after, {}, record)

    def start(self, state: State, batch_size: int, device: torch.device) -> int | Tensor:
        """The tokens before these: a number where all rows agree, else (B,). A graph that is recorded must not depend on it."""
        if state is None:
            return torch.zeros(batch_size, dtype=torch.long, device=device) if exporting() else 0
        position: Tensor = state["position"]
        if recording() or position.is_meta or not len(position):
            return position
        low, high = (int(end) for end in torch.stack(position.aminmax()))
        return low if low == high else position

    def embed(self, tokens: Tensor, state: State, start: int | Tensor, real: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """tokens (B, L), or floats (B, L, D) where there is no vocabulary -> (B, L, D) with the positions in it; of pme the phases,
        (B, L, P) or (1, L, P) where all rows agree, and what they go on with."""
        x, L = looked_up(self.embedding, tokens, type(self).__name__), tokens.shape[1]
        if self.position == "rope":
            places = torch.arange(L, device=x.device) + (start[:, None] if isinstance(start, Tensor) else start)
            return rotated(x, places), None, None
        if self.mesh is None:
            return x, None, None
        phi = None if state is None else state["phi"] if isinstance(start, Tensor) else state["phi"][0]
        phases, last = self.mesh.phases(L, phi, real)
        return x + self.mesh.waves(phases), phases, last

    def init_state(
        self,
        batch_size: int,
        source: Tensor | None = None,
        source_lengths: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        self.check_no_source(source)
        self.check_states()
        like = self.norm.weight
        place, kind = torch.device(device) if device is not None else like.device, state_type(dtype or like.dtype)

        def nothing() -> list[Tensor]:
            return [torch.zeros(batch_size, self.d_model, device=place, dtype=kind) for _ in self.ratios[1:]]

        state: dict[str, Any] = {"position": torch.zeros(batch_size, dtype=torch.long, device=place)}
        if self.mesh is not None:
            state["phi"] = self.mesh.initial_phase().to(place).repeat(batch_size, 1)
        state["sums"] = nothing()
        state["blocks"] = [
            {
                "fields": [cast(Mixer, field).init_state(batch_size, place, dtype) for field in cast(LaminarBlock, block).fields],
                "sums": nothing(),
                "held": nothing(),
            }
            for block in self.blocks
        ]
        return state

    def program(self, p: Program, state: State) -> Value:
        raise NotCompiled("which strata of a LaminarNet move differs from step to step, and a program has the same instructions at each")


class LaminarNet(Laminar):
    """The documented constructor: LaminarNet(LaminarNetConfig(vocab_size=32000, d_model=256, n_layers=6, seq_len=2048, n_strata=2))."""

    def __init__(self, config: LaminarNetConfig) -> None:
        super().__init__(**{field.name: getattr(config, field.name) for field in fields(LaminarNetConfig)})
        self.config = config
