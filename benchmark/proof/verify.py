"""Proof for readers: random rows are computed again from the committed settings and compared.

Of earlier runs only the decoded images are used, and their content is checked. All models are trained anew in a temporary store. On
the machine type that made the rows (same versions, processor, instructions, device) every figure must be identical to the last
digit. Other machine types round differently, and training amplifies that as if the seed were another. There a share must lie within
the range of the committed seeds, widened by a tolerance; a limited share of the cells may lie beyond. Values that follow from a
choice (a dial, a number of pruned units) are not judged there.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy.stats import binomtest

from benchmark.analysis.stats import ENTRY, SCENARIO
from benchmark.proof.compare import points_apart
from benchmark.run.keys import cell_key
from benchmark.run.progress import notes
from benchmark.run.session import manifest as manifest_of
from benchmark.run.session import recompute
from benchmark.settings.cells import Cell, Matrix, settings_hash
from benchmark.settings.load import load_matrix
from benchmark.storage import rows as files
from benchmark.storage.rows import Row, Timing, text_of
from benchmark.storage.zoo import closed
from models.spec import BadInput, generator

__all__ = ["SHARES", "TOLERANCE", "Checked", "Verdict", "compare", "confirmed", "verify"]

TOLERANCE = 0.1
"""On another machine type: how far a share (0.1 = 10 points) may lie outside the range of the committed seeds."""
BEYOND = 0.25
"""On another machine type: the share of cells that may lie beyond it. Measured: 5 of 29 with other instructions of one processor,
115 of 546 on another processor (results/README.md, "Proof")."""
LEVEL = 0.05
"""Level of the binomial test that decides whether more cells lie beyond; one or two of a few cells are not significant."""
SHARES = ("acc", "asr", "ra", "der", "asr_recraft", "ra_recraft", "acc_undefended", "asr_undefended", "ra_undefended", "acc_benign",
          "asr_benign", "effect")  # fmt: skip
"""Columns that are compared between machine types."""
NAMED = ("matrix", "dataset", "backbone", "attack", "rate", "seed", "track", "scope", "defense", "cell", "selection", "target",
         "label_mode", "control", "used", "preset", "extractor", "features")  # fmt: skip
"""Columns that must be identical on every machine type."""
ABOUT = (*SCENARIO, *ENTRY, "track", "selection")
"""Columns that the rows of one entry share over its seeds."""
Verdict = Literal["identical", "within", "beyond", "differs"]


@dataclass(frozen=True)
class Checked:
    """One row, committed and computed again.

    Attributes:
        committed: the committed row.
        again: the same row, computed again.
        verdict: ``identical``; ``differs`` where it must not; ``within`` or ``beyond`` the tolerance of another machine type.
        differs: the columns that are not identical.
        distance: the largest distance of a share from the range of the seeds, in [0, 1]; infinite where one row lacks the share.
    """

    committed: Mapping[str, Any]
    again: Mapping[str, Any]
    verdict: Verdict
    differs: tuple[str, ...]
    distance: float


def compare(
    committed: Mapping[str, Any],
    again: Mapping[str, Any],
    *,
    exact: bool,
    seeds: Sequence[Mapping[str, Any]] = (),
    tolerance: float = TOLERANCE,
) -> Checked:
    """Compares two rows, given as mappings from the columns of :class:`Row` to values.

    Args:
        committed: the committed row.
        again: the row computed again.
        exact: whether both come from one machine type, so that the text of every column must be identical.
        seeds: otherwise, the committed rows of the same entry with other seeds; with ``committed`` they give the range.
        tolerance: how far a share may lie outside the range, in [0, 1]. A share that only one row has lies beyond.
    """
    differs = tuple(f.name for f in fields(Row) if text_of(committed[f.name]) != text_of(again[f.name]))
    distance = max(_outside(float(again[name]), float(committed[name]), [float(row[name]) for row in seeds]) for name in SHARES)
    if not differs:
        verdict: Verdict = "identical"
    elif exact or any(name in differs for name in NAMED):
        verdict = "differs"
    else:
        verdict = "beyond" if distance > tolerance else "within"
    return Checked(committed, again, verdict, differs, distance)


def _outside(value: float, own: float, others: Sequence[float]) -> float:
    """Distance of ``value`` from the range of ``own`` and ``others``; 0 inside, infinite where only one of value and own is NaN."""
    if math.isnan(value) or math.isnan(own):
        return 0.0 if math.isnan(value) and math.isnan(own) else math.inf
    known = [own, *(other for other in others if not math.isnan(other))]
    return max(min(known) - value, value - max(known), 0.0)


def confirmed(checked: Sequence[Checked]) -> bool:
    """Whether the computed rows confirm the committed ones: none differs, and not too many cells lie beyond."""
    beyond = {one.committed["cell"] for one in checked if one.verdict == "beyond"}
    cells = {one.committed["cell"] for one in checked}
    if any(one.verdict == "differs" for one in checked):
        return False
    return not beyond or float(binomtest(len(beyond), len(cells), BEYOND, alternative="greater").pvalue) >= LEVEL


def verify(
    folder: Path,
    *,
    sample: int,
    draw: int,
    cache: Path,
    console: Console,
    processes: int | None = None,
    tolerance: float = TOLERANCE,
) -> list[Checked]:
    """Checks that the files of ``folder`` agree, then computes the cells of random rows again and compares all their rows.

    Args:
        folder: ``results/<matrix>``: rows.csv, timings.csv, manifest.json, matrix.toml, and the plug-ins that it names.
        sample: number of rows drawn; 0 checks the files only, which needs no data.
        draw: seed of the draw.
        cache: folder of decoded images. Trained models are not kept.
        console: where the outcome is printed.
        processes: stages at once.
        tolerance: see :func:`compare`.

    Raises:
        BadInput: a file is missing or damaged; or settings, plug-ins, data or keys differ from those of the manifest and the rows.
    """
    made = _manifest(folder / "manifest.json")
    table = files.read(folder / "rows.csv", Row)
    with tempfile.TemporaryDirectory(prefix="levelfield-verify-") as temporary:
        matrix = _matrix(folder, Path(temporary), made, console)
        _keys(matrix, made, folder, set(table["cell"]))
        console.print(
            f"{folder}: settings, plug-ins and the keys of all {len(table)} rows agree with the manifest", highlight=False
        )
        if not sample or table.empty:
            return []
        picked = sorted(torch.randperm(len(table), generator=generator("verify", draw))[:sample].tolist())
        cells = list(dict.fromkeys(str(table["cell"].iloc[i]) for i in picked))
        exact = _same_machine(matrix, made, console)
        console.print(
            f"{len(picked)} rows drawn (--draw {draw}) from {len(cells)} cells{_cost(folder, cells)}", highlight=False
        )
        with closed():  # victims are trained, not read from the zoo
            again = recompute(
                matrix, cells, store=Path(temporary) / "store", cache=cache, console=console,
                processes=processes, expected={name: one["fingerprint"] for name, one in made["datasets"].items()},
            )  # fmt: skip
    found = {(row.cell, row.selection): {f.name: getattr(row, f.name) for f in fields(Row)} for row in again}
    old = table[table["cell"].isin(cells)].to_dict("records")
    checked = []
    for record in old:
        row = {str(name): value for name, value in record.items()}
        kin = table[(table[list(ABOUT)] == [row[name] for name in ABOUT]).all(axis=1)].to_dict("records")
        again_row = found[row["cell"], row["selection"]]
        checked.append(compare(row, again_row, exact=exact, seeds=kin, tolerance=tolerance))  # type: ignore[arg-type]
    _show(checked, exact, tolerance, console)
    return checked


def _manifest(path: Path) -> dict[str, Any]:
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in ("settings", "datasets", "plugins", "versions", "arithmetic") if name not in made]
        if missing:
            raise BadInput(f"{path}: {missing[0]!r} is missing")
        if not all(isinstance(one["fingerprint"], str) for one in made["datasets"].values()):
            raise BadInput(f"{path}: 'datasets' is not as a run writes it")
    except BadInput:
        raise
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise BadInput(f"{path}: not a run's manifest: {type(error).__name__}: {error}") from error
    return dict(made)


def _matrix(folder: Path, temporary: Path, made: Mapping[str, Any], console: Console) -> Matrix:
    """The committed matrix under its own name (its file is matrix.toml there); plug-ins are checked before they run."""
    settings = folder / "matrix.toml"
    if not settings.is_file():
        raise BadInput(f"{settings}: no such file; a run writes it beside its rows")
    path = temporary / f"{folder.resolve().name}.toml"
    shutil.copyfile(settings, path)
    for plugin in made["plugins"]:
        source = folder / "plugins" / plugin["file"]
        if not source.resolve().is_relative_to((folder / "plugins").resolve()):
            raise BadInput(f"{folder / 'manifest.json'}: plug-in {plugin['file']!r} lies outside the folder")
        if not source.is_file():
            raise BadInput(f"{source}: no such file; a run copies the plug-ins of its matrix there")
        if hashlib.sha256(source.read_bytes()).hexdigest() != plugin["sha256"]:
            raise BadInput(f"{source}: is not the file the rows were made with (its sha256 differs from the manifest's)")
        target = temporary / plugin["file"]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    matrix = load_matrix(path, notes(console))
    if settings_hash(matrix) != made["settings"]:
        raise BadInput(
            f"{settings}: its cells are not those of manifest.json: it was changed after the run, or another version of levelfield "
            "made the rows"
        )
    return matrix


def _keys(matrix: Matrix, made: Mapping[str, Any], folder: Path, rows: set[str]) -> dict[str, Cell]:
    """The cells of the matrix by their names in rows.csv, from the fingerprints of the manifest.

    Raises:
        BadInput: rows.csv has a cell that is not in the settings.
    """
    prints = [one["fingerprint"] for one in made["datasets"].values()]
    named = {cell_key(cell, fingerprint)[:12]: cell for fingerprint in prints for cell in matrix.cells}
    odd = sorted(rows - set(named))
    if odd:
        raise BadInput(
            f"{folder / 'rows.csv'}: cell {odd[0]!r} ({len(odd)} in all) does not follow from matrix.toml and manifest.json"
        )
    return named


def _same_machine(matrix: Matrix, made: Mapping[str, Any], console: Console) -> bool:
    """Whether this is the machine type that made the rows; prints the differences."""
    here = manifest_of(matrix, {})
    differs = [
        f"{name} {made[part].get(name)!r} there, {here[part].get(name)!r} here"
        for part in ("arithmetic", "versions")
        for name in sorted(set(made[part]) | set(here[part]))
        if made[part].get(name) != here[part].get(name)
    ]
    if differs:
        console.print(f"another machine type than the rows': {'; '.join(differs)}", highlight=False, markup=False)
    return not differs


def _cost(folder: Path, cells: Sequence[str]) -> str:
    """The recorded computing time of cells, as a phrase; empty without timings."""
    try:
        timings = files.read(folder / "timings.csv", Timing)
    except BadInput:
        return ""
    mine = timings[timings["cell"].isin(cells)]
    seconds = mine["seconds"].sum() + mine.drop_duplicates(["dataset", "backbone", "attack", "seed"])["victim_seconds"].sum()
    return f"; where they were made their defenses and attacked models took {seconds:.0f} s of one core"


def _show(checked: Sequence[Checked], exact: bool, tolerance: float, console: Console) -> None:
    table = Table("row", "ACC", "again", "ASR", "again", "verdict")
    for one in checked:
        row = one.committed
        words = {"within": "within", "beyond": f"BEYOND by {100 * one.distance:.0f}", "identical": "identical"}
        verdict = words.get(one.verdict, f"DIFFERS: {', '.join(one.differs[:4])}{' ...' if len(one.differs) > 4 else ''}")
        table.add_row(
            escape(" / ".join(str(row[name]) for name in ("defense", "scope", "attack", "backbone", "seed", "selection"))),
            *(_percent(float(source[name])) for name in ("acc", "asr") for source in (row, one.again)), verdict,
        )  # fmt: skip
    console.print(table)
    count = {verdict: sum(one.verdict == verdict for one in checked) for verdict in ("identical", "within", "beyond", "differs")}
    if exact:
        console.print(f"{len(checked)} rows, same machine type: {count['identical']} identical, {count['differs']} differ")
        return
    cells = len({one.committed["cell"] for one in checked})
    beyond = len({one.committed["cell"] for one in checked if one.verdict == "beyond"})
    console.print(
        f"{len(checked)} rows, another machine type: {count['identical']} identical, {count['within']} within {100 * tolerance:g} "
        f"points of the committed seeds, {count['beyond']} beyond, {count['differs']} differ in columns that must be identical\n"
        f"{beyond} of {cells} cells beyond; {100 * BEYOND:g} % may be",
        highlight=False,
    )
    _moved(checked, console)


def _moved(checked: Sequence[Checked], console: Console) -> None:
    """Prints the differences in ACC and ASR between both versions of the rows."""
    for name in ("acc", "asr"):
        apart = points_apart([float(one.committed[name]) for one in checked], [float(one.again[name]) for one in checked])
        if len(apart):
            half, most = np.quantile(apart, (0.5, 0.9))
            console.print(
                f"{name.upper()}: {half:.1f} points apart in the median row, at most {most:.1f} in nine of ten, "
                f"at most {apart.max():.1f} in any",
                highlight=False,
            )


def _percent(share: float) -> str:
    return "" if math.isnan(share) else f"{100 * share:.1f}"
