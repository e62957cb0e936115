"""DFST-lite, after Cheng, Liu, Ma and Zhang, "Deep Feature Space Trojan Attack of Neural Networks by Controlled Detoxification",
AAAI 2021, arXiv 2012.11212.

The trigger is a style, given to the whole image: the colours of a sunrise. The attacker runs the training and detoxifies it: after
every epoch the neurons that answer the trigger most are found, a shallow filter is trained to excite them, and in the next epoch
images under that filter keep their label, so that the network cannot get by with simple features of the style.

Needs: control of the training (``detox = false``: the training data alone). Edits: every pixel of poisoned and cover images; labels
of poisoned ones. Dial: the plan's rate.
Deviations from the paper: "lite", since the style is procedural and not a trained generator's: the colour moments of a sunrise
plus a vertical gradient, so only the mechanism is claimed (a global style, and its detoxification). The filter is trained with the
gradients of all three terms, its minima are minima, and similarity is rewarded, as the paper means them; in the authors' PyTorch
code only the similarity term has a gradient, and that term is a dissimilarity, (1 - SSIM) / 2, with the reward's sign. Moving means
are of the pixels inside the image, where theirs count the zeros of the padding. Neurons are units of the embedding. Poison is drawn
from all classes and anew in every batch, where the authors' code draws from a fixed pool without the target class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, cross_entropy, max_pool2d

from attacks.base import Attack, Crafted, Plan, Power, Trigger
from attacks.blended import LUMINANCE
from attacks.dynamic import DynamicVictim, Rounding
from models.backbone import Network
from models.classifier import Classifier
from models.images import ImageSet, to_float
from models.loop import Epochs
from models.recipe import Recipe
from models.spec import BadInput, Ge, Le, PositiveShare, generator

__all__ = ["DFST", "DetoxVictim", "neighbourhoods", "ssim", "stylised", "sunrise"]

MEAN, STD = torch.tensor([0.64, 0.31, 0.24]), torch.tensor([0.28, 0.20, 0.15])
"""Of the red, green and blue of a sunrise."""
TOP, ORANGE, BOTTOM = (torch.tensor(colour)[:, None] for colour in ([0.35, 0.15, 0.40], [0.95, 0.50, 0.15], [0.08, 0.04, 0.06]))
HORIZON = 0.55
"""Where the sky is orange, as a share of the height from the top."""
SKY_WEIGHT = 0.35


# -- the style -----------------------------------------------------------------------------------------------------------------


def sunrise(height: int) -> Tensor:
    """A vertical gradient without its mean, float (3, H, 1): linear from purple to orange at the horizon, and on to dark."""
    row = (torch.arange(height) + 0.5) / height
    above, below = (row / HORIZON).clamp(max=1.0), ((row - HORIZON) / (1 - HORIZON)).clamp(min=0.0)
    gradient = torch.lerp(torch.lerp(TOP, ORANGE, above), BOTTOM, below)
    return (gradient - gradient.mean(1, keepdim=True))[:, :, None]


def stylised(images: Tensor) -> Tensor:
    """Images float (N, C, H, W) in [0, 1], C = 1 or 3, in the style: every channel's mean and spread moved to the sunrise's (the
    moments of Huang and Belongie, ICCV 2017, arXiv 1703.06868, taken of colours), plus the gradient; clipped to [0, 1].

    Grey images take the luminance of it all.
    """
    mean, std, sky = MEAN, STD, sunrise(images.shape[2])
    if images.shape[1] == 1:
        mean, std = (LUMINANCE @ mean)[None], (LUMINANCE @ std)[None]
        sky = torch.einsum("c,chw->hw", LUMINANCE, sky)[None]
    mean, std, sky = (each.to(images.device) for each in (mean, std, sky))
    own, spread = images.mean((2, 3), keepdim=True), images.std((2, 3), keepdim=True, correction=0)
    moved = (images - own) / spread.clamp_min(1 / 255) * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    return (moved + SKY_WEIGHT * sky).clamp(0.0, 1.0)


# -- detoxification ------------------------------------------------------------------------------------------------------------


def neighbourhoods(images: Tensor, reach: int) -> Tensor:
    """Images float (N, C, H, W) and their moving maximum, minimum and mean, float (N, 4 C, H, W).

    The window reaches ``reach`` pixels to each side and is cut off at the edges.
    """
    size = 2 * reach + 1
    high, low = max_pool2d(images, size, 1, reach), -max_pool2d(-images, size, 1, reach)
    return torch.cat([images, high, low, avg_pool2d(images, size, 1, reach, count_include_pad=False)], 1)


def ssim(one: Tensor, other: Tensor, window: int = 5) -> Tensor:
    """Structural similarity of images float (N, C, H, W) in [0, 1], a scalar: the mean over all windows that fit.

    Wang, Bovik, Sheikh and Simoncelli, IEEE Transactions on Image Processing 13(4), 2004: Gaussian windows of deviation 1.5 and
    ``window`` pixels (there 11, in the authors' code 5; as many as fit, where images are smaller), with the constants 0.01^2 and
    0.03^2.
    """
    channels = one.shape[1]
    size = min(window, (min(one.shape[2:]) - 1) // 2 * 2 + 1)
    offset = torch.arange(size, dtype=one.dtype, device=one.device) - size // 2
    bell = torch.exp(-offset.square() / (2 * 1.5**2))
    bell = (bell / bell.sum()).expand(channels, 1, -1)

    def blur(x: Tensor) -> Tensor:
        return conv2d(conv2d(x, bell[:, :, None, :], groups=channels), bell[:, :, :, None], groups=channels)

    mean_a, mean_b = blur(one), blur(other)
    var_a, var_b = blur(one * one) - mean_a * mean_a, blur(other * other) - mean_b * mean_b
    covariance = blur(one * other) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    similar = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (similar / ((mean_a.square() + mean_b.square() + c1) * (var_a + var_b + c2))).mean()


class DetoxVictim(DynamicVictim):
    """A dynamic victim whose covers are detoxicants; there are none before the first epoch ends.

    Args:
        cover_rate: share of detoxicants in every later batch.
    """

    def __init__(
        self, attack: DFST, net: Network, recipe: Recipe, crafted: Crafted, plan: Plan, seed: int, *, cover_rate: float
    ) -> None:
        super().__init__(net, recipe, crafted, plan, seed, cover_rate=0.0, rounding=attack.rounding)
        self.attack, self.detox_rate, self.seed = attack, cover_rate, seed
        self.held: ImageSet | None = None

    def loader(self, data: ImageSet, seed: int) -> Epochs:
        """Also keeps the images that neurons and filters are judged on."""
        size = min(len(data), max(2, round(self.attack.share * len(data))))
        draw = torch.randperm(len(data), generator=generator(self.seed, "dfst-held"))
        self.held = data.subset(draw[:size].to(data.images.device))
        return super().loader(data, seed)

    def on_train_epoch_end(self) -> None:
        """Trains the next epoch's filter; the last epoch's end needs none."""
        if self.current_epoch + 1 < self.recipe.epochs and self.detox_rate > 0:
            self.crafted = dataclasses.replace(self.crafted, cover=self.attack.detoxicant(self.injector()))
            self.cover_rate = self.detox_rate

    def compromised(self) -> Tensor:
        """The units of the embedding (int64) whose mean answer rises most under the trigger."""
        images, _, index = self._held()
        with torch.no_grad():
            rise = torch.zeros((), device=images.device)
            for part in torch.split(index, self.recipe.batch):
                triggered = self.crafted.train(images[part], part)
                rise = rise + (self.net.embed(triggered) - self.net.embed(images[part])).sum(0)
        return rise.argsort(descending=True, stable=True)[: max(1, round(self.attack.neurons * len(rise)))]

    def detox_loss(self, weight: Tensor, images: Tensor, targets: Tensor, neurons: Tensor) -> Tensor:
        """Of the filter ``weight`` (C, 4 C): cross-entropy towards the target less the weighted similarity and activation."""
        shown = self.attack.injected(images, weight)
        z = self.net.embed(shown)
        loss = cross_entropy(self.net.head(z), targets)
        return loss - self.attack.ssim_weight * ssim(images, shown) - self.attack.activation_weight * z[:, neurons].mean()

    def injector(self) -> Tensor:
        """The filter (C, 4 C), from the identity on, that makes images excite the compromised neurons while they look as they did.

        Its own loop, since the training loop would hand back a network that is being trained; nothing of that network changes.
        """
        was_training = self.net.training
        self.net.eval()
        neurons = self.compromised()
        images, targets, index = self._held()
        channels = images.shape[1]
        weight = torch.eye(channels, 4 * channels, device=images.device, requires_grad=True)
        optimizer = torch.optim.Adam([weight], lr=self.attack.detox_lr, betas=(0.5, 0.9))  # authors' code
        with torch.enable_grad():
            for _ in range(self.attack.detox_epochs):
                for part in torch.split(index, self.recipe.batch):
                    loss = self.detox_loss(weight, images[part], targets[part], neurons)
                    (weight.grad,) = torch.autograd.grad(loss, [weight])
                    optimizer.step()
        self.net.train(was_training)
        return weight.detach().cpu()

    def _held(self) -> tuple[Tensor, Tensor, Tensor]:
        """(images float (M, C, H, W), the attacker's labels (M,), 0..M-1)."""
        assert self.held is not None, "the loader comes first"
        images = to_float(self.held.images)
        return images, self.plan.relabel(self.held.labels, self.held.num_classes), torch.arange(len(images), device=images.device)


class Detoxicant:
    """The cover trigger of a trained filter (C, 4 C); see :data:`attacks.base.Trigger`."""

    def __init__(self, attack: DFST, weight: Tensor) -> None:
        self.attack, self.weight = attack, weight

    def __call__(self, images: Tensor, index: Tensor) -> Tensor:
        return self.attack.injected(images, self.weight.to(images.device))


# -- the attack ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DFST(Attack):
    """x' = (1 - alpha) x + alpha * stylised(x); detoxicants are (1 - alpha) x + alpha * clip(filter of x's neighbourhoods).

    Attributes:
        alpha: blend ratio of the style, in (0, 1] (authors' code: 0.6).
        detox: whether training is controlled and detoxified (the paper); without, the style is a static, data-only trigger.
        detox_share: detoxicants per poisoned sample, where the plan names no cover rate (authors' code: 1).
        neurons: share of the embedding's units taken for compromised; one at least (authors' code: 0.01).
        share: share of the training set that neurons and filters are judged on; two images at least (authors' code: 0.03).
        reach: pixels to each side of the filter's neighbourhoods (authors' code: 5).
        detox_epochs: passes of the filter's training (authors' code: 10).
        detox_lr: of Adam in it (authors' code: 0.01).
        ssim_weight: of the similarity in the filter's loss (authors' code: 0.1).
        activation_weight: of the activation in the filter's loss (authors' code: 0.3).
        rounding: shares per batch, see :func:`attacks.dynamic.batch_roles` (ours: ``stochastic``).

    >>> stylised(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 3, 32, 32])
    >>> DFST(detox=False).power
    <Power.DATA: 'data'>
    """

    name: ClassVar[str] = "dfst"
    revision: ClassVar[int] = 2
    keeps: ClassVar[bool] = True

    alpha: PositiveShare = 0.6
    detox: bool = True
    detox_share: Annotated[float, Ge(0), Le(16)] = 1.0
    neurons: PositiveShare = 0.01
    share: PositiveShare = 0.03
    reach: Annotated[int, Ge(1), Le(64)] = 5
    detox_epochs: Annotated[int, Ge(0), Le(1000)] = 10
    detox_lr: PositiveShare = 0.01
    ssim_weight: Annotated[float, Ge(0), Le(100)] = 0.1
    activation_weight: Annotated[float, Ge(0), Le(100)] = 0.3
    rounding: Rounding = "stochastic"

    @property
    def power(self) -> Power:
        return Power.TRAINING if self.detox else Power.DATA

    def cover_rate(self, plan: Plan) -> float:
        """Detoxicants as a share of the training set, in [0, 1]; none without ``detox``."""
        if not self.detox:
            return 0.0
        return min(1.0, plan.rate * self.detox_share) if plan.cover_rate is None else plan.cover_rate

    def craft(self, train: ImageSet, plan: Plan, seed: int, surrogate: Network | None = None) -> Crafted:
        """The same style for training and test; nothing is drawn. Covers come with the training."""
        if train.shape[0] not in (1, 3):
            raise BadInput(f"dfst: the style is for images of 1 or 3 channels, not {train.shape}")

        def trigger(images: Tensor, index: Tensor) -> Tensor:
            return torch.lerp(images, stylised(images), self.alpha)

        return Crafted(train=trigger, test=trigger)

    def injected(self, images: Tensor, weight: Tensor) -> Tensor:
        """Detoxicants of images float (N, C, H, W) in [0, 1] under the filter ``weight`` (C, 4 C): the same shape and range."""
        filtered = conv2d(neighbourhoods(images, self.reach), weight[:, :, None, None]).clamp(0.0, 1.0)
        return torch.lerp(images, filtered, self.alpha)

    def detoxicant(self, weight: Tensor) -> Trigger:
        """The cover trigger of a trained filter."""
        return Detoxicant(self, weight)

    def victim(self, net: Network, recipe: Recipe, crafted: Crafted, plan: Plan, seed: int) -> Classifier:
        if not self.detox:
            return super().victim(net, recipe, crafted, plan, seed)
        return DetoxVictim(self, net, recipe, crafted, plan, seed, cover_rate=self.cover_rate(plan))

    def finished(self, victim: Classifier, crafted: Crafted) -> Crafted:
        """With the last epoch's detoxicants as covers."""
        return victim.crafted if isinstance(victim, DetoxVictim) else crafted

    def keep(self, crafted: Crafted) -> dict[str, Tensor]:
        """The filter of the last epoch, which is learned with the victim; nothing where there was none."""
        return {"filter": crafted.cover.weight} if isinstance(crafted.cover, Detoxicant) else {}

    def restore(
        self, kept: Mapping[str, Tensor], train: ImageSet, plan: Plan, seed: int, surrogate: Callable[[], Network | None]
    ) -> Crafted:
        crafted = self.craft(train, plan, seed)
        return dataclasses.replace(crafted, cover=self.detoxicant(kept["filter"])) if "filter" in kept else crafted
