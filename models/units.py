"""Prunable units: one engine for every pruning defense.

score -> order -> threshold policy -> mask -> writer. A method defines its score; the rest is here.

Units are the channels of every batch norm, of every conv that feeds no batch norm, and the hidden units of the head. Output units
are classes and never prunable. The channels of the embedding, which the classifier reads, are a layer of their own
(:func:`embedding_layer`). The convs that a norm normalises are found from the data flow (``torch.fx``), since in pre-activation
nets a norm comes before the conv and may normalise a residual sum. ``pairing="registration"`` takes the last conv registered before
the norm, as CLP's and BackdoorBench's released code do; it is right for conv-norm nets and wrong for 7 of the 16 norms of
PreAct-ResNet-18.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.stats import gaussian_kde
from torch import Tensor, fx, nn

from models.backbone import GlobalAverage, Network

__all__ = [
    "EMBEDDING", "Leaves", "Masks", "Pairing", "Policy", "Scope", "Scores", "UnitLayer", "Writer", "capture", "density_valley",
    "embedding_layer", "fixed", "hold",
    "largest_within", "mean_std", "prune", "select", "top_share", "unit_layers", "weight_bounds",
]  # fmt: skip

Pairing = Literal["dataflow", "registration"]
Scores = dict[str, Tensor]
"""Suspicion by layer name, float (units,); the higher, the sooner pruned."""
Masks = dict[str, Tensor]
"""By layer name, bool (units,); True = pruned."""
Policy = Callable[[Tensor], Tensor]
"""Scores of one layer, float (units,) -> mask, bool (units,)."""


EMBEDDING = "embedding"
"""Name of the layer whose units are the channels of the embedding: no module, but the columns of the head's first weight."""


class Scope(enum.Enum):
    """Which weights a defense may edit: those of the head, or the whole network's."""

    HEAD = "head"
    WHOLE = "whole"


class Writer(enum.Enum):
    """What pruning writes into a norm: GAMMA = 0 alone (the channel becomes the constant beta; ANP, RNP), GAMMA_BETA = 0 (the
    channel becomes 0; CLP). Units of convs and linear layers have no such choice: row and bias become 0 (OUTPUT). A channel of the
    embedding is cut by a zero column of the weight that reads it, whatever the writer."""

    GAMMA = "gamma"
    GAMMA_BETA = "gamma+beta"
    OUTPUT = "unit output"


@dataclass(frozen=True)
class UnitLayer:
    """One layer's prunable units.

    Attributes:
        name: dotted path of the module in the network, or ``embedding``.
        kind: ``norm``, ``conv``, ``linear`` or ``input`` (of the classifier).
        size: number of units.
        head: whether it is in the head.
        writers: dotted paths of the convs whose (summed) output a norm normalises; for a conv or linear layer, itself.
    """

    name: str
    kind: Literal["norm", "conv", "linear", "input"]
    size: int
    head: bool
    writers: tuple[str, ...]


