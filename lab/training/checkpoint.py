"""Checkpoint files: written atomically, read without executing code, and complete: the random states are in them."""

from __future__ import annotations

import pickle
import random
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric.plugins import CheckpointIO

from lab.files import atomic, unlike
from lab.training.run import RunError

CHECKPOINT = {"lab": dict, "state_dict": dict, "global_step": int}
IDENTITY = {"config": dict, "choices": dict, "config_hash": str, "code_version": str, "git_commit": object}
"""What is read of a checkpoint, and of its entry "lab"."""


class AtomicCheckpointIO(CheckpointIO):
    """Writes beside the target, syncs and renames: a crash at any moment leaves the old file or the new one, never half of one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        with atomic(Path(path)) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: str | Path, map_location: Any | None = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        return read_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of lab, on the CPU; tensors and plain containers only. RunError where the file is missing, truncated or foreign."""
    path = Path(path)
    if not path.is_file():
        raise RunError(f"{path}: there is no such checkpoint")
    if not zipfile.is_zipfile(path):
        raise RunError(f"{path} is not a checkpoint, or only the beginning of one ({path.stat().st_size:,} bytes)")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RunError(f"{path} holds more than tensors and plain values, and is not loaded: {str(error).splitlines()[0]}") from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    wrong = unlike(checkpoint, CHECKPOINT) or unlike(checkpoint["lab"], IDENTITY)
    if wrong:
        raise RunError(f"{path} is not a checkpoint of lab: {wrong}")
    return checkpoint


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states() -> dict[str, Any]:
    """The states of every global generator, as tensors and plain containers (a numpy array would not load with weights_only)."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "python": list(random.getstate()),
    }


def restore_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))


@contextmanager
def keep_random_states() -> Iterator[None]:
    """What is drawn inside does not count."""
    states = random_states()
    try:
        yield
    finally:
        restore_random_states(states)
