"""lab-train: compose a config, check it, train."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

from lab.cli import Parser, check_target, run, starting

USAGE = "lab-train [KEY=VALUE ...] [--config FILE] [options]"
EXAMPLES = """\
examples:
  lab-train experiment=copy_reverse_small                     an experiment of experiments/
  lab-train --config experiments/copy_reverse_small.yaml      the same by its file, which may lie anywhere
  lab-train experiment=copy_reverse_small optimizer.lr=1e-3   with another value
  lab-train experiment=copy_reverse_small model=transformer   with another option of a group (a folder of configs/)
  lab-train model=transformer mixer@model.mixer=lattice ...   with another option inside of a node
  lab-train 'task.eval_lengths=[1,2]' "run_dir='runs/my run'" lists and texts with special characters, quoted for the shell
  lab-train ... run_dir=PATH                                  names the folder; the same command again resumes what it holds
  lab-train resume=RUN trainer.max_steps=4000                 goes on by the config that the run stored

  lab-train -m experiment=copy_reverse_small model=lot,transformer seed=1,2,3 hydra.launcher.n_jobs=2
                                                              a sweep, two jobs at a time; the same command again does what is left

seeing before believing:
  lab-train experiment=copy_reverse_small --cfg job           the config that this would train with
  lab-train experiment=copy_reverse_small --explain model.d_model
"""


def main(argv: Sequence[str] | None = None) -> int:
    return run("lab-train", lambda: _main(_parser().parse_intermixed_args(argv)))


def _parser() -> Parser:
    parser = Parser(
        prog="lab-train", usage=USAGE, description="Train a model on a task, as a config says.", epilog=EXAMPLES + _options(),
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="a value, or an option of a group: optimizer.lr=1e-3 model=lot")
    parser.add_argument("--config", metavar="FILE", help="an experiment given by its YAML file")
    parser.add_argument("--cfg", choices=["job"], help="print the resolved config and exit")
    parser.add_argument("--package", "-p", metavar="KEY", help="with --cfg: only this node")
    parser.add_argument("--explain", metavar="KEY", help="print each file and word that sets this key, and exit")
    parser.add_argument("--trust", metavar="PREFIX", action="append", default=[], help="with resume=: a module that the run may call")
    parser.add_argument("--multirun", "-m", action="store_true", help="a sweep: a job for each combination of the values given")
    parser.add_argument("--hydra-help", action="store_true", help="Hydra's own help: its grammar, its flags")
    return parser


def _options() -> str:
    """What there is to choose from, in lab and in the current folder."""
    from lab.config.files import options

    groups = {group: ", ".join(sorted(found)) for group, found in options().items()}
    lines = [textwrap.fill(f"{group:14}{names}", 140, initial_indent="  ", subsequent_indent=" " * 16) for group, names in groups.items()]
    return "\n".join(["\nto choose from:", *lines])


def _main(arguments: argparse.Namespace) -> None:
    from lab.config import ConfigError, check, compose, explain
    from lab.config.overrides import parse

    words = [f"--config={arguments.config}"] if arguments.config else []
    words += arguments.overrides
    if arguments.hydra_help:
        _hydra_help()
        return
    if arguments.multirun:
        _sweep(words, arguments)
        return
    if arguments.package and not arguments.cfg:
        raise ConfigError("--package belongs to --cfg job")
    resumed = [word for word in arguments.overrides if word.lstrip("+").startswith("resume=")]
    runs = [parse(word).value() for word in resumed]
    if any(runs) and (arguments.cfg or arguments.explain):
        raise ConfigError(f"resume={runs[0]} goes on by the config that the run stored; read it in {Path(str(runs[0]), 'config.yaml')}")
    if arguments.explain:
        print(explain(arguments.explain, words))
        return
    if arguments.cfg:
        _print_config(words, arguments.package)
        return
    if any(runs):
        if len(runs) > 1 or arguments.config:
            raise ConfigError("resume=RUN goes on by the config that the run stored; leave out --config and a second resume=")
        check_target("lab-train", str(runs[0]))
        with starting("lab-train"):
            from lab.training import resume

        resume(str(runs[0]), [word for word in arguments.overrides if word not in resumed], arguments.trust)
        return
    if arguments.trust:
        raise ConfigError("--trust belongs to resume=RUN; a config that you give here may call anything")
    with starting("lab-train"):
        composed = compose(words)
        check(composed)
        from lab.training import train

    train(composed)


def _sweep(words: list[str], arguments: argparse.Namespace) -> None:
    from lab.config import ConfigError

    single = {"--cfg job": arguments.cfg, "--explain": arguments.explain, "--package": arguments.package}
    for option in (option for option, value in single.items() if value):
        raise ConfigError(f"{option} shows one config: leave out -m, and give each key one value")
    if arguments.trust:
        raise ConfigError("--trust belongs to resume=RUN; a config that you give here may call anything")
    with starting("lab-train"):
        from lab.sweeps import sweep

    sweep(words)


def _print_config(words: list[str], package: str | None) -> None:
    from omegaconf import OmegaConf

    from lab.config import ConfigError, compose
    from lab.config.errors import hint
    from lab.config.tree import dotted, lookup, places

    config = compose(words).config
    found = lookup(config, tuple(package.split("."))) if package else (config,)
    if found is None:
        raise ConfigError(f"--package {package}: there is no such key{hint(str(package), (dotted(key) for key, _ in places(config)))}")
    print(OmegaConf.to_yaml(OmegaConf.create({"value": found[0]}).value) if isinstance(found[0], dict | list) else found[0])


def _hydra_help() -> None:
    from hydra import initialize_config_dir
    from hydra._internal.utils import get_args_parser
    from hydra.core.global_hydra import GlobalHydra

    from lab.config import files

    parser = get_args_parser()
    print("lab-train composes its config with Hydra and takes its overrides; of these flags it takes --cfg job and --package.\n")
    with initialize_config_dir(str(files.home() / "configs"), job_name="lab", version_base="1.3"):
        main = GlobalHydra.instance().hydra
        assert main is not None
        main.hydra_help(config_name=None, args_parser=parser, args=parser.parse_args([]))


if __name__ == "__main__":
    raise SystemExit(main())
