"""The backend `triton`: kernels in Triton, for a GPU; simulated on the CPU where TRITON_INTERPRET=1 was set before lab was imported.

`launch.py` says when they can run and launches them, importing neither triton nor a kernel before the first launch; `scans.py` and
`vandermonde.py` hold the kernels, and import triton.
"""
