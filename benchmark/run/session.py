"""Runs a matrix: plan -> stages -> rows.

The same command resumes: finished stages are read from the store, and files whose content stays the same are not touched.
"""

from __future__ import annotations

import functools
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from benchmark.data.datasets import Dataset, load
from benchmark.run.local import places, run_stages
from benchmark.run.outcome import CellResult, cell_rows
from benchmark.run.plan import Plan, Stage
from benchmark.run.progress import RunProgress, notes
from benchmark.settings.cautions import cautions
from benchmark.settings.cells import Cell, Matrix, settings_hash
from benchmark.storage import rows as files
from benchmark.storage import zoo
from benchmark.storage.files import held, why, write_bytes, write_text
from benchmark.storage.machine import arithmetic, versions
from benchmark.storage.rows import Curve, Row, Timing
from benchmark.storage.store import Entry, Store
from models.spec import BadInput, canonical, digest, nearest

__all__ = ["Executor", "Filter", "Outcome", "cached_rows", "chosen_cells", "parse_only", "recompute", "run_matrix"]

Executor = Literal["local", "ray"]
Filter = Mapping[str, Sequence[str]]
AXES: dict[str, Callable[[Cell], str]] = {
    "backbone": lambda cell: cell.scenario.backbone_label,
    "attack": lambda cell: cell.scenario.attack_label,
    "seed": lambda cell: str(cell.scenario.seed),
    "track": lambda cell: cell.track.name,
    "scope": lambda cell: cell.scope.value,
    "defense": lambda cell: cell.defense_label,
}


def parse_only(matrix: Matrix, only: str | None) -> Filter:
    """Reads a filter: ``"attack=badnets|blended,seed=0"`` gives the values that each axis may have, by axis.

    Commas separate axes, bars separate values; a cell is taken when all axes agree. A label may contain both: what follows a comma
    without an axis of its own belongs to the value before it, and a value that some cell has is not split.

    Raises:
        BadInput: an unknown axis, one named twice, or a value that no cell has, with the nearest right one.
    """
    parts: list[str] = []
    for part in (only or "").split(","):
        if parts and part.strip() and "=" not in part:
            parts[-1] += f",{part}"
        elif part.strip():
            parts.append(part)
    chosen: dict[str, Sequence[str]] = {}
    for part in parts:
        axis, equals, text = (piece.strip() for piece in part.partition("="))
        if not equals or axis not in AXES:
            raise BadInput(f"--only {part.strip()!r}: write axis=value{nearest(axis, AXES)}")
        if axis in chosen:
            raise BadInput(f"--only names {axis} twice; write {axis}={'|'.join(chosen[axis])}|{text}")
        values = list(dict.fromkeys(AXES[axis](cell) for cell in matrix.cells))
        wanted = (text,) if text in values else tuple(piece.strip() for piece in text.split("|"))
        for value in wanted:
            if value not in values:
                raise BadInput(f"--only {axis}={value}: matrix {matrix.name!r} has none{nearest(value, values)}")
        chosen[axis] = wanted
    return chosen


def chosen_cells(matrix: Matrix, only: str | None) -> list[Cell]:
    """The cells that a filter takes, in matrix order.

    Raises:
        BadInput: as :func:`parse_only`.
    """
    chosen = parse_only(matrix, only)
    return [cell for cell in matrix.cells if _taken(cell, chosen)]


def _taken(cell: Cell, axes: Filter) -> bool:
    return all(AXES[axis](cell) in values for axis, values in axes.items())


@dataclass(frozen=True)
class Outcome:
    """What a run wrote.

    Attributes:
        folder: where the three files are.
        results: the cells that were run, in matrix order.
        changed: whether rows.csv or curves.csv changed.
    """

    folder: Path
    results: list[CellResult]
    changed: bool


