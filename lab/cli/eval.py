"""lab-eval: the scores of a run or a checkpoint, by the config that it stored; or of public weights, on a task that is named."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.cli import Parser, check_target, holds_weights, run, starting

USAGE = "lab-eval RUN_OR_CHECKPOINT [KEY=VALUE ...] [--config FILE] [--trust PREFIX] [--json]"
EXAMPLES = """\
examples:
  lab-eval runs/copy_reverse_small/2026-11-21_10-00-00_1a2b3c4d              the test split, with the best checkpoint
  lab-eval runs/copy_reverse_small/2026-11-21_10-00-00_1a2b3c4d split=val checkpoint=last
  lab-eval path/to/best.ckpt 'task.eval_lengths=[1,2,4]'                     also at longer sequences
  lab-eval RUN --config experiments/copy_reverse_small.yaml                  an error where this file contradicts the run
  lab-eval RUN --trust mymodels                                              the run may call mymodels.* of the current folder
  lab-eval path/to/weights task=stdlib                                       public weights (config.json, model.safetensors)

Model, task and data are those of the run: a config is code, and only lab's own classes are called unless --trust names others.
Writes eval/<split>-<checkpoint>.json and metrics.json into the run, and prints the metrics.
A folder of public weights has no task: task=NAME or experiment=NAME, and keys such as task.seq_len=512, say what it is scored on.
"""


def main(argv: Sequence[str] | None = None) -> int:
    return run("lab-eval", lambda: _main(_parser().parse_intermixed_args(argv)))


def _parser() -> Parser:
    parser = Parser(
        prog="lab-eval", usage=USAGE, description="Evaluate a trained model.", epilog=EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("target", metavar="RUN_OR_CHECKPOINT", help="the folder of a run, a checkpoint file, or a folder of public weights")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="how to evaluate: split, checkpoint, task.eval_lengths"
    )
    parser.add_argument("--config", metavar="FILE", help="the experiment that the run should be of; an error where it is not")
    parser.add_argument("--trust", metavar="PREFIX", action="append", default=[], help="a module of yours that the run may call")
    parser.add_argument("--json", action="store_true", help="print all of metrics.json instead of a table")
    return parser


def _main(arguments: argparse.Namespace) -> None:

    public = holds_weights(arguments.target)
    if not public:
        check_target("lab-eval", arguments.target)
    with starting("lab-eval"):
        from lab.training import evaluate_pretrained, evaluate_run

    if public:
        result, file = evaluate_pretrained(arguments.target, arguments.overrides, arguments.config)
    else:
        result, file = evaluate_run(arguments.target, arguments.overrides, arguments.trust, arguments.config)
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        _print_table(result, file)


def _print_table(result: dict[str, Any], file: Path) -> None:
    """A column for each input length; what else was measured is in the file."""
    from rich.console import Console
    from rich.table import Table

    from lab.training import Run

    lengths = result["by_length"] or {"": result["metrics"]}
    weights = result["checkpoint"] if result["step"] is None else f"{result['checkpoint']} of step {result['step']}"
    table = Table(title=f"{result['model']} on {result['task']}, {result['split']} split, {weights}")
    table.add_column("metric")
    for length in lengths:
        table.add_column(f"length {length}".strip(), justify="right")
    for name in result["metrics"]:
        values = [scores[name] if isinstance(scores, dict) else None for scores in lengths.values()]
        table.add_row(name, *("-" if value is None else f"{value:.4f}" for value in values))
    for i, (name, value) in enumerate(result["references"].items()):
        if not i:
            table.add_section()
        table.add_row(f"{name} (no model)", *[f"{value:.4f}"] * len(lengths))
    for i, (name, entry) in enumerate(result.get("published", {}).items()):
        if not i:
            table.add_section()
        table.add_row(f"{name} (published)", f"{entry['value']:.4f}", *["-"] * (len(lengths) - 1))
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)
    for length, scores in lengths.items():
        if isinstance(scores, str):
            console.print(f"length {length}: {scores}")
    for name, entry in result.get("published", {}).items():
        console.print(f"published: {name}, {entry['source']}", soft_wrap=True, highlight=False)
    for name in ("distance", "pairs"):
        if scores := result.get(f"by_{name}"):
            pairs = ", ".join(f"{value}: {score:.4f}" for value, score in scores.items())
            console.print(f"accuracy by {name}: {pairs}", soft_wrap=True, highlight=False)
    if result["data"]:
        console.print("data: " + ", ".join(f"{name} {value}" for name, value in result["data"].items()), soft_wrap=True, highlight=False)
    console.print(f"written to {file}", soft_wrap=True)
    run = Run(file.parent.parent)
    status = run.job().get("status") if run.exists() else None
    if status not in (None, "done"):
        console.print(f"the run is not finished, it is {status}: these are the scores of what it had saved", soft_wrap=True)


if __name__ == "__main__":
    raise SystemExit(main())
