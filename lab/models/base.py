"""The interface of a model: tokens -> logits at once, or continued from an explicit state; and the seeded initialisation.

B = batch, L = length, V = vocabulary. `model(tokens, state, lengths=..., want=...)` is the only computation; `prefill`, `step`, `generate`
and `stream` are thin callers of it, so that compile and hooks see everything.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lab.layers.embedding import check_tokens
from lab.mixers.base import Output, State
from lab.models.beam_search import beam_search
from lab.models.decoding import decode
from lab.models.sampling import check_sampling, choose
from lab.ops.backend import recording
from lab.ops.program import NotCompiled, Program, Value


class SequenceModel(nn.Module, ABC):
    max_len: int | None = None  # the longest sequence, state included; None: no limit
    loss_names: tuple[str, ...] = ()  # the auxiliary losses that want=("losses",) returns
    mean_shapes: Mapping[str, tuple[int, ...]] = {}  # of Output.means, which comes with the losses
    takes_source: bool = False  # True: an encoder-decoder, which needs a source
    causal: bool = True  # False: logits depend on later tokens too, so there is no state, no step and no generation
    n_classes: int | None = None  # logits (B, C) for a whole input, by a pooled head; None: (B, L, V)
    n_answers: int = 1  # more: logits (B, n_answers, C)
    activation_checkpointing: bool = False  # training recomputes each block in the backward pass: less memory, more time
    blocks: nn.ModuleList  # what gets compiled and checkpointed, one by one
    embedding: nn.Module  # of tokens; nn.Identity in a model without a vocabulary
    d_model: int

    @abstractmethod
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
        """tokens (B, L) -> logits (B, L, V), or an `Output` with what `want` names ("state", "losses", "record", "in_place", "last").

        lengths (B,): real tokens of each right-padded row; padding changes nothing at real positions, and the state stands after the
        last real token. losses are unweighted means over layers and real tokens. "last": logits of each row's last real token alone,
        (B, 1, V): a long prompt over a large vocabulary needs no others. source (B, S), right-padded with source_lengths (B,) as tokens
        are: what an encoder-decoder model translates, and no other takes. It enters once, here or in `init_state`, and lives in the state.
        """

    @abstractmethod
    def init_state(
        self,
        batch_size: int,
        source: Tensor | None = None,
        source_lengths: Tensor | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """The state before the first token: a pytree of tensors, batch first. An encoder-decoder model encodes the source here."""

    def check_states(self) -> None:
        """NotImplementedError for a classifier."""
        if self.n_classes is not None:
            name = type(self).__name__
            raise NotImplementedError(f"{name} with n_classes answers once for a whole input: it has no state, no step and no generation")

    def reserve(self, state: State, n: int) -> State:
        """The same state with room for n more tokens, which "in_place" steps fill. `generate` and `stream` call it once."""
        return state

    def program(self, p: Program, state: State) -> Value:
        """One token through the model as instructions of `p`, which continue `state`; the value that holds the logits."""
        raise NotCompiled(f"{type(self).__name__} has no program")

    def losses_of(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The losses that are functions of means over tokens, from `Output.means`, or from those of several batches, averaged by their
        real tokens: a batch in pieces has the losses of the whole. A loss that is a mean itself is not among them."""
        return {}

    def derived_metrics(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Metrics that follow from the unweighted losses, as {"sync_order": 1 - losses["sync"]}."""
        return {}

    @staticmethod
    def map_state(fn: Callable[[Tensor], Tensor], state: State) -> State:
        """fn on every tensor of a state. `model.map_state(lambda t: t[rows], state)` selects and reorders rows."""
        return pytree.tree_map_only(Tensor, fn, state)

    def prefill(
        self,
        tokens: Tensor,
        state: State = None,
        *,
        lengths: Tensor | None = None,
        source: Tensor | None = None,
        source_lengths: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """A chunk at once: tokens (B, L) -> logits (B, L, V) and the state after it."""
        out = self(tokens, state, lengths=lengths, source=source, source_lengths=source_lengths, want=("state",))
        return out.y, out.state

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """One token: (B,) or (B, 1) -> logits (B, V) and the next state. Pure: `state` can be continued again. A model without a
        vocabulary takes one vector, (B, D) or (B, 1, D)."""
        vector = token.is_floating_point()
        if not recording() and token.shape[1 : token.ndim - vector] not in ((), (1,)):
            what = "one vector of each row, (B, D) or (B, 1, D)" if vector else "one token of each row, (B,) or (B, 1)"
            raise ValueError(f"{type(self).__name__}: step takes {what}, got {tuple(token.shape)}")
        one = token.reshape(len(token), 1, -1) if vector else token.reshape(-1, 1)
        out = self(one, state, want=("state",))
        return out.y[:, 0], out.state

    @overload
    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        stop_token: int | None = ...,
        pad_token: int = ...,
        lengths: Tensor | None = ...,
        source: Tensor | None = ...,
        source_lengths: Tensor | None = ...,
        beams: int = ...,
        length_penalty: float = ...,
        generator: torch.Generator | None = ...,
        streaming: Literal[False] = ...,
    ) -> Tensor: ...
    @overload
    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        stop_token: int | None = ...,
        pad_token: int = ...,
        lengths: Tensor | None = ...,
        source: Tensor | None = ...,
        source_lengths: Tensor | None = ...,
        beams: int = ...,
        length_penalty: float = ...,
        generator: torch.Generator | None = ...,
        streaming: Literal[True],
    ) -> Iterator[Tensor]: ...
    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_token: int | None = None,
        pad_token: int = 0,
        lengths: Tensor | None = None,
        source: Tensor | None = None,
        source_lengths: Tensor | None = None,
        beams: int = 1,
        length_penalty: float = 0.0,
        generator: torch.Generator | None = None,
        streaming: bool = False,
    ) -> Tensor | Iterator[Tensor]:
        """prompt (B, P) -> prompt and new tokens (B, P + N), N <= max_new_tokens; with streaming=True the iterator of `stream`.

        temperature 0 is greedy; otherwise tokens are drawn from softmax(logits / temperature), cut to the top_k most probable and to the
        smallest set with probability top_p. lengths (B,): prompts of unequal length, right-padded; the new tokens of a row stand right
        after its own prompt, the rest of the row is pad_token. After stop_token a row goes on with pad_token, and generation ends when
        all rows have stopped. source (B, S): what an encoder-decoder model translates; the prompt is then how the answer begins, mostly a
        start token. beams above 1: the best continuation that a beam search of that width finds, by its log-probability over
        n^length_penalty of its n new tokens (lab/models/beam_search.py, which also gives the others). The mode
        of the module is the caller's: call model.eval() first, or dropout stays on.
        """
        end: dict[str, Any] = {"stop_token": stop_token, "pad_token": pad_token}
        given: dict[str, Any] = {"lengths": lengths, "source": source, "source_lengths": source_lengths}
        new: Sequence[Tensor]
        if beams == 1 or not max_new_tokens:
            tokens = self.stream(
                prompt, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator, **end, **given
            )
            if streaming:
                return tokens
            new = list(tokens)
        else:
            if temperature or streaming:
                raise ValueError("generate: a beam search samples nothing and is not known before its end: temperature 0, no streaming")
            found = beam_search(self, prompt, max_new_tokens, beams, length_penalty=length_penalty, **end, **given)
            new = found.tokens[:, 0].unbind(1)
        out = torch.cat([prompt, prompt.new_full((len(prompt), len(new)), pad_token)], dim=1)
        if lengths is None:
            lengths = torch.full((len(prompt),), prompt.shape[1], device=prompt.device)
        place = torch.arange(out.shape[1], device=out.device)
        out = torch.where(place < lengths[:, None], out, pad_token)
        if not new:
            return out
        return out.scatter(1, lengths[:, None] + place[: len(new)], torch.stack(new, dim=1).to(out.dtype))

    def stream(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_token: int | None = None,
        pad_token: int = 0,
        lengths: Tensor | None = None,
        source: Tensor | None = None,
        source_lengths: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """The tokens of `generate` as they come, each (B,). Arguments are checked at the call, not at the first token."""
        self.check_generation(prompt, max_new_tokens, temperature, top_k, top_p, lengths, source)
        given = {"lengths": lengths, "source": source, "source_lengths": source_lengths}
        return self._stream(prompt, max_new_tokens, temperature, top_k, top_p, stop_token, pad_token, given, generator)

    @torch.no_grad()
    def _stream(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        stop_token: int | None,
        pad_token: int,
        given: Mapping[str, Tensor | None],
        generator: torch.Generator | None,
    ) -> Iterator[Tensor]:
        if max_new_tokens == 0:
            return
        out = self(prompt, **given, want=("state", "last"))
        pick = partial(choose, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator) if temperature else None
        stopped = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
        for token in decode(self, out.state, out.y[:, 0], max_new_tokens, pick):
            if stop_token is None:
                yield token
                continue
            yield token.masked_fill(stopped, pad_token)  # a stopped row goes on unseen: pad_token may be no token
            stopped = stopped | (token == stop_token)
            if bool(stopped.all()):
                return

    def check_generation(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        lengths: Tensor | None,
        source: Tensor | None,
    ) -> None:
        check_sampling(prompt, max_new_tokens, temperature, top_k, top_p, lengths)
        if max_new_tokens:  # the last new token is never fed back
            longest = prompt.shape[1] if lengths is None else int(lengths.max())
            self.check_length(longest + max_new_tokens - 1, "the prompt with max_new_tokens")
        if source is None and self.takes_source:
            raise ValueError(f"{type(self).__name__}: generate needs a source, the tokens (B, S) that the encoder reads")

    def check_call(self, tokens: Tensor, state: State, lengths: Tensor | None, source: Tensor | None) -> None:
        """ValueError for arguments of `forward` that cannot be, by their shapes and types; nothing that stalls a GPU."""
        self.check_no_source(source)
        if recording():
            return
        owner = type(self).__name__
        check_tokens(self.embedding, tokens, self.d_model, owner)
        if lengths is not None:
            check_lengths(lengths, tokens, owner)
        if state is not None and len(state["position"]) != len(tokens):
            raise ValueError(f"{owner}: the state has {len(state['position'])} rows, the tokens have {len(tokens)}")
        if state is not None and source is not None:
            raise ValueError(f"{owner}: the state holds a source already; another one needs a state of its own")

    def check_no_source(self, source: Tensor | None) -> None:
        if source is not None:
            raise ValueError(f"{type(self).__name__} is a decoder without cross-attention: it takes no source")

    def check_length(self, length: int, what: str) -> None:
        if self.max_len is not None and length > self.max_len:
            raise ValueError(f"{type(self).__name__}: {what} needs length {length}, but the model was built with max_len={self.max_len}")


def check_lengths(lengths: Tensor, tokens: Tensor, owner: str) -> None:
    """ValueError for lengths that are not one of 0 .. L for each row; on a GPU, which a look at them would stall, only for their number."""
    B, L = tokens.shape[:2]
    if lengths.shape != (B,):
        raise ValueError(f"{owner}: lengths has shape {tuple(lengths.shape)}; expected ({B},), one per row")
    if lengths.device.type == "cpu" and B and not 0 <= int(lengths.min()) <= int(lengths.max()) <= L:
        raise ValueError(f"{owner}: lengths {lengths.tolist()} must lie in 0..{L}, the length of the batch")


def last_real(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (B, L, D) -> (B, 1, D), of each row's last real token."""
    return x[:, -1:] if lengths is None else x[torch.arange(len(x), device=x.device), lengths - 1, None]


def mean_real(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (B, L, D) -> (B, D), over the real tokens of each row; 0 where there is none."""
    if lengths is None:
        return x.mean(1)
    real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    return x.masked_fill(~real[:, :, None], 0).sum(1) / lengths.clamp(min=1)[:, None]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside the block; afterwards each module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def initialise(model: nn.Module, seed: int) -> None:
    """Calls `reset_parameters()` of every module, each under its own random stream, seeded by (seed, the module's name).

    So modules of equal name and shapes start equal in every model, whatever else the model contains. A module is reset after the
    modules inside it and has the last word on their values. Draws on the CPU (initialise, then move); the global stream is kept.
    """
    elsewhere = [name for name, p in model.named_parameters() if p.device.type != "cpu"]
    if elsewhere:
        raise ValueError(f"initialise: {elsewhere[0]} is not on the CPU; initialise the model before moving it")
    with torch.random.fork_rng(devices=[]):
        for name, module in reversed(list(model.named_modules())):
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
                torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big"))
                reset()
