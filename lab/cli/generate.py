"""lab-generate: what a trained model goes on with, printed as it comes; of several prompts, when all are done."""

from __future__ import annotations

import argparse
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.cli import Parser, check_target, holds_weights, run, starting

if TYPE_CHECKING:
    from lab.models import SequenceModel
    from lab.tasks import Task
    from lab.tasks.tokens import FolderTokens

USAGE = "lab-generate RUN_OR_CHECKPOINT [checkpoint=best|last] --prompt TEXT [options]"
LONGEST = 256  # new tokens where --max-new-tokens is not given
EXAMPLES = """\
examples:
  lab-generate runs/mine --prompt "5 9 3 2"                           a task of tokens: prompt and answer are token ids
  lab-generate runs/text --prompt $'def main():\\n' --temperature 0.8 --top-p 0.95 --seed 1
  lab-generate runs/text --prompt-file start.txt --stop-token 10      a text ends at its first newline, if its tokens are bytes
  lab-generate runs/mine --prompt "5 9 3 2" --prompt "7 2"            two prompts at once, their answers when both are done
  lab-generate runs/mine checkpoint=last --prompt "5 9 3 2"           the last checkpoint in place of the best one
  lab-generate runs/mine --beams 4 --prompt "5 9 3 2"                 beam search: of the four best answers the first
  lab-generate path/to/weights --prompt "Once upon a time"            public weights (config.json, model.safetensors, tokenizer.json)

Only what is new is printed, not the prompt. Without --temperature each token is the most probable one (greedy).
Of an encoder-decoder the prompt is the source, and what is printed its answer.
"""


def main(argv: Sequence[str] | None = None) -> int:
    return run("lab-generate", lambda: _main(_parser().parse_intermixed_args(argv)))


def _parser() -> Parser:
    parser = Parser(
        prog="lab-generate", usage=USAGE, description="Continue prompts with a trained model.", epilog=EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("target", metavar="RUN_OR_CHECKPOINT", help="the folder of a run, a checkpoint file, or a folder of public weights")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="checkpoint=best or checkpoint=last")
    parser.add_argument("--prompt", metavar="TEXT", action="append", default=[], help="what to go on from; may be given several times")
    parser.add_argument("--prompt-file", metavar="FILE", action="append", default=[], help="a file that is a prompt; - is standard input")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, help=f"default {LONGEST}, or what the model has room for")
    parser.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0: greedy (default); 1: as the model was trained")
    parser.add_argument("--top-k", metavar="K", type=int, help="sample from the K most probable tokens")
    parser.add_argument("--top-p", metavar="P", type=float, help="sample from the fewest tokens with probability P together")
    parser.add_argument("--beams", metavar="N", type=int, default=1, help="beam search of this width; 1: greedy (default)")
    parser.add_argument("--length-penalty", metavar="A", type=float, default=0.0, help="of beams: log-probability / tokens^A (default 0)")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="of the sampling: the same seed, the same text (default 0)")
    parser.add_argument("--stop-token", metavar="ID", type=int, help="the token id at which a text ends; default: that of public weights")
    parser.add_argument("--trust", metavar="PREFIX", action="append", default=[], help="a module of yours that the run may call")
    return parser


def _main(arguments: argparse.Namespace) -> None:
    from lab.config import ConfigError

    public = holds_weights(arguments.target)
    if not public:
        check_target("lab-generate", arguments.target)
    checkpoint = None
    for word in arguments.overrides:
        key, _, checkpoint = word.partition("=")
        if public:
            raise ConfigError(f"{word}: {arguments.target} holds public weights, of which nothing can be chosen")
        if key != "checkpoint" or checkpoint not in ("best", "last"):
            raise ConfigError(f"{word}: of a run, only checkpoint=best or checkpoint=last can be chosen; what is sampled, by --options")
    if not arguments.temperature and (arguments.top_k is not None or arguments.top_p is not None):
        raise ConfigError("--top-k and --top-p choose among tokens that are sampled: they need a --temperature above 0")
    if arguments.beams < 1:
        raise ConfigError(f"--beams must be at least 1, got {arguments.beams}")
    if arguments.beams > 1 and arguments.temperature:
        raise ConfigError("--beams searches and --temperature samples: choose one")
    if arguments.length_penalty and arguments.beams == 1:
        raise ConfigError("--length-penalty is of a beam search: it needs --beams above 1")
    if not 0 <= arguments.seed < 2**64:
        raise ConfigError(f"--seed must lie in 0 to 2^64 - 1, got {arguments.seed}")
    texts = [*arguments.prompt, *map(_read, arguments.prompt_file)]
    if not texts:
        raise ConfigError("there is no prompt: --prompt TEXT or --prompt-file FILE")
    with starting("lab-generate"):
        from lab import load
        from lab.models.pretrained import load_pretrained, vocabulary
        from lab.tasks.tokens import FolderTokens

    model: SequenceModel
    task: Task | FolderTokens
    if public:
        model = stack = load_pretrained(arguments.target)
        task = FolderTokens(arguments.target, vocabulary(stack))
        if task.why_ids is not None:
            print(f"lab-generate: prompt and answer are token ids: {task.why_ids}", file=sys.stderr)
        if arguments.stop_token is None:
            arguments.stop_token = task.stop_token
    else:
        model, task, _ = load(arguments.target, checkpoint, arguments.trust)
    if model.n_classes is not None:
        raise ConfigError(f"{arguments.target}: its model is a classifier, which answers once for a whole input; lab-eval scores it")
    if not model.causal:
        raise ConfigError(f"{arguments.target}: its model reads the future, so it cannot go on from a prompt")
    prompts = [_tokens(text, task, model) for text in texts]
    if arguments.stop_token is not None and not 0 <= arguments.stop_token < task.vocab_size:
        raise ConfigError(f"--stop-token {arguments.stop_token}: the tokens of {_name(task)} are 0 to {task.vocab_size - 1}")
    try:
        new = _continue(model, prompts, getattr(task, "start_token", None), arguments)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if len(prompts) == 1:
        _print((row[0] for row in new), task, prompts[0] if public else ())
        return
    rows = [[token for token in row if token is not None] for row in zip(*new, strict=True)] or [[] for _ in prompts]
    for number, (text, prompt, row) in enumerate(zip(texts, prompts, rows, strict=True), 1):
        line = " ".join(text.split())
        _write(f"--- {number}: {line if len(line) <= 60 else f'...{line[-57:]}'}\n")
        _print(iter(row), task, prompt if public else ())


