"""What a second worker gives: measured in runs of their own, drawn from what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmark.proof import scaling
from benchmark.proof.scaling import Measured, draw
from models.spec import BadInput

TINY = """
title = "tiny"
seeds = [0, 1]
dataset = { source = "digits", clean_fraction = 0.2, train_limit = 100, test_limit = 40 }
recipe = { epochs = 0 }
backbone = [{ name = "vgg11-bn", width = 2, hidden = 8 }]
attack = [{ name = "badnets" }]
[[defense]]
name = "none"
[[defense]]
name = "clp"
tracks = ["model"]
"""


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    (tmp_path / "tiny.toml").write_text(TINY)
    return str(tmp_path / "tiny.toml")


def cells(page: str, executor: str, workers: int) -> list[str]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    (found,) = [line for line in lines if line[:2] == [executor, str(workers)]]
    return found


def test_efficiency_is_against_the_same_executors_single_worker() -> None:
    page = draw(
        [
            Measured("local", 1, 100.0, 40, 0.0, 0.005, same=True), Measured("local", 2, 62.5, 40, 12.5, 0.011, same=True),
            Measured("ray", 1, 120.0, 40, 20.0, 0.02, same=True), Measured("ray", 2, 80.0, 40, 20.0, 0.03, same=False),
        ],
        "the command",
    )  # fmt: skip
    # 100 / (2 x 62.5) = 0.8, without starting 100 / (2 x 50) = 1; 120 / 160 = 0.75, without starting 100 / 120.
    assert cells(page, "local", 2)[3:] == ["62", "0.80", "1.00", "12.5", "11.0", "yes"]
    assert cells(page, "ray", 2)[3:] == ["80", "0.75", "0.83", "20.0", "30.0", "NO"]
    assert cells(page, "ray", 1)[3:] == ["120", "", "", "20.0", "20.0", "yes"]
    assert "the command" in page


def test_a_part_is_run_from_an_empty_store_and_its_stages_counted(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = scaling._whole(tiny, "seed=0", "local", 1, tmp_path)
    assert found["stages"] == 2 + 2  # victim and twin, two cells
    assert found["seconds"] > 0
    assert (tmp_path / "results" / "tiny" / "rows.csv").is_file()
    monkeypatch.setattr(scaling, "COUNTS", (2, 12))
    standing = scaling._cached(tiny, "local", 1, tmp_path / "standing")
    assert standing["per_stage"] < 1
    assert standing["start"] < 60


@pytest.mark.slow
def test_both_ways_are_measured_and_drawn(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(function: str, arguments: tuple[object, ...]) -> dict[str, float]:
        answer: dict[str, float] = getattr(scaling, function)(*arguments)
        return answer

    monkeypatch.setattr(scaling, "_apart", here)
    monkeypatch.setattr(scaling, "COUNTS", (2, 6))
    app = scaling.typer.Typer()
    app.command()(scaling.main)
    done = CliRunner().invoke(app, ["-m", tiny, "--executor", "local", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "WORKERS.md").read_text()
    assert cells(page, "local", 2)[-1] == "yes"
    assert "--matrix tiny.toml --only seed=0" in page
    assert str(tmp_path) not in page
    wrong = CliRunner().invoke(app, ["-m", tiny, "--executor", "rays", "--out", str(tmp_path)])
    assert wrong.exit_code == 2


def test_what_fails_in_an_interpreter_of_its_own_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^nowhere seed=0 local 1: .*BadInput: unknown matrix 'nowhere'"):
        scaling._apart("_whole", ("nowhere", "seed=0", "local", 1, tmp_path))
