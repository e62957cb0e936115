"""Where the time goes: ``python -m benchmark.proof.profile``.

The first victim of a matrix is trained on a part of its images, and predicts its test images, both in one thread under torch's
profiler. Operations are summed by what they belong to. Seconds are those of the processor.
"""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiled

from benchmark.run.world import fresh, world
from benchmark.settings.cells import Scenario
from benchmark.settings.load import find_matrix, load_matrix
from benchmark.storage.machine import arithmetic
from models.classifier import Classifier
from models.files import write_text
from models.spec import BadInput
from models.training import fit, predict

__all__ = ["KINDS", "Spent", "draw", "kind", "main", "measure", "shares"]

KINDS = {
    "convolutions": ("conv",),
    "batch norms": ("batch_norm",),
    "ReLUs": ("relu", "clamp_min", "threshold"),
    "pooling": ("pool",),
    "linear layers": ("addmm", "linear", "mm"),
    "loss": ("softmax", "nll_loss", "cross_entropy", "argmax"),
    "optimiser": ("foreach", "optimizer", "sgd"),
    "batches and augmentation": ("index", "gather", "flip", "pad", "randint", "take", "div", "sub"),
    "copies and zeroes": ("copy", "zero", "fill", "clone", "contiguous", "empty", "_to"),
}
"""What operations belong to, by words in their names; the first that fits counts, and none is "other"."""
OTHER = "other"


class Spent(NamedTuple):
    """One job: images a second without the profiler, and the share of the seconds by kind of operation."""

    rate: float
    shares: dict[str, float]


def kind(operation: str) -> str:
    """What an operation of torch belongs to.

    >>> kind("aten::mkldnn_convolution"), kind("aten::max_pool2d_with_indices_backward"), kind("aten::item")
    ('convolutions', 'pooling', 'other')
    """
    name = operation.lower()
    return next((found for found, words in KINDS.items() if any(word in name for word in words)), OTHER)


def shares(operations: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Share of every kind, in [0, 1], largest first. ``operations``: names, and microseconds without what they call."""
    sums: dict[str, float] = {}
    for name, microseconds in operations:
        sums[kind(name)] = sums.get(kind(name), 0.0) + microseconds
    total = sum(sums.values()) or 1.0
    return {name: value / total for name, value in sorted(sums.items(), key=lambda one: -one[1])}


def _spent(job: Callable[[], object], images: int) -> Spent:
    job()  # the first call chooses kernels
    begun = time.process_time()
    job()
    rate = images / (time.process_time() - begun)
    with profiled(activities=[ProfilerActivity.CPU], acc_events=True) as found:
        job()
    return Spent(rate, shares((one.key, one.self_cpu_time_total) for one in found.key_averages()))


def measure(scenario: Scenario, images: int, cache: Path) -> dict[str, Spent]:
    """What training one epoch of ``images`` images costs, and predicting the test set.

    Raises:
        BadInput: the data cannot be had.
    """
    w = world(scenario, cache)
    part, net = w.train.subset(torch.arange(min(images, len(w.train)))), fresh(scenario, w, 0)
    recipe = dataclasses.replace(scenario.recipe, epochs=1)
    return {
        "training": _spent(lambda: fit(Classifier(net, recipe), part, recipe, 0), len(part)),
        "scoring": _spent(lambda: predict(net.eval(), w.data.test.images), len(w.data.test)),
    }


def draw(network: str, found: dict[str, Spent], command: str) -> str:
    """The page PROFILE.md."""
    names = list(found)
    first = found[names[0]].shares
    every = sorted({part for one in found.values() for part in one.shares}, key=lambda part: -first.get(part, 0.0))
    lines = [f"| operations | {' | '.join(names)} |\n", f"| :-- |{' --: |' * len(names)}\n"]
    for part in every:
        lines.append(f"| {part} | {' | '.join(f'{100 * found[name].shares.get(part, 0.0):.0f} %' for name in names)} |\n")
    rates = ", ".join(f"{name} {found[name].rate:,.0f}" for name in names)
    where = arithmetic()
    return (
        f"# Where the time goes: {network}\n\nShares of the CPU-seconds of one thread, by kind of operation.\n\n{''.join(lines)}\n"
        f"Images a CPU-second, without the profiler: {rates}. Processor: {where['processor']} ({where['instructions']}).\n\n"
        f"Drawn by\n\n```bash\n{command}\n```\n"
    )


def main(
    matrix: Annotated[str, typer.Option("--matrix", "-m", help="Whose first scenario is measured.")] = "cifar10-cpu",
    images: Annotated[int, typer.Option(min=1, help="Training images.")] = 5120,
    cache: Annotated[Path, typer.Option(help="Folder of decoded images.")] = Path(".cache"),
    out: Annotated[Path, typer.Option(help="Folder of PROFILE.md.")] = Path("results/proof"),
) -> None:
    """Measures where a victim's training and the scoring of a candidate spend their time."""
    torch.set_num_threads(1)
    try:
        scenario = load_matrix(find_matrix(matrix), Console(soft_wrap=True).print).scenarios[0]
        found = measure(scenario, images, cache)
    except BadInput as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(2) from error
    name = Path(matrix).name
    command = "python -m benchmark.proof.profile" + (f" --matrix {shlex.quote(name)}" if name != "cifar10-cpu" else "")
    page = draw(f"{scenario.backbone_label} of {Path(matrix).stem}", found, command)
    write_text(out / "PROFILE.md", page)
    typer.echo(page)


if __name__ == "__main__":
    typer.run(main)
