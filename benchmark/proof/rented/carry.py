"""Packs what a rented machine without a network needs, in parts that a limited transfer can hold; joins the parts there; what is
carried back.

Two archives are packed. ``code``: the checkout, the rows so far and the wheels that are missing there; ``images``: the files of the
data set. Each is cut into parts, with their sha256 in ``SHA256SUMS``. Each folder ``transfer-1``, ``transfer-2`` ... holds one
transfer.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch

from benchmark.data.sources import VARIABLE, on_disk
from benchmark.proof.processes import ROOT
from benchmark.run.plan import Plan
from benchmark.settings.cells import Matrix
from benchmark.settings.load import FOLDER
from benchmark.storage.files import write_bytes, write_text
from benchmark.storage.rows import FILES
from benchmark.storage.store import Store
from models.spec import BadInput
from models.weights import halved

__all__ = [
    "CODE", "IMAGES", "LIMIT", "MIB", "SUMS", "Part", "Wheels", "cut", "deliver", "joined", "pack", "pins", "unpacked", "victims",
    "wheels",
]  # fmt: skip

MIB = 2**20
LIMIT = 60
"""MiB of a transfer: a transfer of 64 MiB with room for its own wrapping."""
CODE, IMAGES = "code.tar.gz", "images.tar"
SUMS = "SHA256SUMS"
"""Name and hash of every part, as ``sha256sum --check`` reads them; in the first transfer."""
ROWS = (*FILES, "manifest.json")
MISSING = ("pydantic", "pydantic_core", "annotated-types", "typing-inspection", "typing_extensions")
"""What the benchmark needs beside torch, Lightning and the scientific stack: pydantic and its dependencies."""
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_17_x86_64")
GO = """#!/usr/bin/env bash
# Unpacks what was carried and runs the matrix {name} for some minutes: bash go.sh --minutes 14 --out OUT
set -eu -o pipefail
begun=$(date +%s)
caller=$PWD
cd "$(dirname "${{BASH_SOURCE[0]}}")/.."
packed=$PWD
python=${{PYTHON:-python3}}
grep '/code[.]' transfer-1/SHA256SUMS | sha256sum --check --quiet --strict || {{
  echo "error: carry the parts named above again" >&2; exit 2; }}
