"""Benign salience and adaptive regularisation: Fan, Liu, Chen, Liu and Guo, "Defense against Backdoor Attacks via Identifying and
Purifying Bad Neurons", 2022, arXiv 2208.06537.

A neuron that answers clean images weakly may still matter through what it is connected to, so neurons are judged by benign
salience: the first-order estimate of how much the clean loss would grow if they were set to 0, from its gradient. What
benign data hardly need is purified rather than cut: the clean budget fine-tunes the network under a penalty on the least salient
entries. Adaptive regularisation is that penalty, as steady as L1 on small weights and growing exponentially on large ones.

Needs: model, clean budget. Edits: every weight; penalised are entries of convs and linear layers (scope HEAD: the head alone).
Dial: none; the last epoch is the result.
Deviations from the paper: the formulas are read off its abstract and the authors' code, its errors corrected. The penalty
spares entries that are not selected, and shrinks weights below -1 too; the least salient entries are selected, as in the text,
not the most; salience is taken from the cross-entropy alone. The code penalises the output layer and moves all weights
(``penalised="last"``); by default the scope decides both, since the text speaks of neurons everywhere. Ours: the warm start in
evaluation mode on images as they are, ``r_max``, and that neurons of the output layer,
which are classes, are never penalised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from defenses.base import Candidate, DefenderView, Defense, Inapplicable, Knowledge, Scope
from defenses.fine_tuning import Tuned, tune
from models.backbone import Network
from models.images import ImageSet, to_float
from models.recipe import Recipe
from models.spec import BatchSize, EpochCount, Ge, Le, LearningRate, Lt, Share, check, derive_seed
from models.training import default_device
from models.units import top_share

__all__ = ["BenignSalience", "penalty", "salience", "updated"]

Granularity = Literal["param", "neuron"]


def penalty(weight: Tensor) -> Tensor:
    """Adaptive regularisation R(w) of every entry, same shape: ``|w|`` up to 1, ``exp(|w| - 1)`` above.

    Smooth at 1, with R'(w) = sign(w) max(1, exp(|w| - 1)). Beyond |w| = 21 it goes on along its tangent, so that nothing overflows.
    """
    size = weight.abs()
    grown = (size - 1).clamp(max=20)
    return torch.where(size <= 1, size, grown.exp() * (size - grown))


def updated(average: Tensor, weight: Tensor, gradient: Tensor, eta: float) -> Tensor:
    """``eta S - (1 - eta) g w``: the running average of ``-g w``, which estimates the loss gained by setting an entry to 0."""
    return eta * average.to(weight.device) - (1 - eta) * gradient * weight.detach()


def salience(
    net: Network, entries: Mapping[str, nn.Parameter], data: ImageSet, eta: float, batch: int = 128
) -> dict[str, Tensor]:
    """Benign salience of ``entries`` by name after one pass over ``data``, in order and without a step.

    ``net`` stays in the mode it is in and where it is; the average starts at 0.
    """
    device = next(net.parameters()).device
    found = {name: torch.zeros_like(entry) for name, entry in entries.items()}
    for start in range(0, len(data), batch):
        images = to_float(data.images[start : start + batch].to(device)).contiguous(memory_format=torch.channels_last)
        loss = cross_entropy(net(images), data.labels[start : start + batch].to(device))
        gradients = torch.autograd.grad(loss, list(entries.values()))
        for (name, entry), gradient in zip(entries.items(), gradients, strict=True):
            found[name] = updated(found[name], entry, gradient, eta)
    return found


def _least(scores: Tensor, share: float) -> Tensor:
    """Mask of the ``round(share * n)`` lowest scores, shape as given; ties go to the lower index first."""
    return top_share(share)(-scores.flatten()).view(scores.shape)


def selected(found: Mapping[str, Tensor], share: float, granularity: Granularity) -> dict[str, Tensor]:
    """The least salient ``share`` of every layer, bool by entry name; weights and biases apart, or whole neurons (row and bias)."""
    if granularity == "param":
        return {name: _least(scores, share) for name, scores in found.items()}
    neurons: dict[str, Tensor] = {}
    for name, scores in found.items():
        layer = name.rpartition(".")[0]
        neurons[layer] = neurons.get(layer, 0) + scores.flatten(1).sum(1) if scores.ndim > 1 else neurons[layer] + scores
    chosen = {layer: _least(scores, share) for layer, scores in neurons.items()}
    return {
        name: chosen[name.rpartition(".")[0]].view(-1, *[1] * (scores.ndim - 1)).expand_as(scores)
        for name, scores in found.items()
    }


class _Purified(Tuned):
    """Fine-tuning that follows the salience of ``entries`` and penalises the least salient ones."""

    def __init__(
        self,
        net: Network,
        recipe: Recipe,
        scope: Scope,
        method: BenignSalience,
        entries: Mapping[str, nn.Parameter],
        found: dict[str, Tensor],
    ) -> None:
        super().__init__(net, recipe, scope)
        self.method, self.entries, self.found = method, dict(entries), found
        self.chosen: dict[str, Tensor] = {}

    def on_train_epoch_start(self) -> None:
        self.chosen = selected(self.found, self.method.share(self.current_epoch + 1), self.method.granularity)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        # Here the gradient is still that of the cross-entropy alone; the penalty's is added to it afterwards.
        for name, entry in self.entries.items():
            assert entry.grad is not None
            self.found[name] = updated(self.found[name], entry, entry.grad, self.method.eta)
        if self.method.alpha_reg:
            terms = [(penalty(entry) * self.chosen[name].to(entry.device)).sum() for name, entry in self.entries.items()]
            (self.method.alpha_reg * torch.stack(terms).sum()).backward()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class BenignSalience(Defense):
    """Settings of the salience, of the penalty and of the fine-tuning under it.

    Attributes:
        penalised: entries of every layer in scope (``scope``, ours) or of the output layer alone (``last``, authors' code).
        granularity: what is ranked and penalised: single entries (``param``, authors' code) or neurons (``neuron``, the text).
        alpha_reg: weight of the penalty, a sum over the selected entries (authors' code).
        eta: memory of the salience's running average, in [0, 1) (authors' code).
        beta: share selected before the first epoch; in epoch e of E it is ``beta + (1 - beta) e / E`` (authors' code).
        r_max: never select more than this share (ours: 1, no limit, as the code).
        epochs: of plain SGD, without momentum or weight decay (authors' code: 10).
        lr: constant (authors' code: 0.01).
        batch: samples per step (authors' code: 128).

    >>> [BenignSalience(beta=0.5, epochs=4).share(epoch) for epoch in (1, 2, 3, 4)]
    [0.625, 0.75, 0.875, 1.0]
    """

    name: ClassVar[str] = "benign-salience"
    family: ClassVar[str] = "fine-tuning"
    cost: ClassVar[str] = "one pass and {epochs} epochs on the clean budget"
    scopes: ClassVar[tuple[Scope, ...]] = (Scope.HEAD, Scope.WHOLE)

    penalised: Literal["scope", "last"] = "scope"
    granularity: Granularity = "param"
    alpha_reg: Annotated[float, Ge(0), Le(1000)] = 0.01
    eta: Annotated[float, Ge(0), Lt(1)] = 0.9
    beta: Share = 0.5
    r_max: Share = 1.0
    epochs: EpochCount = 10
    lr: LearningRate = 0.01
    batch: BatchSize = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        neurons = self.penalised == "last" and self.granularity == "neuron"
        check(self, "penalised", not neurons, "'scope' with granularity 'neuron': the output layer's neurons are classes")

    @property
    def needs(self) -> Knowledge:
        return Knowledge.MODEL | Knowledge.CLEAN

    def share(self, epoch: int) -> float:
        """Share of a layer that is penalised in ``epoch``, counted from 1."""
        return min(self.r_max, self.beta + (1 - self.beta) * epoch / self.epochs)

    def entries(self, net: Network, scope: Scope) -> dict[str, nn.Parameter]:
        """Weights and biases of the penalised convs and linear layers, by name; without the output layer for neurons.

        Raises:
            Inapplicable: nothing is left.
        """
        layers = [
            (name, module)
            for name, module in net.named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear)) and (scope is Scope.WHOLE or name.startswith("head."))
        ]
        kept = layers[-1:] if self.penalised == "last" else layers if self.granularity == "param" else layers[:-1]
        if not kept:
            raise Inapplicable("no neurons to penalise at scope 'head': it is a single linear layer, whose units are classes")
        return {f"{name}.{key}": entry for name, module in kept for key, entry in module.named_parameters(recurse=False)}

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        net, clean = view.model.to(default_device()), view.clean
        net.features.requires_grad_(view.scope is Scope.WHOLE)
        entries = self.entries(net, view.scope)
        recipe = Recipe(
            epochs=self.epochs, batch=self.batch, lr=self.lr, momentum=0.0, weight_decay=0.0, schedule="constant",
            crop=view.recipe.crop, flip=view.recipe.flip, precision=view.recipe.precision,
        )  # fmt: skip
        found = salience(net, entries, clean, self.eta, self.batch)
        module = _Purified(net, recipe, view.scope, self, entries, found)
        yield Candidate(tune(module, clean, derive_seed(view.seed, "benign-salience")))
