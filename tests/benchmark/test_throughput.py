"""The speed measurement runs, measures the same work twice, and prints a complete table."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from benchmark import throughput
from benchmark.throughput import bare_loop, main, markdown, measure, random_images
from models.classifier import Classifier
from models.resnet import ResNet8
from models.training import Recipe, fit

BACKBONE = ResNet8(width=4, hidden=0)


def test_the_bare_loop_does_the_work_of_fit() -> None:
    recipe = Recipe(epochs=2, batch=8)
    data = random_images(20)
    nets = [BACKBONE.build(10, data.shape, [0.5] * 3, [0.25] * 3, 0) for _ in range(2)]
    ours, bare = fit(Classifier(nets[0], recipe), data, recipe, seed=1).net, bare_loop(nets[1], data, recipe, seed=1)
    assert all(map(torch.equal, ours.state_dict().values(), bare.state_dict().values()))


def test_every_figure_is_positive_and_the_table_complete() -> None:
    threads = torch.get_num_threads()
    report = measure([BACKBONE], rounds=2, images=16)
    assert torch.get_num_threads() == threads
    (speed,) = report.speeds
    figures = (speed.fit, speed.bare, speed.share, report.gflops, report.augmented)
    assert all(math.isfinite(figure) and figure > 0 for figure in figures)
    table = markdown(report).splitlines()
    assert [line.count("|") for line in table[:3]] == [5, 5, 5]
    assert table[2].startswith("| resnet8 | ")
    assert "16 random 32x32 images" in table[-1]


def test_different_work_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "bare_loop", lambda net, data, recipe, seed: net)
    with pytest.raises(RuntimeError, match="did not do the same work"):
        measure([BACKBONE], rounds=1, images=8)


def run(*arguments: str) -> tuple[int, str, str]:
    app = Typer()
    app.command()(main)
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


def test_the_command_prints_a_table_and_writes_only_where_told(tmp_path: Path) -> None:
    out = tmp_path / "speed.md"
    code, text, _ = run("--backbone", "resnet8", "--rounds", "1", "--images", "8", "--out", str(out))
    assert code == 0
    assert "resnet8" in text
    assert out.read_text().startswith("| backbone | fit [img/CPU-s] |")
    assert list(tmp_path.iterdir()) == [out]


def test_a_wrong_name_is_named() -> None:
    code, _, error = run("--backbone", "resnet9")
    assert code == 2
    assert "did you mean 'resnet8'?" in error
