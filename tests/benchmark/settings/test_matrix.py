"""Matrix files: what they expand to, and one clear error for each thing a person can get wrong in one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmark.rules.tracks import TRACKS
from benchmark.settings.cells import Cell, settings_hash
from benchmark.settings.load import find_matrix, load_matrix, matrix_names
from benchmark.settings.presets import presets, recipes
from defenses import DEFENSES
from defenses.base import Knowledge, Scope
from defenses.fine_tuning import FineTuning
from models.recipe import Recipe
from models.spec import BadInput, canonical, lookup

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
    renamed = GOOD.replace('name = "clp"', 'name = "clp"\nlabel = "Channel Lipschitz"\npreset = "paper"')
    assert settings_hash(load_matrix(written(tmp_path, renamed))) == base
    assert settings_hash(load_matrix(written(tmp_path, GOOD.replace("u = 2", "u = 3")))) != base


TUNED = GOOD + """
[[defense]]
name = "fine-tuning"
tracks = ["model+clean"]
"""


def test_a_preset_is_its_settings_and_says_what_the_matrix_changes_of_it(tmp_path: Path) -> None:
    def tuned(lines: str) -> Cell:
        return load_matrix(written(tmp_path, TUNED + lines)).cells[-1]

    epochs = presets()["fine-tuning"]["cpu"]["epochs"]
    assert (tuned("").preset, tuned("").defense) == ("paper", FineTuning())
    assert (tuned('preset = "cpu"').preset, tuned('preset = "cpu"').defense) == ("cpu", FineTuning(epochs=epochs))
    assert tuned('preset = "cpu"').spec() == tuned(f"epochs = {epochs}").spec()
    assert tuned(f"epochs = {epochs}").preset == f"paper; epochs={epochs}"
    both = tuned('preset = "cpu"\nepochs = 7\nlr = 0.01')  # the rate is the default: nothing is changed of it
    assert (both.preset, both.defense) == ("cpu; epochs=7", FineTuning(epochs=7))


def test_a_recipe_by_name_and_what_wins_over_it(tmp_path: Path) -> None:
    def recipe(text: str) -> Recipe:
        return load_matrix(written(tmp_path, text)).scenarios[-1].recipe

    fast = Recipe(**recipes()["fast"])
    assert recipe(GOOD.replace("epochs = 2", 'preset = "fast"')) == fast
    assert recipe(GOOD.replace("epochs = 2", 'preset = "fast"\nepochs = 2')) == dataclasses.replace(fast, epochs=2)
    one_attack = GOOD.replace("rate = 0.05", 'rate = 0.05\nrecipe = { preset = "fast", batch = 64 }')
    assert recipe(one_attack) == dataclasses.replace(fast, batch=64)
    assert recipe(GOOD.replace("width = 4", 'width = 4\nrecipe = { preset = "fast" }')) == fast
    assert (fast.epochs, fast.batch, fast.schedule, fast.precision) == (24, 512, "one-cycle", "bf16")


def test_presets_change_lengths_and_sample_counts_never_the_algorithm() -> None:
    lengths = {"epochs", "batch", "iterations", "rounds", "points", "grid", "samples"}
    for method, known in presets().items():
        cls = lookup("defense", DEFENSES, method)
        for name, settings in known.items():
            assert name in ("cpu", "smoke")
            assert all(key in lengths or key.endswith(("_epochs", "_batch")) for key in settings), (method, name)
            cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()})


EXTRACTED = """
[[extractor]]
name = "self-supervised"
label = "theirs"
on = "clean"
epochs = 1
[[extractor]]
name = "self-supervised"
label = "own"
epochs = 1
[[extractor]]
name = "supervised"
"""
PROBE = """
[[defense]]
name = "linear-probe"
labels = "train"
extractors = ["theirs", "own"]
"""


def test_a_defense_on_two_extractors_is_two_entries(tmp_path: Path) -> None:
    matrix = load_matrix(written(tmp_path, GOOD + EXTRACTED + PROBE))
    probes = [cell for cell in matrix.cells if cell.defense.name == "linear-probe" and cell.scenario == matrix.scenarios[0]]
    assert [cell.defense_label for cell in probes] == ["linear-probe on theirs", "linear-probe on own"]
    assert [cell.extractor.reads if cell.extractor else None for cell in probes] == ["clean", "poisoned"]
    assert canonical(probes[0].spec()) != canonical(probes[1].spec())
    before = load_matrix(written(tmp_path, GOOD))
    assert [cell.spec() for cell in matrix.cells[:3]] == [cell.spec() for cell in before.cells[:3]], "keys without extractors stand"


def test_an_extractor_trained_on_the_poisoned_set_is_within_the_means_of_whoever_holds_it(tmp_path: Path) -> None:
    inside = PROBE.replace('["theirs", "own"]', '["own"]\ntracks = ["train"]')
    matrix = load_matrix(written(tmp_path, GOOD + EXTRACTED + inside))
    probe = next(cell for cell in matrix.cells if cell.defense.name == "linear-probe")
    assert probe.grants == Knowledge.TRAIN | Knowledge.EXTRACTOR
    assert probe.track.grants == Knowledge.TRAIN


FROZEN = 'width = 4\nattacks = ["badnets"]\nfrozen = { extractor = "theirs", epochs = 3 }'


def test_a_frozen_victim_is_another_scenario(tmp_path: Path) -> None:
    matrix = load_matrix(written(tmp_path, GOOD.replace("width = 4", FROZEN) + EXTRACTED))
    first = matrix.scenarios[0]
    assert {scenario.attack_label for scenario in matrix.scenarios} == {"badnets 10 %", "badnets 1 %"}
    assert first.backbone_label == "resnet8-w4 on theirs"
    assert first.frozen is not None
    assert first.frozen.epochs == 3
    assert first.twin().frozen == first.frozen
    plain = load_matrix(written(tmp_path, GOOD)).scenarios[0]
    assert "frozen" not in plain.spec(), "keys of end-to-end victims stand"
    assert {**plain.spec(), "frozen": first.frozen.spec()} == first.spec()
    relabelled = GOOD.replace("width = 4", FROZEN.replace("theirs", "other")) + EXTRACTED.replace("theirs", "other")
    assert load_matrix(written(tmp_path, relabelled)).scenarios[0].spec() == first.spec(), "a label is no setting"


BAD = {
    "unknown top key": (GOOD.replace("seeds", "seed", 1), "unknown key 'seed'; did you mean 'seeds'"),
    "unknown data set key": (GOOD.replace("clean_fraction", "clean_fractoin"), "did you mean 'clean_fraction'"),
    "unknown attack": (GOOD.replace("badnets", "badnet"), "unknown attack 'badnet'; did you mean 'badnets'"),
    "unknown defense": (GOOD.replace('"clp"', '"clpp"'), "unknown defense 'clpp'; did you mean 'clp'"),
    "unknown backbone": (GOOD.replace("resnet8", "resnet7"), "unknown backbone 'resnet7'; did you mean 'resnet9'"),
    "unknown setting": (GOOD.replace("u = 2", "uu = 2"), "defense clp: unknown key 'uu'; did you mean 'u'"),
    "unknown attack setting": (GOOD.replace("rate = 0.05", "raet = 0.05"), "unknown key 'raet'; did you mean 'rate'"),
    "unknown recipe key": (GOOD.replace("epochs = 2", "epoch = 2"), "recipe: unknown key 'epoch'; did you mean 'epochs'"),
    "unknown track": (GOOD.replace('["model"]', '["modle"]'), "unknown track 'modle'; did you mean 'model'"),
    "unknown preset": (TUNED + 'preset = "cpuu"', "no preset 'cpuu'; did you mean 'cpu'"),
    "a preset nobody wrote": (GOOD.replace("u = 2", 'preset = "cpu"'), "defense clp: no preset 'cpu'"),
    "unknown extractor": (GOOD + EXTRACTED + PROBE.replace('"own"', '"onw"'), "no extractor 'onw' in this matrix; did you mean"),
    "no extractor named": (GOOD + PROBE.replace('extractors = ["theirs", "own"]', ""), "'extractors' is missing"),
    "extractors for who uses none": (TUNED + 'extractors = ["theirs"]', "it uses none"),
    "two extractors of one name": (GOOD + EXTRACTED.replace('"own"', '"theirs"'), "two extractors are called 'theirs'"),
    "an extractor the track withholds": (
        GOOD + EXTRACTED + PROBE + 'tracks = ["train"]',
        "extractor 'theirs' (self-supervised on the clean images) needs extractor, which the track 'train' withholds",
    ),
    "frozen on nothing": (GOOD.replace("width = 4", "frozen = { epochs = 3 }"), "frozen: 'extractor' is missing"),
    "frozen on an unknown one": (GOOD.replace("width = 4", FROZEN), "frozen: no extractor 'theirs' in this matrix"),
    "frozen, misspelt": (GOOD.replace("width = 4", FROZEN.replace("epochs", "epoch")) + EXTRACTED, "did you mean 'epochs'"),
    "an attack that is not there": (GOOD.replace("width = 4", 'attacks = ["badnet"]'), "did you mean 'badnets'"),
    "nothing to control": (
        GOOD.replace("width = 4", 'frozen = { extractor = "theirs" }').replace('"sig"', '"wanet"') + EXTRACTED,
        "there is no training for wanet to control",
    ),
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
    "unknown recipe preset": (GOOD.replace("epochs = 2", 'preset = "fsat"'), "recipe: no preset 'fsat'; did you mean 'fast'"),
    "recipe preset of a wrong type": (GOOD.replace("epochs = 2", "preset = 3"), "recipe: preset = 3 should be a str"),
    "a defense's key misspelt": (GOOD.replace("scopes", "scoeps"), "defense clp: unknown key 'scoeps'; did you mean 'scopes'"),
    "a list that is none": (GOOD.replace('["model"]', '"model"'), "defense clp: tracks = 'model' should be a list"),
    "a name among names that is none": (GOOD.replace('["model"]', '["model", 3]'), "clp: tracks number 2 = 3 should be a string"),
    "an entry that is no table": (
        GOOD.split("[[attack]]")[0].replace("[dataset]", "attack = [3]\ndefense = [4]\n[dataset]"),
        "attack number 1 = 3 should be a table",
    ),
    "a data set of a wrong type": (GOOD.replace('"digits"', "7"), "dataset: source = 7 should be a string"),
    "no rates": (GOOD.replace("[0.1, 0.01]", "[]"), "attack badnets: rates = [] should have at least 1 item"),
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
    told: list[str] = []
    matrix = load_matrix(written(tmp_path, text), told.append)
    assert len(told) == 1
    assert "plug-in mine.py" in told[0]
    assert "is code and runs" in told[0]
    assert matrix.cells[-1].defense.name == "identity"
    assert matrix.plugins[0][0] == "mine.py"
    assert len(matrix.plugins[0][1]) == 64


def test_a_defense_meets_the_backbones_it_names_and_by_default_all(tmp_path: Path) -> None:
    two = GOOD.replace("[[attack]]", '[[backbone]]\nname = "resnet8"\nwidth = 2\n[[attack]]', 1)

    def met(text: str) -> set[str]:
        return {cell.scenario.backbone_label for cell in load_matrix(written(tmp_path, text)).cells if cell.defense.name == "clp"}

    labels = {scenario.backbone_label for scenario in load_matrix(written(tmp_path, two)).scenarios}
    assert len(labels) == 2
    assert met(two) == labels
    assert met(two.replace('name = "clp"', 'name = "clp"\nbackbones = ["resnet8-w2"]')) == {"resnet8-w2"}
    with pytest.raises(BadInput, match=r"defense clp: backbones: 'resnet8-w22' is not in this matrix.*resnet8-w2"):
        load_matrix(written(tmp_path, two.replace('name = "clp"', 'name = "clp"\nbackbones = ["resnet8-w22"]')))


def test_a_defense_meets_the_attacks_and_seeds_it_names_and_by_default_all(tmp_path: Path) -> None:
    two = GOOD.replace("[[attack]]", '[[attack]]\nname = "blended"\nlabel = "blend"\n[[attack]]', 1)
    two = "\n".join("seeds = [0, 1]" if line.startswith("seeds") else line for line in two.splitlines())

    def met(keys: str) -> set[tuple[str, int]]:
        cells = load_matrix(written(tmp_path, two.replace('name = "clp"', f'name = "clp"\n{keys}'))).cells
        return {(cell.scenario.attack_label, cell.scenario.seed) for cell in cells if cell.defense.name == "clp"}

    attacks = {attack for attack, _ in met("")}
    assert met("") == {(attack, seed) for attack in attacks for seed in (0, 1)}
    assert len(attacks) > 1
    assert met('attacks = ["blend"]') == {("blend", 0), ("blend", 1)}
    assert met('attacks = ["blend"]\nseeds = [1]') == {("blend", 1)}
    with pytest.raises(BadInput, match=r"defense clp: attacks: 'blended' is not in this matrix.*blend"):
        met('attacks = ["blended"]')
    with pytest.raises(BadInput, match=r"defense clp: seeds: 2 is not among the matrix's seeds \[0, 1\]"):
        met("seeds = [2]")
