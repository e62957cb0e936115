"""Rows are data; everything people look at is a function of them.

Five files a matrix, in matrix order. On one machine type they are byte-identical however often they are made, but for the last:

========================  ==========================================================================================
``scenarios.csv``         one line per scenario: data set, backbone, attack, seed, the undefended model and its twin
``cells.csv``             one line per cell: its scenario, the defense and what it was given
``rows.csv``              one line per cell and selection
``curves.csv``            one line per candidate of a cell
``timings.csv``           one line per cell: seconds and memory, which are never the same twice
========================  ==========================================================================================

:func:`read` joins them: a row, a curve or a timing comes with the columns of its cell and of its scenario.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from benchmark.storage.files import write_text
from models.spec import BadInput

__all__ = ["FILES", "Curve", "Key", "Row", "Timing", "frame", "read", "text_of", "write"]

FILES = ("scenarios.csv", "cells.csv", "rows.csv", "curves.csv", "timings.csv")
"""The files of a matrix. Those before the last repeat byte for byte."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """What a row is about. ``attack`` and ``defense`` are labels of the matrix, unique in it."""

    matrix: str
    dataset: str
    backbone: str
    attack: str
    rate: float
    """Nominal poisoning rate, share of the training set."""
    seed: int
    track: str
    scope: str
    """``head`` or ``whole``: which weights the defense might edit."""
    defense: str
    cell: str
    """First 12 hex digits of the cell's key: joins the files and the store."""


@dataclass(frozen=True, kw_only=True)
class Row(Key):
    """One cell under one selection. Shares are in [0, 1]; NaN (empty in the file) = not measured."""

    target: int
    label_mode: str
    realised_rate: float
    control: bool
    selection: str
    """``default`` | ``validation`` | ``strongest`` | ``canary`` | ``oracle`` | ``leaky`` (:mod:`benchmark.rules.selection`)."""
    status: str
    """``ok`` | ``refused`` | ``failed``."""
    reason: str = ""
    acc: float = math.nan
    asr: float = math.nan
    ra: float = math.nan
    der: float = math.nan
    asr_recraft: float = math.nan
    """ASR with the trigger crafted again on this very model, where the trigger needs the model; ``asr`` is then the *frozen*
    protocol's, crafted once on the undefended model."""
    ra_recraft: float = math.nan
    acc_undefended: float = math.nan
    asr_undefended: float = math.nan
    ra_undefended: float = math.nan
    acc_benign: float = math.nan
    """ACC of the benign twin: same dataset, backbone, recipe and seed, no attack."""
    asr_benign: float = math.nan
    """ASR of the benign twin on the same triggered images: what the trigger does without any poison."""
    effect: float = math.nan
    """``asr_undefended - asr_benign``: the part of the ASR that the poison explains."""
    acc_loss: float = math.nan
    """``acc_benign - acc_undefended``: what the attack costs, paired over the test images."""
    acc_loss_se: float = math.nan
    """Its standard error over the test images."""
    implanted: bool = False
    """The gate on this seed alone; rankings take the mean over a scenario's seeds (:func:`benchmark.analysis.stats.scenarios`)."""
    gate: str = ""
    """The attack-validity gate in words."""
    literature: str = ""
    """``PASS`` | ``WARN`` | ``FAIL`` against the published undefended figure, or ``no reference``."""
    acc_literature: float = math.nan
    asr_literature: float = math.nan
    knob: float = math.nan
    """Setting of the defense's second knob, where it has one."""
    dial: float = math.nan
    kept: bool = False
    """Whether the untouched model was chosen."""
    mark: str = ""
    """``no change`` (the chosen model is the attacked one, weight by weight), ``mechanism failed`` (what it took for poisoned is no
    more poisoned than the training set) or empty."""
    pruned: int = 0
    units: int = 0
    """Prunable units of the chosen model within the scope."""
    val_acc: float = math.nan
    """Accuracy on the validation part of the clean budget."""
    val_loss: float = math.nan
    """Accuracy lost on these images against the undefended model, image by image."""
    val_loss_se: float = math.nan
    """Its standard error."""
    samples_forward: int = 0
    samples_backward: int = 0
    cost_epochs: float = math.nan
    """Standard-epoch equivalents: 1 = forward and backward over the attacker's training set."""
    isolated: int = 0
    """Training samples the defense took for poisoned."""
    precision: float = math.nan
    """Share of these that are poisoned."""
    recall: float = math.nan
    """Share of the poisoned samples that are among them."""
    auroc: float = math.nan
    """Area under the ROC curve of the order in which the defense suspects training samples; of the isolated set itself (the mean of
    recall and the share of clean samples left) where it gives no order."""
    used: str = ""
    """What the defense took from its view, e.g. ``model + clean``."""
    clean_images: int = 0
    """Clean labelled images it used, those for validation included."""
    train_images: int = 0
    """Images of the published training set it used, labels as given."""
    trained_anew: bool = False
    """Whether it trained a network of its own from the public architecture (``model`` not edited but replaced)."""
    extractor: str = ""
    """Extractor it used, with its origin."""
    extractor_epochs: float = math.nan
    """The extractor's share of ``cost_epochs``."""
    features: str = ""
    """Of a victim on given features: the extractor and its origin. Empty = trained end to end."""
    preset: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Curve(Key):
    """One candidate of a cell, along its dial."""

    dial_name: str
    knob: float = math.nan
    dial: float
    is_default: bool
    kept: bool = False
    """The untouched model, which the benchmark adds to every post-training defense."""
    strength: float
    pruned: int
    acc: float
    asr: float
    ra: float
    val_acc: float
    val_loss: float = math.nan
    val_loss_se: float = math.nan
    canary_asr: float = math.nan
    """ASR of the canaries after this setting was applied to their copies, mean over canaries."""
    canary_loss: float = math.nan
    """The largest loss of validation accuracy among these copies, against the copy before the defense."""


