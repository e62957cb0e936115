"""A training from scratch is done once for all attacks of a seed, and stored."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmark.run.defend import defend, run_cell
from benchmark.run.keys import cell_key, scratch_key
from benchmark.run.victim import read_victim
from benchmark.run.world import world
from benchmark.settings.cells import Cell, Matrix
from benchmark.settings.load import load_matrix
from benchmark.storage.networks import stored_network
from benchmark.storage.store import Store
from models.training import Diverged
from tests.benchmark.run.test_budgets import TINY

TEXT = (
    TINY[: TINY.index("[[defense]]")].replace("seeds = [0]", "seeds = [0, 1]")
    + """
[[attack]]
name = "blended"
[[defense]]
name = "training-from-scratch"
epochs = 2
budgets = [0.1, 0.2]
"""
)


@pytest.fixture
def matrix(tmp_path: Path) -> Matrix:
    path = tmp_path / "tiny.toml"
    path.write_text(TEXT)
    return load_matrix(path)


def outcome_of(cell: Cell, store: Store, cache: Path) -> dict[str, object]:
    run_cell(cell, store, cache)
    entry = store.read("defended", cell_key(cell, world(cell.scenario, cache).data.fingerprint))
    assert entry is not None
    return entry.outcome


def test_attacks_share_the_network_and_nothing_else_does(matrix: Matrix) -> None:
    keys: dict[str, set[object]] = {}
    for cell in matrix.cells:
        keys.setdefault(scratch_key(cell, "f"), set()).add((cell.scenario.seed, cell.budget))
    assert [len(places) for places in keys.values()] == [1, 1, 1, 1]
    assert len({cell_key(cell, "f") for cell in matrix.cells}) == 8
    one = matrix.cells[0]
    longer = dataclasses.replace(
        one, scenario=dataclasses.replace(one.scenario, recipe=dataclasses.replace(one.scenario.recipe, lr=0.1))
    )
    assert scratch_key(longer, "f") != scratch_key(one, "f") != scratch_key(one, "g")


def test_a_read_network_gives_what_a_training_gives(matrix: Matrix, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    cells = [cell for cell in matrix.cells if cell.scenario.seed == 0 and cell.budget is None]
    assert [cell.scenario.attack_label for cell in cells] == ["badnets", "blended"]
    for cell in cells:
        found = outcome_of(cell, store, tmp_path)
        w = world(cell.scenario, tmp_path)
        alone = defend(cell, w, read_victim(cell.scenario, store, tmp_path))
        for name in ("candidates", "status", "used", "trained", "clean_images"):
            assert found[name] == alone[name], name
        assert (found["used"], found["trained"]) == ("clean", True)
    assert len(list((tmp_path / "store" / "scratch").glob("*/*/entry.json"))) == 1


def test_a_training_that_diverged_is_stored_as_such(tmp_path: Path) -> None:
    store, calls = Store(tmp_path / "store"), []

    def train() -> None:
        calls.append(1)
        raise Diverged("weights are not finite")

    for _ in range(2):
        with pytest.raises(Diverged, match="not finite"):
            stored_network(store, "scratch", "ab" + "0" * 62, {}, lambda: pytest.fail("nothing to fill"), train)  # type: ignore[arg-type]
    assert calls == [1]