def run_matrix(
    matrix: Matrix,
    *,
    results: Path,
    cache: Path,
    console: Console,
    only: str | None = None,
    processes: int | None = None,
    order: Callable[[list[Stage]], list[Stage]] | None = None,
    executor: Executor = "local",
    gpus: float | None = None,
) -> Outcome:
    """Runs what is missing and writes rows.csv, curves.csv, timings.csv, manifest.json and a copy of the matrix.

    Args:
        matrix: the loaded matrix.
        results: folder of results; the matrix gets a folder of its name in it.
        cache: folder of the store, decoded images and tracking runs.
        console: where progress and notes are printed.
        only: see :func:`parse_only`; rows of other cells that are in rows.csv are kept.
        processes: how many stages run at once (default: one per core, or a few on a GPU); never changes a row.
        order: permutes the cells' order of execution (for tests); never changes a row.
        executor: where stages run: in processes of this machine, or on a Ray cluster; never changes a row.
        gpus: share of a GPU that a stage on the Ray cluster takes, in [0, 1] (default: see :func:`benchmark.run.on_ray.connected`).

    Raises:
        BadInput: see the message; everything already computed stays in the store.
        KeyboardInterrupt: it was interrupted; rows of the cells that are cached are written first, as those of a slice are.
    """
    chosen = parse_only(matrix, only)
    if executor == "local" and gpus is not None:
        raise BadInput("--gpus is a stage's share of a GPU of a Ray cluster: it goes with --executor ray")
    folder = results / matrix.name
    if any(folder.glob("*.safetensors")):
        raise BadInput(f"{folder}: holds the files of the zoo, whose README.md a report would replace: name another --results")
    _writable(folder)
    _writable(cache)
    session = _Session(matrix, Store(cache / "store", notes(console)), cache, console)
    cells = session.chosen(chosen)
    used: dict[str, str] = {}
    try:
        failures = session.execute(cells, processes, order, executor, gpus, used)
    except KeyboardInterrupt:
        session.write_cached(folder, cells, _used(executor, used, folder))
        raise
    found = session.collect(cells, failures)
    changed = session.write(folder, found, whole=not chosen, used=_used(executor, used, folder))
    return Outcome(folder, found, changed)


def cached_rows(matrix: Matrix, *, results: Path, cache: Path, console: Console, only: str | None = None) -> int:
    """Writes the rows of the cells that are cached, as :func:`run_matrix` does when it is interrupted, and runs nothing.

    Returns:
        The number of these cells.

    Raises:
        BadInput: as :func:`run_matrix`.
    """
    folder = results / matrix.name
    _writable(folder)
    session = _Session(matrix, Store(cache / "store", notes(console)), cache, console)
    return session.write_cached(folder, session.chosen(parse_only(matrix, only)), arithmetic())


def recompute(
    matrix: Matrix,
    cells: Collection[str],
    *,
    store: Path,
    cache: Path,
    console: Console,
    expected: Mapping[str, str],
    processes: int | None = None,
) -> list[Row]:
    """Rows of some cells, computed in a store of their own and written nowhere (:mod:`benchmark.proof.verify` compares them).

    Args:
        matrix: the loaded matrix.
        cells: their names in rows.csv.
        store: folder of that store.
        cache: decoded images alone are read from here.
        console: where progress is printed.
        expected: fingerprint by data set's name.
        processes: how many stages run at once.

    Raises:
        BadInput: a data set is not the one expected.
    """
    session = _Session(matrix, Store(store), cache, console)
    for dataset in session.datasets.values():
        if expected.get(dataset.name) != dataset.fingerprint:
            raise BadInput(
                f"data set {dataset.name!r}: its images are not those the rows were made with (fingerprint "
                f"{dataset.fingerprint[:12]} here, {expected.get(dataset.name, 'none')[:12]} there)"
            )
    wanted = [cell for cell in session.plan.cells if cell.name in cells]
    failures = session.execute(wanted, processes)
    return [row for result in session.collect(wanted, failures) for row in result.rows]


def _writable(folder: Path) -> None:
    """Fails at once, not after an hour, when a folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder}: cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise BadInput(f"{folder}: cannot be written: permission denied")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".levelfield-probe-", suffix=".tmp") as probe:  # one of its own a run
            probe.write(b"x")
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written: {why(error)}") from error


def _datasets(matrix: Matrix, cache: Path, console: Console) -> dict[str, Dataset]:
    """Every data set of the matrix, by its spec's canonical text; decoded here once, before a worker reads it."""
    found: dict[str, Dataset] = {}
    for scenario in matrix.scenarios:
        key = canonical(scenario.dataset)
        if key not in found:
            report = functools.partial(console.print, style="dim", highlight=False, markup=False)
            found[key] = load(scenario.dataset, cache, report)
    return found


