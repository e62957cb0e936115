"""Who may import whom, what may stand where: the walls of the house, read off the source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

from attacks import ATTACKS
from attacks.base import Attack
from defenses import DEFENSES
from defenses.base import Defense

ROOT = Path(__file__).parents[1]
PACKAGES = ("models", "attacks", "defenses", "benchmark")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
HOMES = {
    "wandb": {"benchmark/tracking.py"},
    "pydantic": {"benchmark/settings/schema.py"},
    "matplotlib": {"benchmark/report/panels.py", "benchmark/report/render.py"},
    "seaborn": {"benchmark/report/panels.py"},
    "pytorch_lightning": {"models/loop.py"},
    "ray": {"benchmark/run/on_ray.py"},
    "filelock": {"benchmark/storage/files.py"},
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(source: str) -> set[str]:
    """Top-level packages imported anywhere in ``source``, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def calls(source: str) -> set[str]:
    """Dotted names of everything called in ``source``."""
    return {ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}


def texts() -> Iterator[Path]:
    """Every text file of the project that is written by hand or committed as a result."""
    folders = [*PACKAGES, "tests", "results", ".ci"]
    top = [path for path in ROOT.iterdir() if path.name == ".gitignore" or not path.name.startswith(".")]
    files = [*top, *(path for folder in folders for path in (ROOT / folder).rglob("*"))]
    binary = {".pyc", ".png", ".pdf", ".safetensors"}
    return (path for path in files if path.is_file() and path.suffix not in binary and path.stat().st_size < 2_000_000)


def test_the_readers_of_source_see_what_they_should() -> None:
    source = "import os.path\ndef f():\n    from wandb.sdk import x\n    torch.load(1)\nfrom . import y\n"
    assert imported(source) == {"os", "wandb"}
    assert calls(source) == {"torch.load"}
    assert len(MODULES) > 20


def test_import_contracts_hold(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    code = lint_imports(no_cache=True)
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert re.search(r"\d+ kept, 0 broken", printed)


@pytest.mark.parametrize("library", HOMES)
def test_a_library_has_one_home(library: str) -> None:
    assert {name(path) for path in MODULES if library in imported(path.read_text())} <= HOMES[library]


def lengths(source: str) -> dict[str, int]:
    """Lines of every function of a module, by name."""
    found = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in found}


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_modules_and_functions_are_short(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= 450
    assert not {function: lines for function, lines in lengths(source).items() if lines > 60}


def test_a_folder_of_the_benchmark_holds_few_modules() -> None:
    """At most 12 modules in a folder; the exhibits are one file a question, like the methods."""
    folders = {path.parent for path in MODULES if name(path).startswith("benchmark/") and path.parent.name != "exhibits"}
    for folder in folders:
        assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= 12, name(folder)


def test_the_whole_is_simple() -> None:
    """McCabe complexity of at most 10 everywhere."""
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "C901", "--output-format", "concise", *PACKAGES],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_siblings_do_not_meet_and_nothing_looks_up() -> None:
    allowed = {"models": set(), "attacks": {"models"}, "defenses": {"models"}, "benchmark": {"models", "attacks", "defenses"}}
    for path in MODULES:
        package = path.relative_to(ROOT).parts[0]
        others = (imported(path.read_text()) & set(PACKAGES)) - {package}
        assert others <= allowed[package], name(path)


def test_no_weights_are_unpickled_outside_their_home() -> None:
    assert {name(path) for path in MODULES if calls(path.read_text()) & {"torch.load", "pickle.load", "pickle.loads"}} <= {
        "models/weights.py"
    }


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_a_module_says_what_it_is_and_prints_nothing(path: Path) -> None:
    source = path.read_text()
    words = ast.get_docstring(ast.parse(source))
    assert words
    assert "placeholder" not in words
    assert "print" not in calls(source)
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", source)


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    places = [f"{place}/" for place in (Path.home(), ROOT) if len(place.parts) > 1]
    homes = re.compile(r"(?<![\w.])/(?:home|Users)/\w")
    for path in texts():
        text = path.read_text(errors="replace")
        assert not [place for place in places if place in text], name(path)
        assert not homes.search(text), name(path)


def test_no_file_names_a_package_index() -> None:
    options = re.compile(r"(?:index|extra)[-_]" + "url|find-" + "links|trusted-" + "host", re.IGNORECASE)
    assert options.search("--extra-index" + "-url https://example.org")
    for path in texts():
        assert not options.search(path.read_text(errors="replace")), name(path)
    assert "://" not in (ROOT / "constraints.txt").read_text()


@pytest.mark.parametrize("method", [*ATTACKS, *DEFENSES], ids=lambda method: method.name)
def test_a_method_has_a_test_file_of_its_own(method: type[Attack] | type[Defense]) -> None:
    package, module = method.__module__.split(".")
    assert (ROOT / "tests" / package / f"test_{module}.py").is_file()


@pytest.mark.parametrize("path", sorted({*(ROOT / "attacks").glob("*.py"), *(ROOT / "defenses").glob("*.py")}), ids=name)
def test_a_method_file_opens_with_its_paper(path: Path) -> None:
    package, module = path.parent.name, path.stem
    mine = [method for method in (*ATTACKS, *DEFENSES) if method.__module__ == f"{package}.{module}"]
    if not mine or all(getattr(method, "control", False) for method in mine):
        return
    words = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert re.search(r"\b(?:19|20)\d\d\b", words), f"{name(path)}: no year of publication"
    for heading in ("Needs:", "Edits:", "Dial:", "Deviations from the paper:"):
        assert heading in words, f"{name(path)}: {heading} is missing"
