"""Where a value comes from: every file and word that sets it, the last of which wins."""

from __future__ import annotations

import json
from typing import Any

from lab.config.composition import Composed, compose
from lab.config.errors import ConfigError, hint
from lab.config.files import options, show
from lab.config.layers import Layer
from lab.config.tree import Key, dotted, leaves, lookup, places


def explain(key: str, overrides: list[str]) -> str:
    """The final value of `key`, and a line for each layer that sets it, lowest first:

        model.d_model = 96
          128  configs/model/lot.yaml:9
          64   experiments/copy_reverse_small.yaml:8
          96   command line

    For a node, a line for each value in it, with the layer that it comes from; for a group of options, the chosen one, all that there are,
    and what it sets. ConfigError for a key that nothing sets.
    """
    composed = compose(overrides)
    config, layers = composed.config, composed.layers
    path = tuple(key.split("."))
    found = lookup(config, path)
    if found is None and key in composed.choices:
        return _of_option(key, composed)
    if found is None:
        raise ConfigError(f"{key}: nothing sets such a key{hint(key, (dotted(place) for place, _ in places(config)))}")
    if isinstance(found[0], dict) and found[0]:
        return _table([(f"{dotted(place)} = {_text(value)}", _setters(layers, place)[-1][1]) for place, value in leaves(found[0], path)])
    return f"{key} = {_text(found[0])}\n" + _table([(f"  {_text(value)}", where) for value, where in _setters(layers, path)])


def _of_option(key: str, composed: Composed) -> str:
    chosen, there = composed.choices[key], options()[key.partition("@")[0]]
    files = {show(file) for file in there[chosen]}
    trees = [layer.tree for layer in composed.layers if layer.name in files and layer.tree]
    values = [(f"  {dotted(place)}", _text(value)) for tree in trees for place, value in leaves(tree)]
    return f"{key} = {chosen}, of {', '.join(sorted(there))}" + (f"; it sets\n{_table(values)}" if values else "; it sets nothing")


def _setters(layers: list[Layer], key: Key) -> list[tuple[Any, str]]:
    return [(found[0], layer.where(key)) for layer in layers if (found := lookup(layer.tree, key)) is not None]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(left) for left, _ in rows)
    return "\n".join(f"{left:{width}}  {right}" for left, right in rows)
