"""Ops: pure functions with several backends. One file each; `backend.py` holds the dispatch rule."""

from lab.ops.backend import force, ops, use, used
from lab.ops.kuramoto_scan import kuramoto_scan
from lab.ops.linear_recurrence import linear_recurrence
from lab.ops.selective_scan import selective_scan

__all__ = ["force", "kuramoto_scan", "linear_recurrence", "ops", "selective_scan", "use", "used"]
