"""NPD, Neural Polarizer based Defense: Zhu, Wei, Zha and Wu, "Neural Polarizer: A Lightweight and Effective Backdoor Defense via
Purifying Poisoned Features", NeurIPS 2023, arXiv 2306.16697.

In the features of a triggered image the image itself is still there, besides the trigger. A small linear layer, put into the frozen
network, can learn to let the one pass and hold the other back. It is trained on clean images x and on images x' that are perturbed
towards their likeliest wrong class t, in place of the unknown trigger and target: ``CE(x) + factor (l_target U(x', t) + l_right
CE(x', c) + l_wrong U(x', k))``, where U(x', c) is ``-log(1 - p_c(x'))``, c the class of x as predicted, and k the likeliest wrong
class of x'.

Needs: model, clean budget. Edits: nothing of the network; a 1x1 convolution and its norm are put before one convolution.
Dial: factor on the losses on perturbed images; larger purifies more; default 1. Each value costs a run.
Deviations from the paper: written from its abstract and from what the authors' code in BackdoorBench does and sets. There the
layer's norm begins without statistics, and five epochs at a tiny rate collect them, so that training starts from standardised
features. Here the norm begins with the clean images' statistics, and its scale and offset undo it, so that training starts from the
network itself; no such epochs are needed. The place in other networks is ours: before the last convolution but one (of those larger
than 1x1; never the first), which in PreAct-ResNet-18 is theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from defenses.base import Candidate, DefenderView, Defense, Inapplicable, Knowledge
from defenses.sau import unlearning
from models.backbone import Network
from models.classifier import Classifier
from models.recipe import Precision, Recipe
from models.spec import BatchSize, EpochCount, Ge, Le, LearningRate, derive_seed
from models.training import fit, in_batches, on_device

__all__ = ["NPD", "insert", "place", "runner_up"]

Weight = Annotated[float, Ge(0), Le(1000)]


def place(net: Network) -> str:
    """Dotted path of the convolution before which the layer goes: the last but one of those larger than 1x1, never the first.

    Raises:
        Inapplicable: there are fewer than two.
    """
    found = [
        f"features.{name}"
        for name, module in net.features.named_modules()
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1
    ]
    if len(found) < 2:
        raise Inapplicable("the layer goes between two convolutions, and the features have fewer")
    return found[max(1, len(found) - 2)]


@torch.no_grad()
def insert(net: Network, path: str, images: Tensor) -> nn.Sequential:
    """Puts a 1x1 convolution and a batch norm before the convolution ``path`` of ``net``, in place.

    They begin as the identity: the norm's statistics are those of ``images``, and its scale and offset undo it.

    Args:
        net: the network; its mode and place stay.
        path: dotted path of the convolution.
        images: uint8 (N, C, H, W), N >= 1.

    Returns:
        What is now at ``path``: convolution, norm, and the former convolution.
    """
    parent, _, name = path.rpartition(".")
    former = net.get_submodule(path)
    assert isinstance(former, nn.Conv2d)
    channels = former.in_channels
    sums = torch.zeros(2, channels, dtype=torch.float64)
    positions = 0

    def note(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal positions
        values = inputs[0].double().transpose(0, 1).flatten(1).cpu()
        sums.add_(torch.stack([values.sum(1), values.square().sum(1)]))
        positions += values.shape[1]

    handle = former.register_forward_pre_hook(note)
    with on_device(net) as device:
        in_batches(net, images, None, device)
    handle.remove()
    mean = sums[0] / positions
    norm = nn.BatchNorm2d(channels)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.copy_((sums[1] / positions - mean.square()).clamp_min(0))
    norm.weight.copy_((norm.running_var + norm.eps).sqrt())
    norm.bias.copy_(mean)
    # Without a draw from the global generator.
    linear: nn.Conv2d = nn.utils.skip_init(nn.Conv2d, channels, channels, 1, bias=False)  # type: ignore[no-untyped-call]
    linear.weight.copy_(torch.eye(channels).view(channels, channels, 1, 1))
    layer = nn.Sequential(linear, norm, former).to(former.weight.device).train(net.training)
    setattr(net.get_submodule(parent), name, layer)
    return layer


def runner_up(logits: Tensor, labels: Tensor) -> Tensor:
    """The likeliest class other than the label, int64 (N,), of logits (N, K)."""
    return logits.detach().scatter(1, labels[:, None], -torch.inf).argmax(1)


class _Polarizing(Classifier):
    """Trains the layer at ``path`` alone; the network and all norms are in evaluation mode."""

    def __init__(self, net: Network, recipe: Recipe, method: NPD, path: str, factor: float) -> None:
        super().__init__(net.requires_grad_(False), recipe)
        layer = net.get_submodule(path)
        assert isinstance(layer, nn.Sequential)
        self.method, self.factor, self.layer = method, factor, layer[:2]

    def train(self, mode: bool = True) -> _Polarizing:
        super().train(mode)
        self.net.eval()
        return self

    def trainable(self) -> list[nn.Parameter]:
        return list(self.layer.requires_grad_().parameters())

    def perturbed(self, images: Tensor, targets: Tensor) -> Tensor:
        """Images moved towards ``targets``, int64 (N,), by at most ``bound`` in all, in [0, 1]; without gradient.

        No further step is taken once more than the share ``reached`` is taken for its target.
        """
        shift, moved, size = torch.zeros_like(images), images, self.method.bound
        for _ in range(self.method.steps):
            shift.requires_grad_()
            logits = self((images + shift).clamp(0, 1))
            if (logits.argmax(1) == targets).double().mean() > self.method.reached:
                break
            (up,) = torch.autograd.grad(cross_entropy(logits, targets, reduction="sum"), shift)
            shift = shift.detach() - self.method.step * up.sign()
            shift = shift * (size / shift.flatten(1).norm(dim=1).clamp_min(1e-12)).clamp_max(1).view(-1, 1, 1, 1)
            moved = (images + shift).clamp(0, 1)
        return moved

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels, index = batch
        logits = self(images)
        loss = self.loss(logits, labels, index)
        if self.factor:
            targets, own = runner_up(logits, labels), logits.detach().argmax(1)
            logits = self(self.perturbed(images, targets))
            away = self.method.l_target * unlearning(logits, labels, targets)
            right = self.method.l_right * cross_entropy(logits, own)
            wrong = self.method.l_wrong * unlearning(logits, labels, runner_up(logits, labels))
            loss = loss + self.factor * (away + right + wrong)
        return loss


@dataclass(frozen=True)
class NPD(Defense):
    """Settings of the layer's training.

    Attributes:
        factor: on the losses on perturbed images, default of the dial (ours: 1, the weights as published).
        factors: further factors at which models are offered; each costs a whole run (ours: none).
        l_target: weight of the loss that leaves the perturbation's class (authors' code: 0.4).
        l_right: weight of the cross-entropy of perturbed images (authors' code: 0.4).
        l_wrong: weight of the loss that leaves their likeliest wrong class (authors' code: 0.4).
        bound: Euclidean length of a perturbation of pixels in [0, 1] (authors' code: 3).
        steps: of the perturbation, at most (authors' code: 2).
        step: by which every pixel moves in a step (authors' code: 0.1).
        reached: share of a batch; no step is taken once more are taken for their target (authors' code: 0.6).
        epochs: passes over the clean samples, without augmentation (authors' code: 50).
        lr: constant, with momentum 0.9 (authors' code: 0.01).
        batch: samples per step (authors' code: 128).
        weight_decay: of SGD (authors' code: 5e-4).

    >>> runner_up(torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]]), torch.tensor([0, 2]))
    tensor([2, 0])
    >>> NPD().needs.words
    'model + clean'
    """

    name: ClassVar[str] = "npd"
    family: ClassVar[str] = "purification"
    cost: ClassVar[str] = "{epochs} epochs on the clean budget, at most {steps} steps of perturbation each"
    revision: ClassVar[int] = 2  # 2: perturbation, losses and recipe as in the authors' code
    dial_name: ClassVar[str] = "factor on the losses on perturbed images"

    factor: Weight = 1.0
    factors: tuple[Weight, ...] = ()
    l_target: Weight = 0.4
    l_right: Weight = 0.4
    l_wrong: Weight = 0.4
    bound: Annotated[float, Ge(0), Le(1000)] = 3.0
    steps: Annotated[int, Ge(0), Le(1000)] = 2
    step: Annotated[float, Ge(0), Le(1)] = 0.1
    reached: Annotated[float, Ge(0), Le(1)] = 0.6
    epochs: EpochCount = 50
    lr: LearningRate = 0.01
    batch: BatchSize = 128
    weight_decay: Annotated[float, Ge(0), Le(1)] = 5e-4

    @property
    def needs(self) -> Knowledge:
        return Knowledge.MODEL | Knowledge.CLEAN

    def recipe(self, precision: Precision) -> Recipe:
        """Of the layer's training."""
        return Recipe(
            epochs=self.epochs, batch=self.batch, lr=self.lr, momentum=0.9, weight_decay=self.weight_decay, schedule="constant",
            crop=0, flip=False, precision=precision,
        )  # fmt: skip

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        clean = view.clean
        if not len(clean):
            raise Inapplicable("the clean budget is empty: the layer cannot be trained")
        for factor in sorted({self.factor, *self.factors}):
            net = view.model
            path = place(net)
            insert(net, path, clean.images)
            recipe = self.recipe(view.recipe.precision)
            fit(_Polarizing(net, recipe, self, path, factor), clean, recipe, derive_seed(view.seed, "npd"))
            yield Candidate(net.cpu().requires_grad_(True).eval(), factor, factor == self.factor, factor)
