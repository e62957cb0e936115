"""Feature extractors: networks whose ``features`` are frozen, under a head trained on other data.

The results of a method depend on where its extractor comes from, so the origin is a setting. An extractor may be trained with
labels on clean images, without labels on clean or on poisoned images, or read from a file of weights. :meth:`Extractor.build` gives
a network and its cost; :attr:`Extractor.reads` is the data it is trained on.

:func:`mlp` and :func:`fit_head` train a head on frozen features, on embeddings that are computed once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from models.backbone import Network, Normalise
from models.classifier import Classifier
from models.images import ImageSet
from models.recipe import Recipe
from models.simclr import SimCLR
from models.spec import (
    BadInput,
    BatchSize,
    EpochCount,
    Ge,
    Gt,
    Le,
    LearningRate,
    Share,
    Spec,
    check,
    derive_seed,
    generator,
    nearest,
)
from models.training import Fitted, default_device, embed, fit, seeded
from models.weights import fit_state, read_state

__all__ = ["EXTRACTORS", "Extractor", "Pretrained", "SelfSupervised", "Supervised", "embeddings", "fit_head", "mlp"]

Fresh = Callable[[int], Network]
"""Builds an untrained network of the scenario's architecture from a seed."""
Reads = Literal["clean", "poisoned", "nothing"]


class Extractor(Spec, ABC):
    """An origin of features: a frozen dataclass of its settings."""

    @property
    @abstractmethod
    def reads(self) -> Reads:
        """Which images it is trained on: the training set before the attack, as published, or none of ours."""

    @property
    @abstractmethod
    def origin(self) -> str:
        """Where its features come from, for a table: "trained with labels on the clean images"."""

    @abstractmethod
    def follows(self, recipe: Recipe) -> dict[str, Any]:
        """The part of the victim's recipe that the result depends on, as plain values; part of the extractor's key."""

    @abstractmethod
    def build(self, fresh: Fresh, data: ImageSet, recipe: Recipe, seed: int) -> Fitted:
        """The extractor, in evaluation mode on the CPU, and its cost.

        Args:
            fresh: builds an untrained network of the victim's architecture.
            data: the images it reads. Where it reads nothing, only their numbers of classes and channels are used.
            recipe: the one the victim is trained with.
            seed: of every draw.

        Raises:
            BadInput: a file or library it needs is missing or does not fit.
            Diverged: weights are not finite at the end.
        """


@dataclass(frozen=True)
class Supervised(Extractor):
    """The victim's architecture and recipe on the clean images with their true labels: what a trusted party would have trained.

    Attributes:
        epochs: passes over the images; None = as many as the victim's (ours).
    """

    name: ClassVar[str] = "supervised"

    epochs: EpochCount | None = None

    @property
    def reads(self) -> Reads:
        return "clean"

    @property
    def origin(self) -> str:
        return "trained with labels on the clean images"

    def recipe(self, victims: Recipe) -> Recipe:
        """The victim's recipe, for ``epochs``."""
        return victims if self.epochs is None else dataclasses.replace(victims, epochs=self.epochs)

    def follows(self, recipe: Recipe) -> dict[str, Any]:
        return self.recipe(recipe).spec()

    def build(self, fresh: Fresh, data: ImageSet, recipe: Recipe, seed: int) -> Fitted:
        recipe = self.recipe(recipe)
        net = fresh(derive_seed(seed, self.name, "weights"))
        return fit(Classifier(net, recipe), data, recipe, derive_seed(seed, self.name, "batches"))


