"""Training speed of this machine: ``python -m benchmark.proof.throughput``.

On a CPU: images per CPU-second of one thread on random 32x32 images, for every backbone with ``fit()`` and with a plain PyTorch
loop that does the same work (same batches, optimiser, schedule; the final weights are compared), and for the augmentation alone.
Both loops alternate within every round, so that other load affects both; each figure is the median over rounds. The speed of
float32 matrix products is printed as well, to compare machines.

On a GPU: images per second of wall-clock time in training and evaluation of full-size networks by recipe and precision, the share
of the GPU's peak, the time of one model, and the speed of several processes that share the GPU.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from benchmark.run.local import SHARING, single_thread
from benchmark.settings.presets import recipes
from models import BACKBONES
from models.backbone import Backbone, Network
from models.classifier import Classifier
from models.files import write_text
from models.images import Batches, ImageSet
from models.recipe import Precision, Recipe
from models.spec import BadInput, generator, lookup, nearest
from models.training import arithmetic, default_device, fit, predict

__all__ = [
    "DEFAULT", "PEAKS", "Pace", "Report", "Speed", "augmentation", "bare_loop", "flops", "main", "markdown", "measure", "pace",
    "pace_together", "paces", "sgemm", "utilisation",
]  # fmt: skip

DEFAULT = ("resnet8", "resnet20", "preact-resnet18", "vgg11-bn", "wrn16-1")
WIDTH = 16
SHAPE = (3, 32, 32)
CLASSES = 10
RECIPE = Recipe(epochs=1)

FULL = ("preact-resnet18", "vgg19-bn")
"""Backbones measured on a GPU, at full width."""
FULL_WIDTH = 64
TRAIN_SIZE = 47_500
"""Training images of one model in the real-size matrices: a CIFAR training set without a clean budget of 5 %."""
_HOPPER: Mapping[Precision, float] = {"reference": 66.9e12, "tf32": 494.7e12, "bf16": 989.4e12}
_AMPERE: Mapping[Precision, float] = {"reference": 19.5e12, "tf32": 156e12, "bf16": 312e12}
PEAKS: Mapping[str, Mapping[Precision, float]] = {
    "NVIDIA H100 80GB HBM3": _HOPPER,
    "NVIDIA H200": _HOPPER,
    "NVIDIA A100-SXM4-40GB": _AMPERE,
    "NVIDIA A100-SXM4-80GB": _AMPERE,
}
"""Dense peak in FLOP/s by the device's name and precision. Sources: NVIDIA H100 Tensor Core GPU Architecture, 2022, table 2 (SXM5:
FP32 without, TF32 and BF16 with tensor cores, without sparsity); the H200's chip is the same (NVIDIA H200 datasheet, 2023); NVIDIA
A100 Tensor Core GPU Architecture, 2020, table 1."""


@dataclass(frozen=True)
class Speed:
    """One backbone. ``fit`` and ``bare``: images per CPU-second, medians; ``share``: median over rounds of fit / bare."""

    backbone: str
    fit: float
    bare: float
    share: float


@dataclass(frozen=True)
class Report:
    """All figures of a CPU. ``gflops``: float32 matrix products, GFLOP/s; ``augmented``: crop + flip, images per CPU-second."""

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
    """``count`` images of noise with random labels."""
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
    """The plain PyTorch loop that ``fit`` is compared with. CPU only."""
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
        way(_build(backbone), few)  # the first steps include set-up
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
    """All figures, on one thread of the CPU.

    Raises:
        BadInput: there is a GPU, which ``fit`` would use.
    """
    if default_device().type != "cpu":
        raise BadInput("CPU-seconds do not measure a GPU; CUDA_VISIBLE_DEVICES= in front of the command hides it")
    data = random_images(images)
    with _one_thread():
        augmentation(data)
        gflops, augmented = sgemm(), statistics.median(augmentation(data) for _ in range(rounds))
        speeds = tuple(_speed(backbone, data, rounds) for backbone in backbones)
    return Report(speeds, gflops, augmented, rounds, images)


# -- on a GPU ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pace:
    """One backbone under one recipe on one device.

    Attributes:
        trained, evaluated: images per second of the clock in ``fit`` and in ``predict``, medians over rounds.
        share: of the device's peak that training reaches, in [0, 1]; NaN where the peak is not known.
        seconds: of training one model on :data:`TRAIN_SIZE` images by this recipe.
        together: images per second of :data:`benchmark.run.local.SHARING` processes that train at once; NaN = not measured.
    """

    backbone: str
    recipe: str
    precision: Precision
    batch: int
    trained: float
    evaluated: float
    share: float
    seconds: float
    together: float = math.nan


def named_recipes() -> dict[str, Recipe]:
    """The recipes measured on a GPU: the literature's at every precision, and the named ones."""
    precisions: tuple[Precision, ...] = ("reference", "tf32", "bf16")
    literature = {f"literature, {precision}": dataclasses.replace(Recipe(), precision=precision) for precision in precisions}
    return literature | {name: Recipe(**settings) for name, settings in recipes().items()}


