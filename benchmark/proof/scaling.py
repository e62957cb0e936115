"""Speed-up by more workers, and the overhead of a stage: ``python -m benchmark.proof.scaling``.

The same part of a matrix is run from an empty store, by local processes and on a new Ray, with one worker and with several; every
run has its own interpreter. The efficiency of n workers is the time of one worker over n times their time. Start-up time and
overhead per stage are measured on cached stages, as the line through two runs of different length. Needs an idle machine: all other
load counts as a loss.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmark.data.datasets import load
from benchmark.run.local import run_stages
from benchmark.run.plan import Plan, Stage
from benchmark.run.progress import notes
from benchmark.run.session import run_matrix
from benchmark.settings.load import find_matrix, load_matrix
from benchmark.storage.store import Store
from models.files import write_text
from models.spec import BadInput, canonical

__all__ = ["Measured", "draw", "main"]

EXECUTORS = "local", "ray"
COUNTS = 20, 1020
"""Numbers of cached stages in the two runs."""


@dataclass(frozen=True)
class Measured:
    """One executor with one number of workers."""

    executor: str
    workers: int
    seconds: float
    """Of the whole run from an empty store, start-up included."""
    stages: int
    start: float
    """Seconds until the first stage can begin."""
    per_stage: float
    """Overhead in seconds: the time of a cached stage."""
    same: bool
    """Whether rows.csv and curves.csv are identical to those of the first run."""


class _Quiet:
    """No progress display: its time does not belong to the executor."""

    def started(self, worker: int, label: str, kind: str) -> None: ...
    def epoch(self, worker: int, done: int, total: int) -> None: ...
    def finished(self, worker: int, label: str, kind: str) -> None: ...
    def put_back(self, worker: int) -> None: ...
    def note(self, line: str) -> None: ...


def _whole(matrix: str, only: str | None, executor: Any, workers: int, folder: Path) -> dict[str, float]:
    """Seconds and stages of one run; called in a new interpreter."""
    loaded = load_matrix(find_matrix(matrix))
    with (folder / "log.txt").open("w") as log:
        begun = time.perf_counter()
        outcome = run_matrix(
            loaded, results=folder / "results", cache=folder / "cache", console=Console(file=log), only=only,
            processes=workers, executor=executor,
        )  # fmt: skip
        seconds = time.perf_counter() - begun
    failed = [result.rows[0].reason for result in outcome.results if result.rows[0].status == "failed"]
    if failed:
        raise BadInput(f"{len(failed)} cells failed: {failed[0]}")
    return {"seconds": seconds, "stages": len(list((folder / "cache" / "store").glob("*/??/*/entry.json")))}


def _cached(matrix: str, executor: str, workers: int, folder: Path) -> dict[str, float]:
    """Start-up time and overhead per stage, from a cached victim; called in a new interpreter."""
    loaded, store, cache = load_matrix(find_matrix(matrix)), folder / "store", folder / "cache"
    plan = Plan(loaded, {canonical(spec): load(spec, cache).fingerprint for spec in {one.dataset for one in loaded.scenarios}})
    cached = next(stage for stage in plan.stages.values() if stage.kind == "victim" and not stage.after)
    cached.run(Store(store), cache)

    def timed(run: Callable[[list[Stage]], object], count: int) -> float:
        begun = time.perf_counter()
        run([cached] * count)
        return time.perf_counter() - begun

    if executor == "ray":
        from benchmark.run.on_ray import connected

        begun = time.perf_counter()
        with connected(workers, 0.0) as cluster:
            start = time.perf_counter() - begun
            # Workers persist. Each has started once it has run a stage.
            first, few, many = (
                timed(lambda stages: cluster.run(stages, plan, store, cache, _Quiet(), {}), count) for count in (workers, *COUNTS)
            )
    else:
        start = 0.0
        first, few, many = (
            timed(lambda stages: run_stages(stages, plan, store, cache, _Quiet(), workers), count)
            for count in (workers, *COUNTS)
        )
    per_stage = (many - few) / (COUNTS[1] - COUNTS[0])
    return {"start": start + first - workers * per_stage, "per_stage": per_stage}


def _apart(function: str, arguments: Sequence[Any]) -> dict[str, float]:
    """Calls a function of this module in a new interpreter; its last argument is a folder.

    Raises:
        BadInput: it failed; the message is the last line of its output.
    """
    program = (
        "import json, sys; from pathlib import Path; from benchmark.proof import scaling\n"
        "function, (*given, folder) = sys.argv[1], json.loads(sys.argv[2])\n"
        "print(json.dumps(getattr(scaling, function)(*given, Path(folder))))"
    )
    given = [*arguments[:-1], str(arguments[-1])]
    done = subprocess.run([sys.executable, "-c", program, function, json.dumps(given)], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise BadInput(f"{' '.join(map(str, arguments[:-1]))}: {last}")
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def measure(matrix: str, only: str | None, ways: Sequence[tuple[str, int]], work: Path, console: Console) -> Iterator[Measured]:
    """Every executor and number of workers in turn.

    Raises:
        BadInput: a run failed, or a cell of one.
    """
    reference: list[bytes] = []
    for number, (executor, workers) in enumerate(ways):
        folder = work / f"{executor}-{workers}"
        folder.mkdir()
        with console.status(f"{executor}, {workers} worker{'s' * (workers > 1)}: {len(ways) - number} of {len(ways)} ways left"):
            whole = _apart("_whole", (matrix, only, executor, workers, folder))
            cached = _apart("_cached", (matrix, executor, workers, folder / "cached"))
        found = [path.read_bytes() for path in sorted(folder.glob("results/*/*.csv")) if path.name in ("rows.csv", "curves.csv")]
        reference = reference or found
        yield Measured(
            executor, workers, whole["seconds"], int(whole["stages"]), cached["start"], cached["per_stage"], found == reference
        )


def draw(measured: Sequence[Measured], command: str) -> str:
    """The page WORKERS.md; efficiency is relative to one worker of the same executor."""
    single = {one.executor: one for one in measured if one.workers == 1}
    lines = [
        "# Workers\n\n",
        "The same part of a matrix from an empty store, by local processes and on Ray. Efficiency: the time of one worker of the\n",
        "same executor over the number of workers times their time; 1 is ideal. ms per stage: the overhead, on cached stages.\n\n",
        "| executor | workers | stages | seconds | efficiency | without start-up | start-up seconds | ms per stage | same rows |\n",
        "| :-- | --: | --: | --: | --: | --: | --: | --: | :-- |\n",
    ]
    for one in measured:
        base = single.get(one.executor)
        gained, bare = "", ""
        if base is not None and one.workers > 1:
            gained = f"{base.seconds / (one.workers * one.seconds):.2f}"
            bare = f"{(base.seconds - base.start) / (one.workers * (one.seconds - one.start)):.2f}"
        numbers = (one.workers, one.stages, f"{one.seconds:.0f}", gained, bare, f"{one.start:.1f}", f"{1000 * one.per_stage:.1f}")
        lines.append(f"| {one.executor} | {' | '.join(map(str, numbers))} | {'yes' if one.same else 'NO'} |\n")
    return "".join([*lines, f"\nDrawn by\n\n```bash\n{command}\n```\n"])


def main(
    matrix: Annotated[str, typer.Option("--matrix", "-m", help="What is run.")] = "quick",
    only: Annotated[str, typer.Option(help="The part of it, as for run.")] = "seed=0",
    workers: Annotated[int, typer.Option(min=2, help="Number of workers compared with a single one.")] = 2,
    executor: Annotated[list[str] | None, typer.Option(help="local or ray; both by default.")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder of the stores; a temporary one by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of WORKERS.md.")] = Path("results/proof"),
) -> None:
    """Times a part of a matrix with one worker and with several, locally and on Ray."""
    console = Console(soft_wrap=True)
    chosen = executor or list(EXECUTORS)
    ways = [(name, count) for name in chosen for count in (1, workers)]
    command = f"python -m benchmark.proof.scaling --matrix {Path(matrix).name} --only {shlex.quote(only)} --workers {workers}"
    try:
        if unknown := set(chosen) - set(EXECUTORS):
            raise BadInput(f"--executor {min(unknown)}: it is local or ray")
        measured: list[Measured] = []
        with tempfile.TemporaryDirectory(prefix="lf-", dir=work) as folder:
            for one in measure(matrix, only or None, ways, Path(folder), console):
                measured.append(one)
                console.print(", ".join(f"{name} {value}" for name, value in asdict(one).items()), markup=False, highlight=False)
                write_text(out / "WORKERS.md", draw(measured, command))
    except BadInput as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(2) from error
    if not all(one.same for one in measured):
        notes(console)("the runs do not give the same rows")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