class _Session:
    """One run of a matrix: its plan, the store and the data sets."""

    def __init__(self, matrix: Matrix, store: Store, cache: Path, console: Console) -> None:
        self.store, self.cache, self.console = store, cache, console
        self.datasets = _datasets(matrix, cache, console)
        self.plan = Plan(matrix, {spec: dataset.fingerprint for spec, dataset in self.datasets.items()})

    def execute(
        self,
        cells: Sequence[Stage],
        processes: int | None = None,
        order: Callable[[list[Stage]], list[Stage]] | None = None,
        executor: Executor = "local",
        gpus: float | None = None,
        used: dict[str, str] | None = None,
    ) -> dict[str, str]:
        """Runs the stages that the rows of ``cells`` need and the store does not have; ``used``: see ``on_ray.Cluster.run``.

        Returns:
            The reasons of those that failed, by key.
        """
        stages = self.plan.missing(cells, self.store)
        if not stages:
            return {}
        if order:
            defended = [stage for stage in stages if stage.kind == "defended"]
            stages = [*(stage for stage in stages if stage.kind != "defended"), *order(defended)]
        for line in cautions((stage.cell for stage in cells if stage.cell is not None), self.datasets):
            self.console.print(line, style="yellow", highlight=False, markup=False)
        if executor == "ray":
            from benchmark.run.on_ray import connected

            with connected(processes, gpus) as cluster, self._progress(stages, cells, cluster.words) as progress:
                failed = cluster.run(stages, self.plan, self.store.root, self.cache, progress, {} if used is None else used)
        else:
            count = min(processes or places(), len(stages))
            gpu = " and one GPU for all" if torch.cuda.is_available() else ""
            where = f"{count} process{'es' if count > 1 else ''}, one thread each{gpu}"
            with self._progress(stages, cells, where) as progress:
                failed = run_stages(stages, self.plan, self.store.root, self.cache, progress, count)
        return {stages[failure.position].key: failure.reason for failure in failed}

    def _progress(self, stages: Sequence[Stage], cells: Sequence[Stage], where: str) -> RunProgress:
        """Prints what there is to do; the display of its progress."""
        totals: Counter[str] = Counter(stage.kind for stage in stages)
        cached = len({cell.key for cell in cells}) - totals["defended"]
        given = sum(zoo.by_key(stage.key) is not None for stage in stages if stage.kind == "victim")
        found = f" ({given} of them are in the zoo)" if given else ""
        self.console.print(
            f"{self.plan.matrix.name}: {totals['victim']} models{found} and {totals['extractor']} extractors to train, "
            f"{totals['defended']} defense cells to run ({cached} are cached); {where}",
            highlight=False,
            markup=False,
        )
        return RunProgress(self.console, totals)

    def chosen(self, axes: Filter) -> list[Stage]:
        """The cells that a filter takes, in matrix order."""
        stages = zip(self.plan.cells, self.plan.matrix.cells, strict=True)
        return [stage for stage, cell in stages if _taken(cell, axes)]

    def write_cached(self, folder: Path, cells: Sequence[Stage], used: Mapping[str, str]) -> int:
        """Writes the rows of those ``cells`` that are cached, merged with what is in the files; returns their number."""
        cached = [cell for cell in cells if self.plan.is_cached(cell, self.store)]
        if cached:
            self.write(folder, self.collect(cached, {}), whole=False, used=used)
        return len(cached)

    def collect(self, cells: Sequence[Stage], failures: Mapping[str, str]) -> list[CellResult]:
        """Rows of every cell, in matrix order, from the store; cells that failed become rows with their reason."""
        outcomes: dict[str, Entry] = {}

        def stored(key: str) -> Entry:
            if key not in outcomes:
                reason = failures.get(key, "interrupted before it ran")
                empty = {"status": "failed", "reason": reason, "candidates": [], "units": 0}
                costs = {"seconds": math.nan, "peak_mib": math.nan, "victim_seconds": math.nan}
                found = self.store.read(self.plan.stages[key].kind, key, tensors=False)
                outcomes[key] = found or Entry({**empty, **costs}, {})
            return outcomes[key]

        results = []
        for stage in cells:
            assert stage.cell is not None
            name, fingerprint = self.datasets[canonical(stage.scenario.dataset)].name, self.plan.fingerprint(stage.scenario)
            outcome, victim, twin = map(stored, (stage.key, *stage.victims))
            results.append(cell_rows(self.plan.matrix.name, name, stage.cell, fingerprint, outcome, victim, twin))
        return results

    def write(self, folder: Path, results: list[CellResult], *, whole: bool, used: Mapping[str, str]) -> bool:
        """Writes the files; True when rows.csv or curves.csv changed.

        Slices that end at the same time write one after the other, or one would merge into files that are out of date.

        Args:
            folder: where to.
            results: the cells that were run.
            whole: whether these are all cells of the matrix; otherwise they are merged with what is in the files.
            used: what they were computed with.
        """
        matrix = self.plan.matrix
        with held(self.store.root / "locks" / f"results-{digest(str(folder.resolve()))}"):
            if not whole:
                results = results + self._others(folder, {result.timing.cell for result in results})
            rows: list[Row] = [row for result in results for row in result.rows]
            curves: list[Curve] = [curve for result in results for curve in result.curves]
            timings: list[Timing] = [result.timing for result in results]
            if not whole:
                known = [cell.name for cell in self.plan.cells]
                rows, curves, timings = (
                    _merge(folder / "rows.csv", Row, rows, known),
                    _merge(folder / "curves.csv", Curve, curves, known),
                    _merge(folder / "timings.csv", Timing, timings, known),
                )
            changed = files.write(folder, rows, curves, timings)
            write_text(folder / "matrix.toml", matrix.settings)
            for name, _ in matrix.plugins:  # the settings beside them cannot be read without them
                write_bytes(folder / "plugins" / name, (matrix.path.parent / name).read_bytes())
            made = manifest(matrix, self.datasets, used)
            write_text(folder / "manifest.json", json.dumps(made, indent=2, sort_keys=True) + "\n")
            return changed

    def _others(self, folder: Path, mine: set[str]) -> list[CellResult]:
        """Cells outside a slice that have rows and are cached, from the store: this restores rows that were changed in the file."""
        if not (folder / "rows.csv").is_file():
            return []
        written = set(files.read(folder / "rows.csv", Row)["cell"]) - mine
        cells = [cell for cell in self.plan.cells if cell.name in written and self.plan.is_cached(cell, self.store)]
        return self.collect(cells, {})


