"""How fast training is here: ``python -m benchmark.throughput``.

Three figures per backbone on random 32x32 images, one thread, in images per CPU-second: ``fit()``; a bare PyTorch loop that does
the same work (same batches, optimiser, schedule, and in the end the same weights, which is checked); and the augmentation alone.
Fit and bare loop take turns inside every round, so that a noisy neighbour meets both, and each figure is the median over rounds.
The machine's speed at float32 matrix products stands beside them, so that figures from two machines can be compared.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from models import BACKBONES
from models.backbone import Backbone, Network
from models.classifier import Classifier
from models.files import write_text
from models.images import Batches, ImageSet
from models.spec import BadInput, generator, lookup
from models.training import Recipe, default_device, fit

__all__ = ["DEFAULT", "Report", "Speed", "augmentation", "bare_loop", "main", "markdown", "measure", "sgemm"]

DEFAULT = ("resnet8", "resnet20", "preact-resnet18", "vgg11-bn", "wrn16-1")
WIDTH = 16
SHAPE = (3, 32, 32)
CLASSES = 10
RECIPE = Recipe(epochs=1)


@dataclass(frozen=True)
class Speed:
    """One backbone. ``fit`` and ``bare``: images per CPU-second, medians; ``share``: median over rounds of fit / bare."""

    backbone: str
    fit: float
    bare: float
    share: float


@dataclass(frozen=True)
class Report:
    """A whole measurement. ``gflops``: float32 matrix products, GFLOP/s; ``augmented``: crop + flip, images per CPU-second."""

    speeds: tuple[Speed, ...]
    gflops: float
    augmented: float
    rounds: int
    images: int


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return max(time.process_time() - start, 1e-9)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_images(count: int) -> ImageSet:
    """``count`` images of noise with random labels: speed does not depend on what is in the picture."""
    draw = generator("throughput", count)
    images = torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8, generator=draw)
    return ImageSet(images, torch.randint(0, CLASSES, (count,), generator=draw), CLASSES)


def sgemm(side: int = 512, repeats: int = 10) -> float:
    """GFLOP/s of a ``side`` x ``side`` float32 matrix product, median of ``repeats``."""
    left, right = torch.rand(side, side), torch.rand(side, side)
    return statistics.median(2e-9 * side**3 / _seconds(lambda: left @ right) for _ in range(repeats))


def augmentation(data: ImageSet) -> float:
    """Augmented images per CPU-second over one epoch of ``data``."""
    batches = Batches(data, RECIPE.batch, 0, crop=RECIPE.crop, flip=RECIPE.flip)
    return len(data) / _seconds(lambda: sum(len(index) for _, _, index in batches))


def bare_loop(net: Network, data: ImageSet, recipe: Recipe, seed: int) -> Network:
    """What ``fit`` does, written as the plain PyTorch loop it is measured against. CPU only."""
    module = Classifier(net, recipe)
    batches = Batches(data, recipe.batch, seed, crop=recipe.crop, flip=recipe.flip)
    module.total_steps = len(batches) * recipe.epochs
    plan = module.configure_optimizers()
    optimizer, schedule = plan["optimizer"], plan["lr_scheduler"]["scheduler"]
    net.train()
    for _ in range(recipe.epochs):
        for images, labels, _index in batches:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(images), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return net.eval()


def _build(backbone: Backbone) -> Network:
    return backbone.build(CLASSES, SHAPE, [0.5] * 3, [0.25] * 3, seed=0)


def _speed(backbone: Backbone, data: ImageSet, rounds: int) -> Speed:
    def ours(net: Network, images: ImageSet) -> Network:
        return fit(Classifier(net, RECIPE), images, RECIPE, seed=0).net

    def bare(net: Network, images: ImageSet) -> Network:
        return bare_loop(net, images, RECIPE, seed=0)

    ways = (ours, bare)
    few = data.subset(torch.arange(min(len(data), 2 * RECIPE.batch)))
    for way in ways:
        way(_build(backbone), few)  # the first steps pay for set-up
    rates: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        nets = (_build(backbone), _build(backbone))
        for which in (number % 2, 1 - number % 2):
            rates[which].append(len(data) / _seconds(partial(ways[which], nets[which], data)))
        if not all(map(torch.equal, nets[0].state_dict().values(), nets[1].state_dict().values())):
            raise RuntimeError(f"{backbone.name}: fit and the bare loop gave different weights, so they did not do the same work")
    share = statistics.median(fitted / plain for fitted, plain in zip(*rates, strict=True))
    return Speed(backbone.name, statistics.median(rates[0]), statistics.median(rates[1]), share)


def measure(backbones: Sequence[Backbone], rounds: int, images: int) -> Report:
    """Everything, on one thread of the CPU.

    Raises:
        BadInput: there is a GPU, which ``fit`` would use.
    """
    if default_device().type != "cpu":
        raise BadInput("CPU-seconds say nothing about a GPU: hide it with CUDA_VISIBLE_DEVICES= in front of the command")
    data = random_images(images)
    with _one_thread():
        augmentation(data)
        gflops, augmented = sgemm(), statistics.median(augmentation(data) for _ in range(rounds))
        speeds = tuple(_speed(backbone, data, rounds) for backbone in backbones)
    return Report(speeds, gflops, augmented, rounds, images)


HEADER = ("backbone", "fit [img/CPU-s]", "bare loop [img/CPU-s]", "fit / bare")


def _cells(speed: Speed) -> tuple[str, str, str, str]:
    return speed.backbone, f"{speed.fit:,.0f}", f"{speed.bare:,.0f}", f"{speed.share:.3f}"


def _caption(report: Report) -> str:
    return (
        f"{report.images:,} random 32x32 images, width {WIDTH}, batch {RECIPE.batch}, one thread, medians of {report.rounds} "
        f"rounds; augmentation {report.augmented:,.0f} img/CPU-s; float32 matrix products {report.gflops:,.1f} GFLOP/s; "
        f"torch {torch.__version__}"
    )


def markdown(report: Report) -> str:
    """The table as Markdown, caption below."""
    lines = [HEADER, ("---",) + ("---:",) * 3, *map(_cells, report.speeds)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{_caption(report)}.\n"


def main(
    backbone: Annotated[list[str] | None, typer.Option(help="A backbone by name; may be given several times.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Medians are over so many rounds.")] = 5,
    images: Annotated[int, typer.Option(min=4, help="Images per training.")] = 1280,
    out: Annotated[Path | None, typer.Option(help="Also write the table there, as Markdown.")] = None,
) -> None:
    """Measures training speed against a bare PyTorch loop."""
    try:
        chosen = [lookup("backbone", BACKBONES, name)(width=WIDTH, hidden=0) for name in backbone or DEFAULT]
        report = measure(chosen, rounds, images)
        if out is not None:
            write_text(out, markdown(report))
    except BadInput as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    table = Table(*HEADER, title="Training speed", caption=_caption(report))
    for column in table.columns[1:]:
        column.justify = "right"
    for speed in report.speeds:
        table.add_row(*_cells(speed))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
