"""Which network reaches which accuracy in how much CPU time: ``python -m benchmark.proof.regime --backbone resnet9 --width 16``.

Benign twins alone are trained, so no attack and no defense has a part in the choice of a matrix's network and recipe. One call
trains one network in one thread and adds a line to ``results/proof/regimes.csv``; the table ``REGIMES.md`` is written from it.
Candidates are compared by their ACC on the clean budget, on which no twin is trained. The test ACC is shown beside it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer

from benchmark.data.datasets import DatasetSpec, load, mean_std
from benchmark.data.splits import split_budget
from benchmark.storage.machine import arithmetic
from models import BACKBONES
from models.classifier import Classifier
from models.files import write_text
from models.recipe import Precision, Recipe
from models.spec import BadInput, derive_seed, lookup
from models.training import accuracy, fit

__all__ = ["Regime", "main", "markdown", "measure"]

FRACTION = 0.05
"""Clean budget, as in the literature and in the matrices of full size."""
RECIPE = Recipe(lr=0.1, nesterov=True, schedule="one-cycle")


@dataclass(frozen=True)
class Regime:
    """One trained twin. Times are CPU-seconds of one thread; ``evaluated``: images per CPU-second of a forward pass."""

    dataset: str
    backbone: str
    width: int
    parameters: int
    epochs: int
    batch: int
    lr: float
    precision: str
    budget_acc: float
    test_acc: float
    seconds: float
    trained: float
    evaluated: float
    processor: str
    instructions: str


def measure(dataset: DatasetSpec, backbone: str, width: int, recipe: Recipe, seed: int, cache: Path) -> Regime:
    """Trains a benign twin as a matrix would and measures it.

    Args:
        dataset: the images. backbone: a name of the catalogue. width: channels of its first stage; its head is linear.
        recipe: how it is trained. seed: of the budget, the initial weights and the batches.
        cache: folder of decoded images.

    Raises:
        BadInput: no such data set or backbone.
    """
    data = load(dataset, cache)
    own, held_out = (data.train.subset(index) for index in split_budget(data.train, FRACTION, seed))
    spec = lookup("backbone", BACKBONES, backbone)(width=width, hidden=0)
    net = spec.build(own.num_classes, own.shape, *mean_std(own), derive_seed(spec.spec(), seed, "init"))
    start = time.process_time()
    fit(Classifier(net, recipe), own, recipe, derive_seed(seed, "train"))
    seconds = time.process_time() - start
    start = time.process_time()
    test = accuracy(net, data.test)
    evaluated = len(data.test) / max(time.process_time() - start, 1e-9)
    where = arithmetic()
    return Regime(
        data.name, backbone, width, sum(value.numel() for value in net.parameters()), recipe.epochs, recipe.batch, recipe.lr,
        recipe.precision, accuracy(net, held_out), test, round(seconds, 1), round(recipe.epochs * len(own) / max(seconds, 1e-9), 1),
        round(evaluated, 1), where["processor"], where["instructions"],
    )  # fmt: skip


HEADER = ("backbone", "width", "parameters", "epochs", "batch", "peak rate", "arithmetic", "ACC, clean budget [%]", "ACC, test [%]",
          "CPU-minutes", "train [img/CPU-s]", "evaluate [img/CPU-s]", "processor")  # fmt: skip


def markdown(lines: Sequence[Regime]) -> str:
    """The table, the shortest training first."""
    words = {"reference": "float32"}
    cells = [
        (one.backbone, str(one.width), f"{one.parameters:,}", str(one.epochs), str(one.batch), f"{one.lr:g}",
         words.get(one.precision, one.precision), f"{100 * one.budget_acc:.1f}", f"{100 * one.test_acc:.1f}",
         f"{one.seconds / 60:.1f}", f"{one.trained:,.0f}", f"{one.evaluated:,.0f}", f"{one.processor} ({one.instructions})")
        for one in sorted(lines, key=lambda one: one.seconds)
    ]  # fmt: skip
    rule = tuple("---" if name in ("backbone", "arithmetic", "processor") else "---:" for name in HEADER)
    return "# Networks and recipes for a CPU\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in (HEADER, rule, *cells)) + (
        f"\nBenign twins, one seed each, one thread each: crop of 4 pixels, flip, SGD with Nesterov momentum {RECIPE.momentum:g}, "
        f"weight decay {RECIPE.weight_decay:g}, one-cycle schedule. Candidates are compared by the ACC on the clean budget "
        f"({100 * FRACTION:g} % of the training images, not trained on). Written by `python -m benchmark.proof.regime`.\n"
    )


def main(
    backbone: Annotated[str, typer.Option(help="A backbone by name.")],
    width: Annotated[int, typer.Option(min=1, help="Channels of its first stage.")],
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    batch: Annotated[int, typer.Option(min=2)] = RECIPE.batch,
    lr: Annotated[float, typer.Option(min=0.0, help="Peak learning rate.")] = RECIPE.lr,
    precision: Annotated[str, typer.Option(help="reference (float32) or bf16.")] = RECIPE.precision,
    source: Annotated[str, typer.Option(help="A data set by name.")] = "cifar10",
    seed: int = 0,
    cache: Path = Path(".cache"),
    out: Annotated[Path, typer.Option(help="Folder of regimes.csv and REGIMES.md.")] = Path("results/proof"),
) -> None:
    """Trains one benign twin and adds it to the table of networks and recipes."""
    torch.set_num_threads(1)
    try:
        recipe = Recipe(epochs=epochs, batch=batch, lr=lr, nesterov=True, schedule=RECIPE.schedule, precision=_precision(precision))
        found = measure(DatasetSpec(source=source), backbone, width, recipe, seed, cache)
        file = out / "regimes.csv"
        before = pd.read_csv(file).to_dict("records") if file.is_file() else []
        lines = [Regime(**{str(name): value for name, value in line.items()}) for line in before]
        write_text(file, pd.DataFrame([asdict(line) for line in (*lines, found)]).to_csv(index=False, lineterminator="\n"))
        write_text(out / "REGIMES.md", markdown([*lines, found]))
    except BadInput as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    typer.echo(markdown([found]))


def _precision(name: str) -> Precision:
    known: tuple[Precision, ...] = ("reference", "tf32", "bf16")
    for one in known:
        if one == name:
            return one
    raise BadInput(f"precision = {name!r} must be {', '.join(known)}")


if __name__ == "__main__":
    typer.run(main)
