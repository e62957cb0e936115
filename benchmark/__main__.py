"""Runs backdoor defenses on attacked image classifiers, and shows the results. Settings are in matrix files, never in flags."""

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
WriteOption = Annotated[
    Optional[Path],  # noqa: UP045 - typer reads the annotation at run time
    typer.Option("--results", help="Folder to write results into (default: runs).", envvar="LEVELFIELD_RESULTS"),
]
ReadOption = Annotated[
    Optional[Path],  # noqa: UP045 - typer reads the annotation at run time
    typer.Option(
        "--results",
        help="Folder of results (default: of each matrix those in runs, if there are any, otherwise those in results).",
        envvar="LEVELFIELD_RESULTS",
    ),
]
CacheOption = Annotated[
    Path, typer.Option("--cache", help="Folder of trained models, decoded images and tracking runs.", envvar="LEVELFIELD_CACHE")
]
OnlyOption = Annotated[
    Optional[str],  # noqa: UP045 - typer reads the annotation at run time
    typer.Option("--only", help="Run a part, e.g. attack=badnets|sig,seed=0; axes: backbone attack seed track scope defense."),
]
RUNS, CACHE = Path("runs"), Path(".cache")
"""Where runs write; git ignores both."""
COMMITTED = Path("results")
"""Where the committed results are."""


@contextmanager
def _heard() -> Iterator[None]:
    """Inside, a Ctrl-C during a destructor, which Python would print and ignore, is raised again a moment later."""
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
    draw: Annotated[bool, typer.Option(help="Draw tables, plots, page and report, and log to W&B; --no-draw: rows alone.")] = True,
    publish: Annotated[bool, typer.Option("--publish", help="For maintainers: write the committed folder, results.")] = False,
    results: WriteOption = None,
    cache: CacheOption = CACHE,
) -> None:
    """Run a matrix: train attacked models, defend them, score; then draw tables, plots, page and report."""
    from benchmark.run.progress import notes
    from benchmark.run.session import run_matrix
    from benchmark.settings.load import find_matrix, load_matrix

    if publish and results is not None:
        raise BadInput("--publish writes results: leave --results (or LEVELFIELD_RESULTS) away")
    loaded = load_matrix(find_matrix(matrix), notes(console))
    try:
        with _heard():
            outcome = run_matrix(
                loaded,
                results=COMMITTED if publish else results or RUNS,
                cache=cache,
                console=console,
                only=only,
                processes=processes or None,
                executor=executor.value,
                gpus=gpus,
            )
            if draw:
                from benchmark.present import present

                present(outcome.folder, loaded, cache=cache, console=console, track=wandb)
                _compare(outcome.folder)
    except KeyboardInterrupt:
        console.print("\ninterrupted; finished stages are cached, finished cells have rows: issue the same command again to go on")
        raise typer.Exit(130) from None


def _compare(folder: Path) -> None:
    """Prints how the rows of a run compare with the committed rows of the same matrix, if there are any."""
    from benchmark.proof.compare import comparison

    committed = COMMITTED / folder.name
    if (committed / "rows.csv").is_file() and folder.resolve() != committed.resolve():
        for line in comparison(folder, committed).lines(committed):
            console.print(line, highlight=False, markup=False)


def _stored(matrix: str | None, results: Path | None) -> list[Path]:
    """The folders of results to read: of one matrix, or of all that have rows.

    Without ``results`` a matrix is read from runs if it has rows there, otherwise from the committed results; a line says which.
    """
    from models.spec import nearest

    folders: dict[str, Path] = {}
    for root in (COMMITTED, RUNS) if results is None else (results,):
        for rows in sorted(root.glob("*/rows.csv")):
            folders[rows.parent.name] = rows.parent
    where = f"{RUNS}, {COMMITTED}" if results is None else str(results)
    if not folders:
        raise BadInput(f"{where}: no results there; run a matrix first")
    if matrix is not None and matrix not in folders:
        raise BadInput(f"{where}: no results of a matrix {matrix!r}{nearest(matrix, list(folders))}")
    found = [folders[name] for name in sorted(folders) if matrix in (None, name)]
    for folder in found if results is None else ():
        whose = "your run" if folder.parent == RUNS else "committed"
        console.print(f"reading {folder} ({whose})", highlight=False, markup=False)
    return found


StoredOption = Annotated[
    Optional[str],  # noqa: UP045 - typer reads the annotation at run time
    typer.Option("--matrix", "-m", help="One matrix (default: every matrix that has rows)."),
]


@app.command()
def tables(matrix: StoredOption = None, results: ReadOption = None) -> None:
    """Draw the tables again from stored rows."""
    from benchmark.present import draw_tables

    for folder in _stored(matrix, results):
        draw_tables(folder, console)


@app.command()
def plots(matrix: StoredOption = None, results: ReadOption = None) -> None:
    """Draw the figures again from stored rows."""
    from benchmark.present import draw_plots

    for folder in _stored(matrix, results):
        draw_plots(folder, console)


