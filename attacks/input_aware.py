"""Input-aware dynamic backdoor. Nguyen and Tran, "Input-Aware Dynamic Backdoor Attack", NeurIPS 2020, arXiv 2010.08138.

Every image has a trigger of its own: one generator draws a pattern for it, another a mask of where the pattern replaces the
image. The mask generator is trained first, to masks that are small and differ between images. Then the attacker trains classifier
and pattern generator together: in every batch some images receive their own trigger and the attacker's label, and others the
trigger of *another* image and keep their label, so that a trigger works on no image but its own. A diversity loss keeps patterns
of different images apart. At test time an image's own trigger sends it to the target.

Needs: control of the training. Edits: the pixels under the mask of poisoned and cover images; labels of poisoned ones. Dial: the
plan's rate; a rate is not comparable with a static attack's, since another share of the data is poisoned in every epoch and nearly
every image is seen triggered in the end.
Deviations from the paper: the other image is another of the same batch, not one of a second loader, and the patterns of both kinds
are made in one pass of the generator. The gradients of the pattern generator are set to zero after each of its steps; in the
authors' code they add up over the whole training (``accumulate_g``). The output is squashed by one tanh as in the authors' code
(BackdoorBench applies it twice). Steps of a learning rate come at the authors' shares of a training, whatever its length. Masks are
trained on images without augmentation; the classifier's augmentation is the recipe's and comes before the trigger, as in the
authors' code. Shares hold on average (``rounding``), not rounded down per batch. Triggered images are rounded to 8 bits when they
are stored or tested, not in training, where gradients pass through them. Image sides need not be multiples of 8: a stage is
up-sampled to the very size that its pooling had reduced.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d

from attacks.base import Attack, Crafted, Plan, Power, Role, uniforms
from attacks.dynamic import DynamicVictim, Rounding, another, batch_roles
from attacks.generated import in_fixed_batches, part, prefixed
from models.backbone import Network, Normalise
from models.classifier import Classifier
from models.images import ImageSet, to_float
from models.loop import Loop
from models.recipe import Recipe
from models.spec import BadInput, BatchSize, EpochCount, Ge, Gt, Le, Share, derive_seed
from models.training import optimise, seeded

__all__ = ["CrossTrigger", "Generator", "InputAware", "OwnTrigger", "diversity", "hardened", "mixed", "statistics"]

STAGES = 3
MASK_STEPS = (10 / 25, 20 / 25)
"""When the mask generator's learning rate falls to a tenth, as shares of its training (authors' code: epochs 10 and 20 of 25)."""
PATTERN_STEPS = (200 / 600, 300 / 600, 400 / 600, 500 / 600)
"""When the pattern generator's does, as shares of the victim's training (authors' code: of 600 epochs)."""
EPSILON = 1e-7


def _block(inputs: int, outputs: int, *, relu: bool = True) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs, momentum=0.05)]
    return nn.Sequential(*layers, nn.ReLU()) if relu else nn.Sequential(*layers)


