"""The command line: verbs and filters. Numbers stand in matrix files, never in flags."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from models.spec import BadInput

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__, rich_markup_mode=None)
console = Console(soft_wrap=True)

MatrixOption = Annotated[str, typer.Option("--matrix", "-m", help="A shipped matrix by name, or a .toml file.")]
ResultsOption = Annotated[Path, typer.Option("--results", help="Folder of results.", envvar="LEVELFIELD_RESULTS")]
CacheOption = Annotated[
    Path, typer.Option("--cache", help="Folder of the store, decoded images and tracking runs.", envvar="LEVELFIELD_CACHE")
]
OnlyOption = Annotated[
    Optional[str],  # noqa: UP045 - typer reads the annotation at run time
    typer.Option("--only", help="Run a slice, e.g. attack=badnets|sig,seed=0; axes: backbone attack seed track scope defense."),
]
RESULTS, CACHE = Path("results"), Path(".cache")


@contextmanager
def _heard() -> Iterator[None]:
    """Has a Ctrl-C that falls into a destructor, where Python prints it and goes on, raised again a moment later."""
    before = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            again = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
            again.daemon = True
            again.start()
        else:
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


class Executor(StrEnum):
    """Where stages run."""

    local = "local"
    ray = "ray"


@app.command()
def run(
    matrix: MatrixOption = "quick",
    only: OnlyOption = None,
    processes: Annotated[int, typer.Option(min=0, help="Stages at once; 0 = one per core (three on a GPU). No row changes.")] = 0,
    executor: Annotated[
        Executor,
        typer.Option(help="local: processes of this machine; ray: the cluster of RAY_ADDRESS, or this machine. No row changes."),
    ] = Executor.local,
    gpus: Annotated[
        Optional[float],  # noqa: UP045 - typer reads the annotation at run time
        typer.Option(min=0, max=1, help="With ray: a stage's share of a GPU (default: a third, if there are any). No row changes."),
    ] = None,
    wandb: Annotated[bool, typer.Option(help="Log every cell to Weights & Biases (offline by default).")] = True,
    results: ResultsOption = RESULTS,
    cache: CacheOption = CACHE,
) -> None:
    """Run a matrix: implant, defend, score; then tables, plots, page, report and the leaderboard."""
    from benchmark.settings.matrix import find_matrix, load_matrix
    from benchmark.present import present
    from benchmark.run.progress import notes
    from benchmark.run.session import run_matrix

    loaded = load_matrix(find_matrix(matrix), notes(console))
    try:
        with _heard():
            outcome = run_matrix(
                loaded,
                results=results,
                cache=cache,
                console=console,
                only=only,
                processes=processes or None,
                executor=executor.value,
                gpus=gpus,
            )
            present(outcome.folder, loaded, cache=cache, console=console, track=wandb)
    except KeyboardInterrupt:
        console.print("\ninterrupted; finished stages are stored, finished cells have rows: issue the same command again to go on")
        raise typer.Exit(130) from None


def _stored(matrix: str | None, results: Path) -> list[Path]:
    """The result folders meant: one by name, or all that hold rows."""
    from models.spec import nearest

    if not results.is_dir():
        raise BadInput(f"{results}: no such folder; run a matrix first")
    every = sorted(folder for folder in results.iterdir() if (folder / "rows.csv").is_file())
    if matrix is None:
        return every
    found = [folder for folder in every if folder.name == matrix]
    if not found:
        raise BadInput(f"{results}: no results of a matrix {matrix!r}{nearest(matrix, [folder.name for folder in every])}")
    return found


StoredOption = Annotated[
    Optional[str],  # noqa: UP045 - typer reads the annotation at run time
    typer.Option("--matrix", "-m", help="One matrix; without it, every matrix with stored rows."),
]


@app.command()
def tables(matrix: StoredOption = None, results: ResultsOption = RESULTS) -> None:
    """Regenerate tables from stored rows, touching no model."""
    from benchmark.present import draw_tables

    for folder in _stored(matrix, results):
        draw_tables(folder, console)


@app.command()
def plots(matrix: StoredOption = None, results: ResultsOption = RESULTS) -> None:
    """Regenerate figures from stored rows, touching no model."""
    from benchmark.present import draw_plots

    for folder in _stored(matrix, results):
        draw_plots(folder, console)


@app.command()
def page(matrix: StoredOption = None, results: ResultsOption = RESULTS) -> None:
    """Regenerate each result folder's leaderboard.html, a page to sort, filter and open, from stored rows."""
    from benchmark.present import draw_page

    for folder in _stored(matrix, results):
        draw_page(folder, console)