@dataclass(frozen=True)
class SelfSupervised(Extractor):
    """SimCLR: no label is looked at (Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML
    2020, arXiv 2002.05709), as DBD trains it on a poisoned set (Huang et al., ICLR 2022, arXiv 2202.03423).

    Attributes:
        on: the images before the attack (``clean``) or as published (``poisoned``).
        epochs: of SGD with a cosine schedule (DBD's authors' code: 1000).
        batch: images per step (DBD's authors' code: 512).
        lr: peak rate at batch 512, scaled by batch / 512 (DBD's authors' code: 0.4).
        temperature: of the loss (DBD's authors' code: 0.5).
        weight_decay: of SGD (DBD's authors' code: 1e-4).
        blur: share of the views that are blurred (DBD's authors' code; SimCLR's own recipe for 32x32 images, App. B.9, has none).
        symmetric: both views are anchors, as in SimCLR, or the first ones alone, as in DBD (its authors' code).
    """

    name: ClassVar[str] = "self-supervised"

    on: Literal["clean", "poisoned"] = "poisoned"
    epochs: EpochCount = 1000
    batch: BatchSize = 512
    lr: LearningRate = 0.4
    temperature: Annotated[float, Gt(0), Le(100)] = 0.5
    weight_decay: Annotated[float, Ge(0), Le(1)] = 1e-4
    blur: Share = 0.5
    symmetric: bool = False

    @property
    def reads(self) -> Reads:
        return self.on

    @property
    def origin(self) -> str:
        return f"self-supervised on the {self.on} images"

    def follows(self, recipe: Recipe) -> dict[str, Any]:
        # "reference" is left out: keys from before the setting existed stay the same.
        return {"flip": recipe.flip, **({"precision": recipe.precision} if recipe.precision != "reference" else {})}

    def build(self, fresh: Fresh, data: ImageSet, recipe: Recipe, seed: int) -> Fitted:
        own = Recipe(
            epochs=self.epochs, batch=self.batch, lr=self.lr * self.batch / 512, weight_decay=self.weight_decay, crop=0, flip=False,
            precision=recipe.precision,
        )  # fmt: skip
        net = fresh(derive_seed(seed, self.name, "weights"))
        first = net.head[0]
        assert isinstance(first, nn.Linear)
        module = SimCLR(
            net, own, width=first.in_features, temperature=self.temperature, flip=recipe.flip, blur=self.blur,
            symmetric=self.symmetric, seed=derive_seed(seed, self.name, "views"),
        )  # fmt: skip
        return fit(module, data, own, derive_seed(seed, self.name, "batches"))


class _Resized(nn.Module):
    """A trunk behind a resize to the square it was trained on."""

    def __init__(self, trunk: nn.Module, size: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.trunk(interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=False, antialias=True))
        return z


