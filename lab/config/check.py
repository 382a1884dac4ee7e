"""A config is checked against the signatures of what it names.

A node is the keyword arguments of its `_target_`: names first, then annotated types. The root is the keyword arguments of `Experiment`.
A target with **kwargs accepts any name; an annotation that cannot be resolved at run time accepts any value.
"""

from __future__ import annotations

import collections.abc
import importlib
import inspect
import json
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union

from lab.config.build import locate, refuse_untrusted
from lab.config.compose import Composed
from lab.config.errors import ConfigError, MistakeError, hint, nearest
from lab.config.layers import origin
from lab.config.tree import Key, dotted, lookup, misplaced

ROOT = "lab.training.experiment.Experiment"
FIRST = ("model", "task", "optimizer", "trainer")
LATE = ("callbacks", "logger")
"""Keys whose targets import Lightning, which takes seconds: `check_late`, once it is imported anyway."""

RESERVED = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")
SCALARS = {bool: "true or false", int: "an int", float: "a number", str: "a text", type(None): "null"}


def check(config: Composed | dict[str, Any], root: Callable[..., Any] | str = ROOT, trust: list[str] | None = None) -> None:
    """Raises ConfigError for the first mistake in names, types and missing values, callbacks and logger excepted.

    trust: as for `build`; a config that was loaded is checked with a list, so that nothing it names is imported before it is allowed.
    """
    _check(config, root, trust, late=False)


def check_late(config: Composed | dict[str, Any], root: Callable[..., Any] | str = ROOT, trust: list[str] | None = None) -> None:
    """The same for callbacks and logger."""
    _check(config, root, trust, late=True)


def _check(config: Composed | dict[str, Any], root: Callable[..., Any] | str, trust: list[str] | None, late: bool) -> None:
    composed = config if isinstance(config, Composed) else None
    tree = config.config if isinstance(config, Composed) else config
    if trust is not None:
        refuse_untrusted(tree, trust)
    try:
        _check_root(tree, root, late)
    except MistakeError as mistake:
        raise _with_advice(mistake, tree, composed).at(origin(composed.overrides, mistake.culprit) if composed else None) from None


def _with_advice(mistake: MistakeError, tree: dict[str, Any], composed: Composed | None) -> MistakeError:
    """Advice that needs more than the node at fault: another place in the config, or the choice of an option."""
    if isinstance(mistake, UnknownNameError) and nearest(str(mistake.key[-1]), mistake.valid) is None:
        mistake.problem += misplaced(str(mistake.key[-1]), tree) or hint(str(mistake.key[-1]), mistake.valid)
    elif isinstance(mistake, UnknownNameError):
        mistake.problem += f"; did you mean {dotted((*mistake.key[:-1], nearest(str(mistake.key[-1]), mistake.valid)))}?"
    (value,) = lookup(tree, mistake.key) or (None,)
    for choice in composed.choices if composed else ():
        if choice.rpartition("@")[2] == dotted(mistake.key) and isinstance(value, str):
            mistake.problem += f"; an option is chosen by {choice}={value}, in a file by `override /{choice}: {value}` in its defaults"
    return mistake


class UnknownNameError(MistakeError):
    """A name that its node does not take; `valid` are those that it does."""

    def __init__(self, key: Key, problem: str, valid: Sequence[str]) -> None:
        super().__init__(key, problem)
        self.valid = valid


# ----------------------------------------------------------------------- nodes


def _check_root(tree: dict[str, Any], root: Callable[..., Any] | str, late: bool) -> None:
    if isinstance(root, str):
        module, _, name = root.rpartition(".")
        root = getattr(importlib.import_module(module), name)
    assert callable(root)
    parameters = inspect.signature(root).parameters
    annotations = _annotations(root)
    for name in tree:
        if name not in parameters:
            raise UnknownNameError((name,), "there is no such key", list(parameters))
    for name, parameter in parameters.items():
        if name not in tree and parameter.default is parameter.empty:
            raise MistakeError((name,), f"is missing; it must be {_expected(annotations.get(name, Any))}")
    names = LATE if late else [*FIRST, *(name for name in tree if name not in FIRST + LATE)]
    for name in names:
        if name in tree:
            _check_value((name,), tree[name], annotations.get(name, Any))
    if "ops" in tree and not late:
        _check_ops(tree["ops"])


