"""One command: matrix -> stages -> rows -> tables, plots, report, tracking.

Issuing the same command again resumes: finished stages are read from the store, and files whose content stays the same are not
touched.
"""

from __future__ import annotations

import functools
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from benchmark.data.datasets import Dataset, load
from benchmark.run.keys import cell_key, extractor_key, victim_key
from benchmark.run.local import Stage, extractors_of, places, run_stages, victims_of
from benchmark.run.outcome import CellResult, cell_rows
from benchmark.run.progress import RunProgress, notes
from benchmark.settings.cells import Cell, Matrix, Scenario, settings_hash
from benchmark.storage import rows as files
from benchmark.storage.files import held, why, write_bytes, write_text
from benchmark.storage.machine import arithmetic, versions
from benchmark.storage.rows import Curve, Row, Timing
from benchmark.storage.store import Entry, Store
from models.spec import BadInput, canonical, digest, nearest

__all__ = ["Filter", "Outcome", "collect", "parse_only", "recompute", "run_matrix"]

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
    """``"attack=badnets|blended,seed=0"`` -> the values that each axis may have, by axis.

    Commas stand between axes, bars between values; all axes must agree. A label may hold either: what follows a comma without an
    axis of its own belongs to the value before it, and a value that a cell has as it stands is not split.

    Raises:
        BadInput: an unknown axis, one named twice, or a value no cell has, with the nearest right one.
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


@dataclass(frozen=True)
class Outcome:
    """What a run left: the three files' folder, and how the cells ended."""

    folder: Path
    results: list[CellResult]
    computed: int
    changed: bool
    """Whether rows.csv or curves.csv changed."""


def run_matrix(
    matrix: Matrix,
    *,
    results: Path,
    cache: Path,
    console: Console,
    only: str | None = None,
    processes: int | None = None,
    order: Callable[[list[Stage]], list[Stage]] | None = None,
    executor: Literal["local", "ray"] = "local",
    gpus: float | None = None,
) -> Outcome:
    """Runs what is missing and writes rows.csv, curves.csv, timings.csv, manifest.json and a copy of the matrix.

    Args:
        results: folder of results; the matrix gets a folder of its name in it.
        cache: the store, decoded images and tracking runs live here.
        only: see :func:`parse_only`; other cells that stand in rows.csv keep their rows.
        processes: how many stages run at once (default: one per core, or a few on a GPU); never changes a row.
        order: permutes the cells' order of execution (for tests); never changes a row.
        executor: where stages run: in processes of this machine, or on a Ray cluster; never changes a row.
        gpus: share of a GPU that a stage on the Ray cluster takes, in [0, 1] (default: see :func:`ray_executor.connected`).

    Raises:
        BadInput: see the message; everything already computed stays in the store.
        KeyboardInterrupt: somebody stopped it; the rows of the cells that stand are written first, as those of a slice are.
    """
    chosen = parse_only(matrix, only)
    if executor == "local" and gpus is not None:
        raise BadInput("--gpus is a stage's share of a GPU of a Ray cluster: it goes with --executor ray")
    folder = results / matrix.name
    _writable(folder)
    _writable(cache)
    store = Store(cache / "store", notes(console))
    cells = [cell for cell in matrix.cells if all(AXES[axis](cell) in values for axis, values in chosen.items())]
    datasets = _datasets(matrix, cache, console)
    used: dict[str, str] = {}
    try:
        work = _work(matrix, cells, store, datasets, order)
        failures = _execute(matrix, work, store, cache, console, processes=processes, executor=executor, gpus=gpus, used=used)
    except KeyboardInterrupt:
        stored = [cell for cell in cells if _stands(cell, store, datasets)]
        if stored:
            collected = collect(matrix, stored, store, datasets, {})
            _write(matrix, folder, collected, datasets, store, whole=False, used=_used(executor, used, folder))
        raise
    collected = collect(matrix, cells, store, datasets, failures)
    changed = _write(matrix, folder, collected, datasets, store, whole=not chosen, used=_used(executor, used, folder))
    return Outcome(folder, [result for result, _ in collected], sum(new for _, new in collected), changed)


