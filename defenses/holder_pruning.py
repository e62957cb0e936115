"""Hölder pruning: "Hölder Pruning: Localized Pruning for Backdoor Removal in Deep Neural Networks", submitted to ICLR 2025 and
withdrawn (OpenReview yJduhi9mDQ; authors anonymous, no code released).

A backdoored unit answers a small change of its input with a large change of its output: it has a large Hölder constant
``|f(a) - f(b)| <= H ||a - b||^alpha``. The constant is estimated as the largest quotient over pairs of a sample and its FGSM
perturbation ``b = a + eps sign(grad CE(a, y))``. Only the hidden units of the classifier head are inspected and pruned, no
fine-tuning follows.

Needs: model, and for the FGSM pairs the poisoned training set with its given labels (``pairs="train"``, as in the paper) or the
clean budget; with ``estimator="weight-bound"`` the model alone. Edits: the head's hidden units (scope WHOLE: every unit).
Dial: share of units pruned, per layer; default = what ``rule`` prunes.
Deviations from the paper: its text was not available in full. From public text: the estimator, FGSM, alpha = 0.5, pruning of the p
units of highest constant (its Algorithm 2), and in an appendix a threshold "by analysing the density distribution". Ours: eps, p (a
tenth of a layer), and the options. The density rule made automatic (``rule="density"``; no labels, no attack success) was the
default before: where a density has no valley it prunes nothing, so that the method left nearly every model as it was.

Alpha cannot matter where all distances are equal: at one fixed ``eps`` without clipping, ``||a - b||`` is the same for every pair,
so ``H(alpha) = H(1) * const``, and no scale-free rule (all but ``fixed``) can tell one alpha from another. Clipping, several
``radii``, or ``distance="feature"`` make it matter. At alpha = 1 with weight bounds and ``rule="mean-std"`` the method is CLP.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from defenses.base import Candidate, DefenderView, Defense, Inapplicable, Knowledge, Scope, prunable, pruned_candidate
from models.backbone import Network
from models.images import ImageSet, to_float
from models.spec import Ge, Gt, Le, Lt, PositiveShare, Share, Spec, check, generator
from models.training import default_device
from models.units import (
    Masks,
    Policy,
    Scores,
    UnitLayer,
    Writer,
    capture,
    density_valley,
    fixed,
    mean_std,
    select,
    top_share,
    weight_bounds,
)

__all__ = ["HolderPruning", "HolderSettings", "holder_constants", "quotients"]


def quotients(change: Tensor, distance: Tensor, alpha: float) -> Tensor:
    """``change / distance^alpha``, float64 (N, units), from change (N, units) and distance (N,); 0 where the distance is 0."""
    scale = torch.where(distance > 0, distance, torch.ones_like(distance)).double().pow(alpha)
    quotient = change.double() / scale[:, None]
    return torch.where(distance[:, None] > 0, quotient, torch.zeros_like(quotient))


def holder_constants(
    net: Network,
    layers: Sequence[UnitLayer],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    alpha: float,
    radii: Sequence[float],
    clip: bool,
    space: Literal["feature", "pixel"],
    distance: Literal["input", "feature"] = "input",
) -> Scores:
    """Largest quotient of every unit over FGSM pairs of all ``radii``, float64 (units,) by layer name.

    A unit's output is taken after ReLU; the change of a feature map is the L2 norm over its positions.

    Args:
        net: in evaluation mode.
        batches: (inputs, labels): images float (N, C, H, W) in [0, 1] for ``pixel``, embeddings (N, d) for ``feature``.
        clip: keep perturbed images in [0, 1], perturbed features at 0 or above.
        distance: L2 between the inputs, or between the embeddings of the two images.
    """
    best = {layer.name: torch.zeros(layer.size, dtype=torch.float64) for layer in layers}

    def stages(inputs: Tensor) -> tuple[Tensor, Tensor]:
        z = inputs if space == "feature" else net.embed(inputs)
        return z, net.head(z)

    def length(difference: Tensor) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(difference.flatten(1), dim=1, dtype=torch.float64)
        return norms

    with capture(net, layers) as seen:
        for inputs, labels in batches:
            a = inputs.detach().requires_grad_()
            z, logits = stages(a)
            direction = torch.autograd.grad(cross_entropy(logits, labels, reduction="sum"), a)[0].sign()
            before = {name: output.detach() for name, output in seen.items()}
            for radius in radii:
                with torch.no_grad():
                    b = a + radius * direction
                    if clip:
                        b = b.clamp(0, 1) if space == "pixel" else b.clamp(min=0)
                    moved, _ = stages(b)
                    apart = length(moved - z if distance == "feature" else b - a)
                    for name, output in seen.items():
                        change = (output - before[name]).flatten(2) if output.ndim > 2 else (output - before[name])[..., None]
                        size = torch.linalg.vector_norm(change, dim=2, dtype=torch.float64)
                        best[name] = torch.maximum(best[name], quotients(size, apart, alpha).amax(0).cpu())
    return best


@dataclass(frozen=True)
class HolderSettings(Spec):
    """The settings that Hölder pruning shares with :class:`defenses.hid.HID`, which prunes with it.

    Attributes:
        alpha: Hölder exponent (paper: 0.5).
        u: of the rules ``mean-std``, and ``density`` where no valley exists (CLP: 3).
        share: of the rule ``top-p`` (ours).
        max_pairs: at most so many samples, drawn without replacement (ours).
        grid: shares per layer at which models are offered (ours).
    """

    alpha: PositiveShare = 0.5
    u: Annotated[float, Ge(0), Le(100)] = 3.0
    share: Share = 0.1
    max_pairs: Annotated[int, Ge(1)] = 5000
    grid: tuple[Share, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)


@dataclass(frozen=True)
class HolderPruning(HolderSettings, Defense):
    """Settings of the estimate and of the pruning; see also :class:`HolderSettings`.

    Attributes:
        estimator: where FGSM perturbs, the head's input (``feature-fgsm``; ours) or the image (``pixel-fgsm``), or no data at all
            (``weight-bound``: the Lipschitz bound L. On a bounded domain of diameter D a unit is Hölder with L D^(1 - alpha); D is
            common to a layer, so it never changes the ranking and is set to 1).
        rule: default of the dial: ``top-p`` (paper, Algorithm 2), ``density`` (our automatic reading of its appendix), ``mean-std``
            (CLP's), ``fixed``.
        threshold: of the rule ``fixed``.
        eps: FGSM step; None = 0.1 * median feature norm / sqrt(d) in feature space, 8/255 in pixels (ours).
        radii: multiples of eps; the constant is the largest over all of them (ours: one).
        clip: keep images in [0, 1], features at 0 or above (ours: no).
        distance: between the inputs that FGSM perturbs, or between their embeddings (pixel-fgsm at scope HEAD only).
        pairs: ``train`` (paper) or ``clean``.

    >>> method = HolderPruning(alpha=0.5, share=0.25)
    >>> quotients(torch.tensor([[1.0, 3.0]]), torch.tensor([4.0]), method.alpha)  # change / sqrt(distance)
    tensor([[0.5000, 1.5000]], dtype=torch.float64)
    >>> method.policy(torch.tensor([1.0, 9.0, 2.0, 3.0]))  # a quarter of the units
    tensor([False,  True, False, False])
    """

    name: ClassVar[str] = "holder-pruning"
    family: ClassVar[str] = "pruning"
    cost: ClassVar[str] = "one pass over at most {max_pairs} training images"
    revision: ClassVar[int] = 2  # 2: the published rule, top-p, is the default
    scopes: ClassVar[tuple[Scope, ...]] = (Scope.HEAD, Scope.WHOLE)
    dial_name: ClassVar[str] = "share of units pruned"
    writer: ClassVar[Writer | None] = Writer.OUTPUT

    estimator: Literal["feature-fgsm", "pixel-fgsm", "weight-bound"] = "feature-fgsm"
    rule: Literal["density", "mean-std", "top-p", "fixed"] = "top-p"
    threshold: Annotated[float, Ge(0)] | None = None
    eps: Annotated[float, Gt(0), Lt(math.inf)] | None = None
    radii: tuple[Annotated[float, Gt(0)], ...] = (1.0,)
    clip: bool = False
    distance: Literal["input", "feature"] = "input"
    pairs: Literal["train", "clean"] = "train"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "threshold", self.rule != "fixed" or self.threshold is not None, "given with rule 'fixed'")
        check(self, "radii", len(self.radii) > 0, "one or more multiples of eps")
        behind = self.distance == "feature" and self.estimator != "pixel-fgsm"
        check(self, "distance", not behind, "'input' unless estimator is 'pixel-fgsm'")

    @property
    def needs(self) -> Knowledge:
        if self.estimator == "weight-bound":
            return Knowledge.MODEL
        return Knowledge.MODEL | (Knowledge.TRAIN if self.pairs == "train" else Knowledge.CLEAN)

    @property
    def z_threshold(self) -> float | None:
        return self.u if self.rule == "mean-std" else None

    @property
    def policy(self) -> Policy:
        """The default's threshold rule, per layer."""
        if self.rule == "fixed":
            assert self.threshold is not None
            return fixed(self.threshold)
        return {"density": density_valley(self.u), "mean-std": mean_std(self.u), "top-p": top_share(self.share)}[self.rule]

    def scores(self, view: DefenderView) -> Scores:
        """Hölder constant of every unit in scope, float (units,) by layer name.

        Raises:
            Inapplicable: no units, no samples, or an estimator that does not cover the units in scope.
        """
        net = view.model
        layers = prunable(net, view.scope)
        if self.estimator == "weight-bound":
            return weight_bounds(net, layers)
        if view.scope is Scope.WHOLE and self.estimator == "feature-fgsm":
            raise Inapplicable("perturbed features say nothing about units before them: at scope 'whole' use 'pixel-fgsm'")
        if view.scope is Scope.WHOLE and self.distance == "feature":
            raise Inapplicable("distance 'feature' lies behind the units of scope 'whole': use distance 'input'")
        data = view.train if self.pairs == "train" else view.clean
        if not len(data):
            raise Inapplicable(f"no samples to form pairs from: {self.pairs!r} is empty")
        net = net.to(default_device()).requires_grad_(False)
        drawn = torch.randperm(len(data), generator=generator(view.seed, "holder-pruning", "pairs"))[: self.max_pairs]
        return self.estimate(net, layers, data.subset(drawn.sort().values))

    def estimate(self, net: Network, layers: Sequence[UnitLayer], data: ImageSet, batch: int = 128) -> Scores:
        """Hölder constants of ``layers`` over the FGSM pairs of ``data``; ``net`` is frozen and on :func:`default_device`."""
        device, feature = default_device(), self.estimator == "feature-fgsm"
        data = data.to(device)

        starts = range(0, len(data), batch)

        def images() -> Iterator[Tensor]:
            for start in starts:
                yield to_float(data.images[start : start + batch]).contiguous(memory_format=torch.channels_last)

        with torch.no_grad():
            inputs: Iterable[Tensor] = [net.embed(chunk) for chunk in images()] if feature else images()
        eps = self.eps or 8 / 255
        if self.eps is None and feature:
            z = torch.cat(list(inputs))
            eps = 0.1 * float(z.norm(dim=1).median()) / math.sqrt(z.shape[1])
        return holder_constants(
            net, layers, zip(inputs, (data.labels[start : start + batch] for start in starts), strict=True),
            alpha=self.alpha, radii=[eps * radius for radius in self.radii], clip=self.clip,
            space="feature" if feature else "pixel", distance=self.distance,
        )  # fmt: skip

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        yield from self.offered(view.model, self.scores(view))

    def offered(self, model: Network, scores: Scores) -> Iterator[Candidate]:
        """``model`` pruned by ``scores`` along the dial, the rule's own choice marked as the default."""
        units = sum(len(layer) for layer in scores.values())

        def realised(masks: Masks) -> float:
            return sum(int(mask.sum()) for mask in masks.values()) / units

        chosen = select(scores, self.policy)
        default = realised(chosen)
        ladder = {realised(masks): masks for masks in (select(scores, top_share(share)) for share in self.grid)}
        ladder[default] = chosen  # at an equal number of units, the rule's own choice is offered
        for share, masks in sorted(ladder.items(), key=lambda item: item[0]):
            yield pruned_candidate(model, masks, Writer.OUTPUT, share, share == default)
