"""The commands. One thin file each; what they share is how a command ends."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

USAGE = 2  # the exit code of a mistake in the command or its config; 1 is a failed run, 128 + n a signal


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, with the nearest option."""

    def error(self, message: str) -> NoReturn:
        from lab.config.errors import nearest

        unknown = message.removeprefix("unrecognized arguments: ").split(" ")[0].partition("=")[0]
        near = nearest(unknown, (option for action in self._actions for option in action.option_strings))
        hint = f"; did you mean {near}?" if near else ""
        print(f"{self.prog}: {message}{hint} ({self.prog} --help shows the usage)", file=sys.stderr)
        raise SystemExit(USAGE)


def run(command: str, body: Callable[[], None]) -> int:
    """The exit code of a command. What the user can mend, or a run that says why it failed, is one line on stderr; a bug is a traceback.

    `body` is all that the command does, reading its words included: the imports take a second, and Ctrl-C may come in it.
    """
    try:
        return _run(command, body)
    except KeyboardInterrupt:
        return _say(command, "interrupted", 130)


@contextmanager
def starting(command: str) -> Iterator[None]:
    """For imports, before anything is done: Ctrl-C ends the process at once. Raised inside of numpy or torch it may be swallowed."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # neither ignored nor someone else's
        signal.signal(signal.SIGINT, lambda *_: os._exit(_say(command, "interrupted", 130)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def check_target(command: str, target: str) -> None:
    """Whether a run or checkpoint is there at all, before the seconds that importing torch takes."""
    from lab.config import ConfigError
    from lab.training.run import Run

    if "=" in target and not Path(target).exists():
        raise ConfigError(f"{target}: the run or checkpoint comes first: {command} RUN_OR_CHECKPOINT {target}")
    if not Path(target).is_file():
        Run.open(target)


def holds_weights(target: str) -> bool:
    """Whether it is a folder of public weights, which `load_pretrained` reads."""
    return (Path(target) / "config.json").is_file()


def _run(command: str, body: Callable[[], None]) -> int:
    with starting(command):
        from lab.config import ConfigError
        from lab.training.run import RunError

    try:
        body()
        sys.stdout.flush()
    except ConfigError as error:
        return _say(command, error, USAGE)
    except RunError as error:
        return _say(command, error, error.exit_code)
    except BrokenPipeError:  # `lab-compare FILE | head`: nobody reads on; whether all would have gone well is not known
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None:
            raise
        return _say(command, f"{error.filename}: {error.strerror}", 1)
    return 0


def _say(command: str, message: object, code: int) -> int:
    print(f"{command}: {message}", file=sys.stderr)
    return code
