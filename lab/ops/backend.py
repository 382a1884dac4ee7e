"""The dispatch rule: which backend computes an op.

An op is one function with several backends in order of preference. `Op.choose(*args)` takes the first whose `supports(*args)` gives no
reason against it. `with use("torch"):` forces one for all ops, `with use(kuramoto_scan="reference"):` for one, `force({...})` for the
process (the config key `ops`); a forced backend that cannot run is an error with the reason. A `Backend` of your own in place of a name
is the first to be asked, before those of the op. `used()` says what ran.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

AUTO = "auto"
log = logging.getLogger(__name__)

_forced: dict[str, str | Backend] = {}  # op -> the name of a backend, or one to prefer; an op that is missing follows the rule
_used: dict[str, str | None] = {}  # op -> backend of its last call; a missing key would make compiled code depend on the first call
_ops: dict[str, Op] = {}


def recording() -> bool:
    """Whether a graph is recorded rather than numbers computed: by torch.compile, torch.export or TorchScript's tracer. It must not
    depend on values, such as those that a check reads."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def exporting() -> bool:
    """Whether the graph that is recorded goes into a file, which must run without lab: no operator of ours may be left in it."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def without_autocast(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Inside the block, operations keep the dtypes of their tensors. On the device of x; tensors without numbers have no autocast."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def always(*args: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    name: str
    run: Callable[..., Any]
    supports: Callable[..., str | None] = always  # the reason why it cannot compute these arguments, or None


@dataclass(frozen=True)
class Op:
    """An op by name, its backends in order of preference. Making one registers it; another op of the same name is an error."""

    name: str
    backends: tuple[Backend, ...]
    example: Callable[[], tuple[Any, ...]] | None = None  # small arguments on torch's default device, for lab-doctor
    result: Callable[[Any], Any] = lambda got: got  # what a backend gives as tensors, for lab-doctor
    forms: tuple[str, ...] = ()  # what its last argument may be; lab-doctor computes the example in each
    flops: Callable[..., float] | None = None  # operations for the arguments of a backend (lab/analysis/cost.py says what counts)
    said: set[str] = field(default_factory=set, compare=False)  # backends whose absence was reported

    def __post_init__(self) -> None:
        other = _ops.get(self.name)
        if other is not None and other.home != self.home:  # the same module again: it was reloaded
            raise ValueError(f"op {self.name}: there is one already, of {other.home}; choose another name")
        _ops[self.name] = self
        _used[self.name] = None

    def __call__(self, *args: Any) -> Any:
        backend = self.choose(*args)
        if not exporting():  # an exported graph must not write to a global
            _used[self.name] = backend.name
        return backend.run(*args)

    def choose(self, *args: Any) -> Backend:
        forced, reasons = isinstance(_forced.get(self.name), str), []
        for backend in self.candidates():
            reason = backend.supports(*args)
            if reason is None:
                return backend
            reasons.append(f"{backend.name}: {reason}")
            if len(reasons) == 1 and not forced and not recording() and backend.name not in self.said:  # of the best one alone
                self.said.add(backend.name)
                log.warning("op %s does not use backend %s: %s", self.name, backend.name, reason)
        raise RuntimeError(f"op {self.name}: no {'forced ' if forced else ''}backend can compute this ({'; '.join(reasons)})")

    def candidates(self) -> tuple[Backend, ...]:
        """The backends that may run, in the order in which they are asked."""
        forced = _forced.get(self.name)
        if forced is None:
            return self.backends
        if isinstance(forced, Backend):
            return (forced, *self.backends)
        return tuple(backend for backend in self.backends if backend.name == forced)

    @property
    def home(self) -> str:
        """The module that made it."""
        return getattr(self.backends[-1].run, "__module__", "?")


def differentiable_once(
    name: str, forward: Any, backward: Any, save: Callable[..., None], gradient: Callable[..., Any], *, twice: str
) -> None:
    """Gives the operator `forward` a gradient that calls the operator `backward`, and makes a second derivative an error that names the
    backend which has one. save(ctx, inputs, output), gradient(ctx, *grads): as of torch.library."""

    def refuse(ctx: Any, *grads: torch.Tensor) -> None:
        raise RuntimeError(f"{name}: no second derivative; use({name}={twice!r}) has one")

    forward.register_autograd(gradient, setup_context=save)
    backward.register_autograd(refuse)


def ops() -> dict[str, tuple[str, ...]]:
    """All ops, with the names of their backends in order of preference."""
    return {name: tuple(backend.name for backend in op.backends) for name, op in _ops.items()}


def used() -> dict[str, str]:
    """The backend of each op's last call in this process, or since `forget`; ops that did not run are missing."""
    return {op: backend for op, backend in _used.items() if backend is not None}


def forget() -> None:
    """`used` starts afresh: a run reports what it has used itself."""
    for op in _used:
        _used[op] = None


@contextmanager
def unnoticed() -> Iterator[None]:
    """What runs inside the block is not in `used`."""
    before = dict(_used)
    try:
        yield
    finally:
        _used.update(before)


def every() -> tuple[Op, ...]:
    """The ops themselves."""
    return tuple(_ops.values())


def forced() -> dict[str, str]:
    """{op: backend} of those that do not follow the rule alone."""
    return {op: choice if isinstance(choice, str) else choice.name for op, choice in _forced.items()}


def force(choice: Mapping[str, str | Backend]) -> None:
    """{op: the name of a backend, "auto", or a Backend to prefer} for the whole process; ops that are not named keep what they have."""
    known = ops()
    for op, backend in choice.items():
        if op not in known:
            raise ValueError(f"ops.{op}: there is no such op; the ops are {', '.join(known)}")
        if isinstance(backend, Backend):
            if backend.name in (AUTO, *known[op]):
                raise ValueError(f"ops.{op}: it has a backend {backend.name} of its own; name yours otherwise")
        elif backend != AUTO and backend not in known[op]:
            raise ValueError(f"ops.{op}={backend}: there is no such backend; expected {', '.join((AUTO, *known[op]))}")
    for op, backend in choice.items():
        if backend == AUTO:
            _forced.pop(op, None)
        else:
            _forced[op] = backend


@contextmanager
def use(backend: str | None = None, **by_op: str | Backend) -> Iterator[None]:
    """Inside the block, as `force`: a backend for all ops that have it (positional) or by op (keywords)."""
    before = dict(_forced)
    having = [op for op, names in ops().items() if backend in (AUTO, *names)]
    if backend is not None and not having:
        raise ValueError(f"use({backend!r}): there is no such backend of any op; expected {', '.join(sorted({*sum(ops().values(), ())}))}")
    by_name: dict[str, str | Backend] = {op: backend for op in having if backend is not None}
    force({**by_name, **by_op})
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
