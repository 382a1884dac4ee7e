"""Elements of HTML and SVG. The standard library's ElementTree closes and escapes them, so no text of a run can become markup."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, TypeAlias
from xml.etree.ElementTree import Element, tostring

Child: TypeAlias = "Element | str | Iterable[Child] | None"


def el(tag: str, *children: Child, **attributes: Any) -> Element:
    """el("p", "a ", el("b", "word"), class_="x"). An attribute of None is left out; `_` in its name stands for `-`."""
    given = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value is not None and value is not False}
    element = Element(tag, {name: "" if value is True else _clean(value) for name, value in given.items()})
    _append(element, children)
    return element


def html(root: Element) -> str:
    return "<!doctype html>\n" + tostring(root, encoding="unicode", method="html") + "\n"


def _append(element: Element, children: Iterable[Child]) -> None:
    for child in children:
        if isinstance(child, str):
            if len(element):
                element[-1].tail = (element[-1].tail or "") + _clean(child)
            else:
                element.text = (element.text or "") + _clean(child)
        elif isinstance(child, Element):
            element.append(child)
        elif child is not None:
            _append(element, child)


def _clean(value: Any) -> str:
    """Without the control characters that no document may have, such as those of a terminal's colours in the reason of a failure."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(value))
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)
