"""Matrix files: what they expand to, and one clear error for each thing a person can get wrong in one."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmark.matrix import find_matrix, load_matrix, matrix_names, settings_hash
from benchmark.tracks import TRACKS
from defenses.base import Scope
from models.spec import BadInput

GOOD = """
title = "tiny"
seeds = [0, 1]
[dataset]
source = "digits"
clean_fraction = 0.2
[recipe]
epochs = 2
[[backbone]]
name = "resnet8"
width = 4
[[attack]]
name = "badnets"
rates = [0.1, 0.01]
recipe = { epochs = 3 }
[[attack]]
name = "sig"
rate = 0.05
[[defense]]
name = "none"
[[defense]]
name = "clp"
tracks = ["model"]
scopes = ["head", "whole"]
u = 2
"""


def written(tmp_path: Path, text: str, name: str = "tiny.toml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_expansion(tmp_path: Path) -> None:
    matrix = load_matrix(written(tmp_path, GOOD))
    assert matrix.name == "tiny"
    assert len(matrix.scenarios) == 1 * 3 * 2
    assert len(matrix.cells) == 6 * (1 + 2)
    first = matrix.scenarios[0]
    assert (first.backbone_label, first.attack_label, first.recipe.epochs) == ("resnet8-w4", "badnets 10 %", 3)
    assert matrix.scenarios[-1].recipe.epochs == 2
    assert {cell.track.name for cell in matrix.cells} == {"control", "model"}
    assert {cell.scope for cell in matrix.cells if cell.defense.name == "clp"} == {Scope.HEAD, Scope.WHOLE}
    assert next(cell.defense for cell in matrix.cells if cell.defense.name == "clp").spec()["u"] == 2.0
    assert first.twin().spec()["attack"] is None
    assert first.twin().spec() != first.spec()


def test_labels_and_presets_do_not_change_the_key_but_settings_do(tmp_path: Path) -> None:
    base = settings_hash(load_matrix(written(tmp_path, GOOD)))
    renamed = GOOD.replace('name = "clp"', 'name = "clp"\nlabel = "Channel Lipschitz"\npreset = "cpu"')
    assert settings_hash(load_matrix(written(tmp_path, renamed))) == base
    assert settings_hash(load_matrix(written(tmp_path, GOOD.replace("u = 2", "u = 3")))) != base


BAD = {
    "unknown top key": (GOOD.replace("seeds", "seed", 1), "unknown key 'seed'; did you mean 'seeds'"),
    "unknown data set key": (GOOD.replace("clean_fraction", "clean_fractoin"), "did you mean 'clean_fraction'"),
    "unknown attack": (GOOD.replace("badnets", "badnet"), "unknown attack 'badnet'; did you mean 'badnets'"),
    "unknown defense": (GOOD.replace('"clp"', '"clpp"'), "unknown defense 'clpp'; did you mean 'clp'"),
    "unknown backbone": (GOOD.replace("resnet8", "resnet9"), "unknown backbone 'resnet9'; did you mean 'resnet8'"),
    "unknown setting": (GOOD.replace("u = 2", "uu = 2"), "defense clp: unknown key 'uu'; did you mean 'u'"),
    "unknown attack setting": (GOOD.replace("rate = 0.05", "raet = 0.05"), "unknown key 'raet'; did you mean 'rate'"),
    "unknown recipe key": (GOOD.replace("epochs = 2", "epoch = 2"), "recipe recipe: unknown key 'epoch'; did you mean 'epochs'"),
    "unknown track": (GOOD.replace('["model"]', '["modle"]'), "unknown track 'modle'; did you mean 'model'"),
    "unknown scope": (GOOD.replace('"head", "whole"', '"haed"'), "unknown scope 'haed'; did you mean 'head'"),
    "no tracks": (GOOD.replace('tracks = ["model"]\n', ""), "'tracks' is missing"),
    "control track for a defense": (GOOD.replace('["model"]', '["control"]'), "for controls only"),
    "rate out of range": (GOOD.replace("rate = 0.05", "rate = 1.5"), "rate = 1.5 is out of range"),
    "wrong type": (GOOD.replace("u = 2", 'u = "2"'), "u = '2'"),
    "not a number": (GOOD.replace("u = 2", "u = nan"), "is not a finite number"),
    "fraction out of range": (GOOD.replace("clean_fraction = 0.2", "clean_fraction = 1.2"), "clean_fraction"),
    "seed twice": (GOOD.replace("[0, 1]", "[1, 1]"), "twice"),
    "no seeds": (GOOD.replace("[0, 1]", "[]"), "seeds"),
    "name missing": (GOOD.replace('name = "sig"\n', ""), "attack number 2: 'name' is missing"),
    "two alike": (GOOD + '[[defense]]\nname = "none"\n', "two defenses are called 'none'"),
    "not toml": (GOOD + "]]", "not TOML"),
    "rate and rates": (GOOD.replace("rates = [0.1, 0.01]", "rates = [0.1]\nrate = 0.1"), "either rate or rates"),
    "plugin missing": ('plugins = ["gone.py"]\n' + GOOD, "gone.py: no such file"),
}


@pytest.mark.parametrize("case", BAD, ids=list(BAD))
def test_bad_input_is_one_line_that_names_the_file_and_the_value(tmp_path: Path, case: str) -> None:
    text, expected = BAD[case]
    path = written(tmp_path, text)
    with pytest.raises(BadInput) as caught:
        load_matrix(path)
    message = str(caught.value)
    assert expected in message
    assert str(path) in message
    assert "\n" not in message


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="did you mean 'quick'"):
        find_matrix("quik")
    with pytest.raises(BadInput, match="no such matrix file"):
        find_matrix(str(tmp_path / "none.toml"))
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="cannot be read"):
        load_matrix(path)


@pytest.mark.parametrize("name", matrix_names())
def test_every_shipped_matrix_loads_and_enters_granted_tracks_only(name: str) -> None:
    matrix = load_matrix(find_matrix(name))
    assert matrix.cells
    assert matrix.title
    for cell in matrix.cells:
        assert not cell.defense.needs & ~cell.track.grants, (cell.defense_label, cell.track.name)
    assert {track.name for track in TRACKS}  # a matrix may use some tracks only


PLUGIN = '''
"""A plug-in with one defense."""
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar
from defenses.base import Candidate, DefenderView, Defense, Knowledge

@dataclass(frozen=True)
class Identity(Defense):
    """Does nothing."""
    name: ClassVar[str] = "identity"

    @property
    def needs(self) -> Knowledge:
        return Knowledge.MODEL

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        yield Candidate(view.model)
'''


def test_plugins_are_loaded_and_their_hash_recorded(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    text = 'plugins = ["mine.py"]\n' + GOOD + '[[defense]]\nname = "identity"\ntracks = ["model"]\n'
    matrix = load_matrix(written(tmp_path, text))
    assert matrix.cells[-1].defense.name == "identity"
    assert matrix.plugins[0][0] == "mine.py"
    assert len(matrix.plugins[0][1]) == 64
