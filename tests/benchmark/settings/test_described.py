"""A scenario comes back from its spec."""

from __future__ import annotations

import dataclasses
import json

import pytest

from benchmark.settings.cells import Scenario
from benchmark.settings.described import scenario_of
from benchmark.settings.load import FOLDER, load_matrix, matrix_names
from models.spec import BadInput


def again(scenario: Scenario) -> Scenario:
    """Through JSON, as a card holds it."""
    return scenario_of(json.loads(json.dumps(scenario.spec())), scenario.backbone_label, scenario.attack_label)


@pytest.mark.parametrize("name", matrix_names())
def test_every_victim_of_the_shipped_matrices_comes_back(name: str) -> None:
    matrix = load_matrix(FOLDER / f"{name}.toml")
    for scenario in {one.attack: one for one in matrix.scenarios if one.seed == matrix.scenarios[0].seed}.values():
        if scenario.frozen is not None:
            with pytest.raises(BadInput, match="'frozen' is not a setting of a victim that is trained end to end"):
                again(scenario)
            continue
        assert again(scenario) == scenario
        twin = again(scenario.twin())
        assert twin.spec() == scenario.twin().spec()
        assert twin.attack is None
        apart = dataclasses.replace(scenario, weights_seed=3)
        assert again(apart) == apart


def test_what_is_no_victim_is_named() -> None:
    spec = load_matrix(FOLDER / "smoke.toml").scenarios[0].spec()
    for change, words in (
        ({"backbone": spec["backbone"] | {"name": "resnet7"}}, "unknown backbone 'resnet7'; did you mean 'resnet"),
        ({"recipe": spec["recipe"] | {"epochs": -1}}, "recipe: epochs = -1 is out of range"),
        ({"recipe": spec["recipe"] | {"batch": "many"}}, "recipe: batch = 'many' should be a integer"),
        ({"recipe": spec["recipe"] | {"momentun": 0.9}}, "recipe: momentun = 0.9 there, None here"),
        ({"attack": spec["attack"] | {"revision": 7}}, "attack: revision = 7 there, 1 here"),
        ({"plan": None}, "not the settings of a victim"),
        ({"surprise": 1}, "'surprise' is not a setting"),
    ):
        with pytest.raises(BadInput, match=words):
            scenario_of(spec | change, "b", "a")
    with pytest.raises(BadInput, match="not the settings of a victim: KeyError"):
        scenario_of({}, "b", "a")
