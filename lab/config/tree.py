"""Plain trees of dicts and lists, and the keys into them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

Key: TypeAlias = tuple[Any, ...]
"""The place of a value in a tree: ("model", "mixer", "n_heads"); an index for an item of a list."""


def dotted(key: Key) -> str:
    """("task", "lengths", 0) as the user writes it: task.lengths.0"""
    return ".".join(map(str, key))


def lookup(tree: Any, key: Key) -> tuple[Any] | None:
    """The value at `key`, in a tuple; None where there is no such place. Names are compared as text: "0" is the first item of a list."""
    for name in map(str, key):
        if isinstance(tree, dict):
            found = [value for inner, value in tree.items() if str(inner) == name]
        elif isinstance(tree, list) and name.isdigit():
            found = tree[int(name) : int(name) + 1]
        else:
            found = []
        if not found:
            return None
        tree = found[0]
    return (tree,)


def places(tree: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Every key and item with its place, nodes before what is in them."""
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*key, name), value
        yield from places(value, (*key, name))


def leaves(tree: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Every value that is not a dict with something in it, with its place. A list counts as one value."""
    if isinstance(tree, dict) and tree:
        for name, value in tree.items():
            yield from leaves(value, (*key, name))
    else:
        yield key, tree


def misplaced(key: Key, tree: Any) -> str:
    """'; did you mean optimizer.lr?' for an `lr` at a wrong place; "" if the last name of the key stands nowhere else in the tree."""
    return next((f"; did you mean {dotted(other)}?" for other, _ in places(tree) if other[-1] == key[-1] and other != key), "")