@app.command()
def report(matrix: StoredOption = None, results: ResultsOption = RESULTS) -> None:
    """Regenerate each result folder's README.md from stored rows."""
    from benchmark.present import draw_report

    for folder in _stored(matrix, results):
        draw_report(folder, console)


@app.command()
def exhibits(results: ResultsOption = RESULTS) -> None:
    """Regenerate EXHIBITS.md: reviewers' questions, each answered by a table or figure from stored rows."""
    from benchmark.present import draw_exhibits

    _stored(None, results)
    draw_exhibits(results, console)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A folder of results, e.g. results/quick, yours or somebody else's.")],
    sample: Annotated[int, typer.Option(min=0, help="Rows to draw and compute again; 0 = check the files alone.")] = 5,
    draw: Annotated[int, typer.Option(min=0, help="Which draw: the same number draws the same rows.")] = 0,
    processes: Annotated[int, typer.Option(min=0, help="Stages at once; 0 = one per core (three on a GPU).")] = 0,
    cache: CacheOption = CACHE,
) -> None:
    """Compute randomly drawn rows again from the settings beside them, and compare; exit status 1 where they differ."""
    from benchmark.proof.verify import confirmed, verify

    checked = verify(folder, sample=sample, draw=draw, cache=cache, console=console, processes=processes or None)
    raise typer.Exit(0 if confirmed(checked) else 1)


@app.command("list")
def list_() -> None:
    """List matrices, data sets, backbones, attacks, defenses and tracks."""
    from benchmark.present import catalogue

    catalogue(console)


@app.command()
def show(
    matrix: MatrixOption = "quick",
    only: Annotated[
        Optional[str],  # noqa: UP045 - typer reads the annotation at run time
        typer.Option("--only", help="Explain rows instead, e.g. attack=blended,defense=anp,seed=0: why they count, were chosen."),
    ] = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Print the leaderboards of stored rows; with --only, why a scenario counts and why a candidate was chosen."""
    from benchmark.present import explained, leaderboard

    for folder in _stored(matrix, results):
        if only is None:
            leaderboard(folder, console)
        else:
            explained(folder, only, console)


@app.command()
def dashboard(
    matrix: Annotated[
        Optional[str],  # noqa: UP045 - typer reads the annotation at run time
        typer.Option("--matrix", "-m", help="Its runs alone, grouped by defense; default: every run ever logged here."),
    ] = None,
    cache: CacheOption = CACHE,
) -> None:
    """Look at the W&B runs of this machine in the terminal; needs no network and no account."""
    import subprocess

    from benchmark.tracking import dashboard_command

    raise typer.Exit(subprocess.call(dashboard_command(cache / "wandb", Path(matrix).stem if matrix else None)))


@app.command("show-my-model")
def show_my_model(
    checkpoint: Annotated[Path, typer.Option(help="safetensors, or a torch state dict (read with weights only).")],
    backbone: Annotated[str, typer.Option(help="Its architecture, by name; width and head size are read off the weights.")],
    dataset: Annotated[str, typer.Option(help="Data set by name, or folder:PATH of class folders.")],
    attack: Annotated[
        Optional[str],  # noqa: UP045 - typer reads the annotation at run time
        typer.Option(help="Attack suspected or known; without one, only ACC is measured."),
    ] = None,
    matrix: Annotated[
        str, typer.Option("--matrix", "-m", help="Whose defenses, attack settings and clean budget to use.")
    ] = "my-model",
    results: ResultsOption = RESULTS,
    cache: CacheOption = CACHE,
) -> None:
    """Run the post-training defenses on a checkpoint of yours; writes a table and the cleaned weights."""
    from benchmark.run.own_model import defend_checkpoint

    defend_checkpoint(checkpoint, backbone, dataset, attack, matrix, results=results, cache=cache, console=console)


def main() -> None:
    """Entry point: a BadInput is one line and exit status 2; so is the absence of pydantic, which checks matrix files."""
    try:
        app()
    except (BadInput, ModuleNotFoundError) as error:
        told = str(error)
        if isinstance(error, ModuleNotFoundError):  # some versions of typer want it too, before a matrix is read
            if (error.name or "").partition(".")[0] != "pydantic":
                raise
            told = "pydantic is not installed here, and matrix files are checked by it: pip install pydantic"
        Console(stderr=True, soft_wrap=True).print(f"error: {told}", style="red", markup=False, highlight=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
