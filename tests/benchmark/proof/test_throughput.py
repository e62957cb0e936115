"""The speed measurement runs, measures the same work twice, and prints a complete table."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from typer import Typer
from typer.testing import CliRunner

from benchmark.proof import throughput
from benchmark.proof.throughput import bare_loop, main, markdown, measure, random_images
from models.backbone import GlobalAverage, Network, Normalise
from models.classifier import Classifier
from models.recipe import Recipe
from models.resnet import ResNet8
from models.training import fit

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


def test_operations_by_hand() -> None:
    features = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False), GlobalAverage())
    net = Network(Normalise([0.5] * 3, [0.25] * 3), features, nn.Sequential(nn.Linear(5, 10)))
    conv, linear = 2 * 3 * 5 * 9 * 8 * 8, 2 * 5 * 10
    # Backward: the gradient of the weights costs as much again, that of the input too, which the first layer does not need.
    assert throughput.flops(net, (3, 8, 8)) == 2 * conv + 3 * linear


def test_share_of_the_peak() -> None:
    assert throughput.utilisation(1000, 66.9e9, "NVIDIA H200", "reference") == pytest.approx(1.0)
    assert throughput.utilisation(500, 989.4e9, "NVIDIA H100 80GB HBM3", "bf16") == pytest.approx(0.5)
    assert math.isnan(throughput.utilisation(500, 1e9, "a device nobody listed", "bf16"))


def test_a_pace_is_whole() -> None:
    recipe = Recipe(epochs=7, batch=8)
    found = throughput.pace(BACKBONE, "mine", recipe, random_images(24), 2, "a device nobody listed")
    assert found.trained > 0
    assert found.evaluated > 0
    assert found.seconds == pytest.approx(7 * throughput.TRAIN_SIZE / found.trained)
    assert math.isnan(found.share)
    assert (found.backbone, found.recipe, found.batch) == ("resnet8", "mine", 8)


@pytest.mark.slow
def test_processes_that_share_a_device() -> None:
    assert throughput.pace_together(BACKBONE, Recipe(batch=8), 16, rounds=1, processes=2) > 0


def test_what_is_measured_on_a_gpu() -> None:
    found = throughput.named_recipes()
    assert [recipe.precision for recipe in found.values()] == ["reference", "tf32", "bf16", "bf16"]
    assert found["literature, reference"] == Recipe()
    assert found["fast"].epochs == 24


def test_the_gpus_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    line = throughput.Pace("preact-resnet18", "fast", "bf16", 512, 25_000.4, 90_000.0, 0.0841, 45.6)
    monkeypatch.setattr(throughput, "default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(throughput, "paces", lambda *arguments: (line,))
    code, text, _ = run("--rounds", "3", "--out", str(tmp_path / "gpu.md"))
    assert code == 0
    assert "25,000" in text
    table = (tmp_path / "gpu.md").read_text().splitlines()
    assert {row.count("|") for row in table[:3]} == {9}
    assert table[2] == "| preact-resnet18 | fast | 512 | 25,000 | 8.4% | 46 | - | 90,000 |"
    assert table[-1].startswith("NVIDIA H200; 47,500 random 32x32 images, width 64, medians of 3 rounds")


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
    code, _, error = run("--backbone", "resnet7")
    assert code == 2
    assert "did you mean 'resnet9'?" in error
