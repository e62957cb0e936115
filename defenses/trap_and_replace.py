"""Trap-and-Replace: Wang, Hong, Zhang, Zhou and Wang, "Trap and Replace: Defending Backdoor Attacks by Trapping Them into an
Easy-to-Replace Subnetwork", NeurIPS 2022, arXiv 2210.06428.

While a network learns the poisoned set, its first layers must also rebuild the image they see, so they keep what the image shows
and leave the tie between trigger and target to the last block. That block is then thrown away: a new one is trained from scratch on
the clean budget, on the frozen first layers.

Needs: poisoned training set, clean budget. Edits: everything; the model is new, of the victim's architecture.
Dial: residual blocks (VGG: convs) that are replaced, with the head behind them; default 1. Each further point costs both trainings.
Deviations from the paper: it keeps 5 % of the training file as clean images; here they are the clean budget, which the attacker
never had. The numbers are the authors' code's; its input is not normalised, here the network itself normalises. The last epoch is
the result (the code also keeps the epoch of best test accuracy). The cut, the decoder and the place of the dropout are written for
any network: halves of channels and doubled sides up to the image, and dropout before the last conv that is not 1 x 1. The code's
dropout before the last linear layer has no effect and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout, mse_loss

from defenses.base import Candidate, DefenderView, Defense, Inapplicable, Knowledge
from models.augmentations import cutmix
from models.backbone import Network, before_block, unrolled
from models.classifier import Classifier
from models.cost import tally
from models.recipe import Recipe
from models.spec import BatchSize, EpochCount, Ge, Le, LearningRate, Lt, Share, derive_seed
from models.training import fit, seeded

__all__ = ["TrapAndReplace", "decoder", "total_variation"]


def total_variation(images: Tensor) -> Tensor:
    """Squares of the differences between neighbouring pixels, summed, over the number of values; images float (N, C, H, W)."""
    down, across = images.diff(dim=2), images.diff(dim=3)
    return (down.square().sum() + across.square().sum()) / images.numel()


def decoder(found: tuple[int, int, int], shape: tuple[int, int, int], seed: int) -> nn.Sequential:
    """Rebuilds images of ``shape`` (C, H, W) in [0, 1] from features of ``found`` (channels, height, width).

    Transposed convs double the sides and halve the channels, with ReLU between them; a sigmoid is last.
    """
    channels, sides = found[0], found[1:]
    doublings = max(0, round(math.log2(shape[1] / sides[0])))
    layers: list[nn.Module] = []
    with seeded(seed):
        for left in reversed(range(doublings)):
            outputs = max(1, channels // 2) if left else shape[0]
            layers += [nn.ConvTranspose2d(channels, outputs, 4, stride=2, padding=1), nn.ReLU()]
            channels = outputs
        layers = layers[:-1] or [nn.Conv2d(channels, shape[0], 3, padding=1)]
    if tuple(side * 2**doublings for side in sides) != shape[1:]:
        layers.append(nn.Upsample(size=shape[1:], mode="bilinear", align_corners=False))
    return nn.Sequential(*layers, nn.Sigmoid())


class _Cut(Classifier):
    """Training of a network that is cut in two: ``stem``, then ``tail`` and the head."""

    def __init__(self, net: Network, recipe: Recipe, at: int) -> None:
        super().__init__(net, recipe)
        steps = unrolled(net.features)
        self.stem, self.tail = nn.Sequential(*steps[:at]), nn.Sequential(*steps[at:])


class _Trapping(_Cut):
    """Cross-entropy, the error of the rebuilt image and its total variation."""

    def __init__(self, net: Network, recipe: Recipe, at: int, decoder: nn.Module, weights: tuple[float, float]) -> None:
        super().__init__(net, recipe, at)
        self.decoder, self.weights = decoder, weights

    def trainable(self) -> list[nn.Parameter]:
        return [*self.net.parameters(), *self.decoder.parameters()]

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels, index = batch
        stem = self.stem(self.net.normalise(images))
        z = self.tail(stem)
        tally(len(images), z)
        rebuilt = self.decoder(stem).float()
        loss = self.loss(self.net.head(z).float(), labels, index)
        return loss + self.weights[0] * mse_loss(rebuilt, images) + self.weights[1] * total_variation(rebuilt)


class _Replacing(_Cut):
    """Tail and head trained with CutMix and dropout; the stem stays as it is, running statistics included."""

    def __init__(self, net: Network, recipe: Recipe, at: int, smoothing: float, dropped: float) -> None:
        super().__init__(net, recipe, at)
        self.stem.requires_grad_(False)
        self.smoothing = smoothing
        convs = [part for part in self.tail.modules() if isinstance(part, nn.Conv2d)]
        wide = [conv for conv in convs if conv.kernel_size != (1, 1)]
        site = next(iter([*wide[::-1], *convs[::-1], self.net.head]))
        self.dropping = site.register_forward_pre_hook(lambda own, args: (dropout(args[0], dropped, own.training),))

    def train(self, mode: bool = True) -> _Replacing:
        super().train(mode)
        self.stem.eval()
        return self

    def trainable(self) -> list[nn.Parameter]:
        return [*self.tail.parameters(), *self.net.head.parameters()]

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels, _ = batch
        order = torch.randperm(len(images)).to(images.device)  # the whole training is seeded
        mixed, kept = cutmix(images, order, torch.rand(3))
        logits = self(mixed)
        own, other = (cross_entropy(logits, given, label_smoothing=self.smoothing) for given in (labels, labels[order]))
        return kept * own + (1 - kept) * other


@dataclass(frozen=True)
class TrapAndReplace(Defense):
    """Settings of the two trainings; both use Adam with a cosine schedule, and the victim's crop and flip.

    Attributes:
        blocks: default of the dial (authors' code: 1).
        rebuild_weight: of the mean squared error of the rebuilt image (authors' code: 10).
        variation_weight: of its total variation (authors' code: 1).
        epochs: of the training on the poisoned set (authors' code: 200).
        lr: of it (authors' code: 1e-3).
        batch: samples per step of it (authors' code: 256).
        head_epochs: of the training on the clean budget (authors' code: 100).
        head_lr: of it (authors' code: 0.03).
        head_batch: samples per step of it (authors' code: 64).
        weight_decay: of both (authors' code: 5e-4).
        dropout: in the new block (authors' code: 0.5).
        smoothing: of the labels on the clean budget (authors' code: 0.1).
        points: further numbers of blocks at which both are trained, 0 = the head alone (ours: none; authors' code: also 0 or 2).

    >>> TrapAndReplace(points=(0, 2)).needs.words
    'clean + train'
    >>> total_variation(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]]))  # two of four differences, over four values
    tensor(0.5000)
    """

    name: ClassVar[str] = "trap-and-replace"
    family: ClassVar[str] = "training anew"
    cost: ClassVar[str] = "{epochs} epochs on the training set, {head_epochs} of the last block on the clean budget"
    dial_name: ClassVar[str] = "blocks replaced"

    blocks: Annotated[int, Ge(0), Le(1000)] = 1
    rebuild_weight: Annotated[float, Ge(0), Le(10_000)] = 10.0
    variation_weight: Annotated[float, Ge(0), Le(10_000)] = 1.0
    epochs: EpochCount = 200
    lr: LearningRate = 1e-3
    batch: BatchSize = 256
    head_epochs: EpochCount = 100
    head_lr: LearningRate = 0.03
    head_batch: BatchSize = 64
    weight_decay: Annotated[float, Ge(0), Le(1)] = 5e-4
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.5
    smoothing: Share = 0.1
    points: tuple[Annotated[int, Ge(0), Le(1000)], ...] = ()

    @property
    def needs(self) -> Knowledge:
        return Knowledge.TRAIN | Knowledge.CLEAN

    def recipe(self, epochs: int, lr: float, batch: int, victims: Recipe) -> Recipe:
        """Of either training; crop, flip and precision are the victim's."""
        return Recipe(
            epochs=epochs, batch=batch, lr=lr, optimizer="adam", weight_decay=self.weight_decay, schedule="cosine",
            crop=victims.crop, flip=victims.flip, precision=victims.precision,
        )  # fmt: skip

    def trap(self, view: DefenderView, blocks: int) -> tuple[Network, int]:
        """A network trained on the poisoned set together with a decoder, and where it is cut.

        Raises:
            Inapplicable: there is no such cut, or no map of features at it.
        """
        net, data = view.fresh(derive_seed(view.seed, "trap-and-replace", "trap")), view.train
        try:
            at = before_block(net.features, blocks)
        except ValueError as error:
            raise Inapplicable(str(error)) from error
        with torch.no_grad():
            found = nn.Sequential(net.normalise, *unrolled(net.features)[:at]).eval()(torch.zeros(1, *data.shape))
        if found.ndim != 4:
            raise Inapplicable("the features are one module: there is no map of features to rebuild the image from")
        seed = derive_seed(view.seed, "trap-and-replace", "training")
        rebuilt = decoder(tuple(found.shape[1:]), data.shape, derive_seed(seed, "decoder"))
        recipe = self.recipe(self.epochs, self.lr, self.batch, view.recipe)
        fit(_Trapping(net, recipe, at, rebuilt, (self.rebuild_weight, self.variation_weight)), data, recipe, seed)
        return net, at

    def replace(self, view: DefenderView, trapped: Network, at: int) -> Network:
        """A fresh network with the stem of ``trapped``, the rest of it trained on the clean budget."""
        net = view.fresh(derive_seed(view.seed, "trap-and-replace", "replace"))
        for own, other in zip(unrolled(net.features)[:at], unrolled(trapped.features)[:at], strict=True):
            own.load_state_dict(other.state_dict())
        recipe = self.recipe(self.head_epochs, self.head_lr, self.head_batch, view.recipe)
        module = _Replacing(net, recipe, at, self.smoothing, self.dropout)
        fit(module, view.clean, recipe, derive_seed(view.seed, "trap-and-replace", "head"))
        module.dropping.remove()
        return net.requires_grad_(True).eval()

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        for what, data in (("poisoned training set", view.train), ("clean budget", view.clean)):
            if len(data) < 2:
                raise Inapplicable(f"the {what} holds {len(data)} samples; at least 2 are needed")
        for blocks in sorted({self.blocks, *self.points}):
            yield Candidate(self.replace(view, *self.trap(view, blocks)), float(blocks), blocks == self.blocks, float(blocks))
