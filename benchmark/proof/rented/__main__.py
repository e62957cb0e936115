"""A matrix on a machine rented by the minute, without a network: ``python -m benchmark.proof.rented pack``, there ``go.sh``.

``pack`` writes what is to be carried (:mod:`benchmark.proof.rented.carry`). ``go`` runs the matrix there in slices, the most
telling first, each as a normal run with ``--only``. It stops by itself in time, with the rows of every finished cell, the
throughput of the machine, the GPU's utilisation and some of the victims. Cells that have rows are not run again, so the next
rental goes on.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from benchmark.data.sources import VARIABLE
from benchmark.proof.rented import carry
from benchmark.proof.rented.carry import IMAGES, LIMIT, MIB, Part, Wheels, deliver, unpacked
from benchmark.proof.rented.rental import LEAST, RESERVE, Deadline, Ended, Rental, run_slices
from benchmark.settings.load import find_matrix, load_matrix
from benchmark.settings.slices import Slice
from models.spec import BadInput

__all__ = ["app", "go", "pack"]

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__, rich_markup_mode=None)
MatrixOption = Annotated[str, typer.Option("--matrix", "-m", help="A shipped matrix by name, or a .toml file in the checkout.")]


@contextmanager
def _errors() -> Iterator[None]:
    """A BadInput is one line and exit status 2."""
    try:
        yield
    except BadInput as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


@app.command()
def pack(
    matrix: MatrixOption = "cifar10-fast",
    out: Annotated[Path, typer.Option(help="Folder of the transfers.")] = Path("build/rented"),
    limit: Annotated[int, typer.Option(min=1, help="MiB of a transfer.")] = LIMIT,
    python: Annotated[str, typer.Option(help="Version of the rented machine's Python, for the wheels.")] = "3.12",
    wheels: Annotated[str, typer.Option(help="download, none, or a folder of wheels.")] = "download",
    cache: Annotated[Path, typer.Option(help="Where downloaded data sets are.")] = Path(".cache"),
) -> None:
    """Write everything to carry to a rented machine, in folders of one transfer each."""
    with _errors():
        folder = None if wheels == "download" else Path(wheels)
        wanted = None if wheels == "none" else Wheels(python, folder)
        transfers, notes = carry.pack(load_matrix(find_matrix(matrix)), out, limit=limit, wanted=wanted, cache=cache)
        for name, parts in transfers.items():
            typer.echo(f"{out / name}: {_mib(parts)}: {', '.join(f'{Path(part.path).name} {_mib([part])}' for part in parts)}")
        for note in notes:
            typer.echo(note)
        typer.echo(f"carry all of {out}; there: bash {out / 'transfer-1' / 'go.sh'} --minutes 14 --out OUT")


def _mib(parts: Iterable[Part]) -> str:
    return f"{sum(part.size for part in parts) / MIB:.1f} MiB"


@app.command()
def go(
    matrix: MatrixOption,
    minutes: Annotated[float, typer.Option(min=0.1, help="Minutes from the start of go.sh to the end of everything.")] = 14.0,
    out: Annotated[Path, typer.Option(help="Folder for what is to be carried back.")] = Path("out"),
    packed: Annotated[Path, typer.Option(help="The folder with the transfers.")] = Path("build/rented"),
    caller: Annotated[Path, typer.Option(help="The folder that --out is relative to.")] = Path(),
    begun: Annotated[float, typer.Option(help="When the minutes began, in seconds since 1970; 0 = now.")] = 0.0,
    reserve: Annotated[float, typer.Option(min=0, help="Seconds kept for the end; 0 = 5 % of the time, at least 10.")] = 0.0,
    weights: Annotated[float, typer.Option(min=0, help="MiB of victims that come back.")] = 40.0,
    back: Annotated[int, typer.Option(min=0, help="Send one archive back in parts of so many MiB; 0 = plain files.")] = 0,
    processes: Annotated[int, typer.Option(min=0, help="Stages at once; 0 = as in a run.")] = 0,
) -> None:
    """Run a packed matrix for some minutes, the most telling slices first."""
    with _errors():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it, and the slices would, too
        deadline = Deadline((begun or time.time()) + 60 * minutes, reserve or max(LEAST, 60 * minutes * RESERVE))
        packed, out = packed.resolve(), caller / out
        if unpacked(packed, IMAGES, packed / "work" / "data"):
            os.environ[VARIABLE] = str(packed / "work" / "data")
        rental = Rental(load_matrix(find_matrix(matrix), typer.echo), packed / "work", deadline, processes)
        rental.meter.start()
        notes = [rental.throughput(minutes)]

        def run(part: Slice) -> Ended:
            ended = rental.run(part)
            deliver(rental.results, out, back)
            return ended

        ended = run_slices(rental.todo(), deadline, rental.needed, run)
        text = rental.close(ended, notes, weights)
        deliver(rental.results, out, back)
        typer.echo(f"{text}\n{out}: everything to carry back; {deadline.end - time.time():.0f} s of the time are left")


if __name__ == "__main__":
    app()
