"""One step of a model as a short program, which C++ runs on flat memory (csrc/cpu/decode.cpp): no Python between the layers.

A mixer says what it does with one token by calling the methods of `Program`, in place of PyTorch's functions:

    def program(self, p, x, state):
        h = p.rotate(p.linear(self.input, x), self.decay(), state["h"])
        return p.linear(self.out, h)

Each takes and gives a `Value`, `width` numbers for every row of the batch, and adds an instruction; nothing is computed yet. Weights are
read where the module has them, so a program lives as long as one call of generate. A state is copied once and then changes in place.
float32 on the CPU. `print(program)` shows the instructions. B = rows of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUP = 16  # numbers of adjacent channels that the kernel keeps together; every region begins at a multiple of it
INSTRUCTIONS = (
    "embed", "norm", "linear", "sigmoid", "silu", "gelu", "softplus", "relu", "add", "multiply", "conv", "scan", "state_space", "rotate",
    "attend", "oscillate", "linear_packed", "dplr", "tanh", "place", "experts",
)  # fmt: skip
"""In the order of csrc/cpu/decode.cpp."""


class NotCompiled(Exception):
    """The reason why a model has no program."""


@dataclass(frozen=True, eq=False)
class Value:
    """`width` numbers of each row. memory: a region of the arena, or a tensor that all rows share (pitch 0)."""

    name: str
    width: int
    pitch: int
    memory: Literal["states", "scratch"] | Tensor
    offset: int = 0

    def part(self, start: int, width: int) -> Value:
        """Its numbers from `start` on."""
        if not 0 <= start <= start + width <= self.width:
            raise ValueError(f"program: {self.name} has {self.width} numbers, not {start} to {start + width}")
        return Value(f"{self.name}[{start}:{start + width}]", width, self.pitch, self.memory, self.offset + start)

    def split(self, *widths: int) -> list[Value]:
        starts = [sum(widths[:i]) for i in range(len(widths))]
        return [self.part(start, width) for start, width in zip(starts, widths, strict=True)]


NOTHING = Value("nothing", 0, 0, torch.empty(0))


class Program:
    """rows: of the batch. room: how many tokens will be fed at most."""

    def __init__(self, rows: int, room: int) -> None:
        self.rows, self.room = rows, room
        self.lines: list[tuple[str, tuple[Any, ...]]] = []
        self.sizes = {"states": 0, "scratch": 0}  # of the regions, in numbers
        self.contents: list[tuple[Value, Tensor]] = []  # what the states begin with
        self._top = self._values = 0
        self.position: Tensor | None = None
        self.logits = NOTHING

    # ---- values

    def value(self, width: int) -> Value:
        """Room for an instruction's result; inside `scratch()` it is given back at the end."""
        pitch = _round_up(width)
        value = Value(f"v{self._values}", width, pitch, "scratch", self._top)
        self._values += 1
        self._top += pitch * self.rows
        self.sizes["scratch"] = max(self.sizes["scratch"], self._top)
        return value

    @contextmanager
    def scratch(self) -> Iterator[None]:
        """What the instructions inside compute is not needed behind the block."""
        top = self._top
        yield
        self._top = top

    def state(self, begin: Tensor) -> Value:
        """Numbers that stay from step to step: begin (B, ...), float32, copied when the program is loaded."""
        if len(begin) != self.rows:
            raise ValueError(f"program: a state of {len(begin)} rows in a batch of {self.rows}")
        width = math.prod(begin.shape[1:])
        value = Value(f"s{len(self.contents)}", width, _round_up(width), "states", self.sizes["states"])
        self.sizes["states"] += value.pitch * self.rows
        self.contents.append((value, begin))
        return value

    def constant(self, numbers: Tensor) -> Value:
        """A vector that all rows share."""
        return Value("constant", numbers.numel(), 0, self.weight(numbers))

    def weight(self, tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """A parameter, or what was computed from some, as the kernel reads it: in place where it is contiguous."""
        if tensor.dtype != dtype or tensor.device.type != "cpu":
            raise NotCompiled(f"a weight is {tensor.dtype} on {tensor.device}, a program computes in float32 on the CPU")
        return tensor.detach().contiguous()

    # ---- instructions

    def embed(self, table: nn.Embedding, places: nn.Embedding | None = None) -> Value:
        """The token's row of a table, and that of its place."""
        rows = [_own(module, nn.Embedding).weight for module in (table, places) if module is not None]
        if any(module is not None and module.max_norm is not None for module in (table, places)):
            raise NotCompiled("an embedding has max_norm, which changes its weights while it is used")
        x = self.value(table.embedding_dim)
        self._emit("embed", x, self.weight(rows[0]), *rows[0].shape, self.weight(rows[1]) if places else None, len(rows[-1]))
        return x

    def place(self, table: Tensor, first: int) -> Value:
        """The row of a table (places, width) for the token's place, whose first one is that of place number `first`."""
        self._check(table.ndim == 2, "place", NOTHING)
        y = self.value(table.shape[1])
        self._emit("place", y, self.weight(table), *table.shape, first)
        return y

    def norm(self, module: nn.Module, x: Value) -> Value:
        """nn.LayerNorm or nn.RMSNorm over all of x."""
        kind = nn.RMSNorm if isinstance(module, nn.RMSNorm) else nn.LayerNorm
        _own(module, kind)
        assert isinstance(module, nn.RMSNorm | nn.LayerNorm)
        self._check(module.normalized_shape == (x.width,), "norm", x)
        weight, bias = (None if t is None else self.weight(t) for t in (module.weight, getattr(module, "bias", None)))
        eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
        y = self.value(x.width)
        self._emit("norm", y, x, x.width, weight, bias, float(eps), int(kind is nn.LayerNorm))
        return y

    def linear(self, module: nn.Linear | Tensor, x: Value, bias: Tensor | None = None) -> Value:
        """W x + b, of a layer or of a matrix (N, K) and `bias` (N,)."""
        if isinstance(module, Tensor):
            weight = module
        else:
            weight, bias = _own(module, nn.Linear).weight, module.bias
        self._check(weight.ndim == 2 and weight.shape[1] == x.width and (bias is None or len(bias) == len(weight)), "linear", x)
        y = self.value(len(weight))
        self._emit("linear", y, x, self.weight(weight), None if bias is None else self.weight(bias), *weight.shape)
        return y

    def apply(self, function: Literal["sigmoid", "silu", "gelu", "softplus", "relu", "tanh"], x: Value) -> Value:
        """A function of each number; gelu is the exact one."""
        if function not in ("sigmoid", "silu", "gelu", "softplus", "relu", "tanh"):
            raise ValueError(f"program: apply has no {function}")
        y = self.value(x.width)
        self._emit(function, y, x, x.width)
        return y

    def experts(self, x: Value, logits: Value, up: Tensor, down: Tensor, top_k: int, activation: Literal["silu", "gelu", "relu"]) -> Value:
        """sum of w_e act(x up_e) down_e over the top_k largest logits, w their softmax (top_k = 1: that over all). up (E, D, F), down
        (E, F, D)."""
        E, D, F = up.shape
        self._check(x.width == D and logits.width == E >= top_k and down.shape == (E, F, D), "experts", x)
        y = self.value(D)
        with self.scratch():
            chosen, hidden = self.value(E), self.value(F)
        place = ("silu", "gelu", "relu").index(activation)
        self._emit("experts", y, x, logits, chosen, hidden, self.weight(up), self.weight(down), E, D, F, top_k, place)
        return y

    def add(self, a: Value, b: Value, onto: Value | None = None) -> Value:
        """a + b; onto: a value that takes the result, such as a itself."""
        return self._pair("add", a, b, onto)

    def multiply(self, a: Value, b: Value) -> Value:
        return self._pair("multiply", a, b, None)

    def conv(self, x: Value, w: Tensor, bias: Tensor | None, state: Tensor, dilation: int = 1) -> Value:
        """As `causal_conv`: w (K, D), bias (D,), state (B, (K - 1) dilation, D)."""
        K, D = w.shape
        self._check(D == x.width and state.shape[1:] == ((K - 1) * dilation, D), "conv", x)
        y = self.value(D)
        self._emit("conv", y, x, self.state(state), self.weight(w), None if bias is None else self.weight(bias), D, K, dilation)
        return y

    def scan(self, u: Value, dt: Value, A: Tensor, B: Value, C: Value, D: Tensor, h: Tensor) -> Value:
        """As `selective_scan`: A (E, N) real, D (E,), h (B, E, N)."""
        E, N = A.shape
        self._check(u.width == dt.width == E == len(D) and B.width == C.width == N and h.shape[1:] == A.shape, "scan", u)
        y = self.value(E)
        decays = self.weight(_grouped(A[None].float() * math.log2(math.e)))
        self._emit("scan", y, u, dt, B, C, self.state(_grouped(h)), decays, self.weight(D), E, N)
        return y

    def state_space(self, u: Value, a: Tensor, b: Tensor, C: Tensor, D: Tensor, h: Tensor) -> Value:
        """N complex states for each channel: h = a h + b u, y = 2 Re(C . h) + D u. a, b, C (D, N, 2), D (D,), h (B, D, N, 2)."""
        self._check(a.shape == b.shape == C.shape == h.shape[1:] and u.width == len(a) == len(D), "state_space", u)
        a, b, C, h = (torch.view_as_complex(t.contiguous()) for t in (a, b, C, h))
        if not bool((b != 0).all()):
            raise NotCompiled("what a state takes of its input is too small for a float")
        h, C = h / b, 2 * b * C  # the states of the input itself: then b need not be read
        planes = [_grouped(torch.view_as_real(t).flatten(-2)) for t in (a[None], C[None], h)]
        y = self.value(u.width)
        self._emit("state_space", y, u, self.state(planes[2]), *map(self.weight, planes[:2]), self.weight(D), u.width, a.shape[1])
        return y

    def dplr(self, u: Value, d: Tensor, right: Tensor, left: Tensor, b: Tensor, C: Tensor, D: Tensor, h: Tensor) -> Value:
        """As `dplr_scan`, of rank 4 at most, and + D u, in double: d, b, C (D, N, 2), right, left (r, D, N, 2), D (D,), h (B, D, N, 2)."""
        self._check(d.shape == b.shape == C.shape == h.shape[1:] == right.shape[1:] and u.width == len(d) == len(D), "dplr", u)
        if len(right) > 4:
            raise NotCompiled(f"a diagonal plus rank {len(right)}, above 4, has no program")
        *arrays, h = (_grouped(t.double().flatten(-2)).contiguous() for t in (d[None], right, left, b[None], C[None], h))
        weights = [self.weight(array, torch.float64) for array in arrays]
        y = self.value(u.width)
        self._emit("dplr", y, u, self.state(h.view(torch.float32)), *weights, self.weight(D), u.width, d.shape[1], len(right))
        return y

    def rotate(self, x: Value, a: Tensor, h: Tensor) -> Value:
        """One complex recurrence of P states, h = a h + x, and the states after it. a (P, 2), h (B, P, 2); the value holds all real
        parts, then all imaginary ones, in x as well."""
        P = len(a)
        self._check(x.width == 2 * P and h.shape[1:] == a.shape, "rotate", x)
        state = self.state(h.transpose(1, 2))
        self._emit("rotate", state, x, self.weight(a.T), P)
        return state

    def attend(
        self, q: Value, k: Value, v: Value, keys: Tensor, values: Tensor, scale: float, more_q: Value = NOTHING, more_k: Value = NOTHING
    ) -> Value:
        """softmax(scale q . k + more_q . more_k) v over all tokens so far, per head. keys (B, S, H, d + m), values (B, S, H, d): of the S
        tokens before, of a row with fewer the first ones. q, k, v: H d numbers, more_q and more_k H m."""
        H, d = values.shape[2:]
        more = keys.shape[3] - d
        self._check(q.width == k.width == v.width == H * d and more_q.width == more_k.width == H * more, "attend", q)
        room = _round_up(values.shape[1] + self.room)
        keys, values = (F.pad(t, (0, 0, 0, 0, 0, room - t.shape[1])) for t in (keys, values))
        keys = keys.unflatten(1, (-1, GROUP)).permute(0, 3, 1, 4, 2)  # (B, H, S / GROUP, d + m, GROUP)
        y = self.value(H * d)
        with self.scratch():
            scores = self.value(H * room)
        self._emit(
            "attend",
            y,
            q,
            k,
            v,
            more_q,
            more_k,
            self.state(keys),
            self.state(values.transpose(1, 2)),
            scores,
            H,
            d,
            more,
            room,
            float(scale),
        )
        return y

    def oscillate(self, u: Value, theta: Tensor, alpha: Tensor, free: Tensor, pull: Tensor, dt: float) -> tuple[Value, Value]:
        """Coupled phases (lab/ops/kuramoto_scan.py): theta (B, H) moves by dt u + free + cos theta * (P sin theta) - sin theta * (P cos
        theta), pull = P (H, H). The columns cos and sin of each head, H 2 numbers, before that: times alpha, and as they are."""
        H = len(alpha)
        self._check(u.width in (0, H) and theta.shape[1:] == alpha.shape == free.shape and pull.shape == (H, H), "oscillate", u)
        of_q, of_k = self.value(2 * H), self.value(2 * H)
        with self.scratch():
            parts = self.value(H), self.value(H)
        columns = self.weight(F.pad(pull.T, (0, _round_up(H) - H)))
        self._emit(
            "oscillate",
            of_q,
            of_k,
            self.state(theta),
            u,
            *parts,
            self.weight(alpha),
            self.weight(free),
            columns,
            H,
            _round_up(H),
            float(dt),
        )
        return of_q, of_k

    def _pair(self, name: str, a: Value, b: Value, onto: Value | None) -> Value:
        self._check(a.width == b.width and (onto is None or onto.width == a.width), name, a)
        y = self.value(a.width) if onto is None else onto
        self._emit(name, y, a, b, a.width)
        return y

    def _check(self, well: bool, name: str, x: Value) -> None:
        if not well:
            raise ValueError(f"program: {name} of {x.name} with {x.width} numbers does not fit its other arguments")

    def _emit(self, name: str, *operands: Value | Tensor | float | None) -> None:
        self.lines.append((name, operands))

    def __str__(self) -> str:
        return "\n".join(f"{name:12}{'  '.join(map(_said, operands))}" for name, operands in self.lines)

    def ends(self, logits: Value, position: Tensor) -> Program:
        """What the last instruction leaves; position (B,): how many tokens each row has seen before the first one is fed."""
        self.logits, self.position = logits, position
        return self


def _own(module: Any, kind: type[nn.Module]) -> Any:
    """A module that computes what `kind` does: not one that something else was put in place of."""
    if not isinstance(module, kind) or type(module).forward is not kind.forward:
        raise NotCompiled(f"{type(module).__name__} stands where {kind.__name__} is expected")
    return module


def part(module: Any) -> Any:
    """A module inside of another, if it can be part of a program."""
    if not hasattr(module, "program"):
        raise NotCompiled(f"{type(module).__name__} has no program")
    return module


def without_dropout(module: nn.Module) -> None:
    """NotCompiled for what stands where dropout is expected, which does nothing in eval mode, and does something."""
    if not isinstance(module, nn.Identity):
        _own(module, nn.Dropout)


def _grouped(x: Tensor) -> Tensor:
    """(B, D, N) -> (B, groups of channels, N, GROUP), the last group with zeros"""
    return F.pad(x, (0, 0, 0, _round_up(x.shape[1]) - x.shape[1])).unflatten(1, (-1, GROUP)).transpose(2, 3)


def _round_up(n: int) -> int:
    return -(-n // GROUP) * GROUP


def _said(operand: Any) -> str:
    if isinstance(operand, Value):
        return f"{operand.name}({operand.width})"
    return str(tuple(operand.shape)) if isinstance(operand, Tensor) else "-" if operand is None else f"{operand:g}"