def recompute(
    matrix: Matrix,
    cells: Sequence[Cell],
    *,
    store: Path,
    cache: Path,
    console: Console,
    expected: Mapping[str, str],
    processes: int | None = None,
) -> list[Row]:
    """Rows of some cells, computed in a store of their own and written nowhere (:mod:`benchmark.proof.verify` compares them).

    Args:
        store: folder of that store. cache: decoded images alone are taken from here.
        expected: fingerprint by data set's name.

    Raises:
        BadInput: a data set is not the one expected.
    """
    datasets = _datasets(matrix, cache, console)
    for dataset in datasets.values():
        if expected.get(dataset.name) != dataset.fingerprint:
            raise BadInput(
                f"data set {dataset.name!r}: its images are not those the rows were made with (fingerprint "
                f"{dataset.fingerprint[:12]} here, {expected.get(dataset.name, 'none')[:12]} there)"
            )
    own = Store(store)
    failures = _execute(matrix, _work(matrix, cells, own, datasets), own, cache, console, processes=processes)
    return [row for result, _ in collect(matrix, cells, own, datasets, failures) for row in result.rows]


def _stands(cell: Cell, store: Store, datasets: Mapping[str, Dataset]) -> bool:
    """Whether everything that the cell's rows are made of is stored, and sound."""
    fingerprint = datasets[canonical(cell.scenario.dataset)].fingerprint
    keys = [("victim", victim_key(scenario, fingerprint)) for scenario in (cell.scenario, cell.scenario.twin())]
    found = (store.read(stage, key, tensors=False) for stage, key in [("defended", cell_key(cell, fingerprint)), *keys])
    return all(entry is not None for entry in found)


def _writable(folder: Path) -> None:
    """Says at once, not after an hour, that a folder cannot be written."""
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
    """Every data set of the matrix, by its spec's canonical text; decoded here once, before any worker wants it."""
    found: dict[str, Dataset] = {}
    for scenario in matrix.scenarios:
        key = canonical(scenario.dataset)
        if key not in found:
            say = functools.partial(console.print, style="dim", highlight=False, markup=False)
            found[key] = load(scenario.dataset, cache, say)
    return found


@dataclass(frozen=True)
class _Work:
    """What is not stored.

    Attributes:
        stages: in an order in which one process can take them.
        keys: what each of them would store, by its kind and number.
        standing: how many cells are stored already.
        rounded: whether a victim of the cells is trained in bfloat16.
    """

    stages: list[Stage]
    keys: dict[tuple[str, int], str]
    standing: int
    rounded: bool

    def count(self, kind: str) -> int:
        return sum(stage.kind == kind for stage in self.stages)


def _work(
    matrix: Matrix,
    cells: Sequence[Cell],
    store: Store,
    datasets: Mapping[str, Dataset],
    order: Callable[[list[Stage]], list[Stage]] | None = None,
) -> _Work:
    """The stages that the rows of ``cells`` need and the store does not have; ``order`` permutes those of cells."""

    def print_of(scenario: Scenario) -> str:
        return datasets[canonical(scenario.dataset)].fingerprint

    numbers = {id(cell): number for number, cell in enumerate(matrix.cells)}
    wanted = {canonical(world.spec()) for cell in cells for world in (cell.scenario.twin(), cell.scenario)}
    todo_cells = [cell for cell in cells if store.read("defended", cell_key(cell, print_of(cell.scenario)), tensors=False) is None]
    extractors, every = extractors_of(matrix), victims_of(matrix)
    needed = {extractor_key(s.frozen.extractor, s, print_of(s)) for s in every if s.frozen and canonical(s.spec()) in wanted}
    for cell in todo_cells:
        needed |= {extractor_key(one, cell.scenario, print_of(cell.scenario)) for one in cell.extractors}
    stages: list[Stage] = []
    keys: dict[tuple[str, int], str] = {}
    place: dict[str, int] = {}

    def add(stage: Stage, key: str) -> None:
        place[key] = len(stages)
        keys[stage.kind, stage.number] = key
        stages.append(stage)

    def train_extractors(reads: str) -> None:
        for number, (extractor, scenario) in enumerate(extractors):
            key = extractor_key(extractor, scenario, print_of(scenario))
            if extractor.reads != reads or key not in needed or store.read("extractor", key, tensors=False) is not None:
                continue
            victim = victim_key(scenario, print_of(scenario))
            after = (place[victim],) if reads == "poisoned" and victim in place else ()
            of = f"{scenario.backbone_label} / seed {scenario.seed}" if reads == "clean" else _label(scenario)
            add(Stage("extractor", number, f"extractor {extractor.origin}: {of}", after), key)

    # What waits comes after what it waits for, so that one process can take the stages as they stand.
    train_extractors("clean")
    for number, scenario in enumerate(every):
        key = victim_key(scenario, print_of(scenario))
        if canonical(scenario.spec()) in wanted and store.read("victim", key, tensors=False) is None:
            given = extractor_key(scenario.frozen.extractor, scenario, print_of(scenario)) if scenario.frozen else ""
            twin = victim_key(scenario.twin(), print_of(scenario))  # each victim is compared with its twin
            after = tuple(place[before] for before in (given, twin) if before in place)
            add(Stage("victim", number, f"train {_label(scenario)}", after), key)
    train_extractors("poisoned")
    todo = []
    for cell in todo_cells:
        before = [extractor_key(one, cell.scenario, print_of(cell.scenario)) for one in cell.extractors]
        before.append(victim_key(cell.scenario, print_of(cell.scenario)))
        label = f"{cell.defense_label} ({cell.scope.value}) on {_label(cell.scenario)}"
        number = numbers[id(cell)]
        keys["cell", number] = cell_key(cell, print_of(cell.scenario))
        todo.append(Stage("cell", number, label, tuple(place[key] for key in before if key in place)))
    stages += order(todo) if order else todo
    rounded = any(s.recipe.precision == "bf16" and canonical(s.spec()) in wanted for s in every)
    return _Work(stages, keys, len(cells) - len(todo), rounded)


