"""The command line as a person meets it: verbs, one-line errors with exit status 2, nothing half done."""

from __future__ import annotations

import io
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

import benchmark.__main__ as cli
from benchmark.present import draw_report
from models import BACKBONES
from models.spec import BadInput, lookup
from models.weights import save_weights

ROOT = Path(__file__).resolve().parents[2]
runner = CliRunner()
MATRIX = """
title = "two defenses"
seeds = [0]
[dataset]
source = "digits"
clean_fraction = 0.2
train_limit = 150
test_limit = 50
[recipe]
epochs = 1
batch = 32
crop = 0
flip = false
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
[[defense]]
name = "pruning"
tracks = ["model+clean"]
scopes = ["head"]
levels = [0.0, 0.5]
"""


@pytest.fixture
def matrix(tmp_path: Path) -> Path:
    path = tmp_path / "two.toml"
    path.write_text(MATRIX)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    backbone = lookup("backbone", BACKBONES, "vgg11-bn")(width=2, hidden=8)
    path = tmp_path / "mine.safetensors"
    save_weights(backbone.build(10, (1, 16, 16), [0.3], [0.4], 0), path)
    return path


def said(*arguments: str) -> str:
    """What the BadInput of a command says."""
    result = runner.invoke(cli.app, list(arguments))
    assert isinstance(result.exception, BadInput), result.output
    message = str(result.exception)
    assert "\n" not in message
    return message


def test_a_bad_input_is_one_line_on_stderr_and_exit_status_two() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmark", "run", "-m", "quik"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "error: unknown matrix 'quik'; did you mean 'quick'?"
    assert done.stdout == ""


def test_list_names_everything() -> None:
    out = runner.invoke(cli.app, ["list"]).output
    for name in ("quick", "digits", "resnet8", "badnets", "holder-pruning", "model+clean", "self-supervised", "paper, cpu"):
        assert name in out


@pytest.mark.slow
def test_run_then_tables_plots_report_and_show(matrix: Path, tmp_path: Path) -> None:
    places = ["--results", str(tmp_path / "results")]
    first = runner.invoke(
        cli.app, ["run", "-m", str(matrix), *places, "--cache", str(tmp_path / "cache"), "--processes", "1", "--no-wandb"]
    )
    assert first.exit_code == 0, first.output
    folder = tmp_path / "results" / "two"
    for name in ("rows.csv", "curves.csv", "timings.csv", "manifest.json", "matrix.toml", "README.md", "plots/triggers.png"):
        assert (folder / name).is_file(), name
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}
    for verb in ("tables", "plots", "report"):
        assert runner.invoke(cli.app, [verb, *places]).exit_code == 0
    again = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}
    assert again == before
    assert "model" in runner.invoke(cli.app, ["show", "-m", "two", *places]).output
    assert "no results of a matrix 'tow'; did you mean 'two'" in said("tables", "-m", "tow", *places)


def test_tables_without_results(tmp_path: Path) -> None:
    assert "no results there; run a matrix first" in said("tables", "--results", str(tmp_path / "none"))


def test_results_are_read_from_the_own_run_or_else_as_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LEVELFIELD_RESULTS", raising=False)
    read: list[str] = []
    monkeypatch.setattr("benchmark.present.draw_tables", lambda folder, console: read.append(str(folder)))
    assert "runs, results: no results there" in said("tables")
    for folder in ("results/a", "results/b", "runs/b", "runs/c"):
        Path(folder).mkdir(parents=True)
        Path(folder, "rows.csv").touch()
    Path("runs/a").mkdir()  # a run that has no rows yet
    out = runner.invoke(cli.app, ["tables"]).output
    assert read == ["results/a", "runs/b", "runs/c"]
    assert out == "reading results/a (committed)\nreading runs/b (your run)\nreading runs/c (your run)\n"
    assert runner.invoke(cli.app, ["tables", "-m", "b"]).output == "reading runs/b (your run)\n"
    read.clear()
    assert runner.invoke(cli.app, ["tables", "--results", "results"]).output == ""
    assert read == ["results/a", "results/b"]


