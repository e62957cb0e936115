"""Rows computed again from what lies beside them."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import benchmark.__main__ as cli
from benchmark.proof.verify import BEYOND, SHARES, TOLERANCE, Checked, _show, compare, confirmed, verify
from benchmark.run.session import run_matrix
from benchmark.settings.load import load_matrix
from benchmark.storage.rows import Row, read
from models.spec import BadInput

TINY = """
title = "tiny"
plugins = ["code/mine.py"]
seeds = [0]
dataset = { source = "digits", clean_fraction = 0.2, train_limit = 200, test_limit = 60 }
recipe = { epochs = 1, batch = 32, crop = 1, flip = false }
[[backbone]]
name = "vgg11-bn"
width = 2
hidden = 8
[[attack]]
name = "badnets"
[[defense]]
name = "none"
[[defense]]
name = "clp"
tracks = ["model"]
scopes = ["head", "whole"]
[[defense]]
name = "same"
tracks = ["model"]
"""
MINE = '''
"""A defense that does nothing."""
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar
from defenses.base import Candidate, Defense, DefenderView, Knowledge, Scope

@dataclass(frozen=True)
class Same(Defense):
    name: ClassVar[str] = "same"
    needs: ClassVar[Knowledge] = Knowledge.MODEL
    scopes: ClassVar[frozenset[Scope]] = frozenset(Scope)

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        yield Candidate(view.model(), dial=None, is_default=True, strength=0.0)
'''


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder of results; the matrix, its plug-in and the store that made them are gone."""
    root = tmp_path_factory.mktemp("made")
    (root / "code").mkdir()
    (root / "code" / "mine.py").write_text(MINE)
    (root / "tiny.toml").write_text(TINY)
    run_matrix(load_matrix(root / "tiny.toml"), results=root / "results", cache=root / "cache", console=quiet(), processes=1)
    for gone in ("code", "cache"):
        shutil.rmtree(root / gone)
    (root / "tiny.toml").unlink()
    return root / "results" / "tiny"


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "tiny"))


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def edit(path: Path, change: Callable[[str], str]) -> None:
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))


def test_drawn_rows_come_out_the_same_from_the_folder_alone(folder: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    checked = verify(folder, sample=12, draw=0, cache=tmp_path / "cache", console=quiet(), processes=1)
    assert [one.verdict for one in checked] == ["identical"] * 20  # four cells, five rules
    assert {one.committed["defense"] for one in checked} == {"none", "clp", "same"}
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "cache" / "store").exists()  # what was trained is not kept, so it cannot be compared with itself


def test_a_changed_figure_is_found_and_named(folder: Path, tmp_path: Path) -> None:
    table = read(folder / "rows.csv", Row)
    ra = table["ra"].iloc[0]
    lines = (folder / "rows.csv").read_text().splitlines()
    at = lines[0].split(",").index("ra")
    assert '"' not in lines[1].split(",")[at]
    values = lines[1].split(",")
    values[at] = f"{ra + 1e-6:.6f}"
    (folder / "rows.csv").write_text("\n".join([lines[0], ",".join(values), *lines[2:]]) + "\n")
    out = quiet()
    checked = verify(folder, sample=12, draw=0, cache=tmp_path / "cache", console=out, processes=1)
    wrong = [one for one in checked if one.verdict == "differs"]
    assert [one.differs for one in wrong] == [("ra",)]
    assert "DIFFERS: ra" in out.file.getvalue()  # type: ignore[attr-defined]
    arguments = ["verify", str(folder), "--sample", "12", "--processes", "1", "--cache", str(tmp_path / "cache")]
    told = CliRunner().invoke(cli.app, arguments)
    assert told.exit_code == 1, told.output
    assert "1 differ" in told.output


