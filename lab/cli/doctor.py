"""lab-doctor: what will run on this machine, and why not the fast one; what is wrong with a model, and how its cost grows."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from lab.cli import Parser, run, starting

USAGE = """lab-doctor [ops.OP=BACKEND ...] [--import MODULE] [--format rich|json]
       lab-doctor --model NAME[,NAME ...] [model.KEY=VALUE ...] [--profile [--lengths N,N,...] [--output FOLDER]]"""
EXAMPLES = """\
examples:
  lab-doctor                                            the backend of each op, and the one command that would change it
  lab-doctor ops.selective_scan=torch                   with the words that a training gets
  lab-doctor ops.selective_scan=mykernels.FAST          a backend of yours, and why not if it cannot
  lab-doctor --import mymodels.leaky                    with the ops that a module of yours defines
  lab-doctor --model mamba                              whether a model does what every model must, made small
  lab-doctor --model mamba model.mixer.d_state=4        with options of its own
  lab-doctor --model mymodels.Leaky,s4d                 a mixer or model of yours, by its dotted path; several
  lab-doctor --profile --model mamba,transformer        how time and memory grow with the length
  lab-doctor --format json                              the same for programs

Each op computes a small example here; the difference is that to its plain formula. With --model the exit code is 1 if a check failed.
"""


def main(argv: Sequence[str] | None = None) -> int:
    return run("lab-doctor", lambda: _main(_parser().parse_intermixed_args(argv)))


def _parser() -> Parser:
    parser = Parser(
        prog="lab-doctor", usage=USAGE, description="Say what will run here, and why not the fast one.", epilog=EXAMPLES,
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="ops.OP=BACKEND, and of a model, as of lab-train")
    parser.add_argument("--model", metavar="NAMES", help="of configs/model, or dotted paths of yours, with commas: check them")
    parser.add_argument("--profile", action="store_true", help="measure the models of --model instead of checking them")
    parser.add_argument("--lengths", metavar="N,N,...", help="tokens at which --profile measures; 256,512,1024,2048,4096")
    parser.add_argument("--output", metavar="FOLDER", type=Path, help="of what --profile writes; runs/profile")
    parser.add_argument("--import", dest="modules", metavar="MODULE", action="append", default=[], help="a module of yours, for its ops")
    parser.add_argument("--format", choices=["rich", "json"], default="rich", help="of the output; rich if nothing says otherwise")
    return parser


def _main(arguments: argparse.Namespace) -> None:
    from lab.config import ConfigError

    words = [word for word in arguments.overrides if not word.startswith("ops.")]
    if arguments.profile and not arguments.model:
        raise ConfigError("--profile is of models: add --model NAME, such as --model mamba")
    if words and not arguments.model:
        key = words[0].partition("=")[0]
        takes = "it takes ops.OP=BACKEND, such as ops.selective_scan=torch; with --model NAME also model.KEY=VALUE"
        raise ConfigError(f"{key} is nothing that lab-doctor asks about; {takes}")
    for given, option in ((arguments.lengths, "--lengths"), (arguments.output, "--output")):
        if given and not arguments.profile:
            raise ConfigError(f"{option} belongs to --profile")
    lengths = _lengths(arguments.lengths or "256,512,1024,2048,4096")
    with starting("lab-doctor"):
        import lab.models  # noqa: F401  (it has an op of its own, decode)
        from lab.config.targets import locate

    for module in arguments.modules:
        locate(module)
    names = (arguments.model or "").split(",")
    if arguments.profile:
        _profile(names, words, arguments, lengths)
    elif arguments.model:
        _check(names, words, arguments)
    else:
        _force(arguments.overrides)
        from lab.analysis.doctor import diagnose

        found = diagnose()
        if arguments.format == "json":
            print(json.dumps(found, indent=1))
        else:
            _print(found)


def _lengths(text: str) -> list[int]:
    from lab.config import ConfigError

    numbers = text.split(",")
    if not all(number.isdecimal() and int(number) >= 2 for number in numbers):
        raise ConfigError(f"--lengths {text}: expected numbers of tokens from 2 on, with commas, such as 256,512,1024")
    return sorted({int(number) for number in numbers})


def _force(overrides: Sequence[str]) -> None:
    """The backends that the words force, for this process; after the modules that define ops were imported."""
    from lab import ops
    from lab.config import ConfigError, check
    from lab.config.targets import own_backend

    words = [word.partition("=") for word in overrides if word.startswith("ops.")]
    for key, _, backend in words:
        if not backend:
            raise ConfigError(f"{key}: the backend is missing, such as ops.selective_scan=torch")
    chosen = {key.removeprefix("ops."): backend for key, _, backend in words}
    check({"ops": chosen}, _words)
    ops.force({op: own_backend(op, name, None) if "." in name else name for op, name in chosen.items()})


def _check(names: Sequence[str], words: Sequence[str], arguments: argparse.Namespace) -> None:
    with starting("lab-doctor"):
        from lab.analysis.checkup import SMALL, checkup, outcome, table
        from lab.analysis.subjects import subjects
        from lab.training.run import RunError

    models = subjects(names, words, **SMALL)
    _force(arguments.overrides)
    found = []
    for model in models:
        with _saying() as say:
            found.append(checkup(model, say))
        if arguments.format == "rich":
            _console().print(table(found[-1]))
    if arguments.format == "json":
        print(json.dumps({"models": found}, indent=1))
    if wrong := [f"{one['name']}: {outcome(one)}" for one in found if one["failed"]]:
        raise RunError("; ".join(wrong))


def _profile(names: Sequence[str], words: Sequence[str], arguments: argparse.Namespace, lengths: Sequence[int]) -> None:
    with starting("lab-doctor"):
        from lab.analysis.profile import notes, profile, small, table
        from lab.analysis.profile_plot import growth
        from lab.analysis.subjects import subjects
        from lab.files import atomic, write_json

    models = subjects(names, words, **small(lengths))
    _force(arguments.overrides)
    with _saying() as say:
        found = profile(models, lengths, say=say)
    folder = arguments.output or Path("runs/profile")
    write_json(folder / "profile.json", found)
    figure = growth(found)
    for ending in ("png", "svg"):
        with atomic(folder / f"profile.{ending}") as file:
            figure.savefig(file, format=ending, dpi=150)
    if arguments.format == "json":
        print(json.dumps(found, indent=1))
        return
    _console().print(table(found))
    for line in (*notes(found), f"written to {folder}: profile.json, profile.png, profile.svg"):
        print(line)


@contextmanager
def _saying() -> Iterator[Callable[[str], None]]:
    """What is done at the moment, on a terminal alone, and gone afterwards."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("") if console.is_terminal else nullcontext() as status:
        yield (lambda what: None) if status is None else status.update