class Generator(nn.Module):
    """An encoder and a decoder without skips: images float (N, C, H, W) in [0, 1] -> (N, ``outputs``, H, W) in (0, 1).

    Three times two convs and a max-pool (``width``, 2 ``width``, 4 ``width`` channels), one conv, three times bilinear up-sampling
    and two convs; every conv with batch norm, all but the last with ReLU; tanh(.)/2 + 1/2. Sides of at least 8 pixels.

    Args:
        outputs: channels of what it draws.
        width: channels of the first stage.
        mean: of the training images, per channel.
        std: of the training images, per channel.
    """

    def __init__(self, outputs: int, width: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.normalise = Normalise(mean, std)
        widths = [len(mean), *(width << stage for stage in range(STAGES))]
        self.down = nn.ModuleList(
            nn.Sequential(_block(before, after), _block(after, after)) for before, after in pairwise(widths)
        )
        self.middle = _block(widths[-1], widths[-1])
        after = [*widths[-2:0:-1], outputs]
        self.up = nn.ModuleList(
            nn.Sequential(_block(before, before), _block(before, last, relu=stage < STAGES - 1))
            for stage, (before, last) in enumerate(zip(widths[:0:-1], after, strict=True))
        )

    def forward(self, images: Tensor) -> Tensor:
        x, sizes = self.normalise(images), []
        for stage in self.down:
            sizes.append(x.shape[2:])
            x = max_pool2d(stage(x), 2)
        x = self.middle(x)
        for stage, size in zip(self.up, reversed(sizes), strict=True):
            x = stage(interpolate(x, size=size, mode="bilinear", align_corners=False))
        out: Tensor = x.tanh() / 2 + 0.5
        return out


def hardened(mask: Tensor) -> Tensor:
    """Masks in (0, 1) pushed towards 0 and 1: tanh(20 m - 10) / 2 + 1/2."""
    return (20 * mask - 10).tanh() / 2 + 0.5


def mixed(images: Tensor, pattern: Tensor, mask: Tensor) -> Tensor:
    """x + (p - x) m: images and patterns (N, C, H, W), masks (N, 1, H, W), all in [0, 1]."""
    return images + (pattern - images) * mask


def diversity(one: Tensor, other: Tensor, made_one: Tensor, made_other: Tensor) -> Tensor:
    """Scalar: mean over pairs of distance(inputs) / (distance(outputs) + 1e-7); large where different inputs give equal outputs.

    A distance is the root of the mean squared difference over all of a sample. All arguments (N, ...); 0 for no pairs.
    """

    def distance(a: Tensor, b: Tensor) -> Tensor:
        # A norm has the gradient 0 where both are equal, which the root of a mean does not.
        apart = (a - b).flatten(1)
        norm: Tensor = torch.linalg.vector_norm(apart, dim=1)
        return norm / math.sqrt(apart.shape[1])

    ratios = distance(one, other) / (distance(made_one, made_other) + EPSILON)
    return ratios.sum() / max(1, len(ratios))


def statistics(train: ImageSet) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every channel, in [0, 1]; a deviation below 0.001 is given as 0.001."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in train.images.cpu().unbind(1):
        share = torch.bincount(channel.reshape(-1), minlength=256) / channel.numel()
        mean = share.double() @ values
        means.append(float(mean))
        stds.append(max(0.001, float((share.double() @ (values - mean).square()).sqrt())))
    return means, stds


class OwnTrigger:
    """Each image with its own pattern under its own mask; see :data:`attacks.base.Trigger`."""

    def __init__(self, pattern: Generator, mask: Generator) -> None:
        self.pattern, self.mask = (copy.deepcopy(net).cpu().eval().requires_grad_(False) for net in (pattern, mask))

    def source(self, images: Tensor, index: Tensor) -> Tensor:
        """The images whose triggers are used."""
        return images

    def __call__(self, images: Tensor, index: Tensor) -> Tensor:
        pattern, mask = self.pattern.to(images.device), self.mask.to(images.device)

        def draw(x: Tensor) -> Tensor:
            return torch.cat([pattern(x), hardened(mask(x))], dim=1)

        drawn = in_fixed_batches(draw, self.source(images, index))
        return mixed(images, drawn[:, :-1], drawn[:, -1:]).clamp(0.0, 1.0)


class CrossTrigger(OwnTrigger):
    """Each image with the trigger of another training image, looked up by index."""

    def __init__(self, pattern: Generator, mask: Generator, train: ImageSet, key: int) -> None:
        super().__init__(pattern, mask)
        self.train, self.key = train, key

    def source(self, images: Tensor, index: Tensor) -> Tensor:
        chosen = another(self.key, index, len(self.train)).to(self.train.images.device)
        return to_float(self.train.images[chosen]).to(images.device)


class MaskTraining(Loop):
    """Trains a mask generator: ``norm_weight`` * mean(relu(mask - density)) + ``diversity_weight`` * :func:`diversity`."""

    def __init__(self, mask: Generator, recipe: Recipe, attack: InputAware) -> None:
        super().__init__(recipe)
        self.mask, self.attack = mask, attack

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        images = batch[0]
        masks = hardened(self.mask(images))
        return self.mask_loss(images, masks)

    def mask_loss(self, images: Tensor, masks: Tensor) -> Tensor:
        """Scalar; every image of the batch (N, C, H, W) is paired with the next one."""
        inputs = self.mask.normalise(images)
        apart = diversity(inputs, inputs.roll(-1, 0), masks, masks.roll(-1, 0))
        return self.attack.norm_weight * (masks - self.attack.density).relu().mean() + self.attack.diversity_weight * apart

    def configure_optimizers(self) -> Any:
        return _annealed(self.mask, self.attack.generator_lr, self.total_steps, MASK_STEPS)


def _annealed(net: nn.Module, lr: float, steps: int, shares: Sequence[float]) -> dict[str, Any]:
    """Adam (betas .5, .9) and its schedule per step, x0.1 at ``shares`` of ``steps``, as Lightning takes them."""
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, betas=(0.5, 0.9))
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [max(1, int(steps * share)) for share in shares], gamma=0.1)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class InputAwareVictim(DynamicVictim):
    """Trains classifier and pattern generator on batches whose triggers are made after augmentation."""

    def __init__(self, net: Network, recipe: Recipe, crafted: Crafted, plan: Plan, seed: int, attack: InputAware) -> None:
        cover_rate = attack.cover_rate(plan)
        super().__init__(net, recipe, crafted, plan, seed, cover_rate=cover_rate, rounding=attack.rounding)
        self.before_augment = None  # augmentation comes first
        assert isinstance(crafted.train, OwnTrigger)
        self.attack = attack
        self.pattern = copy.deepcopy(crafted.train.pattern).requires_grad_(True)
        self.mask = copy.deepcopy(crafted.train.mask)

    def train(self, mode: bool = True) -> InputAwareVictim:
        """As usual, but the mask generator is finished: it stays in evaluation mode."""
        super().train(mode)
        self.mask.eval()
        return self

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels, index = batch
        role = batch_roles(self.draws(index), self.plan.rate, self.cover_rate, self.rounding)
        self.count(role)
        with torch.autocast(images.device.type, enabled=False):  # triggers are pictures: float32, as they are at test
            images, labels, apart = self.triggered(images, labels, role)
        return self.loss(self(images), labels, index) + self.attack.diversity_weight * apart

    def draws(self, index: Tensor) -> Tensor:
        """Uniforms (B, 2) of this epoch that decide the roles."""
        return uniforms(self.key, index + ((int(self.current_epoch) + 1) << 32), 2)

    def triggered(self, images: Tensor, labels: Tensor, role: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The attacker's batch and its diversity loss.

        Poisoned images carry their own trigger, covers that of the batch's previous image. The loss pairs poisoned images with the
        images that gave the covers their triggers, as far as there are both.
        """
        poisoned, covers = (torch.nonzero(role == kind).flatten() for kind in (Role.POISON, Role.COVER))
        touched = torch.cat([poisoned, covers])
        if not len(touched):
            return images, labels, images.new_zeros(())
        sources = torch.cat([images[poisoned], images[covers - 1]])  # -1 is the last: a batch's order is random anyway
        # Batch norm needs two values per channel; of images below 16 pixels a single one has only one.
        fed = sources if len(sources) > 1 else torch.cat([sources, sources])
        patterns = self.pattern(fed)[: len(sources)]
        with torch.no_grad():
            masks = hardened(self.mask(sources))
        images, labels = images.clone(), labels.clone()
        images[touched] = mixed(images[touched], patterns, masks)
        labels[poisoned] = self.plan.relabel(labels[poisoned], self._num_classes())
        first, pairs = len(poisoned), min(len(poisoned), len(covers))
        inputs, outputs = self.pattern.normalise(sources), self.pattern.normalise(patterns)
        apart = diversity(inputs[:pairs], inputs[first : first + pairs], outputs[:pairs], outputs[first : first + pairs])
        return images, labels, apart

    def configure_optimizers(self) -> Any:
        """The classifier's; the generator's optimiser is stepped in :meth:`after_step`, on the gradients of the same loss."""
        own = _annealed(self.pattern, self.attack.generator_lr, self.total_steps, PATTERN_STEPS)
        self.moves, self.schedule = own["optimizer"], own["lr_scheduler"]["scheduler"]
        return super().configure_optimizers()

    def after_step(self) -> None:
        self.moves.step()
        self.schedule.step()
        if not self.attack.accumulate_g:
            self.moves.zero_grad()


@dataclass(frozen=True)
class InputAware(Attack):
    """x' = x + (G(x) - x) h(M(x)): generators G of the pattern and M of the mask, h pushes masks towards 0 and 1.

    Attributes:
        width: channels of the generators' first stage (authors' code: 32; 16 and one stage less on MNIST).
        density: share of the image that a mask may cover for free (authors' code: 0.032).
        norm_weight: weight of what exceeds it (authors' code: 100).
        diversity_weight: of the diversity loss, for masks and for patterns (authors' code: 1).
        mask_epochs: passes of the mask generator's training (authors' code: 25).
        batch: images per step of it (authors' code: 128).
        generator_lr: of Adam with betas .5 and .9, for both generators (authors' code: 0.01).
        accumulate_g: never set the pattern generator's gradients to zero, as in the authors' code and BackdoorBench (ours: off).
        rounding: shares per batch: ``stochastic`` (ours) or ``floor`` (authors' code).

    >>> attack = InputAware(width=2)
    >>> generator = Generator(outputs=1, width=attack.width, mean=[0.5] * 3, std=[0.25] * 3)
    >>> generator(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 1, 32, 32])
    """

    name: ClassVar[str] = "input-aware"
    cover_share: ClassVar[float] = 1.0  # authors' code: as many cross-trigger samples as poisoned ones
    keeps: ClassVar[bool] = True

    width: Annotated[int, Ge(1), Le(512)] = 32
    density: Share = 0.032
    norm_weight: Annotated[float, Ge(0), Le(1_000_000)] = 100.0
    diversity_weight: Annotated[float, Ge(0), Le(1_000_000)] = 1.0
    mask_epochs: EpochCount = 25
    batch: BatchSize = 128
    generator_lr: Annotated[float, Gt(0), Le(10)] = 0.01
    accumulate_g: bool = False
    rounding: Rounding = "stochastic"

    @property
    def power(self) -> Power:
        return Power.TRAINING

    def craft(self, train: ImageSet, plan: Plan, seed: int, surrogate: Network | None = None) -> Crafted:
        """Trains the mask generator. The pattern generator is untrained: it learns with the victim, see :meth:`finished`.

        Raises:
            BadInput: images have a side below 8 pixels.
            Diverged: the mask generator's weights are not finite.
        """
        _, height, width = train.shape
        if min(height, width) < 1 << STAGES:
            raise BadInput(f"input-aware: images must have sides of at least 8 pixels, not {height} x {width}")
        mask, pattern = self._generators(train, seed)
        recipe = Recipe(epochs=self.mask_epochs, batch=self.batch, crop=0, flip=False)
        optimise(MaskTraining(mask, recipe, self), train, recipe, derive_seed(seed, "input-aware-mask"))
        return self.triggers(pattern, mask, train, seed)

    def _generators(self, train: ImageSet, seed: int) -> tuple[Generator, Generator]:
        """Untrained generators of the mask and of the pattern."""
        mean, std = statistics(train)
        with seeded(derive_seed(seed, "input-aware-generators")):
            return Generator(1, self.width, mean, std), Generator(train.shape[0], self.width, mean, std)

    def triggers(self, pattern: Generator, mask: Generator, train: ImageSet, seed: int) -> Crafted:
        own = OwnTrigger(pattern, mask)
        return Crafted(train=own, test=own, cover=CrossTrigger(pattern, mask, train, derive_seed(seed, "input-aware-cross")))

    def victim(self, net: Network, recipe: Recipe, crafted: Crafted, plan: Plan, seed: int) -> Classifier:
        return InputAwareVictim(net, recipe, crafted, plan, seed, self)

    def finished(self, victim: Classifier, crafted: Crafted) -> Crafted:
        """The triggers of the pattern generator as it was at the end of the training."""
        assert isinstance(victim, InputAwareVictim)
        assert isinstance(crafted.cover, CrossTrigger)
        own = OwnTrigger(victim.pattern, victim.mask)
        return Crafted(train=own, test=own, cover=CrossTrigger(victim.pattern, victim.mask, crafted.cover.train, crafted.cover.key))

    def keep(self, crafted: Crafted) -> dict[str, Tensor]:
        """Both generators: they are learned, the pattern's with the victim."""
        assert isinstance(crafted.test, OwnTrigger)
        return prefixed("pattern", crafted.test.pattern) | prefixed("mask", crafted.test.mask)

    def restore(
        self, kept: Mapping[str, Tensor], train: ImageSet, plan: Plan, seed: int, surrogate: Callable[[], Network | None]
    ) -> Crafted:
        mask, pattern = self._generators(train, seed)
        for name, net in (("mask", mask), ("pattern", pattern)):
            net.load_state_dict(part(name, kept))
        return self.triggers(pattern, mask, train, seed)
