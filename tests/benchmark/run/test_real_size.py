"""The commands of benchmark/run/README.md for full-size networks, on narrow networks and a few digits."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import benchmark.__main__ as cli
from benchmark.settings.load import find_matrix, load_matrix
from benchmark.storage.rows import Row, read
from defenses import DEFENSES

ROOT = Path(__file__).resolve().parents[3]
LARGE = ("cifar10", "cifar100", "gtsrb", "cifar10-fast")


def tiny_copy(name: str, folder: Path) -> Path:
    """The shipped matrix with its data, widths and lengths made tiny, and nothing else."""
    text = find_matrix(name).read_text(encoding="utf-8")
    data = 'source = "digits"\nclean_fraction = 0.2\ntrain_limit = 200\ntest_limit = 60'
    for wanted, instead in (
        (r'source = "[\w-]+"\nclean_fraction = 0.05', data),
        (r"width = 64", "width = 2"),
        (r'preset = "fast"', 'preset = "fast"\nepochs = 1\nbatch = 32'),
        (r"(?m)^epochs = \d\d+$", "epochs = 1"),
        (r"seeds = \[0, 1, 2\]", "seeds = [0]"),
    ):
        text, found = re.subn(wanted, instead, text)
        assert found or "epochs" in wanted or "preset" in wanted, wanted
    path = folder / f"tiny-{name}.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", LARGE)
def test_a_real_size_matrix_holds_the_eight_defenses_and_the_controls_on_three_seeds(name: str) -> None:
    matrix = load_matrix(find_matrix(name))
    met = {cell.defense.name for cell in matrix.cells}
    eight = {"fine-pruning", "anp", "clp", "holder-pruning", "benign-salience", "abl", "dbd", "hid"}
    assert eight | {"none", "random-pruning", "training-from-scratch", "perfect-filter", "fine-tuning"} <= met
    assert met <= {kind.name for kind in DEFENSES}
    assert {scenario.seed for scenario in matrix.scenarios} == {0, 1, 2}
    assert {scenario.backbone.width for scenario in matrix.scenarios} == {64}
    one_class = {"cifar10": 0.1, "cifar10-q95": 0.1, "cifar100": 0.01, "gtsrb": 0.005}
    for scenario in matrix.scenarios:
        if scenario.attack is not None and scenario.attack.clean_label:
            assert scenario.plan.rate < one_class[scenario.dataset.source]


def test_a_slice_of_a_tiny_copy_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmark.present.present", lambda *arguments, **settings: None)
    matrix = tiny_copy("cifar10-fast", tmp_path)
    command = ["run", "--matrix", str(matrix), "--processes", "1", "--no-wandb", "--results", str(tmp_path / "results")]
    command += ["--cache", str(tmp_path / "cache"), "--only"]
    rows = tmp_path / "results" / matrix.stem / "rows.csv"
    for only in ("attack=badnets|blended,defense=none", "seed=0,attack=badnets,defense=none|clp|holder-pruning (bound)"):
        done = CliRunner().invoke(cli.app, [*command, only])
        assert done.exit_code == 0, done.output
    found = read(rows, Row)
    assert set(found["status"]) <= {"ok", "refused"}
    assert [tuple(pair) for pair in found[["attack", "defense"]].drop_duplicates().to_numpy()] == [
        ("badnets", "none"), ("badnets", "clp"), ("badnets", "holder-pruning (bound)"), ("blended", "none"),
    ]  # fmt: skip


def test_slices_are_taken_in_the_order_of_the_file() -> None:
    made = subprocess.run(
        ["make", "-s", "slices", "STAMP=", f"RUN={sys.executable}", "LEVELFIELD=echo", "MATRIX=cifar10-fast", "ONLY=seed=0"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=900,
        # `make test ARGS=...` hands its own variables on to every make below it.
        env={name: value for name, value in os.environ.items() if name not in ("ARGS", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS")},
    ).stdout.splitlines()  # fmt: skip
    assert made[0] == "run --matrix cifar10-fast --only seed=0,defense=none"
    labels = [line.partition("defense=")[2] for line in made]
    assert labels[1:4] == ["fine-tuning", "fine-pruning", "anp"]
    assert labels[-4:] == ["abl", "dbd", "hid", "hid without pruning"]


def test_without_pydantic_one_line_says_what_to_do() -> None:
    hidden = (
        "import sys; sys.modules['pydantic'] = None; sys.argv = ['benchmark', 'run']\n"
        "from benchmark.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", hidden], cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "pip install pydantic" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_run_needs_neither_wandb_nor_ray() -> None:
    hidden = (
        "import sys; sys.modules['wandb'] = sys.modules['ray'] = None\n"
        "import benchmark.__main__, benchmark.run.session, benchmark.present, benchmark.tracking, benchmark.proof.throughput\n"
        "from attacks import ATTACKS; from defenses import DEFENSES"
    )
    done = subprocess.run([sys.executable, "-c", hidden], cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
    assert (done.returncode, done.stderr) == (0, "")