@dataclass(frozen=True, kw_only=True)
class Timing(Key):
    """Seconds and memory of a cell's defense and of its victim. NaN (empty in the file) = not measured."""

    seconds: float
    """Wall seconds of the defense, its scoring by the benchmark not counted."""
    peak_mib: float
    """Peak resident memory of the stage, MiB."""
    victim_seconds: float
    """Wall seconds the victim took to craft, train and score."""
    gpu_mib: float = math.nan
    """Peak memory the stage allocated on the GPU, MiB; empty where there was none."""
    victim_peak_mib: float = math.nan
    """``peak_mib`` and ``gpu_mib`` of the victim's stage."""
    victim_gpu_mib: float = math.nan


SCENARIO = (
    "matrix", "dataset", "backbone", "attack", "rate", "seed", "target", "label_mode", "realised_rate", "acc_undefended",
    "asr_undefended", "ra_undefended", "acc_benign", "asr_benign", "effect", "acc_loss", "acc_loss_se", "implanted", "gate",
    "literature", "acc_literature", "asr_literature", "features",
)  # fmt: skip
"""Columns of ``scenarios.csv``: what all cells of a scenario share."""
CELL = (
    "track", "scope", "defense", "control", "preset", "used", "clean_images", "train_images", "trained_anew", "extractor",
    "extractor_epochs", "dial_name",
)  # fmt: skip
"""Columns of ``cells.csv``: what all rows and candidates of a cell share."""
LATER = ("auroc",)
"""Columns that files of an earlier version lack: read as not measured, so that a run goes on in an older folder of results."""
TYPES: Mapping[str, str] = {"scenario": "str", **{f.name: str(f.type) for kind in (Row, Curve, Timing) for f in fields(kind)}}

T = TypeVar("T", Row, Curve, Timing)


def text_of(value: Any) -> str:
    """Floats to 6 decimals without trailing zeros, NaN as nothing, booleans as true/false: one value, one text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6f}".rstrip("0").rstrip(".")
    return str(value)


def frame(rows: Sequence[T]) -> pd.DataFrame:
    """Rows as a table, exactly as reading the written files would give them."""
    return pd.DataFrame([asdict(row) for row in rows])


# -- writing -------------------------------------------------------------------------------------------------------------------


def write(folder: Path, rows: Sequence[Row], curves: Sequence[Curve], timings: Sequence[Timing]) -> bool:
    """Writes the files of a matrix into ``folder``, each whole or not at all.

    A process that is killed between two files leaves files that :func:`read` can still join: the scenarios and cells of the old
    and the new rows are written first, and those of the old rows are removed last.

    Returns:
        Whether the content of a file other than timings.csv changed.

    Raises:
        BadInput: the folder cannot be written.
        ValueError: a curve or a timing of a cell that has no row.
    """
    scenarios, cells = _keys(rows, curves)
    known = {line[0] for line in cells}
    stray = next((one for one in (*curves, *timings) if one.cell not in known), None)
    if stray is not None:
        raise ValueError(f"cell {stray.cell} has a {type(stray).__name__.lower()} and no row")
    keys = {"scenarios.csv": (_header("scenario", SCENARIO), scenarios), "cells.csv": (_header("cell", ("scenario", *CELL)), cells)}
    before = {name: _bytes(folder / name) for name in FILES}
    for name, (header, lines) in keys.items():
        if before[name] is not None:
            new = {line[0] for line in lines}
            write_text(folder / name, _text(header, [*lines, *(line for line in _lines(folder / name) if line[0] not in new)]))
    for name, kind, records in (("rows.csv", Row, rows), ("curves.csv", Curve, curves), ("timings.csv", Timing, timings)):
        header = _own(kind)
        write_text(folder / name, _text(header, ([text_of(getattr(one, column)) for column in header] for one in records)))
    for name, (header, lines) in keys.items():
        write_text(folder / name, _text(header, lines))
    return any(_bytes(folder / name) != before[name] for name in FILES[:-1])


def _keys(rows: Sequence[Row], curves: Sequence[Curve]) -> tuple[list[list[str]], list[list[str]]]:
    """Lines of scenarios.csv and of cells.csv. A scenario is named by a hash of its line, so that equal lines are one."""
    dials = {curve.cell: curve.dial_name for curve in curves}
    scenarios: dict[str, list[str]] = {}
    cells: dict[str, list[str]] = {}
    for row in rows:
        line = [text_of(getattr(row, column)) for column in SCENARIO]
        name = hashlib.sha256("\0".join(line).encode()).hexdigest()[:8]
        scenarios[name] = [name, *line]
        own = [dials.get(row.cell, "") if column == "dial_name" else text_of(getattr(row, column)) for column in CELL]
        cells[row.cell] = [row.cell, name, *own]
    return list(scenarios.values()), list(cells.values())


def _own(kind: type[Key]) -> tuple[str, ...]:
    """Columns of a kind that its own file holds: the cell's name and what is neither the cell's nor the scenario's."""
    return _header("cell", (f.name for f in fields(kind) if f.name not in (*SCENARIO, *CELL)))