@app.command()
def page(matrix: StoredOption = None, results: ReadOption = None) -> None:
    """Draw leaderboard.html, a page to sort, filter and open, again from stored rows."""
    from benchmark.present import draw_page

    for folder in _stored(matrix, results):
        draw_page(folder, console)


@app.command()
def report(matrix: StoredOption = None, results: ReadOption = None) -> None:
    """Write the report, README.md beside the rows, again from stored rows."""
    from benchmark.present import draw_report

    for folder in _stored(matrix, results):
        draw_report(folder, console)


@app.command()
def exhibits(
    results: Annotated[Path, typer.Option("--results", help="Folder of results.", envvar="LEVELFIELD_RESULTS")] = COMMITTED,
) -> None:
    """Write EXHIBITS.md again from stored rows: reviewers' questions, each answered by a table or figure."""
    from benchmark.present import draw_exhibits

    _stored(None, results)
    draw_exhibits(results, console)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A folder of results, e.g. results/quick.")],
    sample: Annotated[int, typer.Option(min=0, help="How many rows to draw and compute again; 0 = check the files alone.")] = 5,
    draw: Annotated[int, typer.Option(min=0, help="Seed of the draw.")] = 0,
    processes: Annotated[int, typer.Option(min=0, help="Stages at once; 0 = one per core (three on a GPU).")] = 0,
    cache: CacheOption = CACHE,
) -> None:
    """Compute randomly drawn rows again from the settings beside them, and compare; exit status 1 if they differ."""
    from benchmark.proof.verify import confirmed, verify

    checked = verify(folder, sample=sample, draw=draw, cache=cache, console=console, processes=processes or None)
    raise typer.Exit(0 if confirmed(checked) else 1)


class Listed(StrEnum):
    """What has a table of its own."""

    attacks = "attacks"
    defenses = "defenses"


@app.command("list")
def list_(
    what: Annotated[
        Optional[Listed],  # noqa: UP045 - typer reads the annotation at run time
        typer.Argument(help="One of them as a table: family, what each method needs, its cost, its paper."),
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="For maintainers: write both tables into the README.md files.")] = False,
) -> None:
    """List matrices, data sets, backbones, attacks, defenses and tracks."""
    from benchmark.present import catalogue, methods, write_catalogue

    if write:
        write_catalogue(console)
    elif what is None:
        catalogue(console)
    else:
        methods(console, what.value)


@app.command()
def show(
    matrix: MatrixOption = "quick",
    only: Annotated[
        Optional[str],  # noqa: UP045 - typer reads the annotation at run time
        typer.Option("--only", help="Explain these rows instead, e.g. attack=blended,defense=anp,seed=0."),
    ] = None,
    results: ReadOption = None,
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
        typer.Option("--matrix", "-m", help="Only runs of this matrix, grouped by defense (default: every run logged here)."),
    ] = None,
    cache: CacheOption = CACHE,
) -> None:
    """Show the W&B runs of this machine in the terminal; needs no network and no account."""
    import subprocess

    from benchmark.tracking import dashboard_command

    raise typer.Exit(subprocess.call(dashboard_command(cache / "wandb", Path(matrix).stem if matrix else None)))


@app.command("show-my-model")
def show_my_model(
    checkpoint: Annotated[Path, typer.Option(help="safetensors, or a torch state dict (read with weights only).")],
    dataset: Annotated[str, typer.Option(help="Data set by name, or folder:PATH of class folders.")],
    backbone: Annotated[
        str, typer.Option(help="Its architecture: a name of `list`, torchvision:NAME or timm:NAME; of a folder of timm's, none.")
    ] = "",
    normalised: Annotated[
        str, typer.Option(help="How its images are normalised, where the file does not hold it: 'data set', imagenet or none.")
    ] = "data set",
    attack: Annotated[
        Optional[str],  # noqa: UP045 - typer reads the annotation at run time
        typer.Option(help="The attack, if suspected or known; without one, only ACC is measured."),
    ] = None,
    matrix: Annotated[
        str, typer.Option("--matrix", "-m", help="Whose defenses, attack settings and clean budget to use.")
    ] = "my-model",
    results: WriteOption = None,
    cache: CacheOption = CACHE,
) -> None:
    """Run the post-training defenses on your own checkpoint; writes a table and the defended weights."""
    from benchmark.run.own_model import defend_checkpoint

    defend_checkpoint(checkpoint, backbone, dataset, attack, matrix, results=results or RUNS, cache=cache, console=console,
                      normalised=normalised)  # fmt: skip