def flops(net: Network, shape: tuple[int, int, int] = SHAPE) -> float:
    """Floating-point operations of one image, forward and backward; a multiplication and an addition count as two."""
    images = torch.zeros(2, *shape)  # batch norm needs two
    with FlopCounterMode(display=False) as counter:
        loss = torch.nn.functional.cross_entropy(net.train()(images), torch.zeros(2, dtype=torch.int64))
        loss.backward()  # type: ignore[no-untyped-call]
    return float(counter.get_total_flops()) / 2


def utilisation(rate: float, per_image: float, device: str, precision: Precision) -> float:
    """Model-FLOP utilisation: operations per second over the device's peak, in [0, 1]; NaN for an unknown device."""
    peak = PEAKS.get(device, {}).get(precision, math.nan)
    return rate * per_image / peak


def _trained(backbone: Backbone, recipe: Recipe, data: ImageSet, rounds: int) -> list[float]:
    """Images per second of ``rounds`` trainings of one epoch, after a warm-up."""
    recipe = dataclasses.replace(recipe, epochs=1)
    few = data.subset(torch.arange(min(len(data), 8 * recipe.batch)))
    fit(Classifier(_build(backbone), recipe), few, recipe, seed=0)
    return [len(data) / fit(Classifier(_build(backbone), recipe), data, recipe, seed=0).seconds for _ in range(rounds)]


def _evaluated(backbone: Backbone, recipe: Recipe, data: ImageSet, rounds: int) -> list[float]:
    net, rates = _build(backbone), []
    with arithmetic(recipe.precision):
        predict(net, data.images)
        for _ in range(rounds):
            start = time.perf_counter()
            predict(net, data.images)
            rates.append(len(data) / (time.perf_counter() - start))
    return rates


def pace(backbone: Backbone, name: str, recipe: Recipe, data: ImageSet, rounds: int, device: str) -> Pace:
    """One line of the table, for a single process."""
    trained = statistics.median(_trained(backbone, recipe, data, rounds))
    evaluated = statistics.median(_evaluated(backbone, recipe, data, rounds))
    share = utilisation(trained, flops(_build(backbone)), device, recipe.precision)
    return Pace(
        backbone.name, name, recipe.precision, recipe.batch, trained, evaluated, share, recipe.epochs * TRAIN_SIZE / trained
    )


def _beside(backbone: Backbone, recipe: Recipe, images: int, rounds: int, ready: Any) -> tuple[float, float]:
    """(start, end) of ``rounds`` trainings in a separate process, started once all processes are warm."""
    single_thread()
    data, recipe = random_images(images), dataclasses.replace(recipe, epochs=1)
    _trained(backbone, recipe, data.subset(torch.arange(min(images, 8 * recipe.batch))), 1)
    ready.wait()
    start = time.time()
    for _ in range(rounds):
        fit(Classifier(_build(backbone), recipe), data, recipe, seed=0)
    return start, time.time()


