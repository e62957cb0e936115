"""Weights & Biases, and nothing else: the only file that imports ``wandb``.

Every cell becomes a run (group = matrix, job type = defense, config = the cell's spec, summary = its rows, history = its dial
curve), and one more run holds the tables and the figures. Runs stay on this machine unless ``WANDB_MODE=online``; the
rows are complete without them, so an error of W&B is reported in one line and fails nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from benchmark.storage.files import write_text
from models.spec import BadInput, digest

__all__ = ["CellLog", "dashboard_command", "log_matrix"]

_MODES = {"": "offline", "offline": "offline", "dryrun": "offline", "online": "online", "run": "online", "disabled": "disabled"}
_PROJECT = "levelfield"
_THREADS = 4  # an online run waits for the server most of its time; offline, four hide the hand-over to W&B's own process
_TABLES = "leaderboard"
"""Key of the run that holds tables and figures."""
_RUN_FOLDER = re.compile(r"(?:offline-)?run-\d{8}_\d{6}-(.+)")
_SAVE_EVERY = 50  # runs between two notes of what is logged: at most so many are logged twice after a crash

_QUIET: dict[str, Any] = {
    "silent": True,
    "quiet": True,
    "show_warnings": False,
    "console": "off",
    "save_code": False,
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "symlink": False,
    "x_disable_stats": True,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_disable_viewer": True,
    "x_save_requirements": False,
}
"""What a run would otherwise record about the machine, at ten times the cost: 0.03 s a run with these, offline."""


@dataclass(frozen=True)
class CellLog:
    """One cell, as its run will hold it.

    Attributes:
        key: the cell's key, unique in the matrix. job_type: the defense. name: what the run list shows.
        config: the cell's spec and axes, JSON values.
        summary: its rows, each naming its ``selection``; the column ``asr`` of the row chosen by validation is logged as
            ``validation/asr``. A mapping is logged as it is, nesting flattened the same way.
        curve: its candidates in the order of the dial, one mapping each; every one is a step of ``curve/...`` (numbers only).
            The key ``dial``, if every candidate has it, is the axis.

    Values that are None or NaN were not measured and are left out; so are columns that only repeat the config.
    """

    key: str
    job_type: str
    name: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any] | Sequence[Mapping[str, Any]] = field(default_factory=dict)
    curve: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class _Run:
    """What one run will be: an identity that follows from its content, and how to fill it."""

    key: str
    id: str
    arguments: Mapping[str, Any]
    fill: Callable[[Any], None]


def log_matrix(
    matrix: str,
    cells: Iterable[CellLog],
    tables: Mapping[str, pd.DataFrame],
    figures: Sequence[Path],
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Logs what has not been logged yet and says so in one line for the console.

    Args:
        tables: by title, for the leaderboard run. figures: PNG files, for the same run.
        folder: home of the runs (``.cache/wandb``); they are in its subfolder ``wandb``, the list of logged runs in ``.logged``.
        progress: called with (runs done, runs to do) after each run, in the calling thread.

    A run whose content was logged before, to the same place, is not logged again: the same content gives the same run identity.
    """
    wanted = os.environ.get("WANDB_MODE", "").strip().lower()
    mode = _MODES.get(wanted)
    if mode is None:
        return f"W&B: skipped: WANDB_MODE={wanted!r} is none of online, offline, disabled"
    if mode == "disabled":
        return "W&B: skipped: WANDB_MODE=disabled"
    runs = [*(_cell_run(matrix, cell) for cell in cells), *_leaderboard_run(matrix, tables, figures)]
    record = folder / ".logged" / f"{matrix}.json"
    logged = _logged(record, folder)
    if not _missing(runs, logged, mode):
        return f"W&B: all {len(runs)} runs are logged already"
    try:
        import wandb  # 0.6 s: only when there is something to log
    except ImportError:
        return "W&B: skipped: wandb is not installed"
    session = _Session(wandb, mode, folder, record, logged)
    start = time.perf_counter()
    try:
        session.log(runs, progress)
    except (wandb.Error, OSError, RuntimeError, BadInput) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        session.hint = f", then: {why}; the same command logs the rest"
    finally:
        wandb.teardown()
        _remember(record, logged)
    if session.pending == 0:
        return f"W&B: all {len(runs)} runs are logged already{session.hint}"
    where = f"in {folder / 'wandb'}" if session.mode == "offline" else "at the W&B server"
    count = f"{session.done}" if session.done == session.pending else f"{session.done} of {session.pending}"
    return f"W&B: {count} runs logged {session.mode} {where} in {time.perf_counter() - start:.0f} s{session.hint}"


