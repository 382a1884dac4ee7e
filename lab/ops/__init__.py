"""Ops: pure functions with several backends. One file each; `backend.py` holds the dispatch rule, `native.py` calls compiled kernels."""

from lab.ops.backend import every, force, forced, forget, ops, recording, use, used
from lab.ops.cauchy_kernel import cauchy_kernel
from lab.ops.causal_conv import causal_conv
from lab.ops.dplr_scan import dplr_scan
from lab.ops.fft_conv import fft_conv
from lab.ops.grouped_matmul import grouped_matmul
from lab.ops.kuramoto_scan import kuramoto_scan
from lab.ops.linear_recurrence import linear_recurrence
from lab.ops.selective_scan import selective_scan
from lab.ops.ssm_kernel import ssm_kernel

__all__ = [
    "causal_conv", "cauchy_kernel", "dplr_scan", "every", "fft_conv", "force", "forced", "forget", "grouped_matmul", "kuramoto_scan",
    "linear_recurrence", "ops", "recording", "selective_scan", "ssm_kernel", "use", "used",
]  # fmt: skip
