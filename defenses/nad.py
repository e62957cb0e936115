"""NAD: Li, Lyu, Koren, Lyu, Li and Ma, "Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural Networks", ICLR
2021, arXiv 2101.05930.

A fine-tuned copy of the network, the teacher, looks less at the trigger than the network itself. The network, the student, is then
fine-tuned to look where the teacher looks: the loss is cross-entropy plus ``sum over maps of beta * MSE(A(student), A(teacher))``.
The attention map A of a feature map F is ``sum over channels of |F|^p``, divided by its Euclidean length.

Needs: model, clean budget. Edits: every weight.
Dial: a factor on the betas; larger follows the teacher more; 0 is fine-tuning by the same schedule; default 1. Each value costs a
run of the student; the teacher is trained once.
Deviations from the paper: its WideResNets are compared after each of their three groups. Here it is the last map of each image
size, of the three smallest sizes with more than one position: a map of one position is always the constant 1 (in BackdoorBench's
code one of the three terms is). The rate is BackdoorBench's, from which the published figures on file come, and constant. The
authors' code has 0.1 in the first two of 20 epochs, for a WRN-16-1. On a ResNet-9 (`cifar10-cpu`, BadNets, seed 0) the attention
losses are too strong for that rate: the student classified 32 % of the validation images correctly, against 83 % at 0.01 and the
victim's 86 %. Batch 128 for 64; crop and flip of the victim's recipe, without the code's Cutout; the last epoch, not the best on
test images. Student and teacher are each run once per step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from defenses.base import Candidate, DefenderView, Defense, Inapplicable, Knowledge, Scope
from defenses.fine_tuning import Tuned, tune
from models.backbone import Network
from models.recipe import Recipe
from models.spec import BatchSize, EpochCount, Ge, Le, LearningRate, derive_seed
from models.stages import maps, stages

__all__ = ["NAD", "attention"]

Factor = Annotated[float, Ge(0), Le(1000)]


def attention(features: Tensor, p: float = 2.0) -> Tensor:
    """Attention maps float (N, H, W) of feature maps (N, C, H, W): ``sum over c of |F_c|^p``, each scaled to Euclidean length 1.

    1e-6 is added to the length, so that an empty map stays 0. A map of one position is 1 whatever it holds.
    """
    power = features.float().abs().pow(p).sum(1)
    length: Tensor = power.flatten(1).norm(dim=1)
    return power / (length.view(-1, 1, 1) + 1e-6)


class _Student(Tuned):
    """Training that keeps the attention maps close to the teacher's. ``betas``: weights by module path, none of them 0."""

    def __init__(self, net: Network, recipe: Recipe, teacher: Network, betas: dict[str, float], p: float) -> None:
        super().__init__(net, recipe, Scope.WHOLE)
        self.teacher, self.betas, self.p = teacher.requires_grad_(False), betas, p

    def train(self, mode: bool = True) -> _Student:
        super().train(mode)
        self.teacher.eval()
        return self

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels, index = batch
        with maps(self.net, list(self.betas)) as own:
            loss = self.loss(self(images), labels, index)
        if self.betas:
            with torch.no_grad(), maps(self.teacher, list(self.betas)) as wanted:
                self.teacher(images)
        for path, beta in self.betas.items():
            loss = loss + beta * mse_loss(attention(own[path], self.p), attention(wanted[path], self.p))
        return loss


@dataclass(frozen=True)
class NAD(Defense):
    """Settings of the teacher's fine-tuning and of the distillation. Both use SGD with Nesterov momentum 0.9.

    Attributes:
        factor: on all betas, default of the dial (ours: 1, the betas as published).
        factors: further factors at which models are offered; each costs a whole run of the student (ours: none).
        betas: weight of each map's loss, from the largest map to the smallest; with fewer maps, the last ones (authors' code:
            500, 1000, 1000).
        p: power of the activations in an attention map (authors' code: 2).
        teacher_epochs: passes over the clean samples that make the teacher (authors' README: 5 to 10).
        epochs: passes over the clean samples that train the student (authors' code: 20).
        lr: constant (BackdoorBench: 0.01; authors' code: 0.1, see above).
        batch: samples per step (ours: 128, as the other methods on this budget; authors' code: 64).
        weight_decay: of SGD (authors' code: 1e-4).

    >>> attention(torch.tensor([[[[3.0, 0.0]], [[0.0, 2.0]]]]), NAD().p)  # 9 and 4, scaled to length 1
    tensor([[[0.9138, 0.4061]]])
    """

    name: ClassVar[str] = "nad"
    revision: ClassVar[int] = 2  # 2: the rate is constant
    family: ClassVar[str] = "fine-tuning"
    cost: ClassVar[str] = "{teacher_epochs} and {epochs} epochs on the clean budget"
    dial_name: ClassVar[str] = "factor on the weights of the attention loss"

    factor: Factor = 1.0
    factors: tuple[Factor, ...] = ()
    betas: tuple[Annotated[float, Ge(0), Le(1_000_000)], ...] = (500.0, 1000.0, 1000.0)
    p: Annotated[float, Ge(1), Le(10)] = 2.0
    teacher_epochs: EpochCount = 10
    epochs: EpochCount = 20
    lr: LearningRate = 0.01
    batch: BatchSize = 128
    weight_decay: Annotated[float, Ge(0), Le(1)] = 1e-4

    @property
    def needs(self) -> Knowledge:
        return Knowledge.MODEL | Knowledge.CLEAN

    def recipe(self, epochs: int, view: DefenderView) -> Recipe:
        """Of the teacher and of the student."""
        return Recipe(
            epochs=epochs, batch=self.batch, lr=self.lr, momentum=0.9, nesterov=True, weight_decay=self.weight_decay,
            schedule="constant", crop=view.recipe.crop, flip=view.recipe.flip, precision=view.recipe.precision,
        )  # fmt: skip

    def weights(self, net: Network, shape: tuple[int, int, int], factor: float) -> dict[str, float]:
        """Weights of the attention losses by module path, from the largest map to the smallest; weights of 0 are left out.

        Raises:
            Inapplicable: no feature map has more than one position.
        """
        paths = stages(net, shape)
        if not paths:
            raise Inapplicable("no feature map has more than one position: attention is the constant 1")
        count = min(len(paths), len(self.betas))
        last = zip(paths[len(paths) - count :], self.betas[len(self.betas) - count :], strict=True)
        return {path: factor * beta for path, beta in last if factor * beta}

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        clean = view.clean
        weights = {factor: self.weights(view.model, clean.shape, factor) for factor in sorted({self.factor, *self.factors})}
        teacher = Tuned(view.model, self.recipe(self.teacher_epochs, view), view.scope)
        tune(teacher, clean, derive_seed(view.seed, "nad", "teacher"))
        for factor, betas in weights.items():
            student = _Student(view.model, self.recipe(self.epochs, view), teacher.net, betas, self.p)
            net = tune(student, clean, derive_seed(view.seed, "nad", "student"))
            yield Candidate(net, factor, factor == self.factor, factor)