@dataclass
class _Session:
    """One call of :func:`log_matrix` that has something to log.

    Attributes:
        mode: ``online`` or ``offline``; an online session without a login becomes an offline one.
        hint: what the console line ends with.
        done: number of runs logged.
        pending: number of runs to log; None before they were counted.
    """

    wandb: Any
    mode: str
    folder: Path
    record: Path
    logged: dict[str, dict[str, str]]
    hint: str = ""
    done: int = 0
    pending: int | None = None

    def log(self, runs: Sequence[_Run], progress: Callable[[int, int], None] | None) -> None:
        """Logs the runs that are missing, and records each."""
        (self.folder / "wandb").mkdir(parents=True, exist_ok=True)
        self.wandb.setup(self.wandb.Settings(**_settings(self.wandb, self.mode)))
        if self.mode == "online" and not self.wandb.login(prompt=False):
            self.mode = "offline"
            self.hint = "; online was asked for, but this machine is not logged in: run `wandb login` first"
            self.wandb.teardown()
            self.wandb.setup(self.wandb.Settings(**_settings(self.wandb, self.mode)))
        missing = _missing(runs, self.logged, self.mode)
        self.pending = len(missing)
        place = self.logged.setdefault(_place(self.mode), {})
        for run in _log_all(self.wandb, missing, self.mode, self.folder):
            place[run.key] = run.id
            self.done += 1
            if self.done % _SAVE_EVERY == 0:
                _remember(self.record, self.logged)
            if progress is not None:
                progress(self.done, self.pending)


def dashboard_command(folder: Path, matrix: str | None = None) -> list[str]:
    """The command that opens W&B's terminal view on the runs of :func:`log_matrix`; it wants a terminal and no network.

    Args:
        matrix: show its present runs alone, grouped by defense (a run's name begins with it) under the tables and figures; without
            one, all runs ever logged here, the latest first.

    Raises:
        BadInput: nothing has been logged under ``folder``, or nothing of the matrix.
    """
    runs = folder / "wandb"
    if not any(runs.glob("*run-*/*.wandb")):
        raise BadInput(f"{runs}: no W&B runs here yet; run a matrix first (with wandb installed and WANDB_MODE not disabled)")
    return [sys.executable, "-m", "wandb", "leet", str(_by_defense(folder, matrix) if matrix else runs)]


def _by_defense(folder: Path, matrix: str) -> Path:
    """A folder of links to the present offline runs of a matrix.

    The view lists folders the latest first, then by name, and finds the file inside by the run's id behind the time. So all get one
    time, a made-up one, and the run with tables and figures a second more.
    """
    places = {match[1]: path for path in (folder / "wandb").iterdir() if (match := _RUN_FOLDER.fullmatch(path.name))}
    known = _logged(folder / ".logged" / f"{matrix}.json", folder).get("offline", {})
    wanted = {f"run-20000101_00000{int(key == _TABLES)}-{run}": places[run] for key, run in known.items() if run in places}
    if not wanted:
        raise BadInput(f"{folder}: no W&B runs of the matrix {matrix!r} here; run it first: make benchmark MATRIX={matrix}")
    view = folder / "by-defense" / matrix
    try:
        view.mkdir(parents=True, exist_ok=True)
        for link in view.iterdir():
            if link.is_symlink():
                link.unlink()
        for name, place in wanted.items():
            (view / name).symlink_to(place.resolve(), target_is_directory=True)
    except OSError as error:
        raise BadInput(f"{view}: cannot be written: {error}") from error
    return view


# -- what a run holds ----------------------------------------------------------------------------------------------------------


def _cell_run(matrix: str, cell: CellLog) -> _Run:
    config = {"matrix": matrix, "cell": cell.key, **_plain(cell.config)}
    rows = cell.summary
    by_selection = rows if isinstance(rows, Mapping) else {str(row["selection"]): _new(row, config) for row in rows}
    summary = dict(_flat(_plain(by_selection)))
    curve = [{name: value for name, value in _new(point, config).items() if not isinstance(value, str)} for point in cell.curve]

    def fill(run: Any) -> None:
        if curve:
            # Points are drawn along the dial, and the last one does not pose as the run's result.
            axis = {"step_metric": "curve/dial"} if all("dial" in point for point in curve) else {}
            names = sorted({name for point in curve for name in point})
            for metric in sorted(names, key=lambda name: name != "dial"):
                run.define_metric(f"curve/{metric}", summary="none", **({} if metric == "dial" else axis))
        for step, point in enumerate(curve):
            run.log({f"curve/{name}": value for name, value in point.items()}, step=step)
        run.summary.update(summary)

    identity = _identity(cell.name, [matrix, cell.key, cell.job_type, config, summary, curve])
    return _Run(cell.key, identity, _arguments(matrix, cell.job_type, cell.name, config), fill)


