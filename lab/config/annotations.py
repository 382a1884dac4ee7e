"""What the annotations of a constructor say, in words and as types."""

from __future__ import annotations

import collections.abc
import inspect
import json
import os
import types
import typing
from typing import Annotated, Any, Literal, TypeVar, Union

from lab.config.errors import nearest

SCALARS = {bool: "true or false", int: "an int", float: "a number", str: "a text", type(None): "null"}


def argument_types(target: Any) -> dict[str, Any]:
    """The annotations of a class's constructor or of a function. One that cannot be resolved at run time is Any."""
    function = target
    if isinstance(target, type):
        function = target.__new__ if target.__init__ is object.__init__ else target.__init__  # type: ignore[misc]
    function = inspect.unwrap(function)
    found: dict[str, Any] = {}
    for name, annotation in getattr(function, "__annotations__", {}).items():
        one = types.SimpleNamespace(__annotations__={name: annotation})
        try:
            found |= typing.get_type_hints(one, globalns=getattr(function, "__globals__", {}))
        except (NameError, AttributeError, TypeError, SyntaxError):
            found[name] = Any
    return found


def split(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """list[int] -> (list, (int,)); an annotation without arguments -> (itself, ())."""
    return typing.get_origin(annotation) or annotation, typing.get_args(annotation)


def alternatives(annotation: Any) -> list[Any]:
    """int | None -> [int, NoneType]; anything else alone."""
    origin, arguments = split(annotation)
    if origin is Annotated:
        return alternatives(arguments[0])
    if origin in (Union, types.UnionType):
        return [option for part in arguments for option in alternatives(part)]
    if isinstance(annotation, TypeVar):
        return [Any]
    return [type(None) if annotation is None else annotation]


def kind(option: Any) -> str:
    """What a config may give for one alternative: any, literal, scalar, path, mapping, list; or, only as a node, callable or object."""
    wanted, _ = split(option)
    if wanted is Literal:
        return "literal"
    if wanted is collections.abc.Callable:
        return "callable"
    if not isinstance(wanted, type) or wanted in (Any, object, type):
        return "any"
    if wanted in SCALARS:
        return "scalar"
    if issubclass(wanted, os.PathLike):
        return "path"
    if issubclass(wanted, collections.abc.Mapping):
        return "mapping"
    return "list" if wanted is tuple or is_subclass(list, wanted) else "object"


def is_subclass(a: type, b: type) -> bool:
    try:
        return issubclass(a, b)
    except TypeError:  # b is a Protocol with attributes: it cannot be told
        return True


def expected(annotation: Any) -> str:
    """The annotation in words: 'an int or null'."""
    parts = [part for option in alternatives(annotation) for part in _in_words(option)]
    return " or ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def _in_words(option: Any) -> list[str]:
    wanted, arguments = split(option)
    match kind(option):
        case "literal":
            return [choice if isinstance(choice, str) else shown(choice) for choice in arguments]
        case "scalar":
            return [SCALARS[wanted]]
        case "path":
            return ["a path"]
        case "mapping":
            return ["a node of names and values"]
        case "list" if wanted is tuple and arguments and arguments[-1] is not ...:
            return [f"a list of {len(arguments)} values"]
        case "list":
            return ["a list" if not arguments or kind(arguments[0]) == "any" else f"a list ({expected(arguments[0])} each)"]
        case "callable":
            result = arguments[-1] if arguments else Any
            return ["a node with _target_ and `_partial_: true`" + (f" (of a {result.__name__})" if kind(result) == "object" else "")]
        case "object":
            return [f"a node with _target_ (a {wanted.__name__})"]
        case _:
            return ["any value"]


def advice(value: Any, annotation: Any) -> str:
    """What to write instead, where that can be guessed: the end of the sentence."""
    options = alternatives(annotation)
    if isinstance(value, float) and value.is_integer() and int in options:
        return f"; write {int(value)}"
    if isinstance(value, str):
        choices = [choice for option in options if split(option)[0] is Literal for choice in split(option)[1]]
        close = nearest(value, [choice for choice in choices if isinstance(choice, str)])
        if close:
            return f"; did you mean {close}?"
        if {int, float, bool} & set(options) and _reads_as_number(value):
            return ", a text; remove its quotes"
    return ""


def shown(value: Any) -> str:
    """A value as YAML would have it, cut to fit a sentence."""
    text = f"'{value}'" if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _reads_as_number(text: str) -> bool:
    try:
        return isinstance(json.loads(text), int | float)
    except ValueError:
        return False
