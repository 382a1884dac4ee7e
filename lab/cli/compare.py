"""lab-compare: several models on one experiment, over seeds, and whether what was expected of them holds."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lab.cli import Parser, run, starting

USAGE = (
    "lab-compare FILE|experiment=NAME [FILE ...] [models=A,B] [seeds=N] [pairs=A] [KEY=VALUE ...] [--check] [--format rich|markdown]"
    "   or   lab-compare --show FOLDER [--format rich|markdown]"
)
EXAMPLES = """\
examples:
  lab-compare experiment=copy_reverse_small models=lot,mamba seeds=8
                                                                  two models of configs/model on any experiment, with eight seeds
  lab-compare experiments/repro/induction_heads.yaml              what its file says; the same command again does what is left
  lab-compare experiment=repro/induction_heads                    the same by its name
  lab-compare experiment=stdlib_mamba models=lot,mamba,transformer pairs=transformer seeds=8
                                                                  each other one with the Transformer; without it, all with each other
  lab-compare experiments/all_models/*.yaml                       two comparisons, one after the other
  lab-compare FILE n_jobs=2 threads=1                             two runs at a time, each with one thread
  lab-compare FILE models=mamba,s4d seeds=1,2 trainer.max_steps=100
                                                                  some of its models, these seeds, another value for all of them
  lab-compare FILE seeds=5                                        five seeds, 1 to 5; seeds=[5] is the seed 5
  lab-compare --show runs/comparisons/induction_heads_1a2b3c4d    the tables, of what is there by now

A word for all models is refused where the file has one for a model on the same key, which would win.
Each run is a fresh lab-train, then lab-eval on the test split, of the checkpoint that validation chose. A run that fails is a row of the
table, and the command then exits with 1. An expectation that does not hold is a result: with --check it makes the command exit with 1.
"""


def main(argv: Sequence[str] | None = None) -> int:
    return run("lab-compare", lambda: _main(_parser().parse_intermixed_args(argv)))


def _parser() -> Parser:
    parser = Parser(
        prog="lab-compare", usage=USAGE, description="Compare models over seeds.", epilog=EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("words", nargs="*", metavar="FILE, KEY=VALUE", help="a comparison; lab-compare's words, and lab-train's")
    parser.add_argument("--show", metavar="FOLDER", help="print what a comparison has given, and run nothing")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless every expectation holds")
    parser.add_argument("--format", choices=["rich", "markdown"], default="rich", help="of the tables; rich if nothing says otherwise")
    return parser


def _main(arguments: argparse.Namespace) -> None:
    with starting("lab-compare"):
        from lab.analysis.comparison import OTHER_DATA, load
        from lab.config import ConfigError
        from lab.training.run import RunError

    if arguments.show is not None:
        if arguments.words:
            raise ConfigError(f"--show runs nothing: leave out {arguments.words[0]}")
        found = load(arguments.show)
        _print(found, arguments.format)
        _check([found] if arguments.check else [])
        return
    with starting("lab-compare"):
        from lab.sweeps.comparison import compare
        from lab.sweeps.comparison_words import read_all

        comparisons = read_all(arguments.words)
    for comparison in comparisons:
        if comparison.too_few:
            print(f"lab-compare: {comparison.name}: {comparison.too_few}", file=sys.stderr)
    written: list[Mapping[str, Any]] = []
    failed = runs = 0
    for comparison in comparisons:
        found, folder, not_done = compare(comparison)
        _print(found, arguments.format)
        print(f"written to {folder}: comparison.json, page.html; lab-compare --show {folder} shows the tables again")
        written, failed, runs = [*written, found], failed + not_done, runs + len(found["runs"])
    if failed:
        raise RunError(f"{failed} of {runs} runs are not done; the same command goes on with them")
    if apart := sum(run["status"] == OTHER_DATA for found in written for run in found["runs"]):
        raise RunError(f"{apart} of {runs} runs do not count: their data are not those of the newest; fresh=true runs all of them again")
    _check(written if arguments.check else [])


def _print(found: Mapping[str, Any], form: Literal["rich", "markdown"]) -> None:
    from lab.analysis.comparison import tables
    from lab.analysis.render import render, show

    for report in tables(found):
        if form == "rich":
            show(report)
        else:
            print(render(report, form))


def _check(comparisons: Sequence[Mapping[str, Any]]) -> None:
    """RunError unless all that was expected holds."""
    from lab.analysis.comparison import unmet
    from lab.training.run import RunError

    expected = sum(len(found["expectations"]) for found in comparisons)
    if missed := [text for found in comparisons for text in unmet(found)]:
        raise RunError(f"{len(missed)} of {expected} expectations did not hold: {'; '.join(missed)}")


if __name__ == "__main__":
    raise SystemExit(main())