def _leaderboard_run(matrix: str, tables: Mapping[str, pd.DataFrame], figures: Sequence[Path]) -> Iterator[_Run]:
    if not tables and not figures:
        return
    config = {"matrix": matrix}
    content = {title: table.to_csv(index=False) for title, table in tables.items()}
    pictures = {figure.stem: hashlib.sha256(figure.read_bytes()).hexdigest() for figure in figures}

    def fill(run: Any) -> None:
        import wandb

        media: dict[str, Any] = {}
        for title, table in tables.items():
            cells: list[Any] = [[_plain(value) for value in row] for row in table.astype(object).to_numpy().tolist()]
            columns: list[Any] = [str(name) for name in table.columns]
            media[f"tables/{title}"] = wandb.Table(columns=columns, data=cells, allow_mixed_types=True)
        for figure in figures:
            media[f"figures/{figure.stem}"] = wandb.Image(str(figure), caption=figure.stem)
        run.log(media)

    name = f"{matrix} leaderboard"
    identity = _identity(name, [matrix, content, pictures])
    yield _Run(_TABLES, identity, _arguments(matrix, "leaderboard", name, config), fill)


def _arguments(matrix: str, job_type: str, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"group": matrix, "job_type": job_type, "name": name[:128], "config": dict(config)}


def _identity(name: str, content: object) -> str:
    """A readable run id that changes with the content; the run's folder ends in it."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:48]
    return f"{words}-{digest(content)[:12]}"


def _plain(value: Any) -> Any:
    """JSON values; None, NaN and what contains nothing else are dropped from mappings."""
    if isinstance(value, Mapping):
        pairs = {str(key): _plain(item) for key, item in value.items()}
        return {key: item for key, item in pairs.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def _new(row: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of ``row`` that the config does not hold already, as JSON values."""
    plain: dict[str, Any] = _plain(row)
    return {name: value for name, value in plain.items() if name != "selection" and config.get(name) != value}


def _flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


# -- logging -------------------------------------------------------------------------------------------------------------------


def _settings(wandb: Any, mode: str) -> dict[str, Any]:
    """Those of our settings this version of wandb knows."""
    return {"mode": mode, **{name: value for name, value in _QUIET.items() if name in wandb.Settings.model_fields}}


def _log_all(wandb: Any, runs: Sequence[_Run], mode: str, folder: Path) -> Iterator[_Run]:
    """Logs runs a few at a time and yields each when it is whole; the first failure cancels those not begun."""

    def log(run: _Run) -> _Run:
        settings = wandb.Settings(**_settings(wandb, mode))
        project = os.environ.get("WANDB_PROJECT") or _PROJECT
        live = wandb.init(
            project=project, id=run.id, dir=str(folder), mode=mode, reinit="create_new", settings=settings, **run.arguments
        )
        try:
            run.fill(live)
        finally:
            live.finish()
        return run

    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for future in as_completed([pool.submit(log, run) for run in runs]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _place(mode: str) -> str:
    """Where runs of this mode go: this machine, or a server's project."""
    if mode == "offline":
        return mode
    parts = [os.environ.get(name, "") for name in ("WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_PROJECT")]
    return " ".join([mode, *parts]).strip()


def _missing(runs: Sequence[_Run], logged: Mapping[str, Mapping[str, str]], mode: str) -> list[_Run]:
    known = logged.get(_place(mode), {})
    return [run for run in runs if known.get(run.key) != run.id]


def _logged(record: Path, folder: Path) -> dict[str, dict[str, str]]:
    """Run ids by cell key by place. A record that is missing, unreadable or about deleted runs counts as empty."""
    try:
        known = json.loads(record.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict) or not all(isinstance(runs, dict) for runs in known.values()):
        return {}
    if not (folder / "wandb").is_dir():
        known.pop("offline", None)
    return known


def _remember(record: Path, logged: Mapping[str, Mapping[str, str]]) -> None:
    """Notes what is logged; a disk that will not take the note costs a second logging, no more."""
    try:
        write_text(record, json.dumps(logged, indent=1, sort_keys=True) + "\n")
    except BadInput as error:
        sys.stderr.write(f"W&B: {error}\n")
