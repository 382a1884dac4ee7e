"""A report as text: for the terminal (rich), Markdown, CSV or JSON. People get rounded values, programs all digits."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from typing import Any, Literal, TypeAlias

from lab.analysis.report import Report, number
from lab.files import strict

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
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    header, lines = _cells(report)
    cells = {name: [line[index] for line in lines] for index, name in enumerate(header)}
    same = [name for name in COMMON if name in cells and len(set(cells[name])) == 1 and cells[name][0]]
    table = Table()
    shown = [name for name in header if name not in same]
    for name in shown:
        numeric = any(isinstance(row[name], int | float) for row in report.rows)
        table.add_column(Text(name.replace(" ", "\n").replace("_", "_\n")), justify="right" if numeric else "left", overflow="fold")
    for line in zip(*(cells[name] for name in shown), strict=True):
        table.add_row(*map(Text, line))
    text = io.StringIO()
    console = Console(width=width, file=text)
    if same:
        console.print(Text(", ".join(f"{name} {cells[name][0]}" for name in same)), soft_wrap=True)
    console.print(table)
    for note in report.notes:
        console.print(Text(note), soft_wrap=True)
    return text.getvalue()
