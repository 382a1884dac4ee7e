"""A report as text: for the terminal (rich), Markdown, CSV or JSON. People get rounded values, programs all digits."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lab.analysis.report import Report, number
from lab.files import strict

if TYPE_CHECKING:
    from rich.table import Table

Format: TypeAlias = Literal["rich", "markdown", "csv", "json"]
FORMATS: dict[str, Format] = {"": "rich", ".txt": "rich", ".md": "markdown", ".csv": "csv", ".json": "json"}
"""By the ending of a file."""

COMMON = ("model", "task", "status", "step", "params")
"""What is said once, above the table for the eye, where all runs have it in common."""

COUNTS = ("step", "params", "runs", "n")

UNBOUND = 10_000  # a table in a file or a pipe is as wide as its lines


def render(report: Report, form: Format) -> str:
    if form == "json":
        return json.dumps(strict({"notes": report.notes, "columns": report.columns, "rows": report.rows}), indent=1) + "\n"
    if form == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, report.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(report.rows)
        return text.getvalue()
    return _markdown(report) if form == "markdown" else _rich(report, UNBOUND)


def show(report: Report) -> None:
    """Prints it for a person, not wider than the terminal."""
    print(_rich(report, shutil.get_terminal_size().columns if sys.stdout.isatty() else UNBOUND), end="", flush=True)


def _cells(report: Report) -> tuple[list[str], list[list[str]]]:
    """The header and the lines for people: a mean and its spread share a cell."""
    header = [name for name in report.columns if not name.endswith(" sd")]
    lines = []
    for row in report.rows:
        line = []
        for name in header:
            spread = row.get(f"{name} sd")
            line.append(_cell(name, row[name]) + (f" ± {spread:.2g}" if spread is not None else ""))
        lines.append(line)
    return header, lines


def _cell(name: str, value: Any) -> str:
    """Scores and counts are rounded; what a run was configured with is not, so that two values that differ look different."""
    return number(value) if name in COUNTS or name.startswith(("val ", "test ")) else "" if value is None else str(value)


def _markdown(report: Report) -> str:
    header, lines = _cells(report)
    table = [header, ["---"] * len(header), *lines]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in table)
    return text + "\n\n" + "".join(f"- {note}\n" for note in report.notes)


def _rich(report: Report, width: int) -> str:
    """Runs as lines; where they are wider than the terminal, as columns, as many side by side as there is room for."""
    from rich.console import Console
    from rich.text import Text

    header, lines = _cells(report)
    cells = {name: [line[index] for line in lines] for index, name in enumerate(header)}
    same = [name for name in COMMON if name in cells and len(set(cells[name])) == 1 and cells[name][0]]
    shown = {name: cells[name] for name in header if name not in same}
    numeric = {name for name in shown if any(isinstance(row[name], int | float) for row in report.rows)}
    text = io.StringIO()
    console = Console(width=width, file=text)
    if same:
        console.print(Text(", ".join(f"{name} {cells[name][0]}" for name in same)), soft_wrap=True)
    table = _grid([name.replace(" ", "\n") for name in shown], list(zip(*shown.values(), strict=True)), [name in numeric for name in shown])
    if _width(table) <= width:
        console.print(table)
    else:
        first, others = list(shown)[0], list(shown)[1:]
        start = 0
        while start < len(lines):
            for count in range(len(lines) - start, 0, -1):
                part = slice(start, start + count)
                rows = [[name, *shown[name][part]] for name in others]
                turned = _grid([first, *shown[first][part]], rows, [False] + [True] * count)
                if count == 1 or _width(turned) <= width:
                    break
            console.print(turned)
            start += count
    for note in report.notes:
        console.print(Text(note), soft_wrap=True)
    return text.getvalue()


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]], to_the_right: Sequence[bool]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name, right in zip(header, to_the_right, strict=True):
        table.add_column(Text(name), justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _width(table: Table) -> int:
    """The width at which nothing in the table is broken into two lines."""
    from rich.console import Console

    return Console(width=UNBOUND).measure(table).maximum
