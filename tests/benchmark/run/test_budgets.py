"""Clean budgets as an axis: what a matrix expands to, which images a defender gets, and that nothing else changes its key."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from benchmark.run.defend import _validated_on, defend
from benchmark.run.keys import cell_key
from benchmark.run.session import run_matrix
from benchmark.run.victim import read_victim
from benchmark.run.world import lesser, world
from benchmark.settings.cells import Matrix, settings_hash
from benchmark.settings.load import find_matrix, load_matrix, matrix_names
from benchmark.storage.rows import Row, read
from benchmark.storage.store import Store
from models.spec import BadInput
from models.training import predict

ROOT = Path(__file__).resolve().parents[3]
TINY = """
title = "tiny"
seeds = [0]
[dataset]
source = "digits"
clean_fraction = 0.2
train_limit = 200
test_limit = 40
[recipe]
epochs = 1
batch = 32
lr = 0.05
crop = 1
flip = false
[[backbone]]
name = "vgg11-bn"
width = 2
hidden = 8
[[attack]]
name = "badnets"
[[defense]]
name = "pruning"
tracks = ["model+clean"]
levels = [0.0, 0.5]
"""
ASKED = TINY + "budgets = [0.005, 0.02, 0.1, 0.2]\n"


def matrix_of(folder: Path, text: str, name: str = "tiny") -> Matrix:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return load_matrix(path)


def test_a_budget_is_a_cell_with_its_label_on_the_same_victim(tmp_path: Path) -> None:
    plain, asked = matrix_of(tmp_path, TINY), matrix_of(tmp_path, ASKED)
    assert [cell.defense_label for cell in asked.cells] == [f"pruning, budget {percent} %" for percent in ("0.5", "2", "10", "20")]
    assert [cell.budget for cell in asked.cells] == [0.005, 0.02, 0.1, None]
    assert {cell.scenario for cell in asked.cells} == {cell.scenario for cell in plain.cells}
    assert all("budget" not in cell.scenario.spec() for cell in asked.cells)
    keys = [cell_key(cell, "f") for cell in asked.cells]
    assert len(set(keys)) == 4
    assert keys[-1] == cell_key(plain.cells[0], "f")  # the whole pool is no setting of its own
    assert "budget" not in plain.cells[0].spec()
    assert asked.cells[0].spec() == {**plain.cells[0].spec(), "budget": 0.005}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("budgets = []", "budgets is empty"),
        ("budgets = [0.3]", "at most the 0.2 that clean_fraction holds out"),
        ("budgets = [0]", "0 should be a share above 0"),
        ("budgets = [true]", "True should be a number"),
        ('budgets = ["1 %"]', "'1 %' should be a number"),
        ("budgets = [0.1, 0.1]", "name 0.1 twice"),
        ("budgets = 0.1", "should be a list"),
    ],
)
def test_one_clear_error_for_a_wrong_budget(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(BadInput, match="defense pruning") as caught:
        matrix_of(tmp_path, f"{TINY}{line}\n")
    assert words in str(caught.value)


def test_a_track_without_clean_images_has_no_budget(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="the track 'model' grants no clean images"):
        matrix_of(tmp_path, TINY.replace('"model+clean"', '"model"') + "budgets = [0.1]\n")


def test_the_keys_of_committed_cells_are_what_they_were() -> None:
    matrix, folder = load_matrix(find_matrix("quick-all")), ROOT / "results" / "quick-all"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert settings_hash(matrix) == manifest["settings"]
    keys = [cell_key(cell, manifest["datasets"]["digits"]["fingerprint"])[:12] for cell in matrix.cells]
    assert keys == list(dict.fromkeys(read(folder / "rows.csv", Row)["cell"]))


@pytest.mark.parametrize("name", matrix_names())
def test_a_budget_needs_no_more_than_the_pool_in_every_shipped_matrix(name: str) -> None:
    for cell in load_matrix(find_matrix(name)).cells:
        assert cell.budget is None or 0 < cell.budget < cell.scenario.clean_fraction
        assert (", budget " in cell.defense_label) or cell.budget is None


def images(data: object) -> set[bytes]:
    return {bytes(image.numpy().tobytes()) for image in data.images}  # type: ignore[attr-defined]


def test_a_smaller_budget_is_a_part_of_a_larger_one_and_of_the_pool(tmp_path: Path) -> None:
    matrix = matrix_of(tmp_path, ASKED)
    pool = world(matrix.cells[0].scenario, tmp_path)
    assert lesser(pool, matrix.cells[-1]) is pool
    before: set[bytes] = set()
    for cell, size in zip(matrix.cells[1:3], (4, 20), strict=True):
        got = lesser(pool, cell)
        assert len(got.clean) + len(got.validation) == size
        assert len(got.validation) == max(1, round(size / 5))
        assert got.train is pool.train
        assert got.data is pool.data
        held = images(got.clean) | images(got.validation)
        assert before <= held <= images(pool.clean) | images(pool.validation)
        before = held


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    """Every row of the tiny matrix with budgets, and of the one without, by label and selection."""
    folder = tmp_path_factory.mktemp("budgets")
    text = ASKED.replace("[0.005, 0.02, 0.1, 0.2]", "[0.005, 0.1, 0.2]")
    found = {}
    for name, settings in (("asked", text), ("plain", TINY)):
        outcome = run_matrix(
            matrix_of(folder, settings, name), results=folder / "results", cache=folder / "cache",
            console=Console(file=io.StringIO()), processes=1,
        )  # fmt: skip
        found |= {f"{row.defense} {row.selection}": row for result in outcome.results for row in result.rows}
    return found


def test_the_defender_gets_what_it_was_asked_for_and_is_validated_on_its_own_part(rows: dict[str, Row]) -> None:
    assert [rows[f"pruning, budget {percent} % default"].clean_images for percent in (10, 20)] == [20, 40]
    ten = rows["pruning, budget 10 % validation"]
    assert ten.status == "ok"
    assert math.isclose(ten.val_acc * 4, round(ten.val_acc * 4))  # a share of four images
    assert ten.acc_undefended == rows["pruning default"].acc_undefended


def test_the_whole_pool_is_the_same_cell(rows: dict[str, Row]) -> None:
    asked, plain = rows["pruning, budget 20 % oracle"], rows["pruning oracle"]
    same = {"matrix": "", "defense": ""}
    assert repr(dataclasses.replace(asked, **same)) == repr(dataclasses.replace(plain, **same))  # NaN is never equal


def test_a_budget_that_cannot_be_split_is_refused_with_its_size(rows: dict[str, Row]) -> None:
    one = rows["pruning, budget 0.5 % default"]
    assert one.status == "refused"
    assert one.reason == "does not apply: a clean budget of 0.5 % of 200 images is 1: at least 2 are needed"
    assert math.isnan(one.acc)
    assert one.implanted == rows["pruning default"].implanted


def test_losses_count_from_the_victim_on_the_smaller_part(tmp_path: Path) -> None:
    """What a selection compares with is the attacked model on the very images of the cell's own budget."""
    matrix = matrix_of(tmp_path, ASKED)
    cell, cache, store = matrix.cells[2], tmp_path / "cache", Store(tmp_path / "store")
    pool = world(cell.scenario, cache)
    smaller = lesser(pool, cell)
    victim = _validated_on(smaller, read_victim(cell.scenario, store, cache))
    outcome = defend(cell, smaller, victim)
    right = predict(victim.net, smaller.validation.images) == smaller.validation.labels
    for entry in outcome["candidates"]:
        assert entry["val_loss"] == pytest.approx(float(right.double().mean()) - entry["val_acc"], abs=1e-12)
    untouched = outcome["candidates"][-1]
    assert untouched["kept"]
    assert (untouched["val_loss"], untouched["val_loss_se"], untouched["val_acc"]) == (0.0, 0.0, float(right.double().mean()))