def _check_ops(forced: Mapping[str, str]) -> None:
    from lab.ops import OPS

    for op, backend in forced.items():
        if op not in OPS:
            raise UnknownNameError(("ops", op), "there is no such op", list(OPS))
        backends = ("auto", *OPS[op])
        if backend not in backends:
            raise MistakeError(("ops", op), f"{op} has no backend {backend}{hint(backend, backends, 'expected')}")


def _check_node(key: Key, node: dict[str, Any], annotation: Any) -> None:
    """A dict with `_target_`: that it yields what is expected there, and the arguments in it."""
    try:
        target = locate(node["_target_"])
    except ConfigError as error:
        raise MistakeError((*key, "_target_"), str(error)) from None
    if not callable(target):
        raise MistakeError((*key, "_target_"), f"{node['_target_']} is not a class or function")
    for flag in ("_partial_", "_recursive_"):
        if not isinstance(node.get(flag, True), bool):
            raise MistakeError((*key, flag), f"expected true or false, got {_shown(node[flag])}")
    _check_result(key, node, target, annotation)
    parameters = _parameters(target)
    annotations = _annotations(target)
    named = {name: p for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in node.items():
        if name in RESERVED[:1] + RESERVED[4:]:
            continue
        if name not in named and name not in RESERVED and not open_ended:
            raise UnknownNameError((*key, name), f"{node['_target_']} has no such argument", [*named, *RESERVED])
        _check_value((*key, name), value, annotations.get(name, Any) if name in named else Any)
    if node.get("_partial_", False):
        return
    positional = len(node.get("_args_", ()))
    for index, (name, parameter) in enumerate(named.items()):
        if name not in node and parameter.default is parameter.empty and index >= positional:
            expected = _expected(annotations[name]) if name in annotations else "given"
            raise MistakeError((*key, name), f"{node['_target_']} needs it; it must be {expected}", culprit=(*key, "_target_"))


def _check_result(key: Key, node: dict[str, Any], target: Any, annotation: Any) -> None:
    """As far as classes tell: a function may return anything."""
    partial = node.get("_partial_", False)
    if isinstance(target, type) and not any(_yields(target, partial, option) for option in _alternatives(annotation)):
        if not partial and any(_yields(target, True, option) for option in _alternatives(annotation)):
            raise MistakeError(key, f"`_partial_: true` is missing: {node['_target_']} gets further arguments later", culprit=(*key, "_target_"))
        got = f"a partial {node['_target_']}" if partial else f"a {node['_target_']}"
        raise MistakeError(key, f"expected {_expected(annotation)}, got {got}", culprit=(*key, "_partial_") if partial else (*key, "_target_"))


def _yields(target: type, partial: bool, annotation: Any) -> bool:
    """Whether an instance of the class, or a partial of it, can be what the annotation says."""
    wanted = typing.get_origin(annotation) or annotation
    if wanted is collections.abc.Callable:
        result = (typing.get_args(annotation) or (Any,))[-1]
        if isinstance(result, type) and result is not Any:
            return _is_subclass(target, result) if partial else not _is_subclass(target, result)
        return partial or any("__call__" in vars(base) for base in target.__mro__)
    if not isinstance(wanted, type) or wanted in (object, Any):
        return wanted is not Literal
    return not partial and _is_subclass(target, wanted)


def _is_subclass(target: type, wanted: type) -> bool:
    try:
        return issubclass(target, wanted)
    except TypeError:  # a Protocol with attributes
        return True


def _parameters(target: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(target).parameters
    except (ValueError, TypeError):  # built in, without a signature: any name may be right
        return {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}


def _annotations(target: Any) -> dict[str, Any]:
    function = inspect.unwrap(target.__init__ if isinstance(target, type) else target)
    found = dict(getattr(function, "__annotations__", {}))
    for name, annotation in found.items():
        if isinstance(annotation, str):
            try:
                found[name] = eval(annotation, getattr(function, "__globals__", {}))
            except Exception:
                found[name] = Any
    return found


# ----------------------------------------------------------------------- values


def _check_value(key: Key, value: Any, annotation: Any) -> None:
    if value == "???":
        raise MistakeError(key, f"needs a value, {_expected(annotation)}: {dotted(key)}=...")
    if isinstance(value, dict) and "_target_" in value:
        _check_node(key, value, annotation)
        return
    deepest: MistakeError | None = None
    for option in _alternatives(annotation):
        try:
            _check_one(key, value, option, annotation)
            return
        except MistakeError as mistake:
            if deepest is None or len(mistake.key) > len(deepest.key):
                deepest = mistake
    assert deepest is not None
    raise deepest


def _check_one(key: Key, value: Any, option: Any, annotation: Any) -> None:
    """A value against one alternative of an annotation; the whole of it is for the message."""
    wanted, arguments = typing.get_origin(option) or option, typing.get_args(option)
    mismatch = MistakeError(key, f"expected {_expected(annotation)}, got {_shown(value)}{_advice(value, annotation)}")
    if wanted is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            raise mismatch
    elif wanted in SCALARS:
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise mismatch
    elif not isinstance(wanted, type) or wanted in (object, Any, inspect.Parameter.empty):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
            _check_value((*key, name), inner, Any)
    elif issubclass(wanted, os.PathLike):
        if not isinstance(value, str):
            raise mismatch
    elif issubclass(wanted, collections.abc.Mapping):
        if not isinstance(value, dict):
            raise mismatch
        for name, inner in value.items():
            if arguments and arguments[0] in SCALARS and type(name) is not arguments[0]:
                raise MistakeError((*key, name), f"its name must be {SCALARS[arguments[0]]}, got {_shown(name)}")
            _check_value((*key, name), inner, arguments[1] if len(arguments) == 2 else Any)
    elif issubclass(list, wanted) or wanted is tuple:
        if not isinstance(value, list):
            raise mismatch
        fixed = wanted is tuple and arguments and arguments[-1] is not ...
        if fixed and len(value) != len(arguments):
            raise mismatch
        for index, inner in enumerate(value):
            _check_value((*key, index), inner, arguments[index] if fixed else arguments[0] if arguments else Any)
    else:
        raise mismatch


def _alternatives(annotation: Any) -> list[Any]:
    """int | None -> [int, None's type]; anything else alone."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _alternatives(typing.get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [option for part in typing.get_args(annotation) for option in _alternatives(part)]
    if isinstance(annotation, TypeVar | str) or annotation is inspect.Parameter.empty:
        return [Any]
    return [type(None) if annotation is None else annotation]


def _expected(annotation: Any) -> str:
    """The annotation as the user would say it."""
    parts = []
    for option in _alternatives(annotation):
        wanted, arguments = typing.get_origin(option) or option, typing.get_args(option)
        inner = next(iter(arguments), Any)
        if wanted is Literal:
            parts += [_shown(choice).strip("'") for choice in arguments]
        elif wanted in SCALARS:
            parts.append(SCALARS[wanted])
        elif wanted is collections.abc.Callable:
            parts.append("a node with _target_ and _partial_: true" + (f" (a {arguments[-1].__name__})" if arguments and isinstance(arguments[-1], type) else ""))
        elif not isinstance(wanted, type) or wanted in (object, Any):
            parts.append("any value")
        elif issubclass(wanted, os.PathLike):
            parts.append("a path")
        elif issubclass(wanted, collections.abc.Mapping):
            parts.append("a node of names and values")
        elif wanted is tuple and arguments and arguments[-1] is not ...:
            parts.append(f"a list of {len(arguments)} values")
        elif issubclass(list, wanted) or wanted is tuple:
            parts.append("a list" if inner is Any else f"a list ({_expected(inner)} each)")
        else:
            parts.append(f"a node with _target_ (a {wanted.__name__})")
    return " or ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def _advice(value: Any, annotation: Any) -> str:
    options = _alternatives(annotation)
    if isinstance(value, float) and value.is_integer() and int in options:
        return f"; write {int(value)}"
    choices = [choice for option in options if typing.get_origin(option) is Literal for choice in typing.get_args(option)]
    if isinstance(value, str) and choices:
        close = nearest(value, [choice for choice in choices if isinstance(choice, str)])
        return f"; did you mean {close}?" if close else ""
    if isinstance(value, str) and ({int, float, bool} & set(options)) and _is_plain(value):
        return ", which is a text; remove its quotes"
    return ""


def _is_plain(text: str) -> bool:
    try:
        return isinstance(json.loads(text), int | float)
    except ValueError:
        return False


def _shown(value: Any) -> str:
    """A value as YAML would have it, cut to fit a sentence."""
    text = f"'{value}'" if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