def _execute(
    matrix: Matrix,
    work: _Work,
    store: Store,
    cache: Path,
    console: Console,
    *,
    processes: int | None = None,
    executor: Literal["local", "ray"] = "local",
    gpus: float | None = None,
    used: dict[str, str] | None = None,
) -> dict[str, str]:
    """Runs the stages; returns the reasons of those that failed, by key. What the nodes of a cluster computed with is written into
    ``used``."""
    if not work.stages:
        return {}
    totals = {kind: work.count(kind) for kind in ("victim", "extractor", "cell")}

    def told(where: str) -> RunProgress:
        console.print(
            f"{matrix.name}: {totals['victim']} models and {totals['extractor']} extractors to train, {totals['cell']} defense "
            f"cells to run ({work.standing} already stand); {where}",
            highlight=False,
            markup=False,
        )
        return RunProgress(console, totals)

    if executor == "ray":
        from benchmark.run.on_ray import connected

        with connected(processes, gpus) as cluster, told(cluster.words) as progress:
            failed = cluster.run(work.stages, matrix, store.root, cache, progress, {} if used is None else used)
    else:
        count = min(processes or places(), len(work.stages))
        gpu = " and one GPU for all" if torch.cuda.is_available() else ""
        if work.rounded and not gpu:
            # Measured on forward, backward and step of ResNet-8 and VGG-11-BN at width 8, one thread with AVX2: 5 to 10.
            words = "bf16 without a GPU takes 5 to 10 times as long as float32 where the processor has no instructions for it"
            console.print(words, highlight=False, markup=False)
        with told(f"{count} process{'es' if count > 1 else ''}, one thread each{gpu}") as progress:
            failed = run_stages(work.stages, matrix.path, store.root, cache, progress, count)
    stopped = ((work.stages[failure.position], failure.reason) for failure in failed)
    return {work.keys[stage.kind, stage.number]: reason for stage, reason in stopped}


def _label(scenario: Scenario) -> str:
    return f"{scenario.backbone_label} / {scenario.attack_label} / seed {scenario.seed}"


def collect(
    matrix: Matrix, cells: Sequence[Cell], store: Store, datasets: Mapping[str, Dataset], failures: Mapping[str, str]
) -> list[tuple[CellResult, bool]]:
    """Rows of every cell, in matrix order, from the store; cells that failed outright become rows with their reason."""
    results = []
    outcomes: dict[str, Entry] = {}

    def stored(stage: str, key: str) -> Entry:
        if key not in outcomes:
            reason = failures.get(key, "interrupted before it ran")
            empty = {"status": "failed", "reason": reason, "candidates": [], "units": 0}
            costs = {"seconds": math.nan, "peak_mib": math.nan, "victim_seconds": math.nan}
            outcomes[key] = store.read(stage, key, tensors=False) or Entry({**empty, **costs}, {})
        return outcomes[key]

    for cell in cells:
        fingerprint = datasets[canonical(cell.scenario.dataset)].fingerprint
        key = cell_key(cell, fingerprint)
        entry = stored("defended", key)
        victim = stored("victim", victim_key(cell.scenario, fingerprint))
        twin = stored("victim", victim_key(cell.scenario.twin(), fingerprint))
        name = datasets[canonical(cell.scenario.dataset)].name
        results.append((cell_rows(matrix.name, name, cell, fingerprint, entry, victim, twin), key in failures))
    return results


