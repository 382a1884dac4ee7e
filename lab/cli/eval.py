"""lab-eval: the scores of a run or a checkpoint, by the config that it stored."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from lab.cli import Parser, run

USAGE = "lab-eval RUN_OR_CHECKPOINT [KEY=VALUE ...] [--config FILE] [--trust PREFIX]"
EXAMPLES = """\
examples:
  lab-eval runs/copy_reverse_small/2026-11-21_10-00-00_1a2b3c4d              the test split, with the best checkpoint
  lab-eval runs/copy_reverse_small/2026-11-21_10-00-00_1a2b3c4d split=val checkpoint=last
  lab-eval path/to/best.ckpt 'task.eval_lengths=[1,2,4]'                     also at longer sequences
  lab-eval RUN --config experiments/copy_reverse_small.yaml                  an error where this file contradicts the run
  lab-eval RUN --trust mymodels                                              the run may call mymodels.* of the current folder

Model, task and data are those of the run: a config is code, and only lab's own classes are called unless --trust names others.
Writes eval/<split>-<checkpoint>.json and metrics.json into the run, and prints them.
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    return run(parser.prog, lambda: _main(arguments))


def _parser() -> Parser:
    parser = Parser(
        prog="lab-eval", usage=USAGE, description="Evaluate a trained model.", epilog=EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("target", metavar="RUN_OR_CHECKPOINT", help="the folder of a run, or a checkpoint file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="how to evaluate: split, checkpoint, task.eval_lengths, ...")
    parser.add_argument("--config", metavar="FILE", help="the experiment that the run should be of; an error where it is not")
    parser.add_argument("--trust", metavar="PREFIX", action="append", default=[], help="a module of yours that the run may call")
    return parser


def _main(arguments: argparse.Namespace) -> None:
    from lab.config import ConfigError

    if "=" in arguments.target:
        raise ConfigError(f"{arguments.target}: the run or checkpoint comes first: lab-eval RUN_OR_CHECKPOINT {arguments.target}")
    from lab.training import evaluate_run

    print(json.dumps(evaluate_run(arguments.target, arguments.overrides, arguments.trust, arguments.config), indent=1))


if __name__ == "__main__":
    raise SystemExit(main())