@lru_cache(maxsize=8)
def _content(path: str, _size: int, _changed: int) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@dataclass(frozen=True)
class Pretrained(Extractor):
    """Weights from a local file, for an architecture of torchvision or timm; nothing is ever downloaded.

    The classifier of the file is left out. Images are resized to ``size`` (bilinear, antialiased) and normalised as the weights
    expect; a grey image becomes three equal channels. The settings hold the hash of the file's content, not its path.

    Attributes:
        weights: path of the file, safetensors or a plain torch checkpoint.
        model: the architecture by its library's name, e.g. ``resnet18``.
        library: ``torchvision``, or ``timm`` where that is installed.
        size: side of the square images are resized to (torchvision's and timm's usual 224).
        mean: per channel, of images in [0, 1] (ImageNet's, which both libraries use by default).
        std: per channel, likewise.
    """

    name: ClassVar[str] = "pretrained"

    weights: str
    model: str = "resnet18"
    library: Literal["torchvision", "timm"] = "torchvision"
    size: Annotated[int, Ge(8), Le(4096)] = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[Annotated[float, Gt(0)], ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "mean", len(self.mean) == 3, "three numbers, one per channel")
        check(self, "std", len(self.std) == 3, "three numbers, one per channel")
        self._fingerprint()

    def _fingerprint(self) -> str:
        path = Path(self.weights)
        try:
            found = path.stat()
            return _content(self.weights, found.st_size, found.st_mtime_ns)
        except OSError as error:
            beside = [other.name for other in path.parent.glob("*")] if path.parent.is_dir() else []
            hint = nearest(path.name, beside) if beside else ""
            raise BadInput(f"{self.name}: weights = {self.weights!r}: {error.strerror or error}{hint}") from error

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "weights": self._fingerprint()}

    @property
    def reads(self) -> Reads:
        return "nothing"

    @property
    def origin(self) -> str:
        return f"{self.model} of {self.library}, weights from a file"

    def follows(self, recipe: Recipe) -> dict[str, Any]:
        return {}

    def build(self, fresh: Fresh, data: ImageSet, recipe: Recipe, seed: int) -> Fitted:
        start = time.perf_counter()
        if data.shape[0] not in (1, 3):
            raise BadInput(f"{self.name}: images have {data.shape[0]} channels; {self.model} takes 3 (or 1, shown as grey)")
        with seeded(seed):  # the libraries draw initial weights, all of which are then overwritten
            trunk, width = self._trunk()
            head = nn.Sequential(nn.Linear(width, data.num_classes))
        net = Network(Normalise(self.mean, self.std), _Resized(trunk, self.size), head)
        net = net.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        return Fitted(net, time.perf_counter() - start, 0, 0)

    def _trunk(self) -> tuple[nn.Module, int]:
        """The architecture with the file's weights, its last linear layer replaced by nothing, and the size of what it returns."""
        path = Path(self.weights)
        models, known = self._library()
        if self.model not in known:
            raise BadInput(f"{self.name}: {self.library} has no model {self.model!r}{nearest(self.model, known)}")
        state = read_state(path)
        net = models.get_model(self.model, weights=None) if self.library == "torchvision" else models.create_model(self.model)
        linear = [(name, module) for name, module in net.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise BadInput(f"{self.name}: {self.model} has no linear classifier at its end to read the features from")
        name, last = linear[-1]
        if f"{name}.weight" in state:  # the file decides how many classes its own classifier distinguishes
            net.set_submodule(name, nn.Linear(last.in_features, len(state[f"{name}.weight"]), bias=last.bias is not None))
        fit_state(net, state, path)
        net.set_submodule(name, nn.Identity())
        return net, last.in_features

    def _library(self) -> tuple[Any, list[str]]:
        try:
            library = importlib.import_module("torchvision.models" if self.library == "torchvision" else "timm")
        except ImportError as error:
            raise BadInput(f"{self.name}: library = {self.library!r} is not installed: pip install {self.library}") from error
        known: list[str] = list(library.list_models())
        return library, known


EXTRACTORS: tuple[type[Extractor], ...] = (SelfSupervised, Supervised, Pretrained)
"""Every origin a matrix can name; :func:`models.spec.lookup` finds one by name."""


# -- heads on frozen features --------------------------------------------------------------------------------------------------


def embeddings(net: Network, data: ImageSet) -> Tensor:
    """Features float (N, d) of every image, in evaluation mode, on the CPU; the pass is tallied."""
    parts = [part.cpu() for part in embed(net, data.images)]
    return torch.cat(parts) if parts else torch.empty(0)


def mlp(width: int, hidden: Sequence[int], num_classes: int, seed: int) -> nn.Sequential:
    """A fresh head: linear layers ``width -> hidden... -> num_classes`` with ReLU between them."""
    with seeded(seed):
        sizes = [width, *hidden, num_classes]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def fit_head(
    head: nn.Sequential,
    z: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    lr: float,
    batch: int,
    seed: int,
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
) -> nn.Sequential:
    """Trains ``head`` in place on cached features with Adam at a constant rate; returned in evaluation mode on the CPU.

    Args:
        head: the head.
        z: float (N, d).
        labels: int64 (N,).
        epochs: passes over the features.
        lr: of Adam.
        batch: samples per step.
        seed: of the shuffling.
        loss: (logits (B, num_classes), labels (B,)) -> scalar.
    """
    device, draw = default_device(), generator(seed, "head")
    head, z, labels = head.to(device).train(), z.to(device), labels.to(device)
    optimizer = torch.optim.Adam(head.parameters(), lr=lr)
    for _ in range(epochs):
        order = torch.randperm(len(z), generator=draw).to(device)
        for start in range(0, len(z), batch):
            index = order[start : start + batch]
            optimizer.zero_grad()
            loss(head(z[index]), labels[index]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return head.cpu().eval()