def _write(
    matrix: Matrix,
    folder: Path,
    collected: Sequence[tuple[CellResult, bool]],
    datasets: Mapping[str, Dataset],
    store: Store,
    *,
    whole: bool,
    used: Mapping[str, str],
) -> bool:
    """Writes the files; slices that end at the same time do it one after the other, or one would merge into what is out of date."""
    with held(store.root / "locks" / f"results-{digest(str(folder.resolve()))}"):
        results = [result for result, _ in collected]
        if not whole:
            results += _others(matrix, folder, {result.timing.cell for result in results}, datasets, store)
        rows: list[Row] = [row for result in results for row in result.rows]
        curves: list[Curve] = [curve for result in results for curve in result.curves]
        timings: list[Timing] = [result.timing for result in results]
        if not whole:
            known = [cell_key(cell, datasets[canonical(cell.scenario.dataset)].fingerprint)[:12] for cell in matrix.cells]
            rows, curves, timings = (
                _merge(folder / "rows.csv", Row, rows, known),
                _merge(folder / "curves.csv", Curve, curves, known),
                _merge(folder / "timings.csv", Timing, timings, known),
            )
        changed = files.write(folder, rows, curves, timings)
        write_text(folder / "matrix.toml", matrix.settings)
        for name, _ in matrix.plugins:  # without them the settings beside them could not be read by anybody else
            write_bytes(folder / "plugins" / name, (matrix.path.parent / name).read_bytes())
        write_text(folder / "manifest.json", json.dumps(manifest(matrix, datasets, used), indent=2, sort_keys=True) + "\n")
        return changed


def _others(
    matrix: Matrix, folder: Path, mine: set[str], datasets: Mapping[str, Dataset], store: Store
) -> list[CellResult]:
    """Cells outside a slice that have rows and are stored, as stored: a digit that was changed in the file would stay there."""
    if not (folder / "rows.csv").is_file():
        return []
    written = set(files.read(folder / "rows.csv", Row)["cell"]) - mine
    named = ((cell, cell_key(cell, datasets[canonical(cell.scenario.dataset)].fingerprint)[:12]) for cell in matrix.cells)
    stored = [cell for cell, key in named if key in written and _stands(cell, store, datasets)]
    return [result for result, _ in collect(matrix, stored, store, datasets, {})]


def _merge(path: Path, kind: type[Any], new: list[Any], known: Sequence[str]) -> list[Any]:
    """New rows, and those in the file of other cells the matrix still has, in matrix order."""
    if not path.is_file():
        return new
    fresh = {row.cell for row in new}
    table = files.read(path, kind)
    records: list[dict[str, Any]] = table.to_dict("records")  # type: ignore[assignment]
    old = [kind(**record) for record in records if record["cell"] in known and record["cell"] not in fresh]
    place = {cell: position for position, cell in enumerate(known)}
    return sorted([*new, *old], key=lambda row: place[row.cell])


def _used(executor: Literal["local", "ray"], used: dict[str, str], folder: Path) -> dict[str, str]:
    """What the stages were computed with: this process's arithmetic, or that of the nodes; where they computed nothing, what the
    manifest says already."""
    if executor == "local" or used:
        return used or arithmetic()
    with suppress(OSError, ValueError, KeyError, TypeError):
        written = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["arithmetic"]
        written = {"processor": "unknown", **written}  # manifests of earlier versions do not name it
        return {name: str(written[name]) for name in arithmetic()}
    return arithmetic()


def manifest(matrix: Matrix, datasets: Mapping[str, Dataset], used: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What somebody needs to get the same rows: settings, versions, data, and the arithmetic ``used`` (by default this process's).
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
