"""The table of networks and recipes: a twin is trained as a matrix trains it, lines add up, the shortest training comes first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmark.data.datasets import DatasetSpec, load
from benchmark.data.splits import split_budget
from benchmark.proof import regime
from benchmark.proof.regime import Regime, main, markdown, measure
from benchmark.run.victim import read_victim
from benchmark.settings.load import load_matrix
from benchmark.storage.store import Store
from models.recipe import Recipe

LINE = Regime("digits", "resnet9", 16, 1000, 4, 128, 0.1, "reference", 0.9, 0.91, 60.0, 500.0, 900.0, "maker 1 2", "AVX2")
TWIN = """
title = "twin"
seeds = [3]
dataset = { source = "digits", clean_fraction = 0.05 }
recipe = { epochs = 1, lr = 0.1, nesterov = true, schedule = "one-cycle" }
backbone = [{ name = "vgg11-bn", width = 2, hidden = 0 }]
attack = [{ name = "badnets" }]
defense = [{ name = "none" }]
"""


def test_the_twin_is_the_one_a_matrix_would_train(tmp_path: Path) -> None:
    recipe = Recipe(epochs=1, lr=0.1, nesterov=True, schedule="one-cycle")
    found = measure(DatasetSpec(source="digits"), "vgg11-bn", 2, recipe, 3, tmp_path)
    (tmp_path / "twin.toml").write_text(TWIN)
    scenario = load_matrix(tmp_path / "twin.toml").scenarios[0]
    twin = read_victim(scenario.twin(), Store(tmp_path / "store"), tmp_path)
    assert found.test_acc == twin.outcome["acc"]
    data = load(DatasetSpec(source="digits"), tmp_path).train
    own, held_out = split_budget(data, regime.FRACTION, 3)
    right = (twin.net(data.images[held_out] / 255.0).argmax(1) == data.labels[held_out]).double().mean()
    assert found.budget_acc == pytest.approx(float(right))
    # the seconds on file are rounded to a tenth, and this training takes about half a second
    assert len(own) / (found.seconds + 0.06) <= found.trained <= len(own) / max(found.seconds - 0.06, 0.01)


def test_the_shortest_training_comes_first() -> None:
    lines = markdown([replace(LINE, seconds=90.0), replace(LINE, width=8, seconds=30.0)]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| resnet9")]
    assert [(line[1], line[9]) for line in cells] == [("8", "0.5"), ("16", "1.5")]
    assert cells[0][6:9] == ["float32", "90.0", "91.0"]


def test_lines_add_up_and_a_wrong_name_costs_none(tmp_path: Path) -> None:
    from typer import Typer

    app = Typer()
    app.command()(main)
    given = ["--width", "2", "--epochs", "1", "--source", "digits", "--cache", str(tmp_path), "--out", str(tmp_path)]
    for name in ("vgg11-bn", "resnet8"):
        assert CliRunner().invoke(app, ["--backbone", name, *given]).exit_code == 0
    before = (tmp_path / "regimes.csv").read_text()
    assert [line.split(",")[1] for line in before.splitlines()] == ["backbone", "vgg11-bn", "resnet8"]
    for wrong in (["--backbone", "resnet99"], ["--backbone", "resnet8", "--precision", "int8"]):
        refused = CliRunner().invoke(app, [*wrong, *given])
        assert (refused.exit_code, (tmp_path / "regimes.csv").read_text()) == (2, before)
    assert "reference, tf32, bf16" in refused.output
