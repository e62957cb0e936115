"""Neural Cleanse: Wang, Yao, Shan, Li, Viswanath, Zheng and Zhao, "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in
Neural Networks", IEEE S&P 2019.

For every label the smallest patch is searched that sends clean images to it. A backdoor is a shortcut, so the patch of its target
is much smaller than those of the other labels. A label whose patch is an outlier is flagged; the network is then fine-tuned on
clean images, some of which carry the patches that were found, all under their true labels.

Needs: model, clean budget. Edits: every weight (scope HEAD: the head's alone), or nothing where no label is flagged; the note of a
candidate lists the flagged labels.
Dial: threshold of the anomaly index; labels above it are flagged, so a smaller threshold flags more. Default 2. Thresholds that
flag the same labels share one fine-tuning.
Deviations from the paper: the search makes BackdoorBench's 80 passes over the budget (released code: 1,000 times 1,000 samples),
from a mask and pattern of one half everywhere (released code: random), on images as they are. The size's weight starts at 1e-3
(``weight=0``: released code). The patches are kept as they are found, not rounded to a picture file. Unlearning is this suite's
fine-tuning with a fifth of its images patched (BackdoorBench's share). Where several labels are flagged, these images are dealt
out evenly among their patches. ``unflagged="unlearn-smallest"`` is an ablation: it unlearns the smallest patch where none is
flagged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from defenses.base import Candidate, DefenderView, Inapplicable, Scope
from defenses.fine_tuning import FineTuning, fine_tuned
from models.backbone import Network
from models.images import ImageSet, quantise, to_float
from models.inversion import descend, patched, squashed
from models.spec import BatchSize, Ge, Gt, Le, PositiveShare, Share, derive_seed, generator
from models.training import default_device

__all__ = ["Balance", "NeuralCleanse", "Patch", "Search", "anomaly_indices", "stamped"]

STALL = 5
"""A search ends once the weight has moved both ways and the smallest size has not fallen for so many times ``patience`` passes
(authors' code)."""


@dataclass
class Balance:
    """The weight of a penalty that is raised while a network is accurate enough, and lowered while it is not.

    Attributes:
        value: the weight now.
        patience: checks in a row with the same answer until the weight changes.
        factor: the weight is multiplied by it, or divided by its power of 1.5.
        base: what the weight becomes when it is raised from 0.
        back: raised from below ``base``, it becomes ``base`` too.
        raised: whether it has been raised.
        lowered: whether it has been lowered.
    """

    value: float
    patience: int = 5
    factor: float = 2.0
    base: float = 1e-3
    back: bool = False
    raised: bool = False
    lowered: bool = False
    _row: tuple[bool, int] = (True, 0)

    def update(self, accurate: bool) -> float:
        """The weight after one more check."""
        before, count = self._row
        self._row = accurate, count + 1 if accurate == before else 1
        if self._row[1] < self.patience:
            return self.value
        self._row = accurate, 0
        if not accurate:
            self.value, self.lowered = self.value / self.factor**1.5, True
        else:
            below = self.value == 0 or (self.back and self.value < self.base)
            self.value, self.raised = self.base if below else self.value * self.factor, True
        return self.value


def anomaly_indices(sizes: Tensor) -> Tensor:
    """How far every size is below the median, in units of 1.4826 times the median absolute deviation: float64 (K,).

    Negative above the median; 0 at it, infinite off it where the deviation is 0. The median of an even number of sizes is the mean
    of the two middle ones.

    Args:
        sizes: of the labels' masks, (K,), K >= 1.
    """
    sizes = sizes.double()
    below = sizes.quantile(0.5) - sizes
    deviation = 1.4826 * below.abs().quantile(0.5)
    return torch.where(below == 0, below, below / deviation)


@dataclass(frozen=True)
class Patch:
    """What was found for a label.

    Attributes:
        size: sum of the mask over the pixels.
        mask: float (1, H, W), before tanh (:func:`models.inversion.patched`).
        pattern: float (C, H, W), likewise.
        reached: whether the patch sends as many images to the label as was asked for.
    """

    size: float
    mask: Tensor
    pattern: Tensor
    reached: bool


def stamped(data: ImageSet, patches: Sequence[Patch], share: float, draw: torch.Generator) -> ImageSet:
    """``data`` with the patches, dealt out in turn, on ``round(share * N)`` images at random, rounded to 8 bits; labels stay."""
    images = data.images.clone()
    picked = torch.randperm(len(data), generator=draw)[: round(share * len(data))]
    for number, patch in enumerate(patches):
        part = picked[number :: len(patches)]
        images[part] = quantise(patched(to_float(images[part]), patch.mask, patch.pattern))
    return ImageSet(images, data.labels, data.num_classes)


class Search:
    """Of one label: the loss, and the smallest mask that has worked after a pass so far. A search for another kind of trigger
    overrides :meth:`shown` and :meth:`size`."""

    def __init__(self, method: NeuralCleanse, net: Network, steps: int) -> None:
        self.method, self.net, self.steps = method, net, steps
        self.balance = Balance(method.weight, method.patience, method.factor)
        self.hits = self.seen = self.stalled = 0
        self.best: Patch | None = None

    def loss(self, images: Tensor, targets: Tensor, z: list[Tensor], weight: float) -> Tensor:
        logits = self.net(self.shown(images, z))
        self.hits += int((logits.detach().argmax(1) == targets).sum())
        self.seen += len(targets)
        return cross_entropy(logits, targets) + weight * self.size(z)

    @staticmethod
    def shown(images: Tensor, z: list[Tensor]) -> Tensor:
        """The images with the trigger, float (B, C, H, W)."""
        return patched(images, z[0], z[1])

    @staticmethod
    def size(z: list[Tensor]) -> Tensor:
        """What is to be small, a scalar."""
        return squashed(z[0]).sum()

    def after(self, step: int, z: list[Tensor], weight: float) -> float | None:
        """Checks at the end of a pass: the weight changes with the share of images that were sent to the label in it."""
        if step % self.steps:
            return weight
        reached = self.hits >= self.method.success * self.seen
        self.hits = self.seen = 0
        patch = self.patch(z, reached)
        if reached and (self.best is None or patch.size < self.best.size):
            self.best, self.stalled = patch, 0
        elif self.best is not None:
            self.stalled += 1
        following = self.balance.update(reached)
        ended = self.balance.raised and self.balance.lowered and self.stalled >= STALL * self.method.patience
        return None if ended else following

    def patch(self, z: list[Tensor], reached: bool) -> Patch:
        return Patch(float(self.size(z)), z[0].cpu().clone(), z[1].cpu().clone(), reached)


@dataclass(frozen=True)
class NeuralCleanse(FineTuning):
    """Settings of the search, of the detection, and of the fine-tuning (those of :class:`defenses.fine_tuning.FineTuning`).

    Attributes:
        threshold: default of the dial, at least 0 (authors' code: 2).
        grid: further thresholds at which models are offered (ours); they cost a fine-tuning where they flag other labels.
        unflagged: what is done where no label is flagged: ``keep`` the model, or ``unlearn-smallest`` (ours, an ablation).
        share: of the images that carry a patch while fine-tuning, in [0, 1] (BackdoorBench: 0.2).
        search_epochs: passes of every label's search (BackdoorBench: 80).
        samples: images of a pass, drawn anew; 0 = all (BackdoorBench; authors' code: 1000).
        search_batch: images per step of the search (ours: 128, as the other methods on this budget; authors' code: 32).
        search_lr: of Adam, with betas 0.5 and 0.9 (authors' code: 0.1).
        success: share of the images that a patch must send to its label (BackdoorBench: 0.98; authors' code: 0.99).
        weight: of the mask's size, its sum over the pixels, at the start (BackdoorBench: 1e-3; authors' code: 0).
        patience: passes until the weight changes (authors' code: 5).
        factor: the weight is multiplied by it, or divided by its power of 1.5 (authors' code: 2).

    >>> sizes = torch.tensor([60.0, 80.0, 4.0, 70.0, 75.0])
    >>> anomaly_indices(sizes) > NeuralCleanse(threshold=2.0).threshold
    tensor([False, False,  True, False, False])
    """

    name: ClassVar[str] = "neural-cleanse"
    family: ClassVar[str] = "trigger inversion"
    cost: ClassVar[str] = "at most {search_epochs} passes over the clean budget per class, {epochs} epochs where one is flagged"
    scopes: ClassVar[tuple[Scope, ...]] = (Scope.HEAD, Scope.WHOLE)
    dial_name: ClassVar[str] = "threshold of the anomaly index"

    threshold: Annotated[float, Ge(0), Le(1000)] = 2.0
    grid: tuple[Annotated[float, Ge(0), Le(1000)], ...] = (1.0, 1.5, 2.5, 3.0)
    unflagged: Literal["keep", "unlearn-smallest"] = "keep"
    share: Share = 0.2
    search_epochs: Annotated[int, Ge(1), Le(10_000)] = 80
    samples: Annotated[int, Ge(0), Le(1_000_000)] = 0
    search_batch: BatchSize = 128
    search_lr: Annotated[float, Gt(0), Le(10)] = 0.1
    success: PositiveShare = 0.98
    weight: Annotated[float, Ge(0), Le(1000)] = 1e-3
    patience: Annotated[int, Ge(1), Le(10_000)] = 5
    factor: Annotated[float, Gt(1), Le(100)] = 2.0

    def invert(self, net: Network, data: ImageSet, label: int, seed: int, kind: type[Search] = Search) -> Patch:
        """The smallest trigger that works for ``label``; where none does, the last one.

        Args:
            net: in evaluation mode, its parameters without gradients.
            data: clean images of all labels, on the device of ``net``, at least one.
            label: what images are to be taken for.
            seed: of the order of the images.
            kind: of trigger; a patch by default.
        """
        size = min(self.samples or len(data), len(data))
        draw = generator(seed, "neural-cleanse", "search", label)

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for _ in range(self.search_epochs):
                order = torch.randperm(len(data), generator=draw)[:size].to(data.images.device)
                for start in range(0, size, self.search_batch):
                    part = order[start : start + self.search_batch]
                    yield to_float(data.images[part]), torch.full_like(part, label)

        channels, height, width = data.shape
        search = kind(self, net, -(-size // self.search_batch))
        z = [torch.zeros(shape, device=data.images.device) for shape in ((1, height, width), (channels, height, width))]
        z = descend(search.loss, batches(), z, lr=self.search_lr, betas=(0.5, 0.9), weight=self.weight, after=search.after)
        return search.best or search.patch(z, False)

    def flagged(self, indices: Tensor, sizes: Tensor, threshold: float) -> tuple[int, ...]:
        """The labels whose patches are unlearned at ``threshold``."""
        found = tuple(int(label) for label in (indices > threshold).nonzero())
        return found or ((int(sizes.argmin()),) if self.unflagged == "unlearn-smallest" else ())

    def unlearned(self, view: DefenderView, patches: Sequence[Patch]) -> Network:
        """The model fine-tuned with these patches under true labels; as it is without any."""
        if not patches:
            return view.model
        data = stamped(view.clean, patches, self.share, generator(view.seed, "neural-cleanse", "stamps"))
        return fine_tuned(view.model, data, self.recipe(view), view.scope, derive_seed(view.seed, "fine-tuning"))

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        net, data = view.model.to(default_device()).requires_grad_(False), view.clean.to(default_device())
        if not len(data):
            raise Inapplicable("the clean budget is empty: no patch can be searched")
        patches = [self.invert(net, data, label, view.seed) for label in range(view.num_classes)]
        sizes = torch.tensor([patch.size for patch in patches], dtype=torch.float64)
        indices, models = anomaly_indices(sizes), dict[tuple[int, ...], Network]()
        reached = f"{sum(patch.reached for patch in patches)} of {len(patches)} searches reached {100 * self.success:g} %"
        smallest = f"smallest: label {int(sizes.argmin())}, anomaly index {float(indices[sizes.argmin()]):.2f}"
        for threshold in sorted({self.threshold, *self.grid}):
            labels = self.flagged(indices, sizes, threshold)
            if labels not in models:
                models[labels] = self.unlearned(view, [patches[label] for label in labels])
            shown = ", ".join(map(str, labels)) or "none, the model is as it was given"
            yield Candidate(
                models[labels], threshold, threshold == self.threshold, float(len(labels)),
                note=f"flagged labels: {shown}; {smallest}; {reached}",
            )  # fmt: skip
