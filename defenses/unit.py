"""UNIT: Cheng, Shen, Zhang, Tao, An, Guo, Ma and Zhang, "UNIT: Backdoor Mitigation via Automated Neural Distribution Tightening",
ECCV 2024, arXiv 2407.11372.

A backdoor drives some activations far beyond what clean images reach. Every activation gets an upper bound, at first loose, that is
tightened on clean images as far as validation accuracy allows: the bounds B minimise the cross-entropy plus a weight times the sum
over layers of mean(B). The weight grows while the network is accurate enough and falls while it is not. No weight of the network
is changed.

Needs: model, clean budget. Edits: the ReLUs, which get bounds (scope HEAD: the head's alone).
Dial: tolerated loss of validation accuracy; of the bounds of all steps that keep within it, the tightest are taken. Default 0.03.
The default steers the search; the other values choose among the bounds that it visits, and cost nothing.
Deviations from the paper: the bounds that are taken are those that were validated (released code: those of the step before). Those
at the start may be taken too; where no step keeps within the tolerance, the model stays as it was given. Gradients are summed over
small batches (released code: one batch of all images), and images are shown as they are. ``per="channel"`` gives one bound to a
channel and not to each of its positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from defenses.base import Candidate, DefenderView, Defense, Inapplicable, Knowledge, Scope
from defenses.neural_cleanse import Balance
from models.backbone import Network
from models.bounded import BoundedReLU, bounded, relus
from models.images import ImageSet, to_float
from models.spec import BatchSize, Ge, Gt, Le, LearningRate, Share, generator
from models.training import default_device, embed

__all__ = ["UNIT", "size", "spreads"]

_EXACT = 1e-9
"""Tolerance of comparisons, so that a loss of exactly the tolerated one is within it whatever its last bit."""


class _Part:
    """A part of the clean budget as the bounded part of the network reads it: images (WHOLE) or their embeddings (HEAD)."""

    def __init__(self, net: Network, data: ImageSet, scope: Scope, batch: int) -> None:
        device = next(net.parameters()).device
        self.labels, self.batch, self.whole = data.labels.to(device), batch, scope is Scope.WHOLE
        self.inputs = data.images.to(device) if self.whole else torch.cat(embed(net, data.images))

    def passes(self, net: Network, index: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(logits, labels) of the samples at ``index`` (all by default), batch by batch."""
        index = torch.arange(len(self.labels)) if index is None else index
        for start in range(0, len(index), self.batch):
            part = index[start : start + self.batch].to(self.labels.device)
            x, labels = self.inputs[part], self.labels[part]
            yield net(to_float(x).contiguous(memory_format=torch.channels_last)) if self.whole else net.head(x), labels

    @torch.no_grad()
    def accuracy(self, net: Network) -> float:
        return sum(int((logits.argmax(1) == labels).sum()) for logits, labels in self.passes(net)) / len(self.labels)


