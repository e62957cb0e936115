"""What the README, the make file and the metadata promise, held against what is there."""

from __future__ import annotations

import re
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from packaging.requirements import Requirement

from attacks.base import Attack, Plan, poison
from benchmark import __main__ as command_line
from benchmark.data.sources import DATASETS
from benchmark.rules.tracks import view_for
from benchmark.settings.load import load_matrix, matrix_names
from defenses.base import Knowledge
from models.images import ImageSet

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = set(re.findall(r"^([a-z]+):.*## ", MAKEFILE, re.MULTILINE))
VERBS = set(typer.main.get_command(command_line.app).commands)  # type: ignore[attr-defined]


def block(title: str) -> str:
    """The README's code block under ``<!-- example:title -->``."""
    found = re.search(rf"<!-- example:{title} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found, title
    return found[1]


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", name).lower(): pinned for name, pinned in pins}


def test_make_alone_prints_every_target() -> None:
    printed = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    wanted = "help install benchmark tables plots report paper dashboard test check fix clean"
    assert set(wanted.split()) <= TARGETS
    for target in TARGETS:
        assert f"make {target}" in printed
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert phony
    assert set(phony[1].split()) == TARGETS


def test_the_commands_of_the_readme_exist() -> None:
    assert {"benchmark", "test", "paper", "dashboard", "check"} <= TARGETS
    shell = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)) + "\n".join(re.findall(r"`(make [^`]*)`", README))
    used = set(re.findall(r"\bmake (?:PYTHON=\S+ )?([a-z]+)", shell))
    assert {"benchmark", "test"} <= used <= TARGETS
    verbs = set(re.findall(r"-m benchmark ([a-z-]+)", README)) | set(re.findall(r"\$\(LEVELFIELD\) ([a-z-]+)", MAKEFILE))
    assert {"show-my-model", "run", "dashboard"} <= verbs <= VERBS


def test_the_matrices_of_the_readme_exist() -> None:
    section = README[README.index("| matrix |") : README.index("make benchmark MATRIX=smoke")]
    named = set(re.findall(r"^\| `([a-z0-9-]+)` \|", section, re.MULTILINE))
    assert named == set(matrix_names())


def test_the_datasets_of_the_readme_exist() -> None:
    section = README[README.index("## Data") : README.index("## Defend a model")]
    listed = set(re.findall(r"`([A-Za-z0-9:-]+)`", "\n".join(re.findall(r"^\| (`.*?) \|", section, re.MULTILINE))))
    assert listed == {source.name for source in DATASETS}


def test_the_readme_is_whole() -> None:
    assert README.index("<!-- headline:begin -->") < README.index("<!-- headline:end -->") < README.index("## Two commands")
    for wanted in ("LEVELFIELD_DATA", "WANDB_MODE=online", "wandb sync", "CITATION.cff", "Apache-2.0", "## Limitations"):
        assert wanted in README


def test_the_defense_of_the_readme_runs(tmp_path: Path) -> None:
    (tmp_path / "largest_bound.py").write_text(block("defense"))
    (tmp_path / "mine.toml").write_text(block("matrix"))
    assert len([line for line in block("defense").splitlines() if line.strip()]) < 30
    matrix = load_matrix(tmp_path / "mine.toml")
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


def test_the_attack_of_the_readme_poisons() -> None:
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(block("attack"), "README.md", "exec", dont_inherit=True), names)  # the example is ours, and this is its test
    attack = names["Stripe"]()
    assert isinstance(attack, Attack)
    data = ImageSet(torch.zeros(40, 1, 8, 8, dtype=torch.uint8), torch.arange(40) % 4, 4)
    plan = Plan(rate=0.25, target=1)
    poisoned = poison(data, attack, attack.craft(data, plan, 0), plan, 0)
    marked = poisoned.visible.images[:, 0, :, :2].flatten(1).eq(255).all(1)
    assert int(marked.sum()) == 10
    assert poisoned.visible.labels[marked].eq(1).all()
    assert not poisoned.visible.images[..., 2:].any()


def test_constraints_pin_what_is_tested() -> None:
    pins = constraints()
    assert (pins["torch"], pins["torchvision"]) == ("2.11.0", "0.26.0")
    extras = PROJECT["optional-dependencies"]["dev"]
    for text in [*PROJECT["dependencies"], *extras]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[wanted.name], prereleases=True), text
    assert "levelfield" not in pins


@pytest.mark.parametrize("package", ["torch", "numpy", "pandas", "pytorch-lightning", "safetensors", "wandb"])
def test_the_tests_run_on_the_pinned_versions(package: str) -> None:
    assert version(package).split("+")[0] == constraints()[package], "run 'make install', or update constraints.txt"


def test_licence_citation_and_changelog_agree() -> None:
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert citation["version"] == PROJECT["version"]
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_ci_is_executable_bash() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert "set -euo pipefail" in script.read_text()
