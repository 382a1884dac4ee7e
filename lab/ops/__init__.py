"""Ops: pure functions with several backends. One file each; `backend.py` holds the dispatch rule."""

from lab.ops.backend import force, ops, recording, use, used
from lab.ops.kuramoto_scan import kuramoto_scan

__all__ = ["force", "kuramoto_scan", "ops", "recording", "use", "used"]
