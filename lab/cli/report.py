"""lab-report: one table of any runs, by what their folders say."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lab.cli import Parser, run, starting

USAGE = (
    "lab-report RUNS [RUNS ...] [--by-seed] [--format rich|markdown|csv|json] [--output FILE]   or   lab-report RUNS [RUNS ...] --html FILE"
)
EXAMPLES = """\
examples:
  lab-report runs                                            every run below the folder
  lab-report runs/sweeps/1a2b3c4d                            the jobs of a sweep; runs/sweeps: of all sweeps
  lab-report 'runs/copy_reverse_small*/*' --by-seed          a glob; mean and spread over the seeds
  lab-report runs --output table.md                          Markdown by the ending; also .csv, .json and .txt
  lab-report runs/comparisons/mine_1a2b3c4d --html page.html one page with charts, that opens without a network

The best checkpoint of a run, and the best run, are those of the lowest validation loss; test scores are shown where lab-eval wrote them.
A folder that is no run, or a file that cannot be read, is a line of the table with the reason.
"""


def main(argv: Sequence[str] | None = None) -> int:
    return run("lab-report", lambda: _main(_parser().parse_args(argv)))


def _parser() -> Parser:
    parser = Parser(
        prog="lab-report", usage=USAGE, description="Compare runs in one table.", epilog=EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="a run, a folder of runs, a sweep (or a file of it), or a glob")
    parser.add_argument(
        "--by-seed", action="store_true", help="one line for all seeds of an experiment: mean and sample standard deviation"
    )
    parser.add_argument("--format", choices=["rich", "markdown", "csv", "json"], help="of the table; rich if nothing says otherwise")
    parser.add_argument("--output", metavar="FILE", type=Path, help="write the table there; the ending chooses the format")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write one self-contained page with tables and charts there")
    return parser


def _main(arguments: argparse.Namespace) -> None:
    with starting("lab-report"):
        from lab.analysis.render import FORMATS, render, show
        from lab.analysis.report import by_run, by_seed, rows
        from lab.config import ConfigError
        from lab.files import write_text
        from lab.training.run import RunError

    if arguments.html:
        _write_page(arguments)
        return
    form, output = arguments.format, arguments.output
    if output and not form:
        form = FORMATS.get(output.suffix)
        if form is None:
            raise ConfigError(
                f"--output {output}: the ending says no format; choose one of {', '.join(filter(None, FORMATS))}, or add --format"
            )
    found = rows(arguments.runs)
    if all(row.status == "no run" for row in found):
        raise RunError(f"{found[0].path}: {found[0].reason}")
    report = by_seed(found) if arguments.by_seed else by_run(found)
    if output:
        write_text(output, render(report, form))
        print(f"written to {output}")
    elif form in (None, "rich"):
        show(report)
    else:
        print(render(report, form), end="")


def _write_page(arguments: argparse.Namespace) -> None:
    from lab.analysis.page.document import page
    from lab.config import ConfigError
    from lab.files import write_text

    for option in ("by_seed", "format", "output"):
        if getattr(arguments, option):
            raise ConfigError(f"--html has all runs and the means over their seeds: leave out --{option.replace('_', '-')}")
    write_text(arguments.html, page(arguments.runs))
    print(f"written to {arguments.html}")


if __name__ == "__main__":
    raise SystemExit(main())
