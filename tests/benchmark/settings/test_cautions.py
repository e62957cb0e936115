"""Warnings when a run starts: thresholds that no score of a narrow layer can reach, and bfloat16 without instructions for it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmark.data.datasets import load
from benchmark.settings import cautions as module
from benchmark.settings.cautions import cautions, largest_z
from benchmark.settings.cells import Cell
from benchmark.settings.load import load_matrix
from models.spec import canonical
from models.units import mean_std

MATRIX = """
title = "widths"
seeds = [0, 1]
dataset = { source = "digits", train_limit = 100, test_limit = 40 }
recipe = { epochs = 0 }
backbone = [{ name = "vgg11-bn", width = 4, hidden = 10 }, { name = "resnet8", width = 16, hidden = 16 }]
attack = [{ name = "badnets" }]
[[defense]]
name = "clp"
tracks = ["model"]
scopes = ["head", "whole"]
[[defense]]
name = "holder-pruning"
label = "bound"
estimator = "weight-bound"
rule = "mean-std"
u = 2.5
tracks = ["model"]
scopes = ["head"]
[[defense]]
name = "holder-pruning"
estimator = "weight-bound"
tracks = ["model"]
[[defense]]
name = "random-pruning"
like = "clp"
"""


def told(tmp_path: Path, text: str = MATRIX) -> list[str]:
    (tmp_path / "widths.toml").write_text(text)
    matrix = load_matrix(tmp_path / "widths.toml")
    spec = matrix.scenarios[0].dataset
    return cautions(matrix.cells, {canonical(spec): load(spec, tmp_path)})


@pytest.mark.parametrize("units", [2, 3, 8, 10, 11, 64])
def test_no_score_exceeds_the_largest_z_and_one_reaches_it(units: int) -> None:
    draw = torch.Generator().manual_seed(units)
    scores = torch.rand((2000, units), generator=draw, dtype=torch.float64) ** 20  # a few far above the others
    lone = torch.zeros(1, units, dtype=torch.float64)
    lone[0, 0] = 1.0
    scores = torch.cat([scores, lone])
    z = (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True)
    assert float(z.max()) == pytest.approx(largest_z(units), rel=1e-9)
    assert bool(mean_std(3.0)(lone[0]).any()) == (largest_z(units) > 3.0)


def test_eleven_units_are_the_fewest_in_which_clp_can_prune() -> None:
    assert largest_z(10) < 3.0 < largest_z(11)


def test_a_threshold_out_of_reach_is_named_once_with_its_layer_and_reason(tmp_path: Path) -> None:
    lines = told(tmp_path)
    assert len(lines) == 2  # the wide backbone, Hölder's other rule, u = 2.5 at 10 units and the control are well; two seeds, once
    assert lines[0] == (
        "clp (head) on vgg11-bn-w4: its threshold of 3 standard deviations prunes nothing in 1 of 1 layers. In the narrowest, "
        "head.0 with 10 units, no score is more than 2.85 above the mean: (n - 1) / sqrt(n)"
    )
    assert lines[1].startswith("clp (whole) on vgg11-bn-w4: ")
    assert "in 3 of 9 layers" in lines[1]  # 4, 8 and the head's 10
    assert "features.1 with 4 units, no score is more than 1.50" in lines[1]
    assert told(tmp_path, MATRIX.replace("width = 4, hidden = 10", "width = 16, hidden = 16")) == []
    assert any(line.startswith("bound (head)") for line in told(tmp_path, MATRIX.replace("u = 2.5", "u = 2.9")))


@pytest.mark.parametrize(("gpu", "instructions", "expected"), [(False, False, 1), (False, True, 0), (True, False, 0)])
def test_bf16_is_called_slow_only_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool, instructions: bool, expected: int
) -> None:
    (tmp_path / "widths.toml").write_text(MATRIX)
    cells = load_matrix(tmp_path / "widths.toml").cells
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(module, "has_bfloat16", lambda: instructions)

    def rounded(cell: Cell) -> Cell:
        recipe = dataclasses.replace(cell.scenario.recipe, precision="bf16")
        return dataclasses.replace(cell, scenario=dataclasses.replace(cell.scenario, recipe=recipe))

    plain = [cell for cell in cells if cell.defense.z_threshold is None]
    assert cautions(plain, {}) == []
    lines = cautions(map(rounded, plain), {})
    assert len(lines) == expected
    assert all("5 to 10 times" in line for line in lines)
