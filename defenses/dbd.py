"""DBD: Huang, Li, Wu, Qin and Ren, "Backdoor Defense via Decoupling the Training Process", ICLR 2022, arXiv 2202.03423.

Poisoned samples gather in feature space because training end to end with their wrong labels pulls them there. So the features are
learned without labels, by SimCLR; only then is a head on the frozen features trained with the labels, under a loss that wrong
labels hardly change. What fits the head well keeps its label, the rest loses it, and the whole network is fine-tuned
semi-supervised.

Needs: poisoned training set. Edits: everything; the model is new, of the victim's architecture. Dial: none.
Deviations from the paper: the numbers are the authors' code's. The extractor's running statistics stay as SimCLR left them while
the head is trained (the code lets them drift); losses are recorded on images as they are (the code: augmented); the crop is the
victim's, zero-padded (the code: reflected). MixMatch starts with a fresh Adam (the code: one Adam from the head's training on). The
extractor is the last epoch's (the code's fine-tuning loads epoch 100 of a cosine over 1,000). Where the victim's head is an MLP,
so is this one's. What is reported as isolated is the unlabelled side of the last split, half of the set by design.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from defenses.base import Candidate, DefenderView, Defense, Inapplicable, Knowledge, Scope, lowest_loss
from defenses.fine_tuning import Tuned, tune
from models.backbone import Network
from models.extractors import SelfSupervised
from models.images import ImageSet
from models.mixmatch import MixMatch
from models.recipe import Recipe
from models.spec import BatchSize, EpochCount, Ge, Gt, Le, LearningRate, Lt, PositiveShare, derive_seed
from models.training import fit, logits

__all__ = ["DBD", "HEAD_START", "symmetric_cross_entropy"]

HEAD_START = 10 / 190
"""Share of the ramp of Lu that counts as passed when MixMatch starts (authors' code)."""


def symmetric_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """``0.1 CE + RCE`` of every sample, float (N,) (Wang et al., ICCV 2019, arXiv 1908.06112).

    ``RCE = - sum_c p_c log q_c``, with p the softmax, at least 1e-7, and q the given label's one-hot vector, at least 1e-4.
    """
    given = one_hot(labels, logits.shape[1]).to(logits.dtype).clamp(min=1e-4)
    reverse = -(logits.softmax(1).clamp(min=1e-7) * given.log()).sum(1)
    return 0.1 * cross_entropy(logits, labels, reduction="none") + reverse


class _Head(Tuned):
    def loss(self, logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        return symmetric_cross_entropy(logits, labels).mean()


@dataclass(frozen=True)
class DBD(Defense):
    """Settings of the three stages, all from the authors' code.

    Attributes:
        ssl_epochs: of SimCLR, see :class:`models.extractors.SelfSupervised`.
        ssl_batch: of SimCLR, likewise.
        ssl_lr: of SimCLR, likewise.
        blur: share of SimCLR's views that are blurred.
        head_epochs: of the head alone, on all labels.
        head_batch: samples per step of the head's training.
        lr: of Adam for head and MixMatch, constant.
        clean_share: share of the set that keeps its labels; it must not exceed the share that is clean.
        semi_epochs: of MixMatch; the set is split anew before each.
        iterations: steps per epoch of MixMatch.
        semi_batch: labelled samples per step of MixMatch, and as many unlabelled ones.
        sharpen: MixMatch's temperature.
        mixup: MixMatch's Beta parameter.
        unlabelled_weight: MixMatch's final weight of Lu. It grows linearly from 10/190 of it, whatever the length (authors' code:
            MixMatch begins in epoch 10 of a ramp of 190).

    >>> DBD(ssl_epochs=8).extractor.epochs
    8
    >>> import torch
    >>> symmetric_cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))  # 0.1 log 2 - 0.5 log 1e-4
    tensor([4.6745])
    """

    name: ClassVar[str] = "dbd"
    family: ClassVar[str] = "training anew"
    cost: ClassVar[str] = "{ssl_epochs} epochs of SimCLR, {head_epochs} of the head, {semi_epochs} of MixMatch"
    revision: ClassVar[int] = 2  # 2: the ramp of Lu keeps its shape in shortened schedules

    ssl_epochs: int = 1000
    ssl_batch: int = 512
    ssl_lr: float = 0.4
    blur: float = 0.5
    head_epochs: EpochCount = 10
    head_batch: BatchSize = 128
    lr: LearningRate = 0.002
    clean_share: Annotated[float, Gt(0), Lt(1)] = 0.5
    semi_epochs: Annotated[int, Ge(1), Le(10_000)] = 190
    iterations: Annotated[int, Ge(1), Le(1_000_000)] = 1024
    semi_batch: BatchSize = 64
    sharpen: PositiveShare = 0.5
    mixup: Annotated[float, Gt(0), Le(100)] = 0.75
    unlabelled_weight: Annotated[float, Ge(0), Le(1000)] = 15.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.extractor  # noqa: B018 - its own ranges are checked where it is built

    @property
    def needs(self) -> Knowledge:
        return Knowledge.TRAIN

    @property
    def extractor(self) -> SelfSupervised:
        """SimCLR on the poisoned images, under these settings."""
        return SelfSupervised("poisoned", self.ssl_epochs, self.ssl_batch, self.ssl_lr, blur=self.blur)

    def recipe(self, view: DefenderView, epochs: int, batch: int) -> Recipe:
        """Of the head's training, or MixMatch's."""
        return Recipe(
            epochs=epochs, batch=batch, lr=self.lr, optimizer="adam", weight_decay=0, schedule="constant",
            crop=view.recipe.crop, flip=view.recipe.flip, precision=view.recipe.precision,
        )  # fmt: skip

    def split(self, net: Network, data: ImageSet) -> Tensor:
        """Samples that keep their labels, bool (N,)."""
        return lowest_loss(symmetric_cross_entropy(logits(net, data.images), data.labels.cpu()), self.clean_share)

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        data = view.train
        kept = int(self.clean_share * len(data))
        if min(kept, len(data) - kept) < 2:
            raise Inapplicable(f"clean_share = {self.clean_share} of {len(data)} samples leaves a side with fewer than 2")
        net = view.extract(self.extractor)
        head = _Head(net, self.recipe(view, self.head_epochs, self.head_batch), Scope.HEAD)
        tune(head, data, derive_seed(view.seed, "dbd", "head"))
        recipe = self.recipe(view, self.semi_epochs, self.semi_batch)
        module = MixMatch(
            net, recipe, self.split, iterations=self.iterations, sharpen=self.sharpen, mixup=self.mixup,
            weight=self.unlabelled_weight, ramp=self.semi_epochs, head_start=self.semi_epochs * HEAD_START,
        )  # fmt: skip
        fit(module, data, recipe, derive_seed(view.seed, "dbd", "semi"))
        yield Candidate(net.requires_grad_(True).eval(), isolated=~module.labelled)
