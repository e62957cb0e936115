"""What every training shares: a Lightning module that reads a recipe, and the trainer that runs it."""

from __future__ import annotations

import logging
import math
import signal
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models.images import Batches, BeforeAugment, ImageSet
from models.progress import epoch_ended
from models.recipe import Recipe

with warnings.catch_warnings():
    # Importing Lightning warns about deprecations in other packages; our own warnings stay errors in the tests.
    warnings.simplefilter("ignore")
    import pytorch_lightning as pl
    from pytorch_lightning.plugins.environments import LightningEnvironment

__all__ = ["Epochs", "Loop", "pl", "run"]


class Epochs(Protocol):
    """Training batches. ``len`` gives their number in one epoch; iterating again gives the next epoch."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]: ...


class Loop(pl.LightningModule):  # type: ignore[misc]  # mypy does not follow Lightning's imports
    """A training under a :class:`Recipe`: batches, optimiser, schedule. Subclasses hold the networks and define ``training_step``.

    Args:
        recipe: optimiser, schedule, batch size and augmentation.
    """

    before_augment: BeforeAugment | None = None
    """Attacker-side hook on raw batches, before crop and flip (see :class:`models.images.Batches`)."""
    rate_factor: Callable[[float], float] | None = None
    """(epochs done so far, a fraction within an epoch) -> factor on the recipe's rate, for schedules that no recipe has."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.total_steps = 1
        """Optimiser steps of the whole training; set before it starts."""

    def loader(self, data: ImageSet, seed: int) -> Epochs:
        """The batches of the training.

        Args:
            data: the training set, on the device of the training.
            seed: of every draw.
        """
        recipe = self.recipe
        return Batches(data, recipe.batch, seed, crop=recipe.crop, flip=recipe.flip, before_augment=self.before_augment)

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that the optimiser updates."""
        return list(self.parameters())

    def after_step(self) -> None:
        """Called after every optimiser step, e.g. to keep pruned units at zero."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.after_step()

    def configure_optimizers(self) -> Any:
        recipe, parameters = self.recipe, self.trainable()
        fused = all(parameter.is_cuda for parameter in parameters) or None  # one kernel for all; None = torch's own choice
        optimizer: torch.optim.Optimizer
        if recipe.optimizer == "adam":
            optimizer = torch.optim.Adam(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=fused)
        else:
            optimizer = torch.optim.SGD(
                parameters, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov, weight_decay=recipe.weight_decay,
                fused=fused,
            )  # fmt: skip
        if recipe.schedule == "constant" and self.rate_factor is None:
            return optimizer
        schedule = _schedule(optimizer, recipe, max(1, self.total_steps), self.rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _schedule(
    optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int, factor: Callable[[float], float] | None
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate over ``steps`` optimiser steps: the recipe's, or the one of ``factor``."""
    per_epoch = max(1, steps // max(1, recipe.epochs))
    if factor is not None:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step / per_epoch))
    if recipe.schedule == "one-cycle":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=recipe.lr, total_steps=steps + 1, cycle_momentum=False)
    if recipe.schedule == "multistep":
        milestones = [max(1, int(steps * share)) for share in (0.5, 0.75)]
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    # Cosine by epoch, as in the literature's recipes: the rate changes between epochs, not between steps.
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * (step // per_epoch) / recipe.epochs))
    )


class _Reported(pl.Callback):  # type: ignore[misc]
    """Reports every epoch (:mod:`models.progress`). A callback, because loops have hooks of their own."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch_ended(trainer.current_epoch + 1, trainer.max_epochs)


def run(loop: Loop, batches: Epochs, recipe: Recipe, device: torch.device) -> None:
    """Trains ``loop`` on ``batches`` for the recipe's epochs, in place.

    Lightning's logger, checkpoints, progress bar and sanity check are off: the benchmark shows progress itself, and in a small
    training they take longer than the arithmetic. Nothing is compiled: compiling takes longer than a short training.

    Raises:
        KeyboardInterrupt: the training was interrupted.
    """
    _quiet()
    trainer = pl.Trainer(
        max_epochs=recipe.epochs,
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        # In a Slurm job Lightning would requeue the job on SIGUSR1, and take the job's tasks for ranks of the training.
        plugins=[LightningEnvironment()],
        precision="bf16-mixed" if recipe.precision == "bf16" else "32-true",
        logger=False,
        callbacks=[_Reported()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=loop.total_steps + 1,
        inference_mode=False,
    )
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(loop, train_dataloaders=batches)
    except SystemExit as stop:
        if not trainer.interrupted:
            raise
        # Lightning turns Ctrl-C into an exit and ignores further ones; callers must see the interrupt itself.
        signal.signal(signal.SIGINT, on_interrupt)
        raise KeyboardInterrupt from stop


def _quiet() -> None:
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
