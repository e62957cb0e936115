"""Triggers that need the attacked model: the frozen and the recraft protocol, and keys that should not open the backdoor alone."""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console

from attacks.base import poison_test
from benchmark.rules.metrics import score
from benchmark.run.cell import defend, read_victim, world
from benchmark.run.session import run_matrix
from benchmark.settings.cells import Cell, Matrix
from benchmark.settings.load import load_matrix
from benchmark.storage.rows import Row, read
from benchmark.storage.store import Store
from models.backbone import Network
from models.spec import derive_seed

TINY = """
title = "protocols"
seeds = [0]
[dataset]
source = "digits"
clean_fraction = 0.2
train_limit = 200
test_limit = 60
[recipe]
epochs = 3
batch = 32
lr = 0.05
crop = 0
flip = false
[[backbone]]
name = "vgg11-bn"
width = 4
hidden = 8
[[attack]]
name = "advtrojan"
eps = 0.2
step = 0.1
steps = 2
[[attack]]
name = "badnets"
[[defense]]
name = "none"
[[defense]]
name = "pruning"
tracks = ["model+clean"]
levels = [0.0, 0.5, 0.9]
"""


class Ran:
    """The matrix, run once."""

    def __init__(self, folder: Path) -> None:
        (folder / "protocols.toml").write_text(TINY)
        self.matrix: Matrix = load_matrix(folder / "protocols.toml")
        self.cache = folder / "cache"
        run_matrix(self.matrix, results=folder, cache=self.cache, console=Console(file=io.StringIO()), processes=1)
        self.rows: pd.DataFrame = read(folder / "protocols" / "rows.csv", Row)

    def cell(self, attack: str, defense: str) -> Cell:
        return next(c for c in self.matrix.cells if (c.scenario.attack_label, c.defense_label) == (attack, defense))

    def of(self, attack: str, defense: str) -> pd.DataFrame:
        return self.rows[(self.rows["attack"] == attack) & (self.rows["defense"] == defense)]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(tmp_path_factory.mktemp("protocols"))


def test_chosen_candidates_are_scored_on_a_trigger_crafted_against_them(ran: Ran) -> None:
    cell = ran.cell("advtrojan", "pruning")
    scenario, store = cell.scenario, Store(ran.cache / "store")
    w, victim = world(scenario, ran.cache), read_victim(scenario, store, ran.cache)
    kept: list[Network] = []
    measured = defend(cell, w, victim, keep=kept)["candidates"]
    twin = read_victim(scenario.twin(), store, ran.cache).net
    seed = derive_seed(scenario.seed, "attack")
    assert scenario.attack is not None
    crafted = scenario.attack.craft(w.train, scenario.plan, seed, twin)
    differs = 0
    for _, line in ran.of("advtrojan", "pruning").iterrows():
        if line["status"] != "ok":
            continue
        chosen = next(n for n, one in enumerate(measured) if one["dial"] == line["dial"])
        against = scenario.attack.recraft(kept[chosen], crafted, w.train, scenario.plan, seed)
        again = poison_test(w.data.test, against, scenario.plan)
        expected = score(kept[chosen], w.data.test, again)
        assert (line["asr_recraft"], line["ra_recraft"]) == pytest.approx((expected.asr, expected.ra), abs=1e-6)
        assert (line["asr"], line["ra"]) == pytest.approx((measured[chosen]["asr"], measured[chosen]["ra"]), abs=1e-6)
        assert victim.triggered is not None
        differs += not torch.equal(again.images, victim.triggered.images)
    assert differs, "a pruned network's trigger is another one"


def test_on_the_undefended_model_both_protocols_are_the_same(ran: Ran) -> None:
    line = ran.of("advtrojan", "none").iloc[0]
    assert (line["asr_recraft"], line["ra_recraft"]) == (line["asr"], line["ra"])


def test_other_triggers_have_one_protocol_and_no_keys(ran: Ran) -> None:
    rows = ran.rows[ran.rows["attack"] == "badnets"]
    assert rows["asr_recraft"].isna().all()
    assert not rows["note"].str.contains("alone").any()


def test_the_row_of_the_undefended_says_what_each_key_does_alone(ran: Ran) -> None:
    scenario = ran.cell("advtrojan", "none").scenario
    store = Store(ran.cache / "store")
    w, net = world(scenario, ran.cache), read_victim(scenario, store, ran.cache).net
    assert scenario.attack is not None
    keys = scenario.attack.single_keys(net, w.train, scenario.plan, derive_seed(scenario.seed, "attack"))
    said = []
    for name, key in keys.items():
        alone = score(net, w.data.test, poison_test(w.data.test, key, scenario.plan))
        said.append(f"the {name} alone: ASR {100 * alone.asr:.1f} %, RA {100 * alone.ra:.1f} %")
    assert set(ran.of("advtrojan", "none")["note"]) == {"; ".join(said)}
    assert not ran.of("advtrojan", "pruning")["note"].str.contains("alone").any()