def test_a_run_writes_runs_and_the_committed_folder_only_to_publish(
    matrix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LEVELFIELD_RESULTS", raising=False)
    monkeypatch.setattr("benchmark.present.present", lambda *_, **__: None)
    command = ["run", "-m", str(matrix), "--processes", "1", "--only", "defense=none"]
    first = runner.invoke(cli.app, command)
    assert first.exit_code == 0, first.output
    assert "compared" not in first.output, "nothing is committed yet"
    assert Path("runs/two/rows.csv").is_file()
    assert not Path("results").exists()
    assert "compared" not in runner.invoke(cli.app, [*command, "--publish"]).output
    assert Path("results/two/rows.csv").read_bytes() == Path("runs/two/rows.csv").read_bytes()
    assert "compared with results/two: 5 of 5 rows are identical" in runner.invoke(cli.app, command).output
    assert "leave --results" in said(*command, "--publish", "--results", "elsewhere")


def test_the_front_page_reports_committed_rows_alone(tmp_path: Path) -> None:
    page = "<!-- words:natural:begin -->\n<!-- words:natural:end -->\n"
    (tmp_path / "README.md").write_text(page)
    for root in ("runs", "results"):
        assert (tmp_path / "README.md").read_text() == page
        shutil.copytree(ROOT / "results" / "natural", tmp_path / root / "natural")
        draw_report(tmp_path / root / "natural", Console(file=io.StringIO()))
    assert "results/natural/README.md" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_show_my_model_with_and_without_an_attack(matrix: Path, checkpoint: Path, tmp_path: Path) -> None:
    places = ["--results", str(tmp_path / "results"), "--cache", str(tmp_path / "cache"), "-m", str(matrix)]
    common = ["show-my-model", "--checkpoint", str(checkpoint), "--backbone", "vgg11-bn", "--dataset", "digits", *places]
    alone = runner.invoke(cli.app, common)
    assert alone.exit_code == 0, alone.output
    folder = tmp_path / "results" / "my-model" / "mine"
    lines = (folder / "defenses.csv").read_text().splitlines()
    assert len(lines) == 1 + 3
    assert all(line.split(",")[3:5] == ["", ""] for line in lines[1:])  # no attack: neither ASR nor RA
    weights = load_file(folder / "clp-whole.safetensors")
    assert "head.0.weight" in weights
    attacked = runner.invoke(cli.app, [*common, "--attack", "badnets"])
    assert attacked.exit_code == 0, attacked.output
    lines = (folder / "defenses.csv").read_text().splitlines()
    assert all(line.split(",")[3] != "" for line in lines[1:])


def test_show_my_model_names_what_is_wrong(matrix: Path, checkpoint: Path, tmp_path: Path) -> None:
    places = ["--results", str(tmp_path / "results"), "--cache", str(tmp_path / "cache"), "-m", str(matrix)]

    def ask(file: Path, backbone: str = "vgg11-bn", dataset: str = "digits", *more: str) -> str:
        return said("show-my-model", "--checkpoint", str(file), "--backbone", backbone, "--dataset", dataset, *places, *more)

    assert "did you mean 'vgg11-bn'" in ask(checkpoint, "vgg11bn")
    assert "did you mean 'digits'" in ask(checkpoint, "vgg11-bn", "digit")
    assert "did you mean 'badnets'" in ask(checkpoint, "vgg11-bn", "digits", "--attack", "badnet")
    assert "mine.safetensors" in ask(checkpoint, "resnet8")
    assert "cannot be read" in ask(tmp_path / "none.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(checkpoint.read_bytes()[:-50])
    assert "cut.safetensors" in ask(cut)
    odd = tmp_path / "odd.pt"
    torch.save({"weights": [1, 2, 3]}, odd)
    assert "odd.pt" in ask(odd)
    assert not (tmp_path / "results").exists()


def test_an_interrupt_while_pictures_are_drawn_says_how_to_go_on(
    matrix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmark.present.present", stopped)
    where = ["--results", str(tmp_path / "results"), "--cache", str(tmp_path / "cache")]
    done = runner.invoke(cli.app, ["run", "-m", str(matrix), "--processes", "1", "--no-wandb", *where])
    assert done.exit_code == 130
    assert "issue the same command again to go on" in done.stdout
    assert (tmp_path / "results" / "two" / "rows.csv").is_file()


class Dying:
    """Is interrupted while it is destroyed, where Python lets no exception out."""

    def __del__(self) -> None:
        raise KeyboardInterrupt


def test_an_interrupt_that_falls_into_a_destructor_is_heard(
    matrix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    went_on: list[bool] = []

    def run(*_: object, **__: object) -> None:
        Dying()
        time.sleep(200)
        went_on.append(True)

    monkeypatch.setattr("benchmark.run.session.run_matrix", run)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    begun = time.monotonic()
    try:
        done = runner.invoke(cli.app, ["run", "-m", str(matrix), "--no-wandb", "--results", str(tmp_path)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.exit_code == 130
    assert not went_on
    assert time.monotonic() - begun < 150


def test_what_else_goes_wrong_in_a_destructor_is_told_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_type))

    class Odd:
        def __del__(self) -> None:
            raise ValueError

    with cli._heard():
        Odd()
    assert told == [ValueError]
