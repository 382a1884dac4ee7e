"""Ops: pure functions with several backends. One file each; `backend.py` holds the dispatch rule."""

from lab.ops.backend import force, ops, use, used
from lab.ops.kuramoto_scan import kuramoto_scan

OPS: dict[str, tuple[str, ...]] = ops()
"""Every op with the names of its backends, in order of preference (the config key `ops.<op>` also takes "auto")."""

__all__ = ["OPS", "force", "kuramoto_scan", "use", "used"]
