"""IMC, input-model co-optimisation. Pang, Shen, Zhang, Ji, Vorobeychik, Luo, Liu and Wang, "A Tale of Evil Twins: Adversarial
Inputs versus Poisoned Models", CCS 2020, arXiv 1911.01559. The trojan form, as in the authors' TrojanZoo.

Trigger and model are optimised in turns. Before every epoch the pixels of a small patch, the mark, are moved to where the network
so far already sends marked images to the target; then the epoch trains on batches that hold marked images with the attacker's
label. The network then has less to learn than for a fixed mark. At test time the mark of the last
epoch sends any image to the target.

Needs: control of the training. Edits: the pixels under the mark (replaced), labels of marked images. Dial: the plan's rate; a rate
is not comparable with a static attack's, since another share of the data is poisoned in every epoch and nearly every image is seen
triggered in the end.
Deviations from the paper: the network is trained from scratch, where the paper's starts from a pretrained one, so that the first
marks are fitted to a network that has learned little, and the mark starts from noise instead of TrojanNN's search. Marked images
replace clean ones in a batch, where TrojanZoo adds them. The paper's terms for fidelity and specificity are left to the mark's size
and to the clean rest of the batch. The mark is optimised on images without augmentation and put into them before it, like every
static trigger.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from attacks.badnets import patch
from attacks.base import Attack, Crafted, Plan, Power
from attacks.dynamic import DynamicVictim, Rounding
from models.backbone import Network
from models.classifier import Classifier
from models.images import ImageSet, to_float
from models.loop import Epochs
from models.recipe import Recipe
from models.spec import BadInput, Ge, Gt, Le, Lt, Share, generator

__all__ = ["IMC", "IMCVictim", "Mark", "marked"]


def marked(images: Tensor, mask: Tensor, z: Tensor) -> Tensor:
    """x outside the mask, (tanh z + 1) / 2 inside: images (N, C, H, W) in [0, 1], mask bool (H, W), z float (C, H, W)."""
    return torch.where(mask, (torch.tanh(z) + 1) / 2, images)


class Mark:
    """One mark for every image, see :func:`marked` and :data:`attacks.base.Trigger`."""

    def __init__(self, mask: Tensor, z: Tensor) -> None:
        self.mask, self.z = mask.cpu(), z.detach().cpu()

    def __call__(self, images: Tensor, index: Tensor) -> Tensor:
        return marked(images, self.mask.to(images.device), self.z.to(images.device))


class IMCVictim(DynamicVictim):
    """A dynamic victim that fits its trigger to the network before every epoch."""

    def __init__(self, attack: IMC, net: Network, recipe: Recipe, crafted: Crafted, plan: Plan, seed: int) -> None:
        super().__init__(net, recipe, crafted, plan, seed, cover_rate=0.0, rounding=attack.rounding)
        self.attack, self.seed = attack, seed
        self.held: ImageSet | None = None

    def loader(self, data: ImageSet, seed: int) -> Epochs:
        """Also keeps the images that the mark is fitted on."""
        self.held = data
        return super().loader(data, seed)

    def on_train_epoch_start(self) -> None:
        fitted = self.fitted_mark(int(self.current_epoch))
        self.crafted = Crafted(train=fitted, test=fitted)

    def mark_loss(self, images: Tensor, targets: Tensor, mask: Tensor, z: Tensor) -> Tensor:
        """Cross-entropy of marked images towards ``targets`` (N,), a scalar; shapes as in :func:`marked`."""
        return cross_entropy(self.net(marked(images, mask, z)), targets)

    def fitted_mark(self, epoch: int) -> Mark:
        """The mark, moved by one pass of Adam over ``share`` of the training images, drawn anew for every epoch.

        Its own loop, since the training loop would hand back a network that is being trained; nothing of that network changes.
        """
        mark, data = self.crafted.train, self.held
        assert isinstance(mark, Mark)
        assert data is not None, "the loader comes first"
        order = torch.randperm(len(data), generator=generator(self.seed, "imc-images", epoch))
        order = order[: round(self.attack.share * len(data))].to(data.images.device)
        targets = self.plan.relabel(data.labels, data.num_classes)
        mask, z = mark.mask.to(data.images.device), mark.z.to(data.images.device).clone().requires_grad_()
        optimizer = torch.optim.Adam([z], lr=self.attack.lr)
        was_training = self.net.training
        self.net.eval()
        with torch.enable_grad():
            for part in torch.split(order, self.recipe.batch):
                loss = self.mark_loss(to_float(data.images[part]), targets[part], mask, z)
                (z.grad,) = torch.autograd.grad(loss, [z])
                optimizer.step()
        self.net.train(was_training)
        return Mark(mask, z)


@dataclass(frozen=True)
class IMC(Attack):
    """x' = x outside the mark, (tanh z + 1) / 2 inside; z is fitted to the network before every epoch.

    Attributes:
        size: pixels a side of the mark, near the lower right corner, on images up to 32 pixels (ours: 3); ``round(size * S / 32)``
            where the shorter side S is more.
        margin: pixels between the mark and the image's edges, scaled like ``size`` (ours: 1).
        lr: of Adam on z (TrojanZoo: 0.1).
        share: share of the training set that the mark is fitted on before an epoch (TrojanZoo: 1, one pass); 0 = it stays as it was
            drawn.
        rounding: poisoned samples per batch, see :func:`attacks.dynamic.batch_roles`: ``stochastic`` (TrojanZoo) or ``floor``.

    >>> data = ImageSet(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4), num_classes=4)
    >>> crafted = IMC(size=2).craft(data, Plan(), seed=0)
    >>> int((crafted.train(torch.zeros(1, 3, 32, 32), torch.tensor([0])) > 0).sum())  # 2 x 2 pixels in 3 channels
    12
    """

    name: ClassVar[str] = "imc"
    keeps: ClassVar[bool] = True

    size: Annotated[int, Ge(1), Le(32)] = 3
    margin: Annotated[int, Ge(0), Lt(32)] = 1
    lr: Annotated[float, Gt(0), Le(10)] = 0.1
    share: Share = 1.0
    rounding: Rounding = "stochastic"

    @property
    def power(self) -> Power:
        return Power.TRAINING

    def craft(self, train: ImageSet, plan: Plan, seed: int, surrogate: Network | None = None) -> Crafted:
        """A mark of normal noise, drawn from ``seed``; it is fitted in training, see :meth:`finished`.

        Raises:
            BadInput: the mark does not fit the images.
        """
        channels, height, width = train.shape
        scale = max(1.0, min(height, width) / 32)
        size, margin = round(self.size * scale), round(self.margin * scale)
        if size + margin > min(height, width):
            raise BadInput(f"imc: size + margin = {size + margin} pixels do not fit images of {height} x {width}")
        mask, _ = patch(torch.ones(1, 1), size, margin, height, width)
        start = Mark(mask, torch.randn(channels, height, width, generator=generator(seed, "imc-mark")))
        return Crafted(train=start, test=start)

    def victim(self, net: Network, recipe: Recipe, crafted: Crafted, plan: Plan, seed: int) -> Classifier:
        return IMCVictim(self, net, recipe, crafted, plan, seed)

    def finished(self, victim: Classifier, crafted: Crafted) -> Crafted:
        """The mark of the last epoch."""
        assert isinstance(victim, IMCVictim)
        return victim.crafted

    def keep(self, crafted: Crafted) -> dict[str, Tensor]:
        """The mark: it is learned with the victim."""
        assert isinstance(crafted.test, Mark)
        return {"mask": crafted.test.mask, "z": crafted.test.z}

    def restore(
        self, kept: Mapping[str, Tensor], train: ImageSet, plan: Plan, seed: int, surrogate: Callable[[], Network | None]
    ) -> Crafted:
        mark = Mark(kept["mask"], kept["z"])
        return Crafted(train=mark, test=mark)