@torch.no_grad()
def spreads(run: Callable[[], object], layers: Mapping[str, nn.Module], per: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and unbiased standard deviation of the outputs of ``layers`` during ``run``, in the shape of bounds, by name.

    Args:
        run: makes forward passes of at least two samples in all.
        layers: whose outputs are (N, C, H, W) or (N, units).
        per: ``position``: (C, H, W), over samples. ``channel``: (C, 1, 1), over samples and positions. (units,) in either case.
    """
    counts, sums, squares = dict.fromkeys(layers, 0), dict[str, Tensor](), dict[str, Tensor]()

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            axes = [0, 2, 3] if per == "channel" and output.ndim == 4 else [0]
            values = output.double()
            total, square = values.sum(axes, keepdim=True)[0], values.square().sum(axes, keepdim=True)[0]
            counts[name] += output.numel() // total.numel()
            sums[name], squares[name] = sums.get(name, 0) + total, squares.get(name, 0) + square

        return keep

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, count in counts.items():
        mean = sums[name] / count
        variance = (squares[name] - count * mean.square()).clamp(min=0) / (count - 1)
        found[name] = mean.float(), variance.sqrt().float()
    return found


def size(bounds: Sequence[Tensor]) -> Tensor:
    """Sum over layers of the mean bound, a scalar."""
    return torch.stack([bound.mean() for bound in bounds]).sum()


@dataclass(frozen=True)
class UNIT(Defense):
    """Settings of the bounds and of the search for them.

    Attributes:
        tolerance: default of the dial, in [0, 1] (authors' code: 0.03).
        tolerances: further values at which models are offered (ours); they cost nothing.
        per: a bound for every ``position`` of a channel (authors' code), or for every ``channel``.
        spread: bounds start at the mean plus so many standard deviations of the clean activations (authors' code: 4).
        iterations: steps of Adam on the bounds, with betas 0.5 and 0.9 (authors' code: 300).
        lr: of Adam (authors' code: 1e-3).
        samples: images per step, drawn anew; 0 = all (authors' code).
        batch: images whose passes are made at once; without effect on the result beyond rounding (ours: 128).
        weight: of the bounds' sum, at the start (authors' code: 1e-3).
        patience: steps in a row with the same answer until the weight changes (authors' code: 5).
        factor: the weight is multiplied by it, or divided by its power of 1.5; raised from below where it started, it starts
            again there (authors' code: 2).

    >>> UNIT(per="channel").needs.words
    'model + clean'
    """

    name: ClassVar[str] = "unit"
    family: ClassVar[str] = "clipping"
    cost: ClassVar[str] = "{iterations} passes over the clean budget and its validation part"
    scopes: ClassVar[tuple[Scope, ...]] = (Scope.HEAD, Scope.WHOLE)
    dial_name: ClassVar[str] = "tolerated loss of validation accuracy"

    tolerance: Share = 0.03
    tolerances: tuple[Share, ...] = (0.0, 0.01, 0.02, 0.05)
    per: Literal["position", "channel"] = "position"
    spread: Annotated[float, Ge(0), Le(1000)] = 4.0
    iterations: Annotated[int, Ge(0), Le(1_000_000)] = 300
    lr: LearningRate = 1e-3
    samples: Annotated[int, Ge(0), Le(1_000_000)] = 0
    batch: BatchSize = 128
    weight: Annotated[float, Ge(0), Le(1000)] = 1e-3
    patience: Annotated[int, Ge(1), Le(10_000)] = 5
    factor: Annotated[float, Gt(1), Le(100)] = 2.0

    @property
    def needs(self) -> Knowledge:
        return Knowledge.MODEL | Knowledge.CLEAN

    def start(self, net: Network, fit: _Part, paths: Sequence[str]) -> Network:
        """A copy of ``net`` with the bounds before the first step at ``paths``."""
        found = spreads(lambda: list(fit.passes(net)), {path: net.get_submodule(path) for path in paths}, self.per)
        return bounded(net, {path: mean + self.spread * deviation for path, (mean, deviation) in found.items()})

    def lower(self, net: Network, fit: _Part, bounds: Sequence[nn.Parameter], weight: float, draw: torch.Generator) -> None:
        """Adds the gradients of one step to the bounds of ``net``."""
        index = torch.arange(len(fit.labels))
        if 0 < self.samples < len(index):
            index = torch.randperm(len(index), generator=draw)[: self.samples]
        for logits, labels in fit.passes(net, index):
            (cross_entropy(logits, labels, reduction="sum") / len(index)).backward()  # type: ignore[no-untyped-call]
        (weight * size(bounds)).backward()  # type: ignore[no-untyped-call]

    def tightened(
        self, net: Network, paths: Sequence[str], fit: _Part, check: _Part, draw: torch.Generator
    ) -> dict[float, tuple[float, dict[str, Tensor]]]:
        """Searches bounds. Returns the tightest within each tolerance: their size (:func:`size`), and they themselves by path.

        Args:
            net: in evaluation mode, its parameters without gradients; not changed.
            paths: of the ReLUs that are bounded.
            fit: what bounds are fitted on.
            check: what they are validated on.
            draw: of the samples of a step.
        """
        plain = check.accuracy(net)
        net = self.start(net, fit, paths)
        bounds = [layer.bound for layer in map(net.get_submodule, paths) if isinstance(layer, BoundedReLU)]
        optimizer = torch.optim.Adam(bounds, lr=self.lr, betas=(0.5, 0.9))
        balance = Balance(self.weight, self.patience, self.factor, self.weight, back=True)
        found: dict[float, tuple[float, dict[str, Tensor]]] = {}
        for step in range(self.iterations + 1):
            if step:
                optimizer.zero_grad()
                self.lower(net, fit, bounds, balance.value, draw)
                optimizer.step()
            lost, now = plain - check.accuracy(net) - _EXACT, float(size(bounds).detach())
            for level in {self.tolerance, *self.tolerances}:
                if lost <= level and (level not in found or now < found[level][0]):
                    found[level] = now, {path: bound.detach().cpu().clone() for path, bound in zip(paths, bounds, strict=True)}
            if step:
                balance.update(lost <= self.tolerance)
        return found

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        net = view.model.to(default_device()).requires_grad_(False)
        if len(view.clean) < 2 or not len(view.validation):
            raise Inapplicable("both parts of the clean budget must hold samples: one to bound activations on, one to validate on")
        try:
            paths = relus(net, view.scope)
        except ValueError as error:
            raise Inapplicable(f"not every ReLU can be bounded: {error}") from error
        if not paths:
            raise Inapplicable(f"nothing to bound at scope {view.scope.value!r}: it has no ReLU")
        fit, check = (_Part(net, data, view.scope, self.batch) for data in (view.clean, view.validation))
        found = self.tightened(net, paths, fit, check, generator(view.seed, "unit"))
        for level in sorted({self.tolerance, *self.tolerances}):
            model, note = view.model, "no bounds keep within the tolerance: the model is as it was given"
            if level in found:
                model, note = bounded(model, found[level][1]), f"sum of the layers' mean bounds: {found[level][0]:.4g}"
            yield Candidate(model, level, level == self.tolerance, level, note=note)