def _header(key: str, columns: Iterable[str]) -> tuple[str, ...]:
    return (key, *(column for column in columns if column != key))


def _text(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return out.getvalue()


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _lines(path: Path) -> Iterator[list[str]]:
    """Lines of a file that is about to be replaced, without its header; none where it is not readable as CSV."""
    try:
        with path.open(newline="", encoding="utf-8") as handle:
            yield from [line for line in list(csv.reader(handle))[1:] if line]
    except (OSError, ValueError, csv.Error):
        return


# -- reading -------------------------------------------------------------------------------------------------------------------


def read(path: Path, kind: type[T]) -> pd.DataFrame:
    """A written file, joined with the cells and the scenarios beside it: a table with the columns of ``kind``, in its order.

    Raises:
        BadInput: a file is missing, is not CSV, or lacks a column (named); a cell or a scenario is missing or there twice.
    """
    own = _table(path, _own(kind))
    cells = _table(path.with_name("cells.csv"), _header("cell", ("scenario", *CELL)))
    scenarios = _table(path.with_name("scenarios.csv"), _header("scenario", SCENARIO))
    of_cell = _joined(own, cells, "cell", path)
    of_scenario = _joined(of_cell, scenarios, "scenario", path.with_name("cells.csv"))
    whole = pd.concat([own, of_cell.drop(columns="cell"), of_scenario.drop(columns="scenario")], axis=1)
    return whole[[f.name for f in fields(kind)]]


def _joined(table: pd.DataFrame, keys: pd.DataFrame, key: str, path: Path) -> pd.DataFrame:
    """The line of ``keys`` that each line of ``table`` names, in the order of ``table``."""
    beside = path.with_name(f"{key}s.csv")
    index = pd.Index(keys[key])
    if not index.is_unique:
        raise BadInput(f"{beside}: {key} {index[index.duplicated()][0]!r} is there twice")
    places = index.get_indexer(pd.Index(table[key]))
    if (places < 0).any():
        raise BadInput(f"{path}: {key} {table[key][places < 0].iloc[0]!r} is not in {beside.name}")
    return keys.take(places).reset_index(drop=True)


def _table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """One file as a table with (at least) ``columns``."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file; run the matrix first")
    wanted = {name: TYPES[name] for name in columns}
    numbers = {"int": "int64", "float": "float64"}
    types: dict[Any, Any] = {name: numbers.get(text, "str") for name, text in wanted.items()}
    # Only numbers may be missing: a defense called "nan" is a name.
    missing_as: dict[Any, Any] = {name: [""] for name, text in wanted.items() if text == "float"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # a row longer than the header
            warnings.simplefilter("error", RuntimeWarning)  # no whole number is infinite
            header = pd.read_csv(path, nrows=0, index_col=False)
            missing = [name for name in wanted if name not in (*header.columns, *LATER)]
            if missing:
                raise BadInput(f"{path}: column {missing[0]!r} is missing")
            table = pd.read_csv(path, dtype=types, keep_default_na=False, na_values=missing_as, index_col=False)
    except BadInput:
        raise
    except pd.errors.ParserWarning as error:
        raise BadInput(f"{path}: not a rows file: a row is longer than the header") from error
    except (ValueError, TypeError, OverflowError, OSError, RuntimeWarning) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{path}: not a rows file: {reason}") from error
    table = table.assign(**{name: math.nan for name in wanted if name not in table.columns})
    for name, text in wanted.items():
        if text not in numbers and table[name].isna().any():
            raise BadInput(f"{path}: not a rows file: a row ends before its column {name!r}")
        if text == "bool":
            odd = table[name][~table[name].isin(["true", "false"])]
            if len(odd):
                raise BadInput(f"{path}: not a rows file: {name} = {str(odd.iloc[0])!r} is neither true nor false")
            table[name] = table[name] == "true"
    return table[list(wanted)]
