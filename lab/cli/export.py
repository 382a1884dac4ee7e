"""lab-export: a run or a checkpoint as ONNX, TorchScript or torch.export files, verified."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.cli import Parser, check_target, run, starting

USAGE = "lab-export RUN_OR_CHECKPOINT [checkpoint=last] [--format FORMAT] [--output PATH] [--config FILE] [--trust PREFIX]"
EXAMPLES = """\
examples:
  lab-export runs/mine                                        exports/best.onnx in the run, its prefill and step graphs and a manifest
  lab-export runs/mine checkpoint=last --format torchscript   exports/last.ts.pt ...
  lab-export path/to/best.ckpt --output model.pt2             the format by the name
  lab-export runs/mine --onnx model.onnx                      short for --format onnx --output model.onnx
  lab-export runs/mine --config experiments/mine.yaml         an error where this file contradicts the run

Each file is loaded again in a process without lab and compared with the model at several batches and lengths. Where one differs by more
than the tolerance, the command fails with the figure and leaves nothing behind.
"""


def main(argv: Sequence[str] | None = None) -> int:
    return run("lab-export", lambda: _main(_parser().parse_intermixed_args(argv)))


def _parser() -> Parser:
    parser = Parser(
        prog="lab-export", usage=USAGE, description="Export a trained model.", epilog=EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("target", metavar="RUN_OR_CHECKPOINT", help="the folder of a run, or a checkpoint file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="checkpoint=", help="best or last, of a run; best if not given")
    parser.add_argument("--format", metavar="FORMAT", help="onnx, torchscript or pt2; by the name of the output, or onnx")
    parser.add_argument("--output", metavar="PATH", help="the file of the sequence graph, or a folder; exports/ of the run if not given")
    parser.add_argument("--onnx", metavar="FILE", help="short for --format onnx --output FILE")
    parser.add_argument("--config", metavar="FILE", help="the experiment that the run should be of; an error where it is not")
    parser.add_argument("--trust", metavar="PREFIX", action="append", default=[], help="a module of yours that the run may call")
    return parser


def _main(arguments: argparse.Namespace) -> None:
    from lab.config import ConfigError

    check_target("lab-export", arguments.target)
    if arguments.onnx is not None:
        if arguments.format not in (None, "onnx") or arguments.output is not None:
            raise ConfigError("--onnx FILE is short for --format onnx --output FILE; leave out --format and --output")
        arguments.format, arguments.output = "onnx", arguments.onnx
    checkpoint = None
    for word in arguments.overrides:
        key, _, checkpoint = word.partition("=")
        if key != "checkpoint":
            raise ConfigError(f"{key} cannot change in lab-export, the run's own config decides; allowed is checkpoint")
        if checkpoint not in ("best", "last"):
            raise ConfigError(f"checkpoint must be one of best, last, got {checkpoint!r}")
    with starting("lab-export"):
        from lab.export import export_run

    manifest, file = export_run(arguments.target, arguments.format, arguments.output, checkpoint, arguments.trust, arguments.config)
    _print_table(manifest, file)


def _print_table(manifest: dict[str, Any], file: Path) -> None:
    cases = manifest["verification"]["cases"]
    for graph in manifest["graphs"]:
        found = [case["largest_difference"] for case in cases if case["graph"] == graph["name"]]
        said = f"largest difference {max(found):.2g}" if found else "compared by what the decoder and the step make of its state"
        print(f"{file.with_name(graph['file'])}: the {graph['name']} graph, {said}")
    print(f"{file}: the manifest")


if __name__ == "__main__":
    raise SystemExit(main())