def _merge(path: Path, kind: type[Any], new: list[Any], known: Sequence[str]) -> list[Any]:
    """The new rows and, from the file, those of other cells that the matrix still has, in matrix order."""
    if not path.is_file():
        return new
    fresh = {row.cell for row in new}
    table = files.read(path, kind)
    records: list[dict[str, Any]] = table.to_dict("records")  # type: ignore[assignment]
    old = [kind(**record) for record in records if record["cell"] in known and record["cell"] not in fresh]
    place = {cell: position for position, cell in enumerate(known)}
    return sorted([*new, *old], key=lambda row: place[row.cell])


def _used(executor: Executor, used: dict[str, str], folder: Path) -> dict[str, str]:
    """What the stages were computed with: this process's arithmetic, or that of the nodes; where nothing was computed, what the
    manifest has."""
    if executor == "local" or used:
        return used or arithmetic()
    with suppress(OSError, ValueError, KeyError, TypeError):
        written = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["arithmetic"]
        written = {"processor": "unknown", **written}  # manifests of earlier versions do not name it
        return {name: str(written[name]) for name in arithmetic()}
    return arithmetic()


def manifest(matrix: Matrix, datasets: Mapping[str, Dataset], used: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What is needed to get the same rows: settings, versions, data, and the arithmetic ``used`` (by default this process's).
    No dates, no host."""
    used = used or arithmetic()
    return {
        "matrix": matrix.name,
        "settings": settings_hash(matrix),
        "cells": len(matrix.cells),
        "datasets": {
            dataset.name: {"fingerprint": dataset.fingerprint, "train": len(dataset.train), "test": len(dataset.test)}
            for dataset in datasets.values()
        },
        "plugins": [{"file": name, "sha256": hashed} for name, hashed in matrix.plugins],
        "versions": versions(),
        "arithmetic": {**used, "threads": 1, "precision": _precision(matrix, used["device"]), "memory_format": "channels_last"},
    }


def _precision(matrix: Matrix, device: str) -> str:
    """What the recipes' precisions come to on ``device``, in words."""
    plain = ("reference", "tf32") if device == "cpu" else ("reference",)
    named = (scenario.recipe.precision for scenario in matrix.scenarios)
    return ", ".join(dict.fromkeys("float32" if precision in plain else precision for precision in named))
