"""HID, Hölder iterative defense: a reconstruction from the public text of "Hölder Pruning: Localized Pruning for Backdoor Removal
in Deep Neural Networks", submitted to ICLR 2025 and withdrawn (OpenReview yJduhi9mDQ; authors anonymous, no code released).

Hölder pruning needs an extractor that was trained without poison; where there is none, self-supervised learning on the poisoned
images, which uses no label, replaces it. A head trained on its features learns the backdoor and is pruned; samples whose label the
pruned head confirms are taken for clean, and semi-supervised learning with their labels alone improves the extractor. Repeat.

Needs: poisoned training set. Edits: everything; the model is new, of the victim's architecture with a head of its own.
Dial: share of units pruned at the end, per layer; default = what ``rule`` prunes.
Deviations from the paper: its text was not available in full. From public text: the order of the stages, Hölder pruning inside,
alpha = 0.5. Ours: SimCLR and MixMatch as the self- and semi-supervised methods (with DBD's numbers), the size and training of the
head, the rule for the clean samples, the number of rounds, an epoch of MixMatch = one pass over the clean samples, and the last
pruning of the head that MixMatch leaves.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from defenses.base import Candidate, DefenderView, Defense, Inapplicable, Knowledge, prunable
from defenses.holder_pruning import HolderPruning, HolderSettings
from models.backbone import Network
from models.extractors import SelfSupervised, embeddings, fit_head, mlp
from models.images import ImageSet
from models.mixmatch import MixMatch
from models.recipe import Recipe
from models.spec import EpochCount, Ge, Gt, Le, LearningRate, PositiveShare, Share, check, derive_seed, generator
from models.training import default_device, fit
from models.units import Scope, Scores

__all__ = ["HID", "clean_split"]


def clean_split(logits: Tensor, labels: Tensor, share: float) -> Tensor:
    """Samples taken for clean, bool (N,): classified as labelled, with a loss among the lowest ``share`` of their label's samples.

    ``floor(share * n)`` of a label's n samples come into question; ties go to the lower index.
    """
    losses, agree = cross_entropy(logits, labels, reduction="none"), logits.argmax(1) == labels
    low = torch.zeros(len(labels), dtype=torch.bool)
    for label in set(labels.tolist()):
        members = torch.nonzero(labels == label).flatten()
        order = torch.argsort(losses[members], stable=True)
        low[members[order[: int(share * len(members))]]] = True
    return low & agree


@dataclass(frozen=True)
class HID(HolderSettings, Defense):
    """Settings of the four stages; see also :class:`defenses.holder_pruning.HolderSettings`.

    Attributes:
        ssl_epochs: of SimCLR, see :class:`models.extractors.SelfSupervised` (DBD: 1000).
        ssl_batch: of SimCLR (DBD: 512).
        ssl_lr: of SimCLR (DBD: 0.4).
        blur: share of SimCLR's views that are blurred (DBD: 0.5).
        rounds: of head, pruning, split and semi-supervised training (ours).
        settled: the rounds end once a smaller share of the samples changes sides (ours).
        hidden: sizes of the head's hidden layers (ours).
        head_epochs: of the head on cached features (ours).
        head_lr: of Adam for the head (ours).
        head_batch: samples per step of the head (ours).
        rule: of the pruning, as in :class:`defenses.holder_pruning.HolderPruning`; ``none`` leaves the pruning out, to show what it
            adds (ours).
        clean_share: of every label's samples, those that may be taken for clean (ours, as DBD's half of the set).
        semi_epochs: passes of MixMatch over the clean samples, each round (ours).
        semi_batch: labelled samples per step of MixMatch, and as many unlabelled ones (DBD's authors' code).
        semi_lr: of Adam for MixMatch (DBD's authors' code).
        sharpen: MixMatch's temperature (DBD's authors' code: 0.5).
        mixup: MixMatch's Beta parameter (DBD's authors' code: 0.75).
        unlabelled_weight: MixMatch's final weight of Lu, reached linearly (DBD's authors' code: 15).

    >>> HID(alpha=0.25, rule="top-p").pruner.alpha
    0.25
    >>> clean_split(torch.tensor([[9.0, 0.0], [1.0, 0.0], [0.0, 9.0]]), torch.tensor([0, 0, 1]), share=0.5)
    tensor([ True, False, False])
    """

    name: ClassVar[str] = "hid"
    family: ClassVar[str] = "training anew"
    cost: ClassVar[str] = (
        "{ssl_epochs} epochs of SimCLR, {rounds} rounds of {head_epochs} epochs of the head and "
        "{semi_epochs} of MixMatch"
    )
    revision: ClassVar[int] = 2  # 2: the note says what every round pruned
    dial_name: ClassVar[str] = "share of units pruned"

    ssl_epochs: int = 1000
    ssl_batch: int = 512
    ssl_lr: float = 0.4
    blur: float = 0.5
    rounds: Annotated[int, Ge(1), Le(100)] = 3
    settled: Share = 0.01
    hidden: tuple[Annotated[int, Ge(1)], ...] = (512, 512)
    head_epochs: EpochCount = 30
    head_lr: LearningRate = 1e-3
    head_batch: Annotated[int, Ge(1), Le(65_536)] = 256
    rule: Literal["density", "mean-std", "top-p", "none"] = "density"
    clean_share: PositiveShare = 0.5
    semi_epochs: int = 40
    semi_batch: int = 64
    semi_lr: float = 0.002
    sharpen: PositiveShare = 0.5
    mixup: Annotated[float, Gt(0), Le(100)] = 0.75
    unlabelled_weight: Annotated[float, Ge(0), Le(1000)] = 15.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "hidden", len(self.hidden) > 0, "one or more sizes")
        self.extractor, self.semi  # noqa: B018 - their own ranges are checked where they are built

    @property
    def needs(self) -> Knowledge:
        return Knowledge.TRAIN

    @property
    def extractor(self) -> SelfSupervised:
        """SimCLR on the poisoned images, under these settings."""
        return SelfSupervised("poisoned", self.ssl_epochs, self.ssl_batch, self.ssl_lr, blur=self.blur)

    @property
    def pruner(self) -> HolderPruning:
        """Hölder pruning under these settings; where ``rule`` is ``none``, its rule is not used."""
        shared = {field.name: getattr(self, field.name) for field in fields(HolderSettings)}
        return HolderPruning(**shared, rule="density" if self.rule == "none" else self.rule)

    @property
    def semi(self) -> Recipe:
        """Of the semi-supervised training, but for crop, flip and precision."""
        return Recipe(
            epochs=self.semi_epochs, batch=self.semi_batch, lr=self.semi_lr, optimizer="adam", weight_decay=0, schedule="constant"
        )

    def constants(self, net: Network, data: ImageSet, seed: int) -> Scores:
        """Hölder constants of the head's hidden units, over pairs from ``data``."""
        drawn = torch.randperm(len(data), generator=generator(seed, "pairs"))[: self.max_pairs]
        frozen = copy.deepcopy(net).to(default_device()).eval().requires_grad_(False)
        return self.pruner.estimate(frozen, prunable(frozen, Scope.HEAD), data.subset(drawn.sort().values))

    def pruned(self, net: Network, data: ImageSet, seed: int) -> Candidate:
        """``net`` pruned by the rule."""
        if self.rule == "none":
            return Candidate(net)
        defaults = replace(self.pruner, grid=())
        return next(defaults.offered(net, self.constants(net, data, seed)))

    def split(self, net: Network, data: ImageSet, seed: int) -> tuple[Candidate, Tensor]:
        """A fresh head on ``net``'s features, trained on the labels as given and pruned; and who is taken for clean, bool (N,)."""
        z = embeddings(net, data)
        head = mlp(z.shape[1], self.hidden, data.num_classes, derive_seed(seed, "head"))
        own = derive_seed(seed, "fit")
        fit_head(head, z, data.labels, epochs=self.head_epochs, lr=self.head_lr, batch=self.head_batch, seed=own)
        pruned = self.pruned(Network(net.normalise, net.features, head).eval(), data, seed)
        with torch.no_grad():
            logits = pruned.model.head(z)
        return pruned, clean_split(logits, data.labels, self.clean_share)

    def semi_supervised(self, net: Network, recipe: Recipe, clean: Tensor) -> MixMatch:
        """MixMatch on samples of which those under ``clean``, bool (N,), keep their labels."""
        steps = max(1, int(clean.sum()) // recipe.batch)
        return MixMatch(
            net, recipe, lambda *_: clean, iterations=steps, sharpen=self.sharpen, mixup=self.mixup,
            weight=self.unlabelled_weight, ramp=max(1, recipe.epochs),
        )  # fmt: skip

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        data = view.train
        if len(data) < 2:
            raise Inapplicable(f"the poisoned training set holds {len(data)} samples; at least 2 are needed")
        recipe = replace(self.semi, crop=view.recipe.crop, flip=view.recipe.flip, precision=view.recipe.precision)
        net = view.extract(self.extractor)
        clean, done = torch.zeros(len(data), dtype=torch.bool), 0
        counts: list[int] = []
        for number in range(self.rounds):
            seed = derive_seed(view.seed, "hid", "round", number)
            proposed, found = self.split(net, data, seed)
            moved = float((found != clean).double().mean())
            if number and moved < self.settled:
                break
            net, clean, done = proposed.model, found, number + 1
            counts.append(proposed.pruned)
            if min(int(clean.sum()), int((~clean).sum())) < 2:
                break
            module = self.semi_supervised(net, recipe, clean)
            fit(module, data, recipe, derive_seed(seed, "semi"))
        net = net.requires_grad_(True).eval()
        units = sum(layer.size for layer in prunable(net, Scope.HEAD))
        steps = "nothing pruned by setting" if self.rule == "none" else f"pruned {' and '.join(map(str, counts))} of {units} units"
        note = f"{done} rounds; {steps}; {int(clean.sum())} of {len(data)} samples taken for clean"
        if self.rule == "none":
            yield Candidate(net, isolated=~clean, note=note)
            return
        for candidate in self.pruner.offered(net, self.constants(net, data, derive_seed(view.seed, "hid", "last"))):
            yield replace(candidate, isolated=~clean, note=note)