@app.command()
def doctor(
    checkpoint: Annotated[Path, typer.Argument(help="safetensors, a torch state dict, or a folder of timm's.")],
    images: Annotated[str, typer.Option(help="Clean images of its classes: a folder of class folders, or a data set by name.")],
    backbone: Annotated[str, typer.Option(help="Its architecture, as for show-my-model.")] = "",
    normalised: Annotated[str, typer.Option(help="How its images are normalised, as for show-my-model.")] = "data set",
    twins: Annotated[
        int, typer.Option(min=0, help="Benign networks to train from these images and compare with; 0: no probability is given.")
    ] = 0,
    twin_epochs: Annotated[int, typer.Option(min=1, help="Of their training.")] = 20,
    matrix: Annotated[str, typer.Option("--matrix", "-m", help="Whose post-training defenses are tried.")] = "zoo",
    results: WriteOption = None,
    cache: CacheOption = CACHE,
) -> None:
    """Is a checkpoint backdoored, and which defense cleans it? Writes a page, the figures and the cleaned weights."""
    from benchmark.doctor.examine import examine

    data = f"folder:{images}" if Path(images).exists() else images
    examine(
        checkpoint, backbone, data, matrix=matrix, twins=twins, epochs=twin_epochs, normalised=normalised, results=results or RUNS,
        cache=cache, console=console,
    )  # fmt: skip


@app.command()
def enter(
    plugin: Annotated[Path, typer.Argument(help="A Python file that defines your defense; with --check, the folder of an entry.")],
    authors: Annotated[str, typer.Option(help="Who made it.")] = "",
    paper: Annotated[str, typer.Option(help="Where it is published.")] = "",
    licence: Annotated[str, typer.Option(help="Of the file.")] = "",
    tuned_on: Annotated[str, typer.Option(help="Data, models and attacks on which its settings were chosen.")] = "",
    matrix: Annotated[str, typer.Option("--matrix", "-m", help="Whose attacked models it defends.")] = "zoo",
    full: Annotated[bool, typer.Option("--full", help="cifar10-cpu in place of the zoo: all attacks, networks and seeds.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Compute a tenth of an entry's rows again; exit status 1 if they differ.")
    ] = False,
    only: OnlyOption = None,
    processes: Annotated[int, typer.Option(min=0, help="Stages at once; 0 = one per core.")] = 0,
    results: WriteOption = None,
    cache: CacheOption = CACHE,
) -> None:
    """Run your defense on stored victims and file it as an entry, a folder for a pull request."""
    from benchmark.entry.enter import Claim
    from benchmark.entry.enter import check as check_entry
    from benchmark.entry.enter import enter as enter_plugin
    from benchmark.entry.page import write_page

    if check:
        good = check_entry(plugin, cache=cache, console=console, processes=processes or None)
        write_page(plugin.resolve().parent.parent)
        raise typer.Exit(0 if good else 1)
    where = results or COMMITTED
    folder = enter_plugin(
        plugin, Claim(authors, paper, licence, tuned_on), matrix="cifar10-cpu" if full else matrix, results=where, cache=cache,
        console=console, processes=processes or None, only=only,
    )  # fmt: skip
    console.print(f"entry: {folder}\nboard: {write_page(where)}", highlight=False, markup=False)


@app.command()
def zoo(
    matrix: Annotated[
        Optional[str],  # noqa: UP045 - typer reads the annotation at run time
        typer.Option("--matrix", "-m", help="Export the victims of this matrix (its first seed) that have been trained."),
    ] = None,
    only: OnlyOption = None,
    check: Annotated[bool, typer.Option("--check", help="Compute every card again; exit status 1 if one differs.")] = False,
    folder: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads the annotation at run time
        typer.Option(help="Of the zoo (default: LEVELFIELD_ZOO, or results/zoo of this project)."),
    ] = None,
    cache: CacheOption = CACHE,
) -> None:
    """Export trained victims to the zoo, or check it; without either, write its README.md and picture again."""
    from benchmark.run.progress import notes
    from benchmark.settings.load import find_matrix, load_matrix
    from benchmark.storage.zoo import home
    from benchmark.zoo.check import check as check_zoo
    from benchmark.zoo.export import export
    from benchmark.zoo.page import write_page, write_picture

    shelf = folder or home()
    if check:
        raise typer.Exit(0 if check_zoo(shelf, cache, console) else 1)
    if matrix is not None:
        export(load_matrix(find_matrix(matrix), notes(console)), only=only, cache=cache, folder=shelf, console=console)
    write_picture(shelf, cache)
    console.print(f"page: {write_page(shelf)}", highlight=False)


def main() -> None:
    """Entry point: a BadInput is one line and exit status 2; so is a missing pydantic, which checks matrix files."""
    try:
        app()
    except (BadInput, ModuleNotFoundError) as error:
        message = str(error)
        if isinstance(error, ModuleNotFoundError):  # some versions of typer want it too, before a matrix is read
            if (error.name or "").partition(".")[0] != "pydantic":
                raise
            message = "pydantic is not installed here, and matrix files are checked by it: pip install pydantic"
        Console(stderr=True, soft_wrap=True).print(f"error: {message}", style="red", markup=False, highlight=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