mkdir -p work
rm -rf work/checkout work/wheels work/site
cat $(grep -o 'transfer-[0-9]*/code[.].*' transfer-1/SHA256SUMS) | tar -xz -C work
if ! "$python" -c 'import pydantic' 2>/dev/null; then
  for wheel in work/wheels/*.whl; do [ ! -e "$wheel" ] || "$python" -m zipfile -e "$wheel" work/site; done
fi
export PYTHONPATH="$packed/work/checkout:$packed/work/site${{PYTHONPATH:+:$PYTHONPATH}}"
"$python" -c 'import pydantic' || {{
  echo "error: no wheels of pydantic for $("$python" --version) were carried: pack again with --python, or --wheels FOLDER" >&2
  exit 2; }}
cd work/checkout
exec "$python" -m benchmark.proof.rented go --matrix '{matrix}' --packed "$packed" --caller "$caller" --begun "$begun" "$@"
"""


@dataclass(frozen=True)
class Part:
    """A part of an archive.

    Attributes:
        path: relative to the pack, e.g. ``transfer-1/code.tar.gz.000``.
        size: bytes.
        sha256: in hex.
    """

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Wheels:
    """Where the missing packages come from.

    Attributes:
        python: version of the rented machine's Python, e.g. ``3.12``.
        folder: wheels that were brought; None = they are downloaded by pip.
    """

    python: str = "3.12"
    folder: Path | None = None


# -- parts ---------------------------------------------------------------------------------------------------------------------


def cut(archive: Path, limit: int) -> list[Path]:
    """Cuts a file into ``NAME.000``, ``NAME.001`` ... of at most ``limit`` bytes beside it, and removes it."""
    parts: list[Path] = []
    with archive.open("rb") as source:
        while content := source.read(limit):
            parts.append(archive.with_name(f"{archive.name}.{len(parts):03}"))
            parts[-1].write_bytes(content)
    archive.unlink()
    return parts


def _sums(packed: Path) -> dict[str, str]:
    """The sha256 of every part by its path.

    Raises:
        BadInput: there is no list of parts, or a line of it is not one of :func:`pack`.
    """
    path = packed / "transfer-1" / SUMS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error
    found = {}
    for line in lines:
        parsed = re.fullmatch(r"([0-9a-f]{64})  (transfer-\d+/[\w.]+\.\d{3})", line)
        if parsed is None:
            raise BadInput(f"{path}: {line!r} is not a hash and a part; carry it again")
        found[parsed[2]] = parsed[1]
    return found


def joined(packed: Path, name: str, target: Path) -> bool:
    """Joins the parts of the archive ``name`` into the file ``target``; False where the pack has no such archive.

    Raises:
        BadInput: a part is missing or damaged; it is named.
    """
    mine = {path: sha for path, sha in _sums(packed).items() if Path(path).stem == name}
    with target.open("wb") as out:
        for path, sha in sorted(mine.items(), key=lambda item: Path(item[0]).name):
            try:
                content = (packed / path).read_bytes()
            except OSError as error:
                raise BadInput(f"{packed / path}: cannot be read: {error.strerror or error}; carry this part, too") from error
            if hashlib.sha256(content).hexdigest() != sha:
                raise BadInput(f"{packed / path}: damaged: its sha256 is not the one in {SUMS}; carry this part again")
            out.write(content)
    return bool(mine)


def unpacked(packed: Path, name: str, folder: Path) -> bool:
    """Joins the parts of a tar archive and unpacks it into ``folder``, once; False where the pack has no such archive.

    Raises:
        BadInput: a part is missing or damaged; it is named.
    """
    if folder.is_dir():
        return True
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        archive, whole = Path(temporary) / name, Path(temporary) / "whole"
        if not joined(packed, name, archive):
            return False
        with tarfile.open(archive) as tar:
            tar.extractall(whole, filter="data")
        whole.rename(folder)
    return True


# -- packing -------------------------------------------------------------------------------------------------------------------


def _checkout(root: Path) -> list[str]:
    """The files of the checkout that git does not ignore, without ``results/``.

    Raises:
        BadInput: it is no git checkout.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BadInput(f"{root}: git cannot list its files; pack from a git checkout ({error})") from error
    names = sorted({name for name in done.stdout.split("\0") if name and not name.startswith("results/")})
    return [name for name in names if (root / name).is_file()]


def _rows(matrix: str, root: Path) -> Path | None:
    """The folder with rows of the matrix: your run's, otherwise the committed ones."""
    folders = [root / place / matrix for place in ("runs", "results")]
    return next((folder for folder in folders if (folder / "rows.csv").is_file()), None)


def pins(constraints: str) -> list[str]:
    """``name==version`` of the missing packages, as the text of constraints.txt has them."""
    lines = {line.partition("==")[0]: line.strip() for line in constraints.splitlines() if "==" in line}
    plain = {name.lower().replace("_", "-"): line for name, line in lines.items()}
    return [plain[name.lower().replace("_", "-")] for name in MISSING]


def wheels(wanted: Wheels, folder: Path, root: Path = ROOT) -> str:
    """Puts the wheels of the missing packages into ``folder``; empty text, or what must be brought where they cannot be had."""
    folder.mkdir(parents=True, exist_ok=True)
    if wanted.folder is not None:
        for wheel in sorted(wanted.folder.glob("*.whl")):
            shutil.copy(wheel, folder)
        return "" if any(folder.iterdir()) else f"{wanted.folder} holds no wheel, and none is packed"
    names = pins((root / "constraints.txt").read_text(encoding="utf-8"))
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:",
        "--python-version", wanted.python, "--implementation", "cp", *(f"--platform={one}" for one in PLATFORMS),
        "--dest", str(folder), *names,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return (
        f"no wheels are packed ({reason}); where the rented machine has no pydantic, bring those of {', '.join(names)} for "
        f"Python {wanted.python} on Linux x86-64 in a folder, and pack again with --wheels FOLDER"
    )


def _code(matrix: Matrix, checkout: Sequence[str], staging: Path, wanted: Wheels | None) -> tuple[Path, list[str]]:
    """The archive of checkout, rows so far and wheels; notes on what is in it and what is not."""
    notes = []
    archive, carried = staging / CODE, staging / "wheels"
    carried.mkdir()
    if wanted is not None and (missing := wheels(wanted, carried)):
        notes.append(missing)
    before = _rows(matrix.name, ROOT)
    with tarfile.open(archive, "w:gz") as tar:
        for name in checkout:
            tar.add(ROOT / name, f"checkout/{name}")
        for wheel in sorted(carried.iterdir()):
            tar.add(wheel, f"wheels/{wheel.name}")
        for name in ROWS if before else ():
            if before and (before / name).is_file():
                tar.add(before / name, f"checkout/runs/{matrix.name}/{name}")
    if before:
        notes.append(f"the rows in {before} are packed: what they hold is not run again")
    shutil.rmtree(carried)
    return archive, notes


def _images(matrix: Matrix, staging: Path, cache: Path) -> Path | None:
    """The archive of the data sets' files; None where they come with a library.

    Raises:
        BadInput: they are not on this machine, or the matrix names them by a path.
    """
    sources = list(dict.fromkeys(scenario.dataset.source for scenario in matrix.scenarios))
    if paths := [source for source in sources if source.startswith("folder:")]:
        raise BadInput(
            f"{matrix.path}: source = {paths[0]!r}: a path here is none there; write the bare name of a folder or archive in "
            f"{VARIABLE}"
        )
    places = [place for source in sources if (place := on_disk(source, cache)) is not None]
    if not places:
        return None
    archive = staging / IMAGES
    with tarfile.open(archive, "w") as tar:  # images are packed already
        for place in places:
            tar.add(place, place.name)
    return archive


def _transfers(parts: Iterable[Path], limit: int) -> list[list[Path]]:
    """Parts by transfer: each goes into the first one that has room, and the first part is in the first."""
    found: list[list[Path]] = []
    for part in parts:
        free = [mine for mine in found if sum(one.stat().st_size for one in (*mine, part)) <= limit]
        if free:
            free[0].append(part)
        else:
            found.append([part])
    return found


def pack(
    matrix: Matrix, out: Path, *, limit: int, wanted: Wheels | None, cache: Path
) -> tuple[Mapping[str, Sequence[Part]], list[str]]:
    """Writes the transfers below ``out``, replacing those of an earlier call.

    Args:
        matrix: what is to be run; its file must be in the checkout.
        out: the folder.
        limit: MiB of a transfer, at least 1.
        wanted: the wheels; None = no wheels.
        cache: where downloaded data sets are.

    Returns:
        The parts by transfer, and notes for the user.

    Raises:
        BadInput: the images are not on this machine, the matrix is outside of the checkout, or this is no git checkout.
    """
    path, checkout = matrix.path.resolve(), _checkout(ROOT)
    if not path.is_relative_to(ROOT) or path.relative_to(ROOT).as_posix() not in checkout:
        raise BadInput(f"{matrix.path}: not carried: it is outside of the checkout, or git ignores it; put it into {FOLDER}")
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("transfer-*"):
        shutil.rmtree(old)
    with tempfile.TemporaryDirectory(dir=out) as temporary:
        staging = Path(temporary)
        code, notes = _code(matrix, checkout, staging, wanted)
        images = _images(matrix, staging, cache)
        each = limit * MIB - MIB // 16  # room for the script and the list of parts
        parts = [part for archive in (code, images) if archive is not None for part in cut(archive, each)]
        placed: dict[str, list[Part]] = {}
        for number, mine in enumerate(_transfers(parts, each), 1):
            folder = out / f"transfer-{number}"
            folder.mkdir()
            for part in mine:
                moved = part.rename(folder / part.name)
                sha = hashlib.sha256(moved.read_bytes()).hexdigest()
                placed.setdefault(folder.name, []).append(Part(f"{folder.name}/{part.name}", moved.stat().st_size, sha))
    every = [part for mine in placed.values() for part in mine]
    first = out / "transfer-1"
    write_text(first / SUMS, "".join(f"{part.sha256}  {part.path}\n" for part in every))
    write_text(first / "go.sh", GO.format(name=matrix.name, matrix=path.relative_to(ROOT).as_posix()))
    return placed, notes


# -- what comes back -----------------------------------------------------------------------------------------------------------


def victims(plan: Plan, order: Iterable[int], store: Store, folder: Path, limit: float) -> str:
    """Writes the cached victims of the cells in ``order``, weights rounded to float16, with their settings as JSON beside them.

    Args:
        plan: of the matrix. order: positions of cells. store: where the victims are.
        folder: where to. limit: MiB of all files of weights.

    Returns:
        How many were written, and how many were left out and why, in words.
    """
    left, written, out, beyond = limit * MIB, 0, 0, 0
    for key in dict.fromkeys(plan.cells[position].victims[0] for position in order):
        scenario, entry = plan.stages[key].scenario, store.read("victim", key)
        if entry is None or entry.outcome["status"] != "ok":
            continue
        weights = {name.removeprefix("net."): value for name, value in entry.tensors.items() if name.startswith("net.")}
        try:
            content = safetensors.torch.save(halved(weights))
        except OverflowError:
            beyond += 1
            continue
        if len(content) > left:
            out += 1
            continue
        left, written = left - len(content), written + 1
        label = f"{scenario.attack_label}-seed-{scenario.seed}-{key[:8]}"
        name = "".join(letter if letter.isalnum() else "-" for letter in label)
        exact = scenario.recipe.weights == "half"
        card = {
            "scenario": scenario.spec(), "fingerprint": plan.fingerprint(scenario), "measured": entry.outcome,
            "weights": "rounded to float16, " + ("and measured so" if exact else "after they were measured in float32"),
        }  # fmt: skip
        write_bytes(folder / f"{name}.safetensors", content)
        write_text(folder / f"{name}.json", json.dumps(card, indent=1) + "\n")
    words = {f"more than {limit:g} MiB": out, "weights beyond float16's range": beyond}
    return f"{written} victims in half precision" + "".join(f", {count} left out: {why}" for why, count in words.items() if count)


def deliver(results: Path, out: Path, back: int) -> None:
    """Copies everything in ``results`` to ``out``; with ``back`` as one archive in parts of at most ``back`` MiB."""
    out.mkdir(parents=True, exist_ok=True)
    if not back:
        shutil.copytree(results, out, dirs_exist_ok=True)
        return
    archive = out / "back.tar.gz"
    for old in out.glob(f"{archive.name}*"):
        old.unlink()
    with tarfile.open(archive, "w:gz", compresslevel=3) as tar:
        for path in sorted(results.iterdir()):
            tar.add(path, path.name)
    cut(archive, back * MIB)
