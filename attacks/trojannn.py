"""TrojanNN. Liu, Ma, Aafer, Lee, Zhai, Wang and Zhang, "Trojaning Attack on Neural Networks", NDSS 2018.

A patch that is searched for, not designed: its pixels are chosen so that it excites a few well-connected neurons of a clean
network as strongly as possible, a strong feature which the poisoned training need only tie to the target. At test time the patch
sends any image there.

Needs: the training data and a network trained on it. Edits: the pixels under the patch (replaced), the label. Dial: the plan's
rate.
Deviations from the paper: the paper retrains a given network on data it has reverse-engineered; as in every benchmark, the patch
poisons a training set here. The neurons are those of the embedding with the largest absolute weights into the next layer, and the
patch is found by Adam on pixels in [0, 1], both as in TrojanZoo; the paper descends on the pixels themselves, and its smoothing of
them is left out, as TrojanZoo saw no difference. BackdoorBench's patch, an apple whose values wrap around beyond 255, is not
reproduced: it is stronger for a reason that is no part of the method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from attacks.adversarial import frozen
from attacks.base import Attack, Crafted, Plan
from models.backbone import Network
from models.images import ImageSet
from models.spec import BadInput, Ge, Gt, Le, Lt, generator
from models.training import default_device

__all__ = ["Patch", "TrojanNN", "connected", "place", "search"]


def connected(net: Network, count: int) -> Tensor:
    """The ``count`` neurons of the embedding with the largest sum of absolute weights into the head's first layer, int64 (count,).

    Ties go to the lower number.
    """
    following = net.head[0]
    assert isinstance(following, nn.Linear)
    return following.weight.detach().abs().sum(0).argsort(descending=True, stable=True)[:count]


def place(size: int, margin: int, height: int, width: int) -> tuple[int, int, int, int]:
    """[left, right, top, bottom]: the pixels beside a square near the lower right corner, in the order in which ``pad`` takes them.

    ``size`` and ``margin`` are in 32nds of the image's shorter side; the square has at least one pixel.

    Raises:
        BadInput: the square does not fit.
    """
    scale = min(height, width) / 32
    side, beside = max(1, round(size * scale)), round(margin * scale)
    if side + beside > min(height, width):
        raise BadInput(f"trojannn: size + margin = {side + beside} pixels do not fit images of {height} x {width}")
    return width - beside - side, beside, height - beside - side, beside


def search(
    net: Network, start: Tensor, around: tuple[int, int, int, int], neurons: Tensor, value: float, lr: float, steps: int
) -> Tensor:
    """The patch, float (C, h, w) in [0, 1], that brings ``neurons`` closest to ``value`` when it is put on a black image.

    Minimises sum (value - |a_i|)^2 over z with patch = (tanh z + 1) / 2, by ``steps`` of Adam whose rate falls from ``lr`` to 0 as
    half a cosine.

    Args:
        net: in evaluation mode, its parameters without gradients.
        start: z of the first step, float (C, h, w), on the device of ``net``.
        around: as :func:`place` gives it.
        neurons: int64 (count,), as :func:`connected` gives them.
        value: the activation aimed at.
        lr: rate of the first step.
        steps: number of steps.
    """
    z = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([z], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, steps))
    for _ in range(steps):
        image = pad((torch.tanh(z) + 1) / 2, list(around))[None]
        z.grad = torch.autograd.grad((value - net.embed(image)[0, neurons].abs()).square().sum(), z)[0]
        optimizer.step()
        schedule.step()
    return (torch.tanh(z.detach()) + 1) / 2


class Patch:
    """Pixels float (C, h, w) in [0, 1] in place of an image's own; ``around`` as :func:`place` gives it.

    See :data:`attacks.base.Trigger`.
    """

    def __init__(self, pixels: Tensor, around: tuple[int, int, int, int]) -> None:
        self.pixels = pixels
        self.values = pad(pixels, list(around))
        self.mask = pad(torch.ones(pixels.shape[1:], dtype=torch.bool), list(around))

    def __call__(self, images: Tensor, index: Tensor) -> Tensor:
        return torch.where(self.mask.to(images.device), self.values.to(images.device), images)


@dataclass(frozen=True)
class TrojanNN(Attack):
    """x' = x outside the square, the searched patch inside.

    Attributes:
        size: side of the square in 32nds of the image's shorter side (backdoor-toolbox: 8).
        margin: between the square and the lower and right edges, likewise (backdoor-toolbox: 3).
        neurons: how many are excited (TrojanZoo and BackdoorBench: 2); all of them where the embedding has fewer.
        value: the activation aimed at (TrojanZoo: 100); far above what is reached, so that the patch is as exciting as it can be.
        lr: of Adam (TrojanZoo: 0.1).
        steps: of Adam (TrojanZoo and BackdoorBench: 1000).

    >>> attack = TrojanNN(size=8, margin=3)
    >>> place(attack.size, attack.margin, 32, 32)  # pixels to the left, right, top and bottom of the square
    (21, 3, 21, 3)
    """

    name: ClassVar[str] = "trojannn"
    needs_surrogate: ClassVar[bool] = True
    keeps: ClassVar[bool] = True

    size: Annotated[int, Ge(1), Le(32)] = 8
    margin: Annotated[int, Ge(0), Lt(32)] = 3
    neurons: Annotated[int, Ge(1), Le(65_536)] = 2
    value: Annotated[float, Gt(0), Le(1_000_000)] = 100.0
    lr: Annotated[float, Gt(0), Le(10)] = 0.1
    steps: Annotated[int, Ge(0), Le(100_000)] = 1000

    def craft(self, train: ImageSet, plan: Plan, seed: int, surrogate: Network | None = None) -> Crafted:
        """The same patch for training and test: searched on ``surrogate`` from normal noise drawn from ``seed``.

        Raises:
            BadInput: no surrogate, or the square does not fit the images.
        """
        if surrogate is None:
            raise BadInput("trojannn: searches its patch on a network trained on clean data, and none was given")
        channels, height, width = train.shape
        around = place(self.size, self.margin, height, width)
        left, right, top, bottom = around
        side = height - top - bottom, width - left - right
        start = torch.randn(channels, *side, generator=generator(seed, "trojannn-patch"))
        net = frozen(surrogate)
        neurons = connected(net, self.neurons)
        found = search(net, start.to(default_device()), around, neurons, self.value, self.lr, self.steps).cpu()
        trigger = Patch(found, around)
        return Crafted(train=trigger, test=trigger)

    def keep(self, crafted: Crafted) -> dict[str, Tensor]:
        """The pixels that were found: a search rounds differently on another machine."""
        assert isinstance(crafted.test, Patch)
        return {"pixels": crafted.test.pixels}

    def restore(
        self, kept: Mapping[str, Tensor], train: ImageSet, plan: Plan, seed: int, surrogate: Callable[[], Network | None]
    ) -> Crafted:
        trigger = Patch(kept["pixels"], place(self.size, self.margin, *train.shape[1:]))
        return Crafted(train=trigger, test=trigger)
