"""What a matrix asks for that cannot work, or not at the usual speed, on this machine: one line each, printed when a run starts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch

from benchmark.data.datasets import Dataset
from benchmark.settings.cells import Cell, Scenario
from benchmark.storage.machine import has_bfloat16
from models.spec import canonical
from models.units import Scope, unit_layers

__all__ = ["cautions", "largest_z"]


def largest_z(units: int) -> float:
    """What no score of a layer with so many units can exceed, in standard deviations (unbiased) above the layer's mean.

    One score of 1 among zeros reaches it: (n - 1) / sqrt(n); Samuelson, "How deviant can you be?", JASA 1968.
    """
    return (units - 1) / math.sqrt(units)


def cautions(cells: Iterable[Cell], datasets: Mapping[str, Dataset]) -> list[str]:
    """Warnings about the cells that are going to run, without repeats.

    Args:
        cells: the cells.
        datasets: by the canonical text of their spec.
    """
    wanted = list(cells)
    found = [*_too_narrow(wanted, datasets)]
    rounded = any(cell.scenario.recipe.precision == "bf16" for cell in wanted)
    if rounded and not torch.cuda.is_available() and not has_bfloat16():
        # Measured on forward, backward and step of ResNet-8 and VGG-11-BN at width 8, one thread with AVX2: 5 to 10.
        found.append("bf16 takes 5 to 10 times as long as float32 here: no GPU, and the processor has no instructions for it")
    return list(dict.fromkeys(found))


def _too_narrow(cells: Iterable[Cell], datasets: Mapping[str, Dataset]) -> Iterator[str]:
    """Defenses whose published threshold is beyond what a score can reach in the narrowest layer that they read."""
    sizes: dict[tuple[str, str, Scope], dict[str, int]] = {}
    for cell in cells:
        u, scenario = cell.defense.z_threshold, cell.scenario
        if u is None or cell.defense.control:
            continue
        dataset = canonical(scenario.dataset)
        key = dataset, canonical(scenario.backbone), cell.scope
        if key not in sizes:
            sizes[key] = _sizes(scenario, datasets[dataset], cell.scope)
        narrow = {name: units for name, units in sizes[key].items() if largest_z(units) <= u}
        if narrow:
            layer = min(narrow, key=narrow.__getitem__)
            yield (
                f"{cell.defense_label} ({cell.scope.value}) on {scenario.backbone_label}: its threshold of {u:g} standard "
                f"deviations prunes nothing in {len(narrow)} of {len(sizes[key])} layers. In the narrowest, {layer} with "
                f"{narrow[layer]} units, no score is more than {largest_z(narrow[layer]):.2f} above the mean: (n - 1) / sqrt(n)"
            )


def _sizes(scenario: Scenario, dataset: Dataset, scope: Scope) -> dict[str, int]:
    """Units of every prunable layer of the scenario's network, by name."""
    channels = dataset.train.shape[0]
    with torch.device("meta"):  # no weights are needed
        net = scenario.backbone.build(dataset.train.num_classes, dataset.train.shape, [0.0] * channels, [1.0] * channels, 0)
    return {layer.name: layer.size for layer in unit_layers(net, scope)}
