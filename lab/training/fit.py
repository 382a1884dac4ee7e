"""`fit`: a pl.Trainer from the settings, and what becomes of the run."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.warnings import PossibleUserWarning

from lab.analysis import receptive_field
from lab.config import ConfigError, MistakeError, config_hash
from lab.files import write_json
from lab.memory import reusing_memory, why_not_reuse
from lab.tasks import EvalLoader, TrainLoader
from lab.training.callbacks import Checkpoints
from lab.training.checkpoint import AtomicCheckpointIO, read_checkpoint
from lab.training.document import metrics_document
from lab.training.experiment import Experiment, build_node
from lab.training.load import check_same_data
from lab.training.loggers import JsonLines
from lab.training.module import LabModule
from lab.training.provenance import code_version
from lab.training.run import Interrupted, Run, RunError


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's advice and adverts are not news of the run. Afterwards the log levels and warning filters are the caller's again."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=PossibleUserWarning)
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)  # Lightning 2.6 with torch 2.13
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@_quiet()
def fit(
    run: Run,
    experiment: Experiment,
    stored: dict[str, Any],
    trust: list[str] | None,
    begin: Callable[[], None],
    anew: bool,
    extra_callbacks: Sequence[pl.Callback] = (),
) -> None:
    """Trains from the run's last checkpoint, or from the start, to max_steps. Writes job.json and metrics.json.

    stored: the config with its environment variables unresolved, as it goes into each checkpoint. begin: what the first process does
    to the folder, after everything that can be wrong has been found. anew: whatever the folder holds is not gone on with.
    extra_callbacks: from Python.
    """
    checkpoints = Checkpoints(run, experiment.trainer.checkpoint_every)
    try:
        callbacks = [*_callbacks(experiment, trust), *extra_callbacks, checkpoints]
        logger = build_node("logger", experiment.logger, trust) if experiment.logger else None
        trainer = _trainer(run, experiment, callbacks)
        loaders = _loaders(experiment, trainer)
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        raise MistakeError(("trainer",), str(error).splitlines()[0]) from error
    first_step = 0 if anew or not run.last.exists() else _check_checkpoint(run, experiment)
    if trainer.is_global_zero:
        begin()
    trainer.loggers = [JsonLines(run.path, first_step), *([logger.build(run.path, first_step)] if logger else [])]
    module = _module(run, experiment, stored)
    if trainer.is_global_zero:
        _say_what_starts(run, experiment, first_step)
    with reusing_memory() if experiment.trainer.reuse_memory else nullcontext(), _job(run, trainer):
        trainer.fit(module, *loaders, ckpt_path=run.last if first_step else None)
        if trainer.is_global_zero:
            _finish(run, experiment, module, checkpoints)


def _check_checkpoint(run: Run, experiment: Experiment) -> int:
    """The step of the checkpoint that training goes on from; an error where it cannot."""
    checkpoint = read_checkpoint(run.last)
    check_same_data(run.last, checkpoint["lab"], experiment.task)
    step = checkpoint["global_step"]
    if step > experiment.max_steps:
        raise ConfigError(f"{run.path} is at step {step}: trainer.max_steps cannot be {experiment.max_steps}")
    return step


def _module(run: Run, experiment: Experiment, stored: Mapping[str, Any]) -> LabModule:
    hparams = run.hparams()
    identity = {name: hparams[name] for name in ("choices", "git_commit")}
    identity |= {"config": dict(stored), "config_hash": config_hash(stored), "code_version": code_version()}
    identity |= {"data": dict(experiment.task.facts()), "task": experiment.task.stored()}
    settings, model = experiment.trainer, experiment.model
    model.activation_checkpointing = settings.activation_checkpointing
    if settings.compile:
        for block in model.blocks:
            block.compile(dynamic=False)
    return LabModule(
        model, experiment.task, experiment.optimizer, experiment.weights, settings, experiment.max_steps, experiment.seed, identity,
        experiment.steps_per_epoch if experiment.task.carry_state else None,
    )  # fmt: skip


def _callbacks(experiment: Experiment, trust: list[str] | None) -> list[pl.Callback]:
    callbacks = []
    for name, node in (experiment.callbacks or {}).items():
        callback = build_node(f"callbacks.{name}", node, trust)
        if not isinstance(callback, pl.Callback):
            raise MistakeError(("callbacks", name), f"expected a pytorch_lightning.Callback, got a {type(callback).__name__}")
        callbacks.append(callback)
    if experiment.trainer.ema is not None:
        callbacks.append(EMAWeightAveraging(decay=experiment.trainer.ema))
    return callbacks


def _trainer(run: Run, experiment: Experiment, callbacks: list[pl.Callback]) -> pl.Trainer:
    settings = experiment.trainer
    if settings.precision == "16-mixed" and not torch.cuda.is_available():
        raise MistakeError(("trainer", "precision"), "16-mixed needs a GPU; bf16-mixed works on the CPU")
    if settings.reuse_memory and why_not_reuse():
        raise MistakeError(("trainer", "reuse_memory"), str(why_not_reuse()))
    has_bar = any(isinstance(callback, pl.callbacks.ProgressBar) for callback in callbacks)
    trainer = pl.Trainer(
        max_steps=experiment.max_steps,
        max_epochs=-1,
        accelerator=settings.accelerator,
        devices=settings.devices,
        strategy=settings.strategy,
        precision=settings.precision,
        deterministic=settings.deterministic,
        val_check_interval=settings.val_every,
        check_val_every_n_epoch=None,
        callbacks=callbacks,
        logger=False,
        plugins=[AtomicCheckpointIO()],
        default_root_dir=run.path,
        enable_progress_bar=has_bar,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=1,
    )
    # Filling every new tensor with NaN is a debugging aid that deterministic mode switches on; the kernels here write all they read.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return trainer


def _loaders(experiment: Experiment, trainer: pl.Trainer) -> tuple[TrainLoader, EvalLoader]:
    settings, task = experiment.trainer, experiment.task
    place: dict[str, Any] = {
        "rank": trainer.global_rank, "world": trainer.world_size, "num_workers": settings.num_workers,
        "pin_memory": trainer.strategy.root_device.type == "cuda",
    }  # fmt: skip
    train = TrainLoader(
        task.split("train"), settings.batch_size, settings.accumulate, experiment.max_steps, experiment.seed, **place,
        streams=task.carry_state,
    )  # fmt: skip
    return train, EvalLoader(task.validation(), settings.batch_size, **place)


@contextmanager
def _job(run: Run, trainer: pl.Trainer) -> Iterator[None]:
    """job.json from `running` to what it came to. Only the process that holds the lock writes it."""
    if not trainer.is_global_zero:
        yield
        return
    run.write_job("running", reason=None)
    try:
        yield
    except Interrupted as error:
        run.write_job("interrupted", reason=str(error), step=trainer.global_step)
        raise
    except (KeyboardInterrupt, SystemExit):
        run.write_job("interrupted", reason=f"stopped at once in step {trainer.global_step + 1}", step=trainer.global_step)
        raise Interrupted(
            f"stopped at once in step {trainer.global_step + 1}; the last checkpoint is what is kept", signal.SIGINT
        ) from None
    except BaseException as error:
        reason = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
        with suppress(OSError):  # a full disk: without a word in job.json the run still reads as interrupted
            run.write_job("failed", reason=reason, step=trainer.global_step)
        if isinstance(error, OSError):
            raise RunError(f"{run.path}: {error}; after mending it, the same command with run_dir={run.path} goes on") from error
        raise
    early = trainer.global_step < trainer.max_steps
    run.write_job("done", step=trainer.global_step, reason=f"a callback ended it before step {trainer.max_steps}" if early else None)


def _finish(run: Run, experiment: Experiment, module: LabModule, checkpoints: Checkpoints) -> None:
    best, task = checkpoints.best, experiment.task
    document = metrics_document(
        module.model, module.identity, seq_len=task.seq_len, checkpoint="best", split="val", step=best["step"], seed=experiment.seed,
        metrics=best["metrics"], tables=best["tables"], references=task.references("val"), published=task.reference,
        data={**task.facts(), **task.validation().facts()},
    )  # fmt: skip
    write_json(run.path / "metrics.json", document)
    print(f"done: {run.path}  (best by validation: step {best['step']}, ce_loss {best['metrics']['ce_loss']:.4g})")


def _say_what_starts(run: Run, experiment: Experiment, first_step: int) -> None:
    parameters = sum(p.numel() for p in experiment.model.parameters())
    print(f"run:   {run.path}")
    print(f"task:  {experiment.task.describe()}")
    print(f"model: {run.hparams()['choices']['model']}, {parameters:,} parameters")
    if experiment.match is not None:
        told = " ".join(f"{name}={value}" for name, value in experiment.match.items())
        print(f"match: {told} gave the size of the model")
    if (seen := receptive_field.summary(experiment.model)) is not None:
        print(f"sees:  {seen}")
    print(f"steps: {first_step} to {experiment.max_steps}, {experiment.steps_per_epoch} an epoch", flush=True)
