"""lab-doctor: what will run on this machine, and why not the fast one."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.cli import Parser, run, starting

USAGE = "lab-doctor [ops.OP=BACKEND ...] [--import MODULE] [--format rich|json]"
EXAMPLES = """\
examples:
  lab-doctor                                            the backend of each op, and the one command that would change it
  lab-doctor ops.selective_scan=torch                   with the words that a training gets
  lab-doctor ops.selective_scan=mykernels.FAST          a backend of yours, and why not if it cannot
  lab-doctor --import mymodels.leaky                    with the ops that a module of yours defines
  lab-doctor --format json                              the same for programs

Each op computes a small example here; the difference is that to its plain formula.
"""


def main(argv: Sequence[str] | None = None) -> int:
    return run("lab-doctor", lambda: _main(_parser().parse_intermixed_args(argv)))


def _parser() -> Parser:
    parser = Parser(
        prog="lab-doctor", usage=USAGE, description="Say what will run here, and why not the fast one.", epilog=EXAMPLES,
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", default=[], metavar="ops.OP=BACKEND", help="as of lab-train")
    parser.add_argument("--import", dest="modules", metavar="MODULE", action="append", default=[], help="a module of yours, for its ops")
    parser.add_argument("--format", choices=["rich", "json"], default="rich", help="of the output; rich if nothing says otherwise")
    return parser


def _main(arguments: argparse.Namespace) -> None:
    from lab.config import ConfigError, check

    words = [word.partition("=") for word in arguments.overrides]
    for key, _, backend in words:
        if not key.startswith("ops.") or not backend:
            raise ConfigError(f"{key} is nothing that lab-doctor asks about; it takes ops.OP=BACKEND, such as ops.selective_scan=torch")
    with starting("lab-doctor"):
        from lab import ops
        from lab.analysis.doctor import diagnose
        from lab.config.targets import locate, own_backend

    for module in arguments.modules:
        locate(module)
    chosen = {key.removeprefix("ops."): backend for key, _, backend in words}
    check({"ops": chosen}, _words)
    ops.force({op: own_backend(op, name, None) if "." in name else name for op, name in chosen.items()})
    found = diagnose()
    if arguments.format == "json":
        print(json.dumps(found, indent=1))
    else:
        _print(found)


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
