"""What the tokens of public weights stand for: text by the folder's tokenizer.json, or ids where that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.config.errors import ConfigError


class FolderTokens:
    """As much of a `Task` as generation asks for. why_ids: why tokens are ids, in one sentence; None: they are text.

    stop_token: where a text of this model ends, by generation_config.json or config.json; the first, if there are several.
    """

    def __init__(self, folder: str | Path, vocab_size: int) -> None:
        self.folder, self.vocab_size = Path(folder), vocab_size
        self.tokenizer, self.why_ids = _tokenizer(self.folder / "tokenizer.json")
        self.text = self.tokenizer is not None
        stop = _read(self.folder / "generation_config.json").get("eos_token_id", _read(self.folder / "config.json").get("eos_token_id"))
        stop = stop[0] if isinstance(stop, list) and stop else stop
        self.stop_token = stop if isinstance(stop, int) and 0 <= stop < vocab_size else None

    def encode(self, text: str) -> list[int]:
        """With the special tokens that the tokenizer puts around a text, as transformers does."""
        return self.tokenizer.encode(text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Special tokens, such as that at the end of a text, and ids beyond the tokenizer's are left out."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)


def _tokenizer(file: Path) -> tuple[Any, str | None]:
    if not file.is_file():
        return None, f"{file.parent} has no {file.name}"
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        return None, f"{file} can be read after `pip install tokenizers`"
    try:
        return Tokenizer.from_file(str(file)), None
    except Exception as error:  # the library raises nothing more special
        raise ConfigError(f"{file} is not a tokenizer that the package tokenizers reads: {str(error).splitlines()[0]}") from error


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}
