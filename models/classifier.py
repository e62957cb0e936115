"""The supervised loop, as a Lightning module: one way to train, with places where a method may differ."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from models.backbone import Network
from models.images import Batches, BeforeAugment, ImageSet

with warnings.catch_warnings():
    # Lightning's own imports warn about other packages' deprecations; ours stay errors in the tests.
    warnings.simplefilter("ignore")
    import pytorch_lightning as pl
    from pytorch_lightning.plugins.environments import LightningEnvironment

if TYPE_CHECKING:
    from models.training import Recipe

__all__ = ["Classifier", "Epochs", "LightningEnvironment", "pl"]


class Epochs(Protocol):
    """Training batches: as many as ``len`` says in one epoch; iterating again gives the next epoch."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]: ...


class Classifier(pl.LightningModule):  # type: ignore[misc]  # mypy does not follow Lightning's imports
    """Cross-entropy training of a :class:`Network` under a :class:`Recipe`.

    A method that differs from plain training overrides one hook and nothing else: :meth:`loss`, :meth:`on_batch`,
    :meth:`trainable`, :meth:`after_step`, :meth:`loader`, or sets ``before_augment``. Where a step takes more than one batch of
    labelled images, it overrides ``training_step``.
    """

    before_augment: BeforeAugment | None = None
    """Attacker-side hook on raw batches, before crop and flip (see :class:`models.images.Batches`)."""

    def __init__(self, net: Network, recipe: Recipe) -> None:
        super().__init__()
        self.net = net
        self.recipe = recipe
        self.total_steps = 1
        """Optimiser steps of the whole training; set by ``fit`` before it starts."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits.float()  # losses are float32 also where the network ran under autocast

    def loader(self, data: ImageSet, seed: int) -> Epochs:
        """What the loop iterates over. ``data`` is on the device of the training; every draw is keyed by ``seed``."""
        recipe = self.recipe
        return Batches(
            data, recipe.batch, seed, crop=recipe.crop, flip=recipe.flip, before_augment=self.before_augment
        )

    def on_batch(self, images: Tensor, labels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Changes an augmented batch before the forward pass; shapes as in :class:`models.images.Batches`."""
        return images, labels

    def loss(self, logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        """Scalar loss of one batch; ``index`` (B,) says which training samples they are."""
        return nn.functional.cross_entropy(logits, labels)

    def trainable(self) -> list[nn.Parameter]:
        """The parameters the optimiser moves."""
        return list(self.net.parameters())

    def after_step(self) -> None:
        """Called after every optimiser step, e.g. to hold pruned units at zero."""

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels, index = batch
        images, labels = self.on_batch(images, labels, index)
        return self.loss(self(images), labels, index)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.after_step()

    def configure_optimizers(self) -> Any:
        recipe = self.recipe
        moved = self.trainable()
        optimizer: torch.optim.Optimizer
        fused = all(parameter.is_cuda for parameter in moved) or None  # one kernel for all parameters; None = torch's own choice
        if recipe.optimizer == "adam":
            optimizer = torch.optim.Adam(moved, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=fused)
        else:
            optimizer = torch.optim.SGD(
                moved, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov, weight_decay=recipe.weight_decay,
                fused=fused,
            )  # fmt: skip
        steps = max(1, self.total_steps)
        if recipe.schedule == "constant":
            return optimizer
        if recipe.schedule == "one-cycle":
            schedule: Any = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, max_lr=recipe.lr, total_steps=steps + 1, cycle_momentum=False
            )
        elif recipe.schedule == "cosine":
            per_epoch = max(1, steps // max(1, recipe.epochs))
            # By epoch, as the literature's recipes do: the rate changes between epochs, not between steps.
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * (step // per_epoch) / recipe.epochs))
            )
        else:
            milestones = [max(1, int(steps * share)) for share in (0.5, 0.75)]
            schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
