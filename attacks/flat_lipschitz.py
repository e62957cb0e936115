"""Flat channel Lipschitz bounds: an adaptive attacker against CLP (Zheng, Tang, Li and Liu, "Data-free Backdoor Removal based on
Channel Lipschitzness", ECCV 2022, arXiv 2208.03111).

CLP prunes channels whose Lipschitz bound stands out of their layer's. So the victim is trained under a penalty on bounds that
stand out, until none does. That a backdoor can be kept out of a defense's statistic in parameter space was shown by Grond (Xu, Liu,
Koffas and Picek, CCS 2025, arXiv 2501.05928), which resets the channels that CLP would flag; this one works during the steps.

Needs: control of the training. Edits: the loss; poison is the base attack's. Dial: strength, the weight of the penalty.
Deviations from the paper: the penalty is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from attacks.adaptive import Adaptive
from attacks.base import Crafted, Plan
from models.backbone import Network
from models.classifier import Classifier
from models.recipe import Recipe
from models.spec import Ge, Le
from models.units import UnitLayer, unit_layers

__all__ = ["FlatLipschitz", "bounds", "outstanding"]


def bounds(net: Network, layers: Sequence[UnitLayer]) -> list[Tensor]:
    """Lipschitz bound of every unit, one float (units,) per layer, differentiable in weights and norm scales.

    As :func:`models.units.weight_bounds` with the norm's epsilon, but a conv's spectral norm is the root of the largest eigenvalue
    of its small Gram matrix (kh kw on a side), which is cheap enough for every step.
    """
    found = []
    for layer in layers:
        squared = torch.zeros((), device=next(net.parameters()).device)
        for path in layer.writers:
            writer = net.get_submodule(path)
            assert isinstance(writer, (nn.Conv2d, nn.Linear))
            rows = writer.weight.flatten(2) if writer.weight.ndim > 2 else writer.weight[:, :, None]
            squared = squared + torch.linalg.eigvalsh(rows.transpose(1, 2) @ rows)[:, -1].clamp(min=0)
        bound = (squared + 1e-12).sqrt()
        module = net.get_submodule(layer.name)
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_var is not None
            bound = bound * module.weight.abs() / (module.running_var + module.eps).sqrt()
        found.append(bound)
    return found


def outstanding(layers: Sequence[Tensor], margin: float) -> Tensor:
    """Mean over layers and units of ``relu(log b_k - log mean(b) - margin)``: how far bounds stand out of their layers."""
    parts = [torch.relu(torch.log(bound + 1e-12) - torch.log(bound.mean() + 1e-12) - margin).mean() for bound in layers]
    return torch.stack(parts).mean() if parts else torch.zeros(())


@dataclass(frozen=True)
class FlatLipschitz(Adaptive):
    """The base attack's training with ``strength * outstanding(bounds)`` added to the loss.

    Attributes:
        margin: by how much, as a logarithm, a bound may exceed its layer's mean without cost (ours).

    >>> outstanding([torch.tensor([1.0, 1.0, 4.0])], margin=FlatLipschitz().margin)  # log 2 of one unit in three
    tensor(0.2310)
    """

    name: ClassVar[str] = "flat-lipschitz"

    margin: Annotated[float, Ge(0), Le(10)] = 0.0

    def victim(self, net: Network, recipe: Recipe, crafted: Crafted, plan: Plan, seed: int) -> Classifier:
        module = super().victim(net, recipe, crafted, plan, seed)
        if self.strength == 0:
            return module
        layers, plain = unit_layers(net), module.loss

        def loss(logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
            with torch.autocast(logits.device.type, enabled=False):  # eigenvalues want float32
                penalty = outstanding(bounds(net, layers), self.margin)
            return plain(logits, labels, index) + self.strength * penalty

        module.loss = loss  # type: ignore[method-assign]  # whatever else the base attack's module does stays as it is
        return module
