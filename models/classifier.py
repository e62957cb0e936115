"""The supervised training loop: one way to train a network, with hooks where a method differs."""

from __future__ import annotations

import copy
from collections.abc import Collection

from torch import Tensor, nn

from models.backbone import Network
from models.loop import Loop
from models.recipe import Recipe

__all__ = ["Classifier", "Snapshots"]


class Classifier(Loop):
    """Cross-entropy training of a :class:`Network` under a :class:`Recipe`.

    A method that differs from plain training overrides one hook: :meth:`loss`, :meth:`on_batch`, :meth:`trainable`,
    :meth:`after_step`, :meth:`loader`, or sets ``before_augment``. Where a step takes more than one batch of labelled images, it
    overrides ``training_step``.

    Args:
        net: the network, trained in place.
        recipe: how it is trained.
    """

    def __init__(self, net: Network, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits.float()  # losses are float32 also where the network ran under autocast

    def on_batch(self, images: Tensor, labels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Changes an augmented batch before the forward pass.

        Args:
            images: float (B, C, H, W) in [0, 1].
            labels: int64 (B,).
            index: int64 (B,), the batch's training samples.
        """
        return images, labels

    def loss(self, logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        """Loss of one batch, a scalar.

        Args:
            logits: float (B, num_classes).
            labels: int64 (B,).
            index: int64 (B,), the batch's training samples.
        """
        return nn.functional.cross_entropy(logits, labels)

    def trainable(self) -> list[nn.Parameter]:
        return list(self.net.parameters())

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels, index = batch
        images, labels = self.on_batch(images, labels, index)
        return self.loss(self(images), labels, index)


class Snapshots(Classifier):
    """Training that keeps copies of the network on the way, by the number of epochs before them.

    Args:
        net: the network, trained in place.
        recipe: how it is trained.
        wanted: after how many epochs; the network before the first is always kept, as number 0.
    """

    def __init__(self, net: Network, recipe: Recipe, wanted: Collection[int]) -> None:
        super().__init__(net, recipe)
        self.wanted, self.kept = wanted, {0: copy.deepcopy(net)}

    def on_train_epoch_end(self) -> None:
        done = int(self.current_epoch) + 1
        if done in self.wanted:
            self.kept[done] = copy.deepcopy(self.net).cpu()