def test_another_machine_type_is_named(folder: Path, tmp_path: Path) -> None:
    edit(folder / "manifest.json", lambda text: text.replace('"torch": "', '"torch": "0.'))
    out = quiet()
    checked = verify(folder, sample=1, draw=1, cache=tmp_path / "c", console=out, processes=1)
    assert [one.verdict for one in checked] == ["identical"] * 5
    assert "another machine type" in out.file.getvalue()  # type: ignore[attr-defined]


def test_the_same_draw_takes_the_same_rows(folder: Path, tmp_path: Path) -> None:
    drawn = [
        {one.committed["cell"] for one in verify(folder, sample=1, draw=draw, cache=tmp_path / "c", console=quiet(), processes=1)}
        for draw in (0, 0)
    ]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 1


ROW = Row(
    matrix="m", dataset="d", backbone="b", attack="a", rate=0.1, seed=0, track="model", scope="whole", defense="clp", cell="0" * 12,
    target=0, label_mode="all-to-one", realised_rate=0.1, control=False, selection="default", status="ok", acc=0.9, asr=0.5, ra=0.4,
    der=0.5, acc_undefended=0.9, asr_undefended=1.0, ra_undefended=0.0, acc_benign=0.9, dial=1.5, pruned=3,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "exact", "elsewhere"),
    [
        ({}, "identical", "identical"),
        ({"asr": 0.5 + 2e-7}, "identical", "identical"),  # a row has six decimals
        ({"asr": 0.5 + TOLERANCE - 1e-3}, "differs", "within"),
        ({"asr": 0.5 + TOLERANCE + 1e-3}, "differs", "beyond"),
        ({"acc_undefended": 0.9 - TOLERANCE - 1e-3}, "differs", "beyond"),
        ({"dial": 2.5, "pruned": 7}, "differs", "within"),
        ({"asr": math.nan}, "differs", "beyond"),
        ({"status": "failed", "reason": "diverged", "acc": math.nan}, "differs", "beyond"),
        ({"clean_images": 3, "used": "model + clean"}, "differs", "differs"),
        ({"defense": "anp"}, "differs", "differs"),
    ],
)
def test_verdicts(change: dict[str, object], exact: str, elsewhere: str) -> None:
    one, other = dataclasses.asdict(ROW), dataclasses.asdict(dataclasses.replace(ROW, **change))  # type: ignore[arg-type]
    assert [compare(one, other, exact=same).verdict for same in (True, False)] == [exact, elsewhere]
    assert [compare(other, one, exact=same).verdict for same in (True, False)] == [exact, elsewhere]


@pytest.mark.parametrize(
    ("value", "verdict"),
    [(0.2 - TOLERANCE + 1e-3, "within"), (0.2 - TOLERANCE - 1e-3, "beyond"), (0.8 + TOLERANCE - 1e-3, "within"),
     (0.8 + TOLERANCE + 1e-3, "beyond"), (0.3, "within")],
)  # fmt: skip
def test_elsewhere_a_figure_may_be_what_the_seeds_span(value: float, verdict: str) -> None:
    kin = [dataclasses.asdict(dataclasses.replace(ROW, seed=seed, asr=asr)) for seed, asr in ((1, 0.2), (2, 0.8), (3, math.nan))]
    one, other = dataclasses.asdict(ROW), dataclasses.asdict(dataclasses.replace(ROW, asr=value))
    assert compare(one, other, exact=False, seeds=kin).verdict == verdict
    assert compare(one, other, exact=True, seeds=kin).verdict == "differs"


