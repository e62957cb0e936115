"""The examples for newcomers: they run as plug-ins, and they pass the suite's own contract tests once they are added to it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attacks.base import Plan, poison
from benchmark.rules.tracks import view_for
from benchmark.settings.load import load_matrix
from benchmark.settings.provenance import matrix_of, stale
from defenses.base import Knowledge
from models.images import ImageSet

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "benchmark" / "examples"
ADDED = [
    ("defenses", "my_defense", "DEFENSES", "LargestBound"),
    ("attacks", "my_attack", "ATTACKS", "Stripe"),
    ("models", "my_backbone", "BACKBONES", "ThreeConvs"),
]


def test_the_matrix_of_the_examples_names_them_all() -> None:
    matrix = load_matrix(EXAMPLES / "mine.toml")
    assert {name for name, _ in matrix.plugins} == {f"{file}.py" for _, file, _, _ in ADDED}
    assert {cell.scenario.backbone.name for cell in matrix.cells} == {"three-convs"}
    assert {cell.scenario.attack_label for cell in matrix.cells} == {"stripe", "blended"}
    assert {cell.defense.name for cell in matrix.cells} == {"largest-bound", "none"}


def test_the_defense_offers_a_dial() -> None:
    matrix = load_matrix(EXAMPLES / "mine.toml")
    cell = next(cell for cell in matrix.cells if cell.scope.value == "whole" and cell.defense.name == "largest-bound")
    backbone = cell.scenario.backbone
    net = backbone.build(4, (1, 16, 16), [0.5], [0.25], seed=0)
    view = view_for(
        cell.grants,
        cell.defense,
        cell.scope,
        {Knowledge.MODEL: lambda: net},
        fresh=lambda seed: backbone.build(4, (1, 16, 16), [0.5], [0.25], seed=seed),
        num_classes=4,
        seed=0,
        recipe=cell.scenario.recipe,
    )
    offered = list(cell.defense.candidates(view))
    assert [candidate.dial for candidate in offered if candidate.is_default] == [0.05]
    assert offered[0].pruned == 0
    assert [candidate.pruned for candidate in offered] == sorted(candidate.pruned for candidate in offered)
    assert offered[-1].pruned > 0


def test_the_attack_poisons() -> None:
    attack = next(cell.scenario.attack for cell in load_matrix(EXAMPLES / "mine.toml").cells if cell.scenario.attack)
    data = ImageSet(torch.zeros(40, 1, 8, 8, dtype=torch.uint8), torch.arange(40) % 4, 4)
    plan = Plan(rate=0.25, target=1)
    poisoned = poison(data, attack, attack.craft(data, plan, 0), plan, 0)
    marked = poisoned.visible.images[:, 0, :, :2].flatten(1).eq(255).all(1)
    assert int(marked.sum()) == 10
    assert poisoned.visible.labels[marked].eq(1).all()
    assert not poisoned.visible.images[..., 2:].any()


def test_pages_of_a_matrix_with_plugins_are_drawn_without_running_them(tmp_path: Path) -> None:
    """They lie in plugins/ beside the rows; the report of every such run once ended in "no such file"."""
    shutil.copy(EXAMPLES / "mine.toml", tmp_path / "matrix.toml")
    (tmp_path / "manifest.json").write_text('{"settings": "0"}')
    assert matrix_of(tmp_path).cells == ()
    assert not stale(tmp_path)


@pytest.mark.slow
def test_the_examples_pass_the_contract_tests_once_added(tmp_path: Path) -> None:
    """As CONTRIBUTING.md describes: the file, a line in the catalogue, a test file. Tried on a copy of the project."""
    for package in ("models", "attacks", "defenses", "benchmark", "tests"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package, file, catalogue, name in ADDED:
        shutil.copy(EXAMPLES / f"{file}.py", tmp_path / package)
        line = f"\nfrom {package}.{file} import {name}\n\n{catalogue} = (*{catalogue}, {name})\n"
        with (tmp_path / package / "__init__.py").open("a") as init:
            init.write(line)
        (tmp_path / "tests" / package / f"test_{file}.py").write_text('"""A test of its own."""\n')
    listed = tmp_path / "tests" / "models" / "test_backbones.py"
    text, found = re.subn(r"(?m)^NAMES = \[([^\]]*)\]", r'NAMES = [\1, "three-convs"]', listed.read_text())
    assert found
    listed.write_text(text)
    names = ("contracts/test_attacks", "contracts/test_defenses", "models/test_backbones", "test_architecture")
    tests = [f"tests/{name}.py" for name in names]
    only = "largest-bound or stripe or three-convs or table_order or my_defense or my_attack"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *tests, "-k", only],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) >= 40, done.stdout[-2000:]
    assert "failed" not in done.stdout