def _console() -> Any:
    from rich.console import Console

    return Console(width=min(shutil.get_terminal_size().columns, 120) if sys.stdout.isatty() else 100, highlight=False)


def _words(ops: Mapping[str, str]) -> None:
    """The root of what a config may say here."""


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(width=min(shutil.get_terminal_size().columns, 120) if sys.stdout.isatty() else 80, highlight=False)
    console.print(_ops(found))
    for line in _reasons(found):
        console.print(line, soft_wrap=False, markup=False)
    console.print(_facts(found))
    what, command = found["change"]
    console.print(f"{what}.", markup=False)
    if command:
        console.print(f"To change it:\n  {command}", markup=False, soft_wrap=True)


def _ops(found: dict[str, Any]) -> Any:
    from rich.table import Table

    caption = "off by: the difference to the plain formula, of the largest value"
    if any(found["devices"].values()):
        caption += "; in brackets: were the device here"
    table = Table(title="What will run here", caption=caption)
    for column in ("op", "its backends, best first", *found["devices"], "off by"):
        table.add_column(column)
    for op, devices in found["ops"].items():
        runs = {name: devices[name]["runs"] or "nothing" for name in found["devices"]}
        cells = [runs[name] if absent is None else f"({runs[name]})" for name, absent in found["devices"].items()]
        differences = [entry["difference"] for entry in devices.values() if entry["difference"] is not None]
        texts = [value if isinstance(value, str) else f"{value:.0g}" for value in differences]
        forms = devices["cpu"]["forms"]
        table.add_row(f"{op} ({', '.join(forms)})" if forms else op, ", ".join(devices["cpu"]["backends"]), *cells, "; ".join(texts))
    return table


def _reasons(found: dict[str, Any]) -> list[str]:
    """Why not another one, each reason once, with the ops that it concerns; what merely comes later goes without saying."""
    lines = [f"{device}: {absent}" for device, absent in found["devices"].items() if absent is not None]
    concerned: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for op, devices in found["ops"].items():
        for device, entry in devices.items():
            if found["devices"][device] is None:
                for backend, reason in entry["why_not"].items():
                    if not reason.endswith("comes first"):
                        concerned[backend, device, reason].append(op)
    for (backend, device, reason), names in concerned.items():
        lines.append(f"{backend} on {device}: {reason} ({', '.join(names)})")
    return lines


def _facts(found: dict[str, Any]) -> Any:
    from rich.table import Table

    kernels, environment = found["kernels"], found["environment"]
    cuda = kernels["cuda"]
    table = Table(show_header=False, box=None, padding=(0, 1))
    table.add_column()
    table.add_column(overflow="fold")
    loaded = f"{kernels['loaded']} ({kernels['compiler']}, {kernels['threads']})" if kernels["loaded"] else "none"
    pools = [f"{Path(file).name}{' of torch' if '/torch/' in file else ''}" for file in environment["openmp"]]
    shared = "torch and the kernels share its threads" if len(pools) == 1 else "a pool of threads each" if pools else "not in this process"
    asking = any("triton" in entry["backends"] for devices in found["ops"].values() for entry in devices.values())
    for name, value in (
        ("kernels", loaded),
        ("  built", f"{', '.join(kernels['built']) or 'none'}; this processor has {kernels['processor']}"),
        ("compiler here", kernels["compiler_here"] or "none that runs"),
        ("CUDA kernels", f"{cuda['loaded']} ({cuda['compiler']})" if cuda["loaded"] else cuda["why_not"].partition(" are ")[2]),
        ("lab", f"{environment['lab']}, {environment['code']}"),
        ("torch", environment["torch"] + (f", CUDA {environment['cuda_of_torch']}" if environment["cuda_of_torch"] else "")),
        ("triton", f"{environment['triton'] or 'not installed'}{'' if asking else '; no op has a backend for it'}"),
        ("python", f"{environment['python']}, {environment['platform']}"),
        ("OpenMP", ": ".join([*filter(None, [", ".join(pools)]), shared])),
        ("threads", f"{environment['threads']} of {environment['cores']} cores"),
        ("allocator", environment["allocator"]),
        ("variables", ", ".join(f"{name}={value}" for name, value in environment["variables"].items()) or "none that matters is set"),
        ("forced", ", ".join(f"ops.{op}={backend}" for op, backend in found["forced"].items()) or "no op"),
    ):
        table.add_row(name, value)
    return table


if __name__ == "__main__":
    raise SystemExit(main())