class Leaves(fx.Tracer):
    """Keeps convs and norms whole even where a class wraps them, ours or timm's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = isinstance(m, (nn.Conv2d, nn.BatchNorm2d)) or not list(m.children())
        return whole or super().is_leaf_module(m, module_qualified_name)


def _writers_by_dataflow(features: nn.Module) -> dict[str, tuple[str, ...]]:
    """For every BatchNorm2d of ``features``: the convs whose outputs reach it through nothing but additions."""
    graph = Leaves().trace(features)
    modules = dict(features.named_modules())
    found: dict[str, tuple[str, ...]] = {}

    def convs(node: fx.Node, seen: set[fx.Node]) -> Iterator[str]:
        if node in seen:
            return
        seen.add(node)
        if node.op == "call_module":
            module = modules[str(node.target)]
            if isinstance(module, nn.Conv2d):
                yield str(node.target)
                return
            if not isinstance(module, (nn.Identity, nn.Dropout, nn.Sequential)):
                return
        elif node.op not in ("call_function", "call_method") or "add" not in str(
            getattr(node.target, "__name__", node.target)
        ):
            return
        for source in node.all_input_nodes:
            yield from convs(source, seen)

    for node in graph.nodes:
        if node.op == "call_module" and isinstance(modules[str(node.target)], nn.BatchNorm2d):
            found[str(node.target)] = tuple(sorted(set(convs(node.all_input_nodes[0], set()))))
    return found


def _writers_by_registration(features: nn.Module) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    last: tuple[str, ...] = ()
    for name, module in features.named_modules():
        if isinstance(module, nn.Conv2d):
            last = (name,)
        elif isinstance(module, nn.BatchNorm2d):
            found[name] = last
    return found


def unit_layers(net: Network, scope: Scope = Scope.WHOLE, pairing: Pairing = "dataflow") -> tuple[UnitLayer, ...]:
    """The prunable layers, in the order of the forward pass: features (WHOLE only), then the head's hidden layers.

    With ``pairing="registration"`` convs without a norm are left out, as the released codes do.
    """
    layers: list[UnitLayer] = []
    if scope is Scope.WHOLE:
        writers = (_writers_by_dataflow if pairing == "dataflow" else _writers_by_registration)(net.features)
        paired = {conv for convs in writers.values() for conv in convs}
        for name, module in net.features.named_modules():
            path = f"features.{name}"
            if isinstance(module, nn.BatchNorm2d):
                sources = tuple(f"features.{conv}" for conv in writers.get(name, ()))
                layers.append(UnitLayer(path, "norm", module.num_features, False, sources))
            elif isinstance(module, nn.Conv2d) and name not in paired and pairing == "dataflow":
                layers.append(UnitLayer(path, "conv", module.out_channels, False, (path,)))
    linear = [(name, module) for name, module in net.head.named_modules() if isinstance(module, nn.Linear)]
    for name, module in linear[:-1]:
        layers.append(UnitLayer(f"head.{name}", "linear", module.out_features, True, (f"head.{name}",)))
    return tuple(layers)


def embedding_layer(net: Network) -> UnitLayer:
    """The channels of the embedding as units: what the classifier reads, after every shortcut has been added."""
    first = net.head[0]
    assert isinstance(first, nn.Linear)
    return UnitLayer(EMBEDDING, "input", first.in_features, False, ())


# -- scores shared by several methods ------------------------------------------------------------------------------------------


@torch.no_grad()
def weight_bounds(net: Network, layers: Sequence[UnitLayer], *, norm_epsilon: bool = False) -> Scores:
    """Upper bound of each unit's Lipschitz constant, from weights alone (CLP: Zheng et al., ECCV 2022, arXiv 2208.03111, eq. 6).

    norm: ``|gamma_k| / sqrt(var_k) * sigma_max(W_k reshaped to (C_in, kh * kw))``; where several convs write into one norm, their
    spectral norms combine as the root of the sum of squares (a bound for the stacked operator). linear: ``||w_k||_2``. conv
    without norm: ``sigma_max``. ``norm_epsilon`` adds the norm's epsilon to the variance (the paper and the released code do not).
    One batched ``svdvals`` per conv. A channel of zero variance scores infinity.
    """
    scores: Scores = {}
    for layer in layers:
        squared = torch.zeros(layer.size, dtype=torch.float32)
        for path in layer.writers:
            writer = net.get_submodule(path)
            assert isinstance(writer, (nn.Conv2d, nn.Linear))
            rows = writer.weight.detach().float().cpu()
            squared = squared + torch.linalg.svdvals(rows.reshape(rows.shape[0], rows.shape[1], -1))[:, 0] ** 2
        bound = squared.sqrt()
        module = net.get_submodule(layer.name)
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_var is not None
            variance = module.running_var.cpu() + (module.eps if norm_epsilon else 0.0)
            bound = bound * (module.weight.detach().cpu() / variance.sqrt()).abs()
            bound[variance == 0] = torch.inf
        scores[layer.name] = bound
    return scores


@contextmanager
def capture(
    net: Network, layers: Sequence[UnitLayer], what: Literal["activation", "output", "input"] = "activation"
) -> Iterator[dict[str, Tensor]]:
    """While open, every forward pass leaves each unit's output after ReLU: (N, units, H, W) or (N, units), by layer name.

    Of the embedding's channels it is the map before the global average, where the features end in one. With ``what="output"`` it
    is the module's output itself, with ``"input"`` what the module reads.
    """
    seen: dict[str, Tensor] = {}

    def keep_map(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[EMBEDDING] = torch.relu(inputs[0])

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = torch.relu(output) if what == "activation" else output if what == "output" else inputs[0]

        return hook

    handles = [net.get_submodule(layer.name).register_forward_hook(keep(layer.name)) for layer in layers if layer.kind != "input"]
    if any(layer.kind == "input" for layer in layers):
        pools = [module for module in net.features.modules() if isinstance(module, GlobalAverage)]
        handles.append(
            pools[-1].register_forward_pre_hook(keep_map) if pools else net.features.register_forward_hook(keep(EMBEDDING))
        )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# -- threshold policies --------------------------------------------------------------------------------------------------------


def fixed(threshold: float) -> Policy:
    """Prune scores at or above ``threshold``."""
    return lambda scores: scores >= threshold


def top_share(share: float) -> Policy:
    """Prune the ``round(share * n)`` highest scores of a layer, share in [0, 1]; ties go to the lower index first."""

    def policy(scores: Tensor) -> Tensor:
        order = torch.argsort(scores, descending=True, stable=True)
        mask = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        mask[order[: round(share * len(scores))]] = True
        return mask

    return policy


def mean_std(u: float) -> Policy:
    """Prune scores above ``mean + u * std`` of their layer (unbiased std, strict), CLP's rule.

    Scores that are not finite (zero variance) are pruned and left out of mean and std. With fewer than two finite scores, or all
    equal, nothing else is pruned.
    """

    def policy(scores: Tensor) -> Tensor:
        finite = torch.isfinite(scores)
        kept = scores[finite]
        if len(kept) < 2:
            return ~finite
        return ~finite | (scores > kept.mean() + u * kept.std())

    return policy


def density_valley(fallback_u: float = 3.0) -> Policy:
    """Prune scores right of the first clear valley of their density, without looking at labels or ASR.

    The automatic reading of "the threshold is selected by analysing the density distribution of Hölder constants": Gaussian KDE of
    ``log(score + 1e-12)`` over units with a positive score, bandwidth ``0.9 min(std, IQR / 1.34) n^(-1/5)``, 512 grid points;
    threshold = the first local minimum right of the main mode that is followed by another mode, if its density is at most 0.8 of
    that lower mode and at most 30 % of the units are above. Otherwise, or with fewer than 8 such units, ``mean + fallback_u std``.
    Infinite scores are pruned and left out of the density; dead units (score 0) are never pruned.
    """

    def policy(scores: Tensor) -> Tensor:
        alive = scores > 0
        finite = scores[alive & torch.isfinite(scores)]
        threshold = _valley(np.log(finite.double().numpy() + 1e-12)) if len(finite) >= 8 else None
        if threshold is None:
            return mean_std(fallback_u)(scores) & alive
        return alive & (torch.log(scores.double() + 1e-12) > threshold)

    return policy


def _valley(values: np.ndarray) -> float | None:
    """The density's first clear valley right of its main mode, or None."""
    spread = min(float(values.std(ddof=1)), float(np.subtract(*np.percentile(values, [75, 25]))) / 1.34)
    if not np.isfinite(spread) or spread <= 0:
        return None
    bandwidth = 0.9 * spread * len(values) ** -0.2
    grid = np.linspace(values.min() - 3 * bandwidth, values.max() + 3 * bandwidth, 512)
    density = gaussian_kde(values, bw_method=bandwidth / float(values.std(ddof=1)))(grid)
    inner = density[1:-1]
    minima = np.flatnonzero((inner < density[:-2]) & (inner <= density[2:])) + 1
    maxima = np.flatnonzero((inner > density[:-2]) & (inner >= density[2:])) + 1
    main = int(density.argmax())
    for low in minima[minima > main]:
        later = maxima[maxima > low]
        if not len(later):
            return None
        clear = density[low] <= 0.8 * min(density[later].max(), density[main])
        if clear and float((values > grid[low]).mean()) <= 0.3:
            return float(grid[low])
    return None


