"""The page around the studies: head, contents, style and script, all in one file that asks for no other."""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Sequence
from importlib import resources
from xml.etree.ElementTree import Element

import lab
from lab.analysis.page.markup import el, html
from lab.analysis.page.sections import question, sections
from lab.analysis.page.studies import Study, studies
from lab.training.provenance import now


def page(targets: Sequence[str]) -> str:
    """The page about these runs, sweeps, folders, globs and comparisons; RunError for a path that does not exist."""
    return document(studies(targets), shlex.join(["lab-report", *targets]))


def document(found: Sequence[Study], command: str) -> str:
    title = ", ".join(dict.fromkeys(study.title for study in found))
    single = len(found) == 1
    parts: list[Element] = []
    contents: list[Element] = []
    for i, study in enumerate(found):
        key, inner = f"s{i}", sections(study, f"s{i}", 2 if single else 3)
        if single:
            parts += [el("div", *question(study), class_="question"), *inner]
            contents += [el("li", el("a", str(each.get("aria-label")), href=f"#{each.get('id')}")) for each in inner]
        else:
            parts.append(el("article", el("h2", study.title), *question(study), *inner, id=key))
            contents.append(el("li", el("a", study.title, href=f"#{key}")))
    style, script = _file("page.css"), _file("page.js")
    # The browser is told to load nothing, and to run nothing but this script.
    policy = f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; base-uri 'none'; form-action 'none'"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", name="generator", content=f"lab {lab.__version__}"),
        el("title", title),
        el("style", style),
    )
    header = el("header", el("h1", title), el("nav", el("ol", *contents), aria_label="Contents"))
    footer = el("footer", el("p", f"Written {now()} by lab {lab.__version__}: ", el("code", command)))
    return html(el("html", head, el("body", header, el("main", *parts), footer, el("script", script)), lang="en"))


def _file(name: str) -> str:
    return (resources.files("lab.analysis.page") / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
