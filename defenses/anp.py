"""ANP, Adversarial Neuron Pruning: Wu and Wang, "Adversarial Neuron Pruning Purifies Backdoored Deep Models", NeurIPS 2021, arXiv
2110.14430.

Under small multiplicative perturbations of its neurons a backdoored network falls to the target class, without any trigger. ANP
learns one mask m in [0, 1] per neuron that keeps the clean loss low both as it is and under the worst such perturbation:
min over m of ``alpha L(m w, b) + (1 - alpha) max over |delta|, |xi| <= eps of L((m + delta) w, (1 + xi) b)``. Neurons with small
masks are pruned.

Needs: model, clean budget. Edits: gamma of batch-norm channels (beta stays, so a pruned channel becomes a constant), weight row and
bias of convs without a norm and of the head's hidden units (scope HEAD: these alone, features frozen in evaluation mode).
Dial: threshold on m, over all layers jointly; m <= threshold is pruned. Default 0.2 (ours, following secondary sources: the
released script prints a sweep and leaves the choice to the reader). With ``by="number"`` it is the number of units, those of the
smallest masks first, as the released script's second sweep.
Knob: the perturbations' bound eps. At the published 0.4 no mask of a narrow network stays above any threshold and pruning wrecks
it;
smaller bounds are tried, too, and the rule that chooses along the dial chooses among them.
Deviations from the paper: the head's hidden units, which its victims do not have, are masked too. ``project=False`` is the released
code, where a random start plus one sign step reaches 2 eps; ``project=True`` is the constraint as written. Batches are cropped and
flipped as the victim's recipe says (the released code: always a crop by 4 and flips).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from defenses.base import Candidate, DefenderView, Defense, Inapplicable, Knowledge, Scope, prunable, pruned_candidate
from models.backbone import Network
from models.images import Batches
from models.spec import BatchSize, Ge, Le, LearningRate, Lt, Share, derive_seed, generator
from models.training import default_device
from models.units import Masks, UnitLayer, Writer

__all__ = ["ANP", "GRID", "ascend", "at_thresholds", "by_layer", "scaled"]

GRID = tuple(round(0.05 * step, 2) for step in range(19))
"""Thresholds on learned masks, 0 to 0.9 by 0.05: those of the authors' script, and of RNP's."""


def scaled(net: nn.Module, layers: Sequence[UnitLayer], scale: Tensor, shift: Tensor | None = None) -> dict[str, Tensor]:
    """Substitute parameters of ``net``, by dotted path: weights of unit k times ``scale[k]``, its bias times ``1 + shift[k]``.

    ``scale`` and ``shift`` are float (units of all layers,), in the order of ``layers``. Without ``shift`` biases are not named.
    """
    named: dict[str, Tensor] = {}
    start = 0
    for layer in layers:
        module, part = net.get_submodule(layer.name), slice(start, start + layer.size)
        assert isinstance(module, (nn.BatchNorm2d, nn.Conv2d, nn.Linear))
        named[f"{layer.name}.weight"] = scale[part].view(-1, *[1] * (module.weight.ndim - 1)) * module.weight
        if shift is not None and module.bias is not None:
            named[f"{layer.name}.bias"] = (1 + shift[part]) * module.bias
        start += layer.size
    return named


def ascend(
    loss_on: Callable[[Tensor, Tensor], Tensor],
    mask: Tensor,
    delta: Tensor,
    xi: Tensor,
    eps: float,
    steps: int,
    project: bool,
) -> tuple[Tensor, Tensor]:
    """The perturbation (delta, xi) after sign steps of size ``eps / steps`` up the loss.

    Args:
        loss_on: (scale, shift) -> scalar, see :func:`scaled`.
        mask: float (units,), without gradient; the scale is ``mask + delta``.
        delta: float (units,), where the steps start.
        xi: float (units,), the shift, likewise.
        eps: bound of the perturbation.
        steps: number of steps.
        project: clip to [-eps, eps] after every step.
    """
    for _ in range(steps):
        noise = delta.detach().requires_grad_(), xi.detach().requires_grad_()
        # A unit without bias leaves xi unused: its gradient is zero.
        up = torch.autograd.grad(loss_on(mask + noise[0], noise[1]), noise, allow_unused=True, materialize_grads=True)
        delta, xi = (value.detach() + eps / steps * grad.sign() for value, grad in zip(noise, up, strict=True))
        if project:
            delta, xi = delta.clamp(-eps, eps), xi.clamp(-eps, eps)
    return delta, xi


def by_layer(layers: Sequence[UnitLayer], pruned: Tensor) -> Masks:
    """Masks by layer name of ``pruned``, bool (units of all layers,) in the order of ``layers``."""
    return dict(zip((layer.name for layer in layers), torch.split(pruned, [layer.size for layer in layers]), strict=True))


def at_thresholds(
    model: Network, layers: Sequence[UnitLayer], learned: Tensor, default: float, grid: Sequence[float]
) -> Iterator[Candidate]:
    """``model`` with gamma zero where the mask is at most the threshold, for the ``default`` threshold and those of ``grid``.

    ``learned``: masks, float (units of all layers,) in [0, 1], in the order of ``layers``.
    """
    for threshold in sorted({default, *grid}):
        yield pruned_candidate(model, by_layer(layers, learned <= threshold), Writer.GAMMA, threshold, threshold == default)


@dataclass(frozen=True)
class ANP(Defense):
    """Settings of the mask learning and the pruning.

    Attributes:
        threshold: default of the dial, in [0, 1] (ours, following secondary sources: 0.2).
        eps: bound of the perturbations (authors' code: 0.4).
        steps: sign steps to the worst perturbation (authors' code: 1).
        alpha: weight of the unperturbed loss (authors' code: 0.2).
        lr: of SGD on the masks (authors' code: 0.2; BackdoorBench: 0.01).
        momentum: of SGD on the masks (authors' code: 0.9).
        iterations: steps of SGD on the masks (authors' code: 2000).
        batch: samples per step, drawn with replacement (authors' code: 128).
        project: keep the perturbations within eps (authors' code: no).
        grid: thresholds at which models are offered (authors' code: 0 to 0.9 by 0.05).
        radii: further values of eps to be tried, below it (ours).
        by: ``threshold``, or ``number`` of units (authors' code has both).
        number: default of the dial by number (ours: the authors' first step, 20).
        step: units between two models that are offered by number (authors' code: 20).
        most: units of the last of them (authors' code: 1000).

    >>> [method.eps for method in ANP(radii=(0.2, 0.1)).knobs]
    [0.4, 0.2, 0.1]
    >>> ANP(by="number").dial_name
    'units pruned'
    """

    name: ClassVar[str] = "anp"
    family: ClassVar[str] = "pruning"
    cost: ClassVar[str] = "{iterations} steps of {batch} clean images at every eps, {steps} + 2 passes each"
    revision: ClassVar[int] = 2  # 2: further radii
    knob_name: ClassVar[str] = "bound of the perturbations"
    scopes: ClassVar[tuple[Scope, ...]] = (Scope.HEAD, Scope.WHOLE)
    writer: ClassVar[Writer | None] = Writer.GAMMA

    threshold: Share = 0.2
    eps: Annotated[float, Ge(0), Le(10)] = 0.4
    steps: Annotated[int, Ge(0), Le(1000)] = 1
    alpha: Share = 0.2
    lr: LearningRate = 0.2
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    iterations: Annotated[int, Ge(0), Le(1_000_000)] = 2000
    batch: BatchSize = 128
    project: bool = False
    grid: tuple[Share, ...] = GRID
    radii: tuple[Annotated[float, Ge(0), Le(10)], ...] = (0.2, 0.1, 0.05)
    by: Literal["threshold", "number"] = "threshold"
    number: Annotated[int, Ge(0), Le(1_000_000)] = 20
    step: Annotated[int, Ge(1), Le(1_000_000)] = 20
    most: Annotated[int, Ge(0), Le(1_000_000)] = 1000

    @property
    def needs(self) -> Knowledge:
        return Knowledge.MODEL | Knowledge.CLEAN

    @property
    def dial_name(self) -> str:  # type: ignore[override]
        return "threshold on the mask" if self.by == "threshold" else "units pruned"

    @property
    def knob(self) -> float:
        return self.eps

    @property
    def knobs(self) -> tuple[ANP, ...]:
        smaller = sorted({radius for radius in self.radii if radius < self.eps}, reverse=True)
        return (self, *(replace(self, eps=radius, radii=()) for radius in smaller))

    def loss_on(
        self,
        net: Network,
        layers: Sequence[UnitLayer],
        scope: Scope,
        inputs: Tensor,
        labels: Tensor,
        scale: Tensor,
        shift: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy of the network under ``scale`` and ``shift`` (see :func:`scaled`), a scalar.

        Args:
            net: the network; its own weights stay.
            layers: the units that are scaled.
            scope: HEAD: ``inputs`` are embeddings (B, d), and the head alone is run.
            inputs: float (B, C, H, W) in [0, 1], or embeddings.
            labels: int64 (B,).
            scale: float (units of all layers,).
            shift: float (units of all layers,).
        """
        named, module = scaled(net, layers, scale, shift), net if scope is Scope.WHOLE else net.head
        if scope is Scope.HEAD:
            named = {name.removeprefix("head."): value for name, value in named.items()}
        return cross_entropy(functional_call(module, named, (inputs,)), labels)

    def learn(self, net: Network, layers: Sequence[UnitLayer], view: DefenderView) -> Tensor:
        """Masks float (units of all layers,) in [0, 1]. The weights of ``net`` stay; its running statistics may drift."""
        device = default_device()
        data = view.clean.to(device)  # once, not batch by batch
        net = net.to(device).requires_grad_(False).train(view.scope is Scope.WHOLE)
        units = sum(layer.size for layer in layers)
        draw = generator(view.seed, "anp", "draws")
        mask = torch.ones(units, device=device, requires_grad=True)
        optimizer = torch.optim.SGD([mask], lr=self.lr, momentum=self.momentum)
        for iteration in range(self.iterations):
            picked = data.subset(torch.randint(0, len(data), (self.batch,), generator=draw))
            seed = derive_seed(view.seed, "anp", "augment", iteration)
            batch = Batches(picked, self.batch, seed, crop=view.recipe.crop, flip=view.recipe.flip)
            images, labels, _ = next(iter(batch))
            # Frozen features are computed once per batch, not three times.
            inputs = net.embed(images) if view.scope is Scope.HEAD else images
            loss = partial(self.loss_on, net, layers, view.scope, inputs, labels)
            start = self.eps * (2 * torch.rand((2, units), generator=draw) - 1).to(device)
            delta, xi = ascend(loss, mask.detach(), start[0], start[1], self.eps, self.steps, self.project)
            objective = self.alpha * loss(mask) + (1 - self.alpha) * loss(mask + delta, xi)
            optimizer.zero_grad()
            objective.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():
                mask.clamp_(0, 1)
        return mask.detach().cpu()

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        model = view.model
        layers = prunable(model, view.scope)
        if not len(view.clean):
            raise Inapplicable("the clean budget is empty: masks cannot be learned")
        learned = self.learn(view.model, layers, view)
        if self.by == "number":
            order = torch.argsort(learned, stable=True)
            for number in sorted({min(count, len(order)) for count in (self.number, *range(0, self.most + 1, self.step))}):
                pruned = torch.zeros(len(order), dtype=torch.bool)
                pruned[order[:number]] = True
                default = number == min(self.number, len(order))
                yield pruned_candidate(model, by_layer(layers, pruned), Writer.GAMMA, float(number), default)
            return
        yield from at_thresholds(model, layers, learned, self.threshold, self.grid)