def largest_within(levels: Sequence[Masks], accuracy_of: Callable[[Masks], float], floor: float) -> int:
    """Position of the last of ``levels`` (ordered from nothing pruned to most) whose accuracy is still at least ``floor``.

    Stops at the first level that falls below, as fine-pruning does; 0 when even the first one does.
    """
    best = 0
    for position, masks in enumerate(levels):
        if accuracy_of(masks) < floor:
            break
        best = position
    return best


def select(scores: Scores, policy: Policy) -> Masks:
    """Applies a policy to every layer."""
    return {name: policy(layer) for name, layer in scores.items()}


# -- writing -------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def hold(net: Network, masks: Mapping[str, Tensor], writer: Writer) -> None:
    """Writes the masks into ``net`` in place; called again after an optimiser step, it keeps pruned units pruned."""
    for name, mask in masks.items():
        if name == EMBEDDING:
            first = net.head[0]
            assert isinstance(first, nn.Linear)
            first.weight[:, mask.to(first.weight.device)] = 0
            continue
        module = net.get_submodule(name)
        assert isinstance(module, (nn.BatchNorm2d, nn.Conv2d, nn.Linear))
        pruned = mask.to(module.weight.device)
        module.weight[pruned] = 0
        keep_bias = isinstance(module, nn.BatchNorm2d) and writer is Writer.GAMMA
        if module.bias is not None and not keep_bias:
            module.bias[pruned] = 0


def prune(net: Network, masks: Mapping[str, Tensor], writer: Writer) -> Network:
    """A pruned copy of ``net``; with empty masks, the very same logits."""
    pruned = copy.deepcopy(net)
    hold(pruned, masks, writer)
    return pruned
