"""What the documentation says works: code blocks, commands, options, links. README.md stays short."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from benchmark import __main__ as command_line

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CONTRIBUTING = ROOT / ".github" / "CONTRIBUTING.md"
PACKAGES = ("attacks", "defenses", "models", "benchmark")
DOCS = [README, CONTRIBUTING, ROOT / "results" / "README.md"]
DOCS += sorted(path for package in PACKAGES for path in (ROOT / package).rglob("README.md"))
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z]+):.*## ", MAKEFILE, re.MULTILINE))
VARIABLES = set(re.findall(r"^([A-Z]+) \?=", MAKEFILE, re.MULTILINE))
OTHERS = {"cd", "head=$(scontrol", "srun", "export", "source", "python3 -m pip"}
"""Commands of a machine without a network and of a cluster, which cannot be tried here."""


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, *kinds: str) -> list[str]:
    """The fenced code blocks of these languages."""
    return [text for kind, text in re.findall(r"(?ms)^```(\w+)\n(.*?)^```", path.read_text()) if kind in kinds]


def prose(path: Path) -> str:
    return re.sub(r"(?ms)^```.*?^```", "", path.read_text())


def commands(path: Path) -> Iterator[list[str]]:
    """Every command of the shell blocks and, of the prose, those of make and of the benchmark."""
    for text in blocks(path, "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words
    for text in re.findall(r"`((?:make|python -m benchmark)[^`]*)`", prose(path)):
        yield shlex.split(text.replace("\\|", "|"))


def check_options(verb: str, words: list[str]) -> None:
    """Whether the command line has this verb and these options; nothing is run."""
    commands = typer.main.get_command(command_line.app).commands  # type: ignore[attr-defined]
    assert verb in commands, verb
    known = {option for parameter in commands[verb].params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("-")} <= known, words


def check_make(words: list[str]) -> None:
    settings = dict(word.split("=", 1) for word in words if "=" in word)
    assert set(settings) <= VARIABLES, settings
    target = [word for word in words if "=" not in word]
    assert set(target) <= TARGETS, words
    assert len(target) <= 1
    matrix = settings.get("MATRIX", "quick")
    if not matrix.startswith(("path/", "NAME")):
        found = (ROOT / matrix).is_file() or (ROOT / "benchmark" / "settings" / "matrices" / f"{matrix}.toml").is_file()
        assert found, matrix
    if target in (["benchmark"], ["slices"]):
        check_options("run", shlex.split(settings.get("ARGS", "")))


def check_command(words: list[str]) -> None:
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words[0] == "env":
        words = words[2:]
    program = Path(words[0]).name
    if program == "make":
        check_make(words[1:])
    elif program in ("python", "python3") and words[1] == "-m" and words[2] == "benchmark":
        if len(words) > 3:
            check_options(words[3], words[4:])
    elif program in ("python", "python3") and words[1] == "-m" and words[2].startswith("benchmark."):
        module = ROOT / f"{words[2].replace('.', '/')}.py"
        module = module if module.is_file() else module.with_suffix("") / "__main__.py"
        source = module.read_text()
        for word in words[3:]:
            assert not word.startswith("--") or f'"{word}"' in source or f" {word[2:].replace('-', '_')}: " in source, words
    elif program == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), words
    elif program == "bash" and Path(words[1]).name == "go.sh":
        check_command(["python", "-m", "benchmark.proof.rented", "go", *words[2:]])
    elif program == "wandb":
        assert words[1] in ("login", "sync")
    else:
        raise AssertionError(f"a command nobody checks: {' '.join(words)}")


@pytest.mark.parametrize("path", DOCS, ids=name)
def test_commands_and_their_options_exist(path: Path) -> None:
    for words in commands(path):
        if "srun" in words and "benchmark" in words:
            words = words[words.index("env") :]
        strange = path not in (README, CONTRIBUTING) and any(" ".join(words).startswith(other) for other in OTHERS)
        if not strange:
            check_command(words)


def test_a_wrong_command_is_found() -> None:
    for wrong in ("make bench", "make benchmark MATRX=quick", "make benchmark MATRIX=quik", "rm -rf /", "python -m benchmark runn",
                  'make benchmark ARGS="--olny seed=0"', "python -m benchmark run --proceses 2",
                  "bash x/go.sh --minuts 2"):  # fmt: skip
        with pytest.raises(AssertionError):
            check_command(shlex.split(wrong))


def test_the_readme_is_short_and_whole() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    assert text.count("<!-- headline:begin -->") == text.count("<!-- headline:end -->") == 1
    assert text.index("<!-- headline:begin -->") < text.index("<!-- headline:end -->") < text.index("## Two commands")
    assert "CITATION.cff" in text
    assert "Apache-2.0" in text
    everything = "".join(path.read_text() for path in DOCS)
    for wanted in ("LEVELFIELD_DATA", "WANDB_MODE=online", "wandb sync", "## Limitations", "RAY_ADDRESS", "CUDA_VISIBLE_DEVICES"):
        assert wanted in everything, wanted


def test_the_python_blocks_of_the_readme_are_the_tested_examples() -> None:
    shown = blocks(README, "python")
    files = [ROOT / "benchmark" / "examples" / f"my_{what}.py" for what in ("defense", "attack", "backbone", "dataset")]
    assert shown == [file.read_text() for file in files]


def executed(text: str, path: Path) -> None:
    exec(compile(text, name(path), "exec", dont_inherit=True), {"__name__": "docs"})  # the text is ours, and this is its test


def test_the_example_that_writes_images_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    executed(blocks(README, "python")[-1], README)
    written = [path.parent.name for path in (tmp_path / ".cache" / "quarters").glob("*/*.png")]
    assert {label: written.count(label) for label in sorted(written)} == {f"class-{label}": 250 for label in range(4)}
    for path in (README, ROOT / "benchmark" / "examples" / "mine.toml"):
        assert 'source = "folder:.cache/quarters"' in path.read_text()


@pytest.mark.parametrize("path", [path for path in DOCS if path != README], ids=name)
def test_other_python_blocks_compile_and_whole_ones_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for text in blocks(path, "python"):
        compile(text, name(path), "exec", dont_inherit=True)
        if re.match(r"(?:from|import) ", text):
            executed(text, path)


def anchors(path: Path) -> set[str]:
    """Of every heading, the name by which GitHub links to it; and of every anchor written as HTML."""
    text = path.read_text()
    heads = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
    return slugs | set(re.findall(r'<a (?:id|name)="([^"]+)"', text))


@pytest.mark.parametrize("path", DOCS, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if link.startswith(("http:", "https:")):
            continue
        place, _, anchor = link.partition("#")
        target = (path.parent / place).resolve() if place else path
        if "results/proof/" in target.as_posix() and not (ROOT / "results" / "proof").is_dir():
            continue
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_pinned_packages_in_the_docs_are_those_that_are_tested() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    named = {(package, pin) for path in DOCS for package, pin in re.findall(r"([a-z][\w-]*)==([\w.]+)", path.read_text())}
    assert named
    for package, pin in named:
        assert pins.get(package.replace("-", "_"), pins.get(package, pin)) == pin, package
