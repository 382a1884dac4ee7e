"""The checks of lab/analysis/conformance.py on one model, each on a model of its own: what passed, what failed and where.

    subject, = subjects(["mamba"], [], **SMALL)
    found = checkup(subject)        # {"name", "parameters", "failed", "checks": [{"check", "result", "reason", "seconds"}, ...]}

A check that has no meaning for a model is "not applicable", with the reason. The parameters are drawn: properties must hold for any.
"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lab.analysis import conformance
from lab.analysis.conformance import LONG, WithSource
from lab.analysis.subjects import LAB, Subject, told
from lab.models import SequenceModel

VOCABULARY, ROWS, TOKENS, SOURCE = 11, 3, 9, 7
SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "length": LONG, "sizes": {"d_model": 32, "n_layers": 2}}
PASSED, FAILED, NOT_APPLICABLE = "passed", "failed", "not applicable"
WITHOUT_STATE = ("gradients", "batch_independence", "checkpoint")  # what can be asked of a model that reads the whole sequence
Check = Callable[[], None]


def checkup(subject: Subject, say: Callable[[str], None] = lambda what: None) -> dict[str, Any]:
    """say: gets the name of each check before it begins."""
    model = subject.make()
    checks = []
    for name, function in CHECKS.items():
        say(f"{subject.name}: {name}")
        reason = why_not(name, model)
        entry = {"check": name, "asks": asks(function), "result": NOT_APPLICABLE, "reason": reason, "seconds": 0.0}
        if reason is None:
            start = time.perf_counter()
            found = failure(partial(_run, name, subject))
            seconds = time.perf_counter() - start
            entry |= {"result": PASSED if found is None else FAILED, "reason": found, "seconds": seconds}
        checks.append(entry)
    return {
        "name": subject.name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "failed": sum(entry["result"] == FAILED for entry in checks),
        "checks": checks,
    }


_FUNCTIONS: tuple[Callable[..., None], ...] = (
    *conformance.CHECKS,
    conformance.check_borders,
    conformance.check_checkpoint,
    conformance.check_source,
)
CHECKS = {check.__name__.removeprefix("check_"): check for check in _FUNCTIONS}


def why_not(name: str, model: SequenceModel) -> str | None:
    """Why a check has no meaning for a model, or None."""
    if name == "source":
        return None if model.takes_source else "it takes no source"
    if not model.causal and name not in WITHOUT_STATE:
        reads = "its head reads the whole input at once" if model.n_classes else "it reads the future by design (causal=False)"
        return f"{reads}: no state, no step"
    if name == "gradients" and model.n_classes is not None:
        return "it has no next token to predict"
    if model.max_len is not None and model.max_len < (wanted := LONG if name == "borders" else TOKENS):
        return f"it was built for {model.max_len} tokens, the check needs {wanted}"
    return None


def _run(name: str, subject: Subject) -> None:
    model = subject.make()
    conformance.randomise(model, 0)
    vocabulary = subject.node.get("vocab_size", VOCABULARY)
    tokens, source = random_tokens(LONG if name == "borders" else TOKENS, vocabulary, 1), random_tokens(SOURCE, vocabulary, 4)

    def of_tokens(model: SequenceModel) -> SequenceModel:
        return WithSource(model, source) if model.takes_source else model

    if name == "source":
        conformance.check_source(model, tokens, source)
        return
    model = of_tokens(model)
    if name == "checkpoint":
        conformance.check_checkpoint(model, lambda: of_tokens(subject.make()), tokens)
    elif name == "gradients":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of dropout
            for training in (True, False):
                conformance.check_gradients(model.train(training), tokens, without=conformance.idle(model))
    else:
        CHECKS[name](model, tokens)


def random_tokens(length: int, vocabulary: int, seed: int) -> Tensor:
    return torch.randint(0, vocabulary, (ROWS, length), generator=torch.Generator().manual_seed(seed))


# ---- what a check says


def asks(check: Callable[..., None]) -> str:
    """The first sentence of its docstring."""
    text = " ".join((check.__doc__ or "").split())
    return text.partition(". ")[0].rstrip(".")


def failure(check: Check) -> str | None:
    """What was wrong and where, in one line; None where nothing was. An error of the model's own code comes with the place in it."""
    try:
        check()
    except AssertionError as error:
        files = [Path(frame.filename).resolve() for frame in traceback.extract_tb(error.__traceback__)]
        of_the_check = files[-1] == LAB / "analysis" / "conformance.py" or "torch/testing" in files[-1].as_posix()
        return condensed(str(error)) if of_the_check and str(error) else told(error)
    except Exception as error:  # the reader's code may raise anything, and the other checks should still run
        return told(error)
    return None


def condensed(sentence: str) -> str:
    """What torch.testing says, without its headings: "WHAT: off by 0.5 at row 0, position 3, logit 2; 12 of 99 values differ"."""
    what, found, rest = sentence.partition(": Tensor-likes are not close!")
    if not found:
        what, found, rest = sentence.partition(": Scalars are not close!")
    largest = re.search(r"[Aa]bsolute difference: (\S+)(?: at index \(([\d, ]*)\))?", rest)
    if not found or not largest:
        return " ".join(sentence.split())
    differing = re.search(r"Mismatched elements: (\d+) / (\d+)", rest)
    count = f"; {differing[1]} of {differing[2]} values differ" if differing else ""
    return f"{what}: off by {float(largest[1]):.3g}{_place(what, largest[2])}{count}"


def _place(what: str, index: str | None) -> str:
    """Logits are (B, L, V); those of one token (B, V), those of one row (L, V): the sentence before says which."""
    numbers = (index or "").replace(" ", "").rstrip(",").split(",")
    axes = ["row", "position", "logit"] if len(numbers) == 3 else []
    if len(numbers) == 2:
        axes = ["row", "logit"] if what.startswith(("step", "rows")) else ["position", "logit"] if what.startswith("row ") else []
    if axes:
        return " at " + ", ".join(f"{axis} {number}" for axis, number in zip(axes, numbers, strict=True))
    return f" at index ({', '.join(numbers)})" if index else ""


# ---- for the eye


def table(found: dict[str, Any]) -> Table:
    """Of what `checkup` returned: a row for each check."""
    title = f"{found['name']}, {found['parameters']:,} parameters: {outcome(found)}"
    drawn = Table(title=title, title_justify="left", show_lines=False)
    drawn.add_column("check", no_wrap=True)
    drawn.add_column("result", no_wrap=True)
    drawn.add_column("s", justify="right", no_wrap=True)
    drawn.add_column("what it asks; where it failed, or why it has no meaning here", overflow="fold")
    for entry in found["checks"]:
        style = {PASSED: "green", FAILED: "bold red"}.get(entry["result"], "dim")
        seconds = "" if entry["result"] == NOT_APPLICABLE else f"{entry['seconds']:.1f}"
        text = Text(entry["reason"] or entry["asks"], style="" if entry["result"] == FAILED else "dim")
        drawn.add_row(entry["check"], Text(entry["result"], style=style), seconds, text)
    return drawn


def outcome(found: dict[str, Any]) -> str:
    """In words: "all 11 checks passed", "2 of 11 checks failed: causality, padding"."""
    asked = [entry for entry in found["checks"] if entry["result"] != NOT_APPLICABLE]
    failed = [entry["check"] for entry in asked if entry["result"] == FAILED]
    return f"{len(failed)} of {len(asked)} checks failed: {', '.join(failed)}" if failed else f"all {len(asked)} checks passed"
