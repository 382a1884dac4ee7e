"""A config is checked against the signatures of what it names.

A node is the keyword arguments of its `_target_`: names first, then annotated types. The root is the keyword arguments of `Experiment`.
A target with **kwargs accepts any name; an annotation that cannot be resolved at run time accepts any value.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias

from lab.config.annotations import advice, alternatives, argument_types, expected, is_subclass, kind, shown, split
from lab.config.composition import Composed
from lab.config.errors import ConfigError, MistakeError, hint, nearest
from lab.config.targets import locate, own_backend, refuse_untrusted
from lab.config.tree import Key, dotted, lookup, misplaced

Config: TypeAlias = Composed | Mapping[str, Any]
Root: TypeAlias = Callable[..., Any] | str

ROOT = "lab.training.Experiment"
FIRST = ("model", "task", "optimizer", "trainer")
LATE = ("callbacks", "logger")
"""Keys whose targets import Lightning, which takes seconds: `check_late`, once it is imported anyway."""

FLAGS = ("_partial_", "_recursive_")
RESERVED = ("_target_", *FLAGS, "_args_", "_convert_")


def check(config: Config, root: Root = ROOT, trust: list[str] | None = None) -> None:
    """Raises ConfigError for the first mistake in names, types and missing values, callbacks and logger excepted.

    trust: as for `build`; a config that was loaded is checked with a list, so that nothing it names is imported before it is allowed.
    """
    _check(config, root, trust, late=False)


def check_late(config: Config, root: Root = ROOT, trust: list[str] | None = None) -> None:
    """The same for callbacks and logger."""
    _check(config, root, trust, late=True)


def _check(config: Config, root: Root, trust: list[str] | None, late: bool) -> None:
    tree, saying_where = (config.config, config.saying_where()) if isinstance(config, Composed) else (config, nullcontext())
    if trust is not None:
        refuse_untrusted(tree, trust)
    with saying_where:
        try:
            _check_root(tree, root, trust, late)
        except UnknownNameError as mistake:
            raise MistakeError(mistake.key, mistake.problem + mistake.meant(tree), mistake.culprit) from None
        except MistakeError as mistake:
            if not isinstance(config, Composed):
                raise
            value = lookup(tree, mistake.key)
            for choice in config.choices:
                if not value or choice.rpartition("@")[2] not in (dotted(mistake.key), mistake.key[-1]):
                    continue
                if isinstance(value[0], str):
                    mistake.problem += f"; an option is chosen by {choice}={value[0]}, in a file by `override /{choice}: {value[0]}`"
                elif isinstance(value[0], dict) and "_target_" not in value[0]:
                    mistake.problem += f"; an option, whose values these may be, is chosen by {choice}=NAME"
            raise


class UnknownNameError(MistakeError):
    """A name that its node does not take; `valid` are those that it does."""

    def __init__(self, key: Key, problem: str, valid: Sequence[str]) -> None:
        super().__init__(key, problem)
        self.valid = valid

    def meant(self, tree: Mapping[str, Any]) -> str:
        """The nearest name in this node, else the same name elsewhere in the config, else all names of this node."""
        name = str(self.key[-1])
        near = nearest(name, self.valid)
        return f"; did you mean {dotted((*self.key[:-1], near))}?" if near else misplaced(self.key, tree) or hint(name, self.valid)


# ----------------------------------------------------------------------- nodes


def _check_root(tree: Mapping[str, Any], root: Root, trust: list[str] | None, late: bool) -> None:
    if isinstance(root, str):
        module, _, name = root.rpartition(".")
        root = getattr(importlib.import_module(module), name)
    assert callable(root)
    parameters, types = inspect.signature(root).parameters, argument_types(root)
    for name in tree:
        if name not in parameters:
            raise UnknownNameError((name,), "there is no such key", list(parameters))
    for name, parameter in parameters.items():
        if name not in tree and parameter.default is parameter.empty:
            raise MistakeError((name,), f"it is missing; it must be {expected(types.get(name, Any))}")
    for name in LATE if late else (*FIRST, *(name for name in tree if name not in FIRST + LATE)):
        if name in tree:
            _check_value((name,), tree[name], types.get(name, Any))
    if "ops" in tree and not late:
        _check_ops(tree["ops"], trust)


def _check_ops(forced: Mapping[str, str], trust: list[str] | None) -> None:
    from lab.ops import ops  # imports torch

    known = ops()  # with those of the model that was just checked, and so imported
    for op, backend in forced.items():
        if op not in known:
            raise UnknownNameError(("ops", op), "there is no such op", list(known))
        backends = ("auto", *known[op])
        if "." in backend:
            own_backend(op, backend, trust)
        elif backend not in backends:
            raise MistakeError(("ops", op), f"{op} has no backend {backend}{hint(backend, backends)}")


def _check_node(key: Key, node: dict[str, Any], annotation: Any) -> None:
    """A dict with `_target_`: that it yields what is expected there, then the arguments in it."""
    name = node["_target_"]
    try:
        target = locate(name)
    except ConfigError as error:
        raise MistakeError((*key, "_target_"), str(error)) from None
    if not callable(target):
        raise MistakeError((*key, "_target_"), f"{name} is not a class or function")
    for flag in FLAGS:
        if not isinstance(node.get(flag, True), bool):
            raise MistakeError((*key, flag), f"expected true or false, got {shown(node[flag])}")
    _check_result(key, node, target, annotation)

    parameters, types = _parameters(target), argument_types(target)
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for argument, value in node.items():
        if argument in named and node.get("_recursive_", True):
            _check_value((*key, argument), value, types.get(argument, Any))
        elif argument in named or argument in RESERVED or open_ended:
            _check_value((*key, argument), value, Any)
        else:
            raise UnknownNameError(
                (*key, argument), f"{name} has no such argument", [*named, *(RESERVED if argument.startswith("_") else ())]
            )
    positional = len(node.get("_args_", ()))
    for argument, parameter in list(named.items())[positional:]:
        if argument not in node and parameter.default is parameter.empty and not node.get("_partial_", False):
            place = (*key, argument)
            raise MistakeError(place, f"{name} needs it; it must be {_wanted(place, types.get(argument, Any))}", culprit=(*key, "_target_"))


def _parameters(target: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(target).parameters
    except (ValueError, TypeError):  # built in, without a signature: any name may be right
        return {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}


def _check_result(key: Key, node: dict[str, Any], target: Any, annotation: Any) -> None:
    """That the node can yield what the annotation says, as far as classes tell: a function may return anything."""
    options, partial, name = alternatives(annotation), node.get("_partial_", False), node["_target_"]
    if not isinstance(target, type) or any(_yields(target, partial, option) for option in options):
        return
    flag_is_wrong = any(_yields(target, not partial, option) for option in options)
    culprit = (*key, "_partial_" if flag_is_wrong and "_partial_" in node else "_target_")
    if flag_is_wrong and not partial:
        raise MistakeError(key, f"`_partial_: true` is missing: {name} gets further arguments later", culprit)
    raise MistakeError(key, f"expected {expected(annotation)}, got a {'partial ' if partial else ''}{name}", culprit)


def _yields(target: type, partial: bool, option: Any) -> bool:
    """Whether an instance of the class, or a partial of it, can be what one alternative of an annotation says."""
    wanted, arguments = split(option)
    match kind(option):
        case "any":
            return True
        case "callable" if arguments and kind(arguments[-1]) == "object":
            return partial and is_subclass(target, arguments[-1])
        case "callable":
            return partial or any("__call__" in vars(base) for base in target.__mro__)
        case "literal":
            return False
        case _:
            return not partial and is_subclass(target, wanted)


# ----------------------------------------------------------------------- values


def _wanted(key: Key, annotation: Any) -> str:
    """The annotation in words; for one that says nothing, how an object is given."""
    if "any" in map(kind, alternatives(annotation)):
        return f"a node such as +{dotted(key)}._target_=yourmodule.Class, or a plain value"
    return expected(annotation)


def _check_value(key: Key, value: Any, annotation: Any) -> None:
    if value == "???":
        raise MistakeError(key, f"it is not set; it must be {_wanted(key, annotation)}")
    if isinstance(value, dict) and "_target_" in value:
        _check_node(key, value, annotation)
        return
    mistakes = []
    for option in alternatives(annotation):
        inner = _inner(value, option)
        try:
            if inner is None:
                raise MistakeError(key, f"expected {expected(annotation)}, got {shown(value)}{advice(value, annotation)}")
            for name, item, wanted in inner:
                _check_value((*key, name), item, wanted)
            return
        except MistakeError as mistake:
            mistakes.append(mistake)
    raise max(mistakes, key=lambda mistake: len(mistake.key))  # of the alternative that went furthest into the value


def _inner(value: Any, option: Any) -> list[tuple[Any, Any, Any]] | None:
    """None where a value is not what one alternative of an annotation says; else (name, value, annotation) of what is in it."""
    wanted, arguments = split(option)
    match kind(option):
        case "any" if isinstance(value, dict):
            return [(name, item, Any) for name, item in value.items()]
        case "any":
            return [(index, item, Any) for index, item in enumerate(value)] if isinstance(value, list) else []
        case "literal":
            return [] if any(value == choice and type(value) is type(choice) for choice in arguments) else None
        case "scalar":
            return [] if type(value) is wanted or (wanted is float and type(value) is int) else None
        case "path":
            return [] if isinstance(value, str) else None
        case "mapping" if isinstance(value, dict):
            of_name, of_item = arguments or (Any, Any)
            return None if any(_inner(name, of_name) is None for name in value) else [(name, item, of_item) for name, item in value.items()]
        case "list" if isinstance(value, list) and wanted is tuple and arguments and arguments[-1] is not ...:
            return list(zip(range(len(value)), value, arguments, strict=True)) if len(value) == len(arguments) else None
        case "list" if isinstance(value, list):
            return [(index, item, arguments[0] if arguments else Any) for index, item in enumerate(value)]
        case _:
            return None