def pace_together(backbone: Backbone, recipe: Recipe, images: int, rounds: int, processes: int) -> float:
    """Images per second of ``processes`` processes that share the device, each training by itself."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(processes, context) as pool:
        ready = manager.Barrier(processes)
        runs = [pool.submit(_beside, backbone, recipe, images, rounds, ready) for _ in range(processes)]
        spans = [run.result() for run in runs]
    return processes * rounds * images / (max(end for _, end in spans) - min(start for start, _ in spans))


def paces(
    backbones: Sequence[Backbone], chosen: Mapping[str, Recipe], rounds: int, images: int, device: str, together: bool
) -> tuple[Pace, ...]:
    """Every backbone under every chosen recipe; ``together`` also measures processes that share the device."""
    data = random_images(images)
    found = []
    for backbone in backbones:
        for name, recipe in chosen.items():
            one = pace(backbone, name, recipe, data, rounds, device)
            if together:
                one = dataclasses.replace(one, together=pace_together(backbone, recipe, images, rounds, SHARING))
            found.append(one)
    return tuple(found)


PACE_HEADER = (
    "backbone", "recipe", "batch", "train [img/s]", "share of peak", "seconds per model", f"{SHARING} at once [img/s]",
    "evaluate [img/s]",
)  # fmt: skip


def _pace_cells(one: Pace) -> tuple[str, ...]:
    def figure(value: float, form: str) -> str:
        return "-" if math.isnan(value) else format(value, form)

    return (
        one.backbone, one.recipe, str(one.batch), figure(one.trained, ",.0f"), figure(one.share, ".1%"),
        figure(one.seconds, ",.0f"), figure(one.together, ",.0f"), figure(one.evaluated, ",.0f"),
    )  # fmt: skip


def _pace_caption(device: str, rounds: int, images: int) -> str:
    return (
        f"{device}; {images:,} random 32x32 images, width {FULL_WIDTH}, medians of {rounds} rounds of one epoch, the loop's start "
        f"included; seconds per model: {TRAIN_SIZE:,} images, the recipe's epochs; share of peak: operations of forward and "
        f"backward passes over the device's dense peak at the precision; deterministic kernels; torch {torch.__version__}"
    )


# -- tables --------------------------------------------------------------------------------------------------------------------


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
    return _markdown(HEADER, 1, map(_cells, report.speeds), _caption(report))


def _markdown(header: Sequence[str], words: int, lines: Iterable[Sequence[str]], caption: str) -> str:
    """A table whose first ``words`` columns are text."""
    rule = ("---",) * words + ("---:",) * (len(header) - words)
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *lines)) + f"\n{caption}.\n"


def _show(header: Sequence[str], words: int, lines: Iterable[Sequence[str]], caption: str) -> None:
    table = Table(*header, title="Training speed", caption=caption)
    for column in table.columns[words:]:
        column.justify = "right"
    for line in lines:
        table.add_row(*line)
    Console().print(table)


def main(
    backbone: Annotated[list[str] | None, typer.Option(help="A backbone by name; may be given several times.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Medians are over so many rounds.")] = 5,
    images: Annotated[int, typer.Option(min=0, help="Images per training; 0 = 1,280, or a CIFAR training set on a GPU.")] = 0,
    together: Annotated[bool, typer.Option(help="On a GPU, also measure processes that share it.")] = True,
    recipe: Annotated[list[str] | None, typer.Option(help="On a GPU, a recipe by name; may be given several times.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the table there, as Markdown.")] = None,
) -> None:
    """Measures training speed: on a CPU against a bare PyTorch loop, on a GPU against its peak."""
    device = default_device()
    names = backbone or (DEFAULT if device.type == "cpu" else FULL)
    try:
        width = WIDTH if device.type == "cpu" else FULL_WIDTH
        chosen = [lookup("backbone", BACKBONES, name)(width=width, hidden=0) for name in names]
        header: Sequence[str]
        lines: Sequence[Sequence[str]]
        if device.type == "cpu":
            report = measure(chosen, rounds, images or 1280)
            header, words, lines, caption = HEADER, 1, [_cells(speed) for speed in report.speeds], _caption(report)
        else:
            named, images = torch.cuda.get_device_name(device), images or TRAIN_SIZE
            every = named_recipes()
            for name in recipe or ():
                if name not in every:
                    raise BadInput(f"unknown recipe {name!r}{nearest(name, list(every))}")
            found = paces(chosen, {name: every[name] for name in recipe or every}, rounds, images, named, together)
            header, words, caption = PACE_HEADER, 2, _pace_caption(named, rounds, images)
            lines = [_pace_cells(one) for one in found]
        if out is not None:
            write_text(out, _markdown(header, words, lines, caption))
    except BadInput as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    _show(header, words, lines, caption)


if __name__ == "__main__":
    typer.run(main)
