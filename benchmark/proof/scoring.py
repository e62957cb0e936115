"""What scoring costs: ``python -m benchmark.proof.scoring``.

A part of a matrix is run in one process from an empty store. Every prediction is made in both ways, with a plain pass and with what
the candidates share (:mod:`models.variants`), and the two are compared. Seconds are those of the processor, so that other load on
the machine counts little; its caches are shared all the same.
"""

from __future__ import annotations

import shlex
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Annotated
from unittest import mock

import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmark.present import present
from benchmark.run.plan import Stage
from benchmark.run.progress import notes
from benchmark.run.session import run_matrix
from benchmark.settings.load import find_matrix, load_matrix
from models.backbone import Network
from models.files import write_text
from models.spec import BadInput
from models.training import predict
from models.variants import Variants

__all__ = ["Part", "draw", "main", "measure"]


@dataclass
class Part:
    """What one kind of stage spent, in CPU-seconds.

    Attributes:
        rest: all but scoring.
        plain: scoring, every network on its own.
        shared: scoring, with what the networks share.
        predictions: how many sets of images were predicted.
        differ: how many of them differed between the two ways.
    """

    rest: float = 0.0
    plain: float = 0.0
    shared: float = 0.0
    predictions: int = 0
    differ: int = 0


@contextmanager
def _counted(parts: defaultdict[str, Part]) -> Iterator[None]:
    """Inside, stages and predictions add what they spend to ``parts``."""
    run, shared = Stage.run, Variants.predict
    current = [Part()]

    def timed(stage: Stage, *given: Path) -> None:
        outer, current[0] = current[0], parts[_called(stage)]
        part, before = current[0], current[0].plain + current[0].shared
        begun = time.process_time()
        run(stage, *given)  # type: ignore[arg-type]
        part.rest += time.process_time() - begun - (part.plain + part.shared - before)
        current[0] = outer

    def both(variants: Variants, net: Network, which: str) -> Tensor:
        begun = time.process_time()
        alone = predict(net, variants.images[which])
        between = time.process_time()
        found = shared(variants, net, which)
        part = current[0]
        part.plain += between - begun
        part.shared += time.process_time() - between
        part.predictions += 1
        part.differ += not torch.equal(alone, found)
        return found

    with mock.patch.object(Stage, "run", timed), mock.patch.object(Variants, "predict", both):
        yield


def _called(stage: Stage) -> str:
    return "models" if stage.cell is None else f"{stage.cell.defense_label} ({stage.cell.scope.value})"


def measure(matrix: str, only: str | None, work: Path, console: Console) -> dict[str, Part]:
    """What the parts of a run cost, in the order in which they were first run; tables and plots come last.

    Raises:
        BadInput: see :func:`benchmark.run.session.run_matrix`; or a cell failed.
    """
    parts: defaultdict[str, Part] = defaultdict(Part)
    loaded = load_matrix(find_matrix(matrix), notes(console))
    with _counted(parts):
        outcome = run_matrix(loaded, results=work / "results", cache=work / "cache", console=console, only=only, processes=1)
    failed = [result.rows[0].reason for result in outcome.results if result.rows[0].status == "failed"]
    if failed:
        raise BadInput(f"{len(failed)} cells failed: {failed[0]}")
    begun = time.process_time()
    present(outcome.folder, loaded, cache=work / "cache", console=console, track=False)
    parts["tables and plots"].rest = time.process_time() - begun
    return dict(parts)


def draw(parts: dict[str, Part], command: str) -> str:
    """The page SCORING.md."""
    total = Part(*(sum(column) for column in zip(*map(astuple, parts.values()), strict=True)))
    lines = [
        "# Scoring\n\n",
        "CPU-seconds of one process from an empty store. Alone: every network is run on every set of images. Shared: what a\n",
        "candidate has in common with the victim is run once, and no network twice. Both were run and their predictions\n",
        "compared.\n\n",
        "| part | all but scoring | predictions | scoring, alone | scoring, shared | predictions that differ |\n",
        "| :-- | --: | --: | --: | --: | --: |\n",
    ]
    for name, part in {**parts, "**all**": total}.items():
        numbers = f"{part.rest:.1f}", part.predictions, f"{part.plain:.1f}", f"{part.shared:.1f}", part.differ
        lines.append(f"| {name} | {' | '.join(map(str, numbers))} |\n")
    before, after = total.rest + total.plain, total.rest + total.shared
    lines.append(
        f"\nScoring is {100 * total.plain / before:.0f} % of {before:.0f} CPU-seconds alone, and "
        f"{100 * total.shared / after:.0f} % of {after:.0f} CPU-seconds shared.\n"
    )
    return "".join([*lines, f"\nDrawn by\n\n```bash\n{command}\n```\n"])


def main(
    matrix: Annotated[str, typer.Option("--matrix", "-m", help="What is run.")] = "scoring",
    only: Annotated[str, typer.Option(help="The part of it, as for run.")] = "",
    work: Annotated[Path | None, typer.Option(help="Folder of the store; a temporary one by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of SCORING.md.")] = Path("results/proof"),
) -> None:
    """Times the parts of a run and compares its predictions with plain ones."""
    torch.set_num_threads(1)
    part = f" --only {shlex.quote(only)}" if only else ""
    command = f"python -m benchmark.proof.scoring --matrix {Path(matrix).name}{part}"
    try:
        with tempfile.TemporaryDirectory(prefix="lf-", dir=work) as folder:
            parts = measure(matrix, only or None, Path(folder), Console(soft_wrap=True))
        write_text(out / "SCORING.md", draw(parts, command))
    except BadInput as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(2) from error
    if any(one.differ for one in parts.values()):
        notes(Console())("some predictions differ")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
