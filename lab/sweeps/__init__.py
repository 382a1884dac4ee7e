"""Sweeps: `lab-train -m` over Hydra's sweepers and launchers; each job is a plain lab-train, then lab-eval, in processes of their own."""

from lab.sweeps.multirun import sweep

__all__ = ["sweep"]
