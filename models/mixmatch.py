"""MixMatch: Berthelot, Carlini, Goodfellow, Papernot, Oliver and Raffel, "MixMatch: A Holistic Approach to Semi-Supervised
Learning", NeurIPS 2019, arXiv 1905.02249.

Unlabelled images get the sharpened mean of the network's answers to two views of them; labelled and unlabelled images are then
mixed with each other and fitted, the former by cross-entropy, the latter by squared error. Here as DBD trains it (Huang et al.,
ICLR 2022, arXiv 2202.03423): two views, guesses in training mode, one share per batch, no averaged weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from models.backbone import Network
from models.classifier import Classifier
from models.images import Batches, ImageSet
from models.loop import Epochs
from models.recipe import Recipe
from models.spec import derive_seed

__all__ = ["MixMatch", "interleave", "mixmatch_loss", "ramped", "sharpened"]

Split = Callable[[Network, ImageSet], Tensor]
"""(the network so far, all images) -> which of them keep their labels, bool (N,)."""


def sharpened(probabilities: Tensor, temperature: float) -> Tensor:
    """``p^(1/T)``, normalised again; (N, classes)."""
    raised = probabilities.pow(1 / temperature)
    return raised / raised.sum(1, keepdim=True)


def mixmatch_loss(x_logits: Tensor, x_targets: Tensor, u_logits: Tensor, u_targets: Tensor) -> tuple[Tensor, Tensor]:
    """(cross-entropy of soft targets, mean square of softmax - target over samples and classes): MixMatch's Lx and Lu."""
    return cross_entropy(x_logits, x_targets), (u_logits.softmax(1) - u_targets).square().mean()


def ramped(weight: float, position: float, length: float) -> float:
    """The weight of Lu at ``position``: it grows linearly from 0 and stays at ``weight`` from ``length`` on."""
    return weight * min(1.0, position / length)


def interleave(parts: Sequence[Tensor]) -> list[Tensor]:
    """Swaps slices between equally long parts, so that each part holds some of all; doing it again undoes it.

    Part 0 and part i exchange their i-th slices. Batch norm then normalises labelled and unlabelled images together, though each
    part is a forward pass of its own. Slices have equal lengths, or the last ones are longer by one.
    """
    count, size = len(parts), len(parts[0])
    longer = size % count
    sizes = [size // count + (slot >= count - longer) for slot in range(count)]
    slices = [list(torch.split(part, sizes)) for part in parts]
    for slot in range(1, count):
        slices[0][slot], slices[slot][slot] = slices[slot][slot], slices[0][slot]
    return [torch.cat(pieces) for pieces in slices]


class _Pools:
    """Batches ``(images, labels, views)`` from both sides of the module's split, which is made anew before every epoch.

    Images float (B, C, H, W) with labels int64 (B,) of labelled samples; views float (2 B, C, H, W) of unlabelled ones. Either side
    starts over when it is exhausted; B is the recipe's batch, or the size of the smaller side.
    """

    def __init__(self, module: MixMatch, data: ImageSet, seed: int) -> None:
        self.module, self.data, self.seed, self.epoch = module, data, seed, 0

    def __len__(self) -> int:
        return self.module.iterations

    def _endless(self, samples: Tensor, batch: int, purpose: str, views: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        recipe, seed = self.module.recipe, derive_seed(self.seed, purpose, self.epoch)
        batches = Batches(
            self.data.subset(samples), batch, seed, crop=recipe.crop, flip=recipe.flip, drop_last=True, views=views
        )
        while True:
            yield from batches

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        labelled = self.module.labelled = self.module.split(self.module.net, self.data)
        sides = labelled, ~labelled
        batch = min(self.module.recipe.batch, *(int(side.sum()) for side in sides))
        if batch < 2:
            raise ValueError(f"{int(labelled.sum())} of {len(self.data)} samples are labelled; each side of the split needs two")
        where = [torch.nonzero(side.to(self.data.images.device)).flatten() for side in sides]
        known = self._endless(where[0], batch, "labelled", 1)
        unknown = self._endless(where[1], batch, "unlabelled", 2)
        self.epoch += 1
        for _ in range(len(self)):
            images, labels, _ = next(known)
            yield images, labels, next(unknown)[0]


class MixMatch(Classifier):
    """Semi-supervised training on one set, of which :attr:`labelled` keep their labels.

    Args:
        net: the network, trained in place.
        recipe: ``batch`` labelled images and as many unlabelled ones a step.
        split: called before every epoch; each side must hold two samples or more.
        iterations: steps of an epoch.
        sharpen: temperature of the guesses.
        mixup: parameter of the Beta distribution.
        weight: final weight of Lu.
        ramp: epochs after which Lu has its final weight.
        head_start: epochs of the ramp that count as done when training starts.
    """

    def __init__(
        self,
        net: Network,
        recipe: Recipe,
        split: Split,
        *,
        iterations: int,
        sharpen: float,
        mixup: float,
        weight: float,
        ramp: float,
        head_start: float = 0.0,
    ) -> None:
        super().__init__(net, recipe)
        self.split, self.iterations = split, iterations
        self.sharpen, self.mixup, self.weight, self.ramp, self.head_start = sharpen, mixup, weight, ramp, head_start
        self.labelled = torch.zeros(0, dtype=torch.bool)
        """bool (N,): the last split; empty before training."""

    def loader(self, data: ImageSet, seed: int) -> Epochs:
        return _Pools(self, data, seed)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        images, labels, views = batch
        size = len(images)
        with torch.no_grad():
            first, second = (self(view).softmax(1) for view in views.chunk(2))
            guess = sharpened((first + second) / 2, self.sharpen)
        inputs, targets = torch.cat([images, views]), torch.cat([one_hot(labels, guess.shape[1]).to(guess.dtype), guess, guess])
        # The whole training is seeded, and torch's distributions take no generator.
        share = torch.distributions.Beta(self.mixup, self.mixup).sample().item()
        share, order = max(share, 1 - share), torch.randperm(3 * size).to(inputs.device)
        inputs, targets = (share * whole + (1 - share) * whole[order] for whole in (inputs, targets))
        parts = [part.contiguous(memory_format=torch.channels_last) for part in interleave(inputs.chunk(3))]
        logits = torch.cat(interleave([self(part) for part in parts]))
        lx, lu = mixmatch_loss(logits[:size], targets[:size], logits[size:], targets[size:])
        position = self.head_start + int(self.global_step) / self.iterations
        return lx + ramped(self.weight, position, self.ramp) * lu