def _read(name: str) -> str:
    """A prompt file as text whose bytes come back as they were; `-` is standard input."""
    content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    return content.decode("utf-8", "surrogateescape")


def _name(task: Task | FolderTokens) -> str:
    return str(getattr(task, "folder", type(task).__name__))


def _tokens(text: str, task: Task | FolderTokens, model: SequenceModel) -> list[int]:
    from lab.config import ConfigError

    if task.text:
        tokens = task.encode(text)
    else:
        try:
            tokens = [int(word) for word in text.replace(",", " ").split()]
        except ValueError:
            raise ConfigError(f"the prompt {text!r} must be token ids, such as '5 6 7 2': {_name(task)} has no text") from None
    if not tokens:
        raise ConfigError("the prompt is empty: a model goes on from at least one token")
    wrong = [token for token in tokens if not 0 <= token < task.vocab_size]
    if wrong:
        raise ConfigError(f"the prompt has the token {wrong[0]}; those of {_name(task)} are 0 to {task.vocab_size - 1}")
    return tokens


def _continue(
    model: SequenceModel, prompts: list[list[int]], start_token: int | None, arguments: argparse.Namespace
) -> Iterator[list[int | None]]:
    """For each step the new token of each prompt, None after it has stopped. ValueError, at the call, for what cannot be. start_token:
    the prompts are sources, and their answers begin with it."""
    import torch

    from lab.models import beam_search

    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    given: dict[str, Any] = {}
    if start_token is not None:
        given = {"source": tokens, "source_lengths": lengths}
        tokens, lengths = torch.full((len(prompts), 1), start_token), torch.ones_like(lengths)
    n = arguments.max_new_tokens
    if model.max_len is not None:
        room = model.max_len - int(lengths.max()) + 1  # the last new token is never fed back
        if room < max(1 if n is None else n, 0):
            raise ValueError(
                f"the model was built with max_len {model.max_len}: after a prompt of {int(lengths.max())} tokens it has room for "
                f"{max(room, 0)} new ones{'' if n is None else f', --max-new-tokens is {n}'}"
            )
    if n is None:
        n = LONGEST if model.max_len is None else min(LONGEST, room)
    given |= {"lengths": lengths if len(prompts) > 1 else None}
    if arguments.beams > 1:
        found = beam_search(
            model,
            tokens,
            n,
            arguments.beams,
            length_penalty=arguments.length_penalty,
            stop_token=arguments.stop_token,
            pad_token=-1,
            **given,
        )
        return ([token if token >= 0 else None for token in step.tolist()] for step in found.tokens[:, 0].unbind(1))
    steps = model.stream(
        tokens, n, temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p, stop_token=arguments.stop_token,
        pad_token=-1, generator=torch.Generator().manual_seed(arguments.seed), **given,
    )  # fmt: skip
    return ([token if token >= 0 else None for token in step.tolist()] for step in steps)


def _print(tokens: Iterator[int | None], task: Task | FolderTokens, before: Sequence[int] = ()) -> None:
    """Each token as it comes: ids with spaces between them, or text, whose last tokens are held back while they may be the beginning of a
    character. before: tokens of a text that ends there; some tokenizers leave out the space of a first word, so none is decoded as that."""
    held: list[int] = []

    def spelled(held: list[int]) -> str:
        return task.decode([*before, *held])[len(task.decode(before)) :]

    for number, token in enumerate(tokens):
        assert token is not None
        if not task.text:
            _write(f" {token}" if number else str(token))
            continue
        held.append(token)
        text, n = spelled(held), 0
        if text.endswith("\ufffd"):  # of UTF-8, at most three bytes begin a character; the bytes before them are settled
            n = next((n for n in (3, 2, 1) if task.decode(held[-n:]) == "\ufffd"), len(held))
            text = text[:-1] if n < len(held) else ""
        settled = max(0, len(held) - n)
        if text:
            _write(text)
            before = held[:settled]
        if settled:
            held = held[settled:]
    _write((spelled(held) if held else "") + "\n")


def _write(text: str) -> None:
    if sys.stdout.isatty():  # what a model invents must not move the cursor or worse: ESC is shown as \x1b
        text = "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else c.encode("unicode_escape").decode() for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))  # a terminal that is not UTF-8 shows ? for what it lacks
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
