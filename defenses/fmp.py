"""FMP, adversarial feature map pruning: Huang and Bu, "Adversarial Feature Map Pruning for Backdoor", ICLR 2024, arXiv 2307.11565.

A feature map that answers a trigger can be moved by a small change of the input, and once it moves, the prediction moves with it.
For every feature map clean images are changed so that this map changes most. The maps under which the network's accuracy on the
changed images is lowest are pruned, in every conv the same share, and the network is fine-tuned on clean samples.

Needs: model, clean budget. Edits: filters of every conv and gamma of the norm behind it, then every weight.
Dial: share of every conv's maps that is pruned, 1 / p: ``floor(C / p)`` of C maps; default p = 64. A conv of fewer than p channels
loses none, so in narrow networks the default only fine-tunes; ``points`` are smaller p.
Deviations from the paper: the images are changed by R+FGSM (Tramer et al., ICLR 2018, arXiv 1705.07204): a random sign of eps / 2,
then one sign step of eps / 2; one random start serves all maps. With few images many maps tie: ties go to the higher cross-entropy
(ours). Gamma is pruned only where the norm reads one conv alone. Fine-tuning is that of :mod:`defenses.fine_tuning`: batch 128 for
256 and cosine to zero for 1e-4. As in the authors' code, what was pruned may grow again there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from defenses.base import Candidate, DefenderView, Inapplicable, Scope
from defenses.fine_tuning import FineTuning
from models.backbone import Network
from models.cost import tally_backward
from models.images import to_float
from models.spec import BatchSize, Ge, Le, generator
from models.training import default_device
from models.units import Masks, UnitLayer, Writer, capture, hold, unit_layers

__all__ = ["FMP", "changed", "feature_maps", "lowest", "orders", "silence"]

MapShare = Annotated[int, Ge(2), Le(65_536)]


def feature_maps(net: Network) -> tuple[UnitLayer, ...]:
    """Every conv of the features, its channels as units, in the order of registration."""
    convs = [(f"features.{name}", module) for name, module in net.features.named_modules() if isinstance(module, nn.Conv2d)]
    return tuple(UnitLayer(name, "conv", conv.out_channels, False, (name,)) for name, conv in convs)


def changed(
    net: Network, layers: Sequence[UnitLayer], images: Tensor, start: Tensor, eps: float
) -> Iterator[tuple[str, int, Tensor]]:
    """For every map: its layer, its channel and the images changed to move it, float (N, C, H, W) in [0, 1].

    ``x' = x + eps / 2 start`` and ``x' + eps / 2 sign(grad |F(x') - F(x)|^2)``, both clipped to [0, 1]. The network runs twice in
    all, since the maps share their start; one backward pass for each map goes from its layer to the images.

    Args:
        net: the network, in evaluation mode, its weights without gradient.
        layers: as :func:`feature_maps` gives them.
        images: float (N, C, H, W) in [0, 1].
        start: -1 or 1, of the images' shape.
        eps: largest change of a pixel.
    """
    with torch.no_grad(), capture(net, layers, "output") as before:
        net.embed(images)
    begun = (images + eps / 2 * start).clamp(0, 1).requires_grad_()
    with capture(net, layers, "output") as after:
        net.embed(begun)
    for layer in layers:
        for unit in range(layer.size):
            moved = (after[layer.name][:, unit] - before[layer.name][:, unit]).square().sum()
            (up,) = torch.autograd.grad(moved, begun, retain_graph=True)
            tally_backward(len(images))
            yield layer.name, unit, (begun.detach() + eps / 2 * up.sign()).clamp(0, 1)


def orders(net: Network, images: Tensor, labels: Tensor, start: Tensor, eps: float) -> dict[str, Tensor]:
    """Every layer's channels, int64 (channels,), from the one whose changed images are classified worst to the best.

    Arguments as in :func:`changed`; ``labels``: int64 (N,). Equal accuracy is ordered by cross-entropy, then by index.
    """
    layers = feature_maps(net)
    right: dict[str, list[float]] = {layer.name: [] for layer in layers}
    losses: dict[str, list[float]] = {layer.name: [] for layer in layers}
    for name, _, inputs in changed(net, layers, images, start, eps):
        with torch.no_grad():
            logits = net(inputs)
        right[name].append(float((logits.argmax(1) == labels).sum()))
        losses[name].append(float(cross_entropy(logits, labels)))
    return {name: torch.from_numpy(np.lexsort((-np.array(losses[name]), np.array(right[name])))) for name in right}


def lowest(order: Mapping[str, Tensor], p: int) -> Masks:
    """Masks of the first ``floor(C / p)`` of every layer's C channels in ``order``."""
    masks: Masks = {}
    for name, channels in order.items():
        masks[name] = torch.zeros(len(channels), dtype=torch.bool)
        masks[name][channels[: len(channels) // p]] = True
    return masks


def silence(net: Network, masks: Masks) -> None:
    """Writes zero filters (and biases) under ``masks`` into ``net``, and zero gamma of the norms that read these maps alone."""
    hold(net, masks, Writer.OUTPUT)
    single = [layer for layer in unit_layers(net) if layer.kind == "norm" and len(layer.writers) == 1]
    hold(net, {layer.name: masks[layer.writers[0]] for layer in single}, Writer.GAMMA)


@dataclass(frozen=True)
class FMP(FineTuning):
    """Settings of the fine-tuning, and of the pruning before it.

    Attributes:
        p: one of so many maps of every conv is pruned (authors' code: 64).
        points: further values of p; each that prunes another number of maps costs a whole fine-tuning (ours: 16).
        eps: largest change of a pixel, images in [0, 1] (ours, following secondary sources: 1/255).
        map_batch: clean images that the maps are tested on (authors' code: 32).

    >>> int(lowest({"conv": torch.arange(128)}, FMP().p)["conv"].sum())
    2
    """

    name: ClassVar[str] = "fmp"
    family: ClassVar[str] = "pruning, fine-tuning"
    cost: ClassVar[str] = (
        "a forward and a backward pass of {map_batch} images per feature map, {epochs} epochs on the clean "
        "budget"
    )
    scopes: ClassVar[tuple[Scope, ...]] = (Scope.WHOLE,)
    dial_name: ClassVar[str] = "share of feature maps pruned"

    p: MapShare = 64
    points: tuple[MapShare, ...] = (16,)
    eps: Annotated[float, Ge(0), Le(1)] = 1 / 255
    map_batch: BatchSize = 32

    def order(self, view: DefenderView) -> dict[str, Tensor]:
        """See :func:`orders`, on the victim and samples drawn from the clean budget."""
        draw = generator(view.seed, "fmp", "draw")
        data = view.clean.subset(torch.randperm(len(view.clean), generator=draw)[: self.map_batch])
        device = default_device()
        images = to_float(data.images)
        start = 2.0 * torch.randint(0, 2, images.shape, generator=draw) - 1
        net = view.model.to(device).requires_grad_(False)
        found = orders(net, images.to(device), data.labels.to(device), start.to(device), self.eps)
        return {name: channels.cpu() for name, channels in found.items()}

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        if not len(view.clean):
            raise Inapplicable("the clean budget is empty: feature maps cannot be tested")
        order = self.order(view)
        steps = {p: lowest(order, p) for p in (self.p, *self.points)}
        seen: set[float] = set()
        for p, masks in steps.items():
            strength = float(sum(int(mask.sum()) for mask in masks.values()))
            if strength in seen:
                continue
            seen.add(strength)
            model = view.model
            silence(model, masks)
            yield Candidate(self.tune(model, view), 1 / p, p == self.p, strength, masks)
