"""Rescaled norms: the same function, another statistic. An adaptive attacker who touches nothing but the finished weights.

ReLU is positively homogeneous, so the scale of a channel can be moved across it: multiply a batch norm's gamma and beta of channel
k by s and divide what the next convs read from that channel by s, and the network computes what it did. Its Lipschitz bounds do not
stay what they were. A defense that compares channels with their layer, as CLP (ECCV 2022, arXiv 2208.03111), Hölder pruning and ANP
do, measures something that an attacker can choose freely.

Needs: the finished model. Edits: gamma and beta of norms that feed nothing but ReLU, pooling and convs or the head; the weights
that read them. Dial: strength in [0, 1]; at 1 every channel of such a norm has the layer's median bound.
Deviations from the paper: none; the attack is ours. Residual sums cannot be rescaled alone, so norms that feed one are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from attacks.adaptive import Adaptive
from attacks.base import Crafted
from models.backbone import GlobalAverage, Network
from models.classifier import Classifier
from models.spec import Share
from models.units import Leaves, unit_layers, weight_bounds

__all__ = ["Rescaled", "readers", "rescale"]

_THROUGH = (nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Identity, nn.Dropout, nn.Flatten, GlobalAverage)
_THROUGH_CALLS = ("relu", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "flatten", "mean", "dropout")


def readers(net: Network) -> dict[str, tuple[str, ...]]:
    """For every norm whose channels can be rescaled: the layers that read them, by dotted path.

    That is where its output passes a ReLU and then reaches convs, or the head's first layer, through operations that commute with a
    positive scale per channel, and nothing else.
    """
    graph = Leaves().trace(net.features)
    modules = dict(net.features.named_modules())
    head = next(f"head.{name}" for name, module in net.head.named_modules() if isinstance(module, nn.Linear))
    found: dict[str, tuple[str, ...]] = {}
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(modules[str(node.target)], nn.BatchNorm2d):
            reached = _reached(node, modules, head, past_relu=False)
            if reached:
                found[f"features.{node.target}"] = tuple(sorted(reached))
    return found


def _reached(node: fx.Node, modules: Mapping[str, nn.Module], head: str, past_relu: bool) -> set[str] | None:
    """The layers that read the output of ``node``; None where a scale per channel cannot be moved into them."""
    reached: set[str] = set()
    for user in node.users:
        module = modules[str(user.target)] if user.op == "call_module" else None
        if past_relu and user.op == "output":
            reached.add(head)
        elif past_relu and isinstance(module, nn.Conv2d):
            reached.add(f"features.{user.target}")
        else:
            further = _reached(user, modules, head, past_relu or _is_relu(user, module)) if _commutes(user, module) else None
            if further is None:
                return None
            reached |= further
    return reached


def _called(user: fx.Node) -> str:
    """The name of the function or method that a node calls; empty for other nodes."""
    return str(getattr(user.target, "__name__", user.target)).rstrip("_") if user.op in ("call_function", "call_method") else ""


def _is_relu(user: fx.Node, module: nn.Module | None) -> bool:
    return isinstance(module, nn.ReLU) or _called(user) == "relu"


def _commutes(user: fx.Node, module: nn.Module | None) -> bool:
    """Whether an operation commutes with a positive scale per channel."""
    return isinstance(module, _THROUGH) or _called(user) in _THROUGH_CALLS


@torch.no_grad()
def rescale(net: Network, strength: float) -> None:
    """Multiplies every channel's scale by ``(median bound of the layer / its bound)^strength``, in place; the logits stay.

    Channels whose bound is 0 or not finite are left as they are.
    """
    passing = readers(net)
    layers = [layer for layer in unit_layers(net) if layer.name in passing]
    for name, bound in weight_bounds(net, layers).items():
        good = torch.isfinite(bound) & (bound > 0)
        if not bool(good.any()):
            continue
        scale = torch.ones_like(bound)
        scale[good] = (bound[good].median() / bound[good]) ** strength
        norm = net.get_submodule(name)
        assert isinstance(norm, nn.BatchNorm2d)
        scale = scale.to(norm.weight.device)
        norm.weight.mul_(scale)
        norm.bias.mul_(scale)
        for path in passing[name]:
            reader = net.get_submodule(path)
            assert isinstance(reader, (nn.Conv2d, nn.Linear))
            reader.weight.div_(scale.view(1, -1, *[1] * (reader.weight.ndim - 2)))


@dataclass(frozen=True)
class Rescaled(Adaptive):
    """The base attack's victim, rescaled after training.

    Attributes:
        strength: share of the way to the layer's median bound, as a logarithm; 0 = the base attack.

    >>> from models import BACKBONES
    >>> net = BACKBONES[0](width=2).build(10, (3, 32, 32), [0.5] * 3, [0.25] * 3, seed=0).eval()
    >>> images = torch.rand(2, 3, 32, 32)
    >>> before = net(images)
    >>> rescale(net, Rescaled().strength)
    >>> torch.allclose(net(images), before, atol=1e-5)
    True
    """

    name: ClassVar[str] = "rescaled"

    strength: Share = 1.0

    def finished(self, victim: Classifier, crafted: Crafted) -> Crafted:
        crafted = super().finished(victim, crafted)
        if self.strength:
            rescale(victim.net, self.strength)
        return crafted
