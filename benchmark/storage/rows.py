"""Rows are data; everything people look at is a function of them.

Three files a matrix, sorted in matrix order, byte-identical however often and wherever on one machine type they are made:
``rows.csv`` (one row per cell and selection), ``curves.csv`` (one row per candidate of a cell) and, apart because seconds are
never the same twice, ``timings.csv``.
"""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from benchmark.storage.files import write_text
from models.spec import BadInput

__all__ = ["Curve", "Key", "Row", "Timing", "frame", "read", "text_of", "write"]


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
    """First 12 hex digits of the cell's key: joins the three files and the store."""


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
    """The gate on this seed alone; rankings take the mean over the seeds of a scenario (:func:`benchmark.analysis.stats.scenarios`)."""
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


T = TypeVar("T", Row, Curve, Timing)


def text_of(value: Any) -> str:
    """Floats to 6 decimals without trailing zeros, NaN as nothing, booleans as true/false: one value, one text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6f}".rstrip("0").rstrip(".")
    return str(value)


def write(path: Path, kind: type[T], rows: Iterable[T]) -> bool:
    """Writes rows as CSV, whole or not at all; True when the file's content changed."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([f.name for f in fields(kind)])
    for row in rows:
        writer.writerow([text_of(value) for value in asdict(row).values()])
    return write_text(path, out.getvalue())


def frame(rows: Sequence[T]) -> pd.DataFrame:
    """Rows as a table, exactly as reading the written file would give them."""
    return pd.DataFrame([asdict(row) for row in rows])


def read(path: Path, kind: type[T]) -> pd.DataFrame:
    """A written file as a table with the columns of ``kind``.

    Raises:
        BadInput: the file is missing, is not CSV, or lacks a column (named).
    """
    if not path.is_file():
        raise BadInput(f"{path}: no such file; run the matrix first")
    wanted = {f.name: str(f.type) for f in fields(kind)}
    numbers = {"int": "int64", "float": "float64"}
    types: dict[Any, Any] = {name: numbers.get(text, "str") for name, text in wanted.items()}
    # Only numbers may be missing: a defense called "nan" is a name.
    missing_as: dict[Any, Any] = {name: [""] for name, text in wanted.items() if text == "float"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # a row longer than the header
            warnings.simplefilter("error", RuntimeWarning)  # no whole number is infinite
            header = pd.read_csv(path, nrows=0, index_col=False)
            missing = [name for name in wanted if name not in header.columns]
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
    for name, text in wanted.items():
        if text not in numbers and table[name].isna().any():
            raise BadInput(f"{path}: not a rows file: a row ends before its column {name!r}")
        if text == "bool":
            odd = table[name][~table[name].isin(["true", "false"])]
            if len(odd):
                raise BadInput(f"{path}: not a rows file: {name} = {str(odd.iloc[0])!r} is neither true nor false")
            table[name] = table[name] == "true"
    return table