def test_how_many_cells_may_lie_beyond() -> None:
    def of(cells: int, beyond: int, last: str = "within") -> list[Checked]:
        verdicts = ["beyond"] * beyond + ["within"] * (cells - beyond - 1) + [last] * (cells > beyond)
        return [
            Checked(dataclasses.asdict(dataclasses.replace(ROW, cell=str(i), selection=how)), {}, verdict, (), 0.0)  # type: ignore[arg-type]
            for i, verdict in enumerate(verdicts) for how in ("default", "oracle")
        ]  # fmt: skip

    def tail(cells: int, beyond: int) -> float:
        return sum(math.comb(cells, k) * BEYOND**k * (1 - BEYOND) ** (cells - k) for k in range(beyond, cells + 1))

    for cells in range(1, 12):
        for beyond in range(cells + 1):
            assert confirmed(of(cells, beyond)) == (tail(cells, beyond) >= 0.05), (cells, beyond)
    assert not confirmed(of(5, 0, "differs"))
    assert confirmed([])


def test_how_far_rows_lie_apart_is_told() -> None:
    """Eleven rows, 0 to 10 points of ACC apart, up or down; of one the ASR cannot be compared, of the others it is the same."""
    checked = []
    for points in range(11):
        again = {"acc": 0.9 + (-1) ** points * points / 100, "asr": math.nan if points == 3 else 0.5}
        checked.append(Checked(dataclasses.asdict(ROW), dataclasses.asdict(dataclasses.replace(ROW, **again)), "within", (), 0.0))
    out = quiet()
    _show(checked, False, TOLERANCE, out)
    told = out.file.getvalue()  # type: ignore[attr-defined]
    assert "ACC: 5.0 points apart in the median row, at most 9.0 in nine of ten, at most 10.0 in any" in told
    assert "ASR: 0.0 points apart in the median row, at most 0.0 in nine of ten, at most 0.0 in any" in told


def test_every_judged_column_is_one() -> None:
    assert set(SHARES) <= {f.name for f in dataclasses.fields(Row)}


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("matrix.toml", lambda text: text.replace("epochs = 1", "epochs = 2"), r"matrix\.toml: its cells are not those of"),
        ("plugins/code/mine.py", lambda text: text + "\n", r"mine\.py: is not the file the rows were made with"),
        ("manifest.json", lambda text: text.replace("code/mine.py", "../../mine.py"), "lies outside the folder"),
        ("manifest.json", lambda text: text.replace('"settings"', '"setting"'), "'settings' is missing"),
        ("manifest.json", lambda text: text[:40], "not a run's manifest"),
        ("manifest.json", lambda text: "[" * 100_000, "not a run's manifest"),
        ("manifest.json", lambda text: text.replace('"fingerprint": "', '"fingerprint": "0'), "does not follow from"),
        ("rows.csv", lambda text: text[: text.index("\n") + 30], r"rows\.csv"),
    ],
)
def test_files_that_do_not_belong_together_are_named(
    folder: Path, tmp_path: Path, name: str, change: Callable[[str], str], told: str
) -> None:
    edit(folder / name, change)
    with pytest.raises(BadInput, match=told):
        verify(folder, sample=0, draw=0, cache=tmp_path / "c", console=quiet(), processes=1)


def test_other_images_under_the_same_name_are_refused(folder: Path, tmp_path: Path) -> None:
    """A manifest and rows that agree with each other, and not with the data here."""
    from benchmark.run.keys import cell_key

    real = json.loads((folder / "manifest.json").read_text())["datasets"]["digits"]["fingerprint"]
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "mine.py").write_text(MINE)
    (tmp_path / "tiny.toml").write_text(TINY)
    for cell in load_matrix(tmp_path / "tiny.toml").cells:
        names = cell_key(cell, real)[:12], cell_key(cell, "f" * 64)[:12]
        for file in ("cells.csv", "rows.csv"):
            edit(folder / file, lambda text, names=names: text.replace(*names))
    edit(folder / "manifest.json", lambda text: text.replace(real, "f" * 64))
    assert verify(folder, sample=0, draw=0, cache=tmp_path / "c", console=quiet(), processes=1) == []
    with pytest.raises(BadInput, match=r"'digits': its images are not those.*ffffffffffff there"):
        verify(folder, sample=1, draw=0, cache=tmp_path / "c", console=quiet(), processes=1)
