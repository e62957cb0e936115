"""Entries: a plug-in is run on a matrix's victims, filed with its card, computed again, and shown on the board."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from benchmark import __main__ as cli
from benchmark.entry.enter import Claim, check, enter, narrowest, read_card, settings_of
from benchmark.entry.page import write_page
from benchmark.settings.load import FOLDER
from defenses import DEFENSES
from defenses.abl import ABL
from defenses.bnp import BNP
from defenses.clp import CLP
from models.spec import BadInput

EXAMPLE = Path(cli.__file__).parent / "examples" / "my_defense.py"
CLAIM = Claim("A. Author", "A paper | with a bar, 2026", "MIT", "nothing")
MATRIX = """# a comment
title = "tiny"
seeds = [0]
dataset = { source = "digits", clean_fraction = 0.2, train_limit = 400, test_limit = 60 }
recipe = { epochs = 12, lr = 0.1, schedule = "one-cycle", crop = 0, flip = false }
backbone = [{ name = "resnet8", width = 2, hidden = 8 }]
attack = [{ name = "badnets", rate = 0.3 }]

[[defense]]
name = "clp"
tracks = ["model"]
"""


@pytest.fixture
def matrix(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(MATRIX)
    return path


def entered(plugin: Path, matrix: Path, claim: Claim = CLAIM) -> Path:
    place = matrix.parent
    return enter(
        plugin, claim, matrix=str(matrix), results=place / "r", cache=place / "c", console=Console(file=io.StringIO()), processes=1
    )  # fmt: skip


def test_the_track_is_the_one_that_grants_least() -> None:
    assert [narrowest(one).name for one in (CLP, BNP, ABL)] == ["model", "model+clean", "train"]
    for one in DEFENSES:
        if not one.control:
            assert not one().needs & ~narrowest(one).grants


def test_the_matrix_keeps_all_but_its_defenses() -> None:
    for name in ("zoo", "cifar10-cpu"):
        text = settings_of(FOLDER / f"{name}.toml", "mine.py", [CLP, BNP])
        assert text.startswith('plugins = ["mine.py"]\n')
        assert text.count("[[defense]]") == 3
        assert text.count("[[attack]]") == (FOLDER / f"{name}.toml").read_text().count("[[attack]]")
        assert text.endswith('[[defense]]\nname = "bnp"\ntracks = ["model+clean"]\n')


@pytest.mark.slow
def test_from_a_file_to_a_line_of_the_board(matrix: Path) -> None:
    place = matrix.parent
    shutil.copy(EXAMPLE, place / "my_defense.py")
    folder = entered(place / "my_defense.py", matrix)
    assert folder == place / "r" / "entries" / "my_defense"
    card = read_card(folder)
    assert (card["authors"], card["tuned_on"], card["status"], card["failed"]) == ("A. Author", "nothing", "reported", 0)
    assert [(one["name"], one["track"]) for one in card["defenses"]] == [("largest-bound", "model")]
    assert (folder / "tiny" / "plugins" / "my_defense.py").read_bytes() == EXAMPLE.read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["card.json", "tiny"]
    page = write_page(place / "r").read_text()
    assert "| my_defense | largest-bound | model |" in page
    assert "A paper \\| with a bar, 2026" in page
    assert page.rstrip().endswith("reported |")
    shutil.rmtree(place / "c" / "store")
    assert check(folder, cache=place / "c", console=Console(file=io.StringIO()), processes=1)
    assert read_card(folder)["status"] == "reproduced"
    assert read_card(folder)["checked"]["identical"] == read_card(folder)["checked"]["rows"] > 0
    assert write_page(place / "r").read_text().rstrip().endswith("reproduced |")
    # An ACC that was improved by hand is found.
    rows = folder / "tiny" / "rows.csv"
    lines = rows.read_text().splitlines()
    at = lines[0].split(",").index("acc")
    changed = [line.split(",") for line in lines]
    for cells in changed[1:]:
        cells[at] = "0.99" if cells[at] else ""
    rows.write_text("\n".join(map(",".join, changed)) + "\n")
    assert not check(folder, cache=place / "c", console=Console(file=io.StringIO()), processes=1)
    assert read_card(folder)["status"] == "not reproduced"


BROKEN = EXAMPLE.read_text().replace("model = view.model", "raise ValueError('no luck')")


@pytest.mark.parametrize(
    ("name", "source", "claim", "words"),
    [
        ("My Defense.py", EXAMPLE.read_text(), CLAIM, "an entry is called like its file"),
        ("mine.py", "x = 1\n", CLAIM, r"^mine\.py: defines no defense$"),
        ("mine.py", EXAMPLE.read_text().replace("    needs =", "    control = True\n    needs ="), CLAIM, "is a control; "),
        ("mine.py", EXAMPLE.read_text(), Claim("A", "P", "MIT", " "), "^--tuned-on is empty"),
        ("mine.py", BROKEN, CLAIM, r"^mine\.py: failed in every cell, so nothing is entered: .*no luck"),
    ],
)
def test_what_cannot_be_entered_is_refused(matrix: Path, name: str, source: str, claim: Claim, words: str) -> None:
    (matrix.parent / name).write_text(source)
    with pytest.raises(BadInput, match=words):
        entered(matrix.parent / name, matrix, claim)
    assert not list(matrix.parent.glob("r/entries/*/card.json"))


def test_damaged_cards_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "entries" / "mine"
    folder.mkdir(parents=True)
    whole = dict.fromkeys(("authors", "paper", "licence", "tuned_on", "source", "defenses", "status"), "x")
    damaged = (
        ("{", "not an entry's card"),
        ("[1]", "not an entry's card"),
        (json.dumps({"authors": "A"}), "'paper' is missing"),
        (json.dumps(whole | {"matrix": "../../elsewhere"}), "matrix '../../elsewhere' is no name of a matrix"),
    )
    for text, words in damaged:
        (folder / "card.json").write_text(text)
        with pytest.raises(BadInput, match=words):
            write_page(tmp_path)
    assert "There is none yet." in write_page(tmp_path / "other").read_text()
