"""Where the time goes: operations by kind, and the page that is drawn of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmark.proof.profile import OTHER, Spent, draw, kind, main, shares

TINY = """
title = "tiny"
seeds = [0]
dataset = { source = "digits", clean_fraction = 0.2, train_limit = 100, test_limit = 40 }
recipe = { epochs = 0 }
backbone = [{ name = "resnet9", width = 2, hidden = 0 }]
attack = [{ name = "badnets" }]
defense = [{ name = "none" }]
"""


@pytest.mark.parametrize(
    ("operation", "found"),
    [
        ("aten::mkldnn_convolution", "convolutions"),
        ("aten::convolution_backward", "convolutions"),
        ("aten::native_batch_norm_backward", "batch norms"),
        ("aten::clamp_min", "ReLUs"),
        ("aten::threshold_backward", "ReLUs"),
        ("aten::max_pool2d_with_indices_backward", "pooling"),
        ("aten::zero_", "copies and zeroes"),
        ("aten::addmm", "linear layers"),
        ("Optimizer.step#SGD.step", "optimiser"),
        ("aten::_foreach_add_", "optimiser"),
        ("aten::item", OTHER),
    ],
)
def test_operations_are_told_apart(operation: str, found: str) -> None:
    assert kind(operation) == found


def test_shares_by_hand() -> None:
    spent = [("aten::mkldnn_convolution", 30.0), ("aten::relu", 10.0), ("aten::convolution_backward", 50.0), ("aten::item", 10.0)]
    found = shares(spent)
    assert found == pytest.approx({"convolutions": 0.8, "ReLUs": 0.1, OTHER: 0.1})
    assert next(iter(found)) == "convolutions"
    assert shares([]) == {}


def test_the_page_has_a_column_for_every_job() -> None:
    found = {"training": Spent(520.4, {"convolutions": 0.75, OTHER: 0.25}), "scoring": Spent(1140.0, {"pooling": 1.0})}
    page = draw("net of m", found, "the command")
    assert "| operations | training | scoring |" in page
    assert "| convolutions | 75 % | 0 % |" in page
    assert "| pooling | 0 % | 100 % |" in page
    assert "training 520, scoring 1,140" in page


@pytest.mark.slow
def test_a_tiny_matrix_is_measured(tmp_path: Path) -> None:
    import typer

    (tmp_path / "tiny.toml").write_text(TINY)
    app = typer.Typer()
    app.command()(main)
    matrix = ["-m", str(tmp_path / "tiny.toml")]
    done = CliRunner().invoke(app, [*matrix, "--images", "64", "--cache", str(tmp_path), "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "PROFILE.md").read_text()
    assert "| convolutions |" in page
    assert "python -m benchmark.proof.profile --matrix tiny.toml" in page
