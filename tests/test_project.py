"""The make file, the metadata and the tables of the documentation agree with the project; test_docs.py checks the code blocks."""

from __future__ import annotations

import re
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from benchmark.data.sources import DATASETS
from benchmark.settings.load import matrix_names

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = set(re.findall(r"^([a-z]+):.*## ", MAKEFILE, re.MULTILINE))


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


def test_the_table_of_matrices_is_complete() -> None:
    section = (ROOT / "benchmark" / "settings" / "README.md").read_text()
    named = set(re.findall(r"^\| `([a-z0-9-]+)` \|", section, re.MULTILINE))
    assert named == set(matrix_names())


def test_the_table_of_data_sets_is_complete() -> None:
    section = (ROOT / "benchmark" / "data" / "README.md").read_text()
    listed = set(re.findall(r"`([A-Za-z0-9:-]+)`", "\n".join(re.findall(r"^\| (`.*?) \|", section, re.MULTILINE))))
    assert listed == {source.name for source in DATASETS}


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
