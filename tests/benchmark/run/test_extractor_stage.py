"""Extractors as a stage: trained once, shared, charged to whoever uses them; victims on given features; what detectors isolate."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console

from attacks.base import Role
from benchmark.run.defend import defend
from benchmark.run.keys import extractor_key
from benchmark.run.session import run_matrix
from benchmark.run.victim import read_extractor, read_victim, run_extractor
from benchmark.run.world import clean_seeds, world
from benchmark.settings.cells import Cell, Matrix
from benchmark.settings.load import load_matrix
from benchmark.storage.rows import Row, read
from benchmark.storage.store import Store
from defenses.base import DefenderView
from models.extractors import Extractor
from models.images import to_float
from models.spec import derive_seed
from models.training import Fitted

TINY = """
title = "extractors"
seeds = [0]
[dataset]
source = "digits"
clean_fraction = 0.2
train_limit = 200
test_limit = 60
[recipe]
epochs = 2
batch = 32
lr = 0.05
crop = 1
flip = false
[[backbone]]
name = "vgg11-bn"
width = 2
hidden = 8
[[backbone]]
name = "vgg11-bn"
label = "frozen"
width = 2
hidden = 8
attacks = ["badnets"]
frozen = { extractor = "clean", epochs = 2 }
[[attack]]
name = "badnets"
[[attack]]
name = "wanet"
s = 2.0
[[extractor]]
name = "self-supervised"
label = "own"
epochs = 1
batch = 32
[[extractor]]
name = "supervised"
label = "clean"
[[defense]]
name = "none"
[[defense]]
name = "linear-probe"
labels = "train"
epochs = 1
extractors = ["own", "clean"]
[[defense]]
name = "linear-probe"
label = "probe in the track"
labels = "train"
tracks = ["train"]
epochs = 1
extractors = ["own"]
[[defense]]
name = "abl"
tracks = ["train"]
rate = 0.05
isolation_epochs = 1
epochs = 1
unlearning_epochs = 1
points = [0]
[[defense]]
name = "dbd"
tracks = ["train"]
ssl_epochs = 1
ssl_batch = 32
head_epochs = 1
semi_epochs = 1
iterations = 2
semi_batch = 8
[[defense]]
name = "hid"
tracks = ["train"]
ssl_epochs = 1
ssl_batch = 32
rounds = 1
hidden = [8]
head_epochs = 1
semi_epochs = 1
semi_batch = 8
"""


class Run:
    """The matrix, run once, with its rows and its store."""

    def __init__(self, folder: Path, processes: int = 1) -> None:
        (folder / "extractors.toml").write_text(TINY)
        self.matrix: Matrix = load_matrix(folder / "extractors.toml")
        self.cache = folder / "cache"
        self.store = Store(self.cache / "store")
        self.said = io.StringIO()
        self.outcome = run_matrix(
            self.matrix, results=folder, cache=self.cache, console=Console(file=self.said), processes=processes
        )
        self.folder = folder / "extractors"
        self.rows: pd.DataFrame = read(self.folder / "rows.csv", Row)

    def cell(self, defense: str, attack: str = "badnets", backbone: str = "vgg11-bn-w2") -> Cell:
        return next(
            cell
            for cell in self.matrix.cells
            if (cell.defense_label, cell.scenario.attack_label, cell.scenario.backbone_label) == (defense, attack, backbone)
        )

    def row(self, defense: str, attack: str = "badnets", backbone: str = "vgg11-bn-w2") -> pd.Series:
        rows = self.rows[self.rows["selection"] == "default"]
        found = rows[(rows["defense"] == defense) & (rows["attack"] == attack) & (rows["backbone"] == backbone)]
        assert len(found) == 1
        return found.iloc[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    threads = torch.get_num_threads()
    yield Run(tmp_path_factory.mktemp("run"))
    torch.set_num_threads(threads)


def test_every_cell_finished(run: Run) -> None:
    assert set(run.rows[run.rows["selection"] == "default"]["status"]) == {"ok"}


def test_each_is_trained_once_however_many_use_it(run: Run) -> None:
    """Own: three worlds, of which two share the poisoned set. Clean: one architecture and recipe, whatever the attack."""
    stored = list((run.store.root / "extractor").rglob("entry.json"))
    assert len(stored) == 3
    assert "3 extractors to train" in run.said.getvalue()
    keys = {
        extractor_key(cell.defense.extractor, cell.scenario, "x")
        for cell in run.matrix.cells
        if cell.defense.extractor is not None and cell.scenario.attack_label == "badnets"
    }
    assert len(keys) == 1, "dbd and hid, end to end and frozen"


def test_its_cost_is_charged_to_every_row_that_uses_it_and_shown_apart(run: Run) -> None:
    size = len(world(run.cell("none").scenario, run.cache).train)
    dbd, probe, own = run.row("dbd"), run.row("linear-probe on own"), run.row("probe in the track on own")
    for row in (dbd, run.row("hid"), probe, own):
        # one epoch of two views of every image, the last incomplete batch included, forward and backward: two standard epochs
        assert row["extractor_epochs"] == pytest.approx(2.0)
        assert row["cost_epochs"] > 2.0
    # on top of the extractor, the probe embeds every image once: a forward pass is a third of an epoch
    assert probe["cost_epochs"] == pytest.approx(2 + 1 / 3)
    assert probe["samples_forward"] == 2 * size + size
    assert probe["samples_backward"] == 2 * size
    clean = run.row("linear-probe on clean")
    assert clean["extractor_epochs"] == pytest.approx(2.0), "two epochs of the victim's recipe"
    assert pd.isna(run.row("abl")["extractor_epochs"])
    assert run.row("none")["cost_epochs"] == 0


def test_rows_say_what_the_defender_was_given(run: Run) -> None:
    size = len(world(run.cell("none").scenario, run.cache).train)
    dbd = run.row("dbd")
    assert (dbd["used"], dbd["train_images"], dbd["clean_images"], dbd["trained_anew"]) == ("train", size, 0, True)
    assert dbd["extractor"] == "self-supervised on the poisoned images"
    probe = run.row("linear-probe on clean")
    assert (probe["used"], probe["extractor"]) == ("train + extractor", "trained with labels on the clean images")
    assert not probe["trained_anew"]
    none = run.row("none")
    assert (none["used"], none["train_images"], none["clean_images"], none["extractor"]) == ("model", 0, 0, "")


def test_precision_and_recall_by_hand(run: Run) -> None:
    """The defense is run again outside the benchmark; its samples are counted one by one."""
    for name in ("abl", "dbd", "hid"):
        cell = run.cell(name)
        w, victim = world(cell.scenario, run.cache), read_victim(cell.scenario, run.store, run.cache)
        view = DefenderView(
            granted=cell.track.grants, declared=cell.defense.needs,
            sources={cell.defense.needs: lambda victim=victim: victim.poisoned.visible},
            fresh=lambda seed, cell=cell, w=w: cell.scenario.backbone.build(10, w.train.shape, w.mean, w.std, seed),
            num_classes=10, seed=derive_seed(0, "defense"), scope=cell.scope, recipe=cell.scenario.recipe,
        )  # fmt: skip
        chosen = next(candidate for candidate in cell.defense.candidates(view) if candidate.is_default)
        assert chosen.isolated is not None
        taken = {i for i, flag in enumerate(chosen.isolated.tolist()) if flag}
        there = {i for i, role in enumerate(victim.poisoned.role.tolist()) if role == Role.POISON}
        row = run.row(name)
        assert row["isolated"] == len(taken) > 0
        assert row["precision"] == pytest.approx(len(taken & there) / len(taken), abs=1e-6)
        assert row["recall"] == pytest.approx(len(taken & there) / len(there), abs=1e-6)
    assert pd.isna(run.row("none")["precision"])


def test_a_frozen_victim_is_a_head_on_the_extractor(run: Run) -> None:
    cell = run.cell("none", backbone="frozen")
    scenario = cell.scenario
    assert scenario.frozen is not None
    victim = read_victim(scenario, run.store, run.cache)
    given = read_extractor(scenario.frozen.extractor, scenario, run.store, run.cache).net
    w = world(scenario, run.cache)
    x = to_float(w.data.test.images[:7])
    with torch.no_grad():
        assert torch.equal(victim.net.embed(x), given.embed(x))
        assert torch.equal(victim.net(x), victim.net.head(given.embed(x)))
    assert len(victim.net.head) == 3, "the backbone's hidden layer"
    assert run.row("none", backbone="frozen")["features"] == "trained with labels on the clean images"
    assert run.row("none")["features"] == ""
    twin = read_victim(scenario.twin(), run.store, run.cache)
    assert torch.equal(twin.net.embed(x), victim.net.embed(x))


def test_training_control_meets_the_exported_set_and_says_so(run: Run) -> None:
    for name in ("abl", "dbd", "hid"):
        assert "exported static set" in run.row(name, attack="wanet")["note"]
        assert "exported" not in str(run.row(name)["note"])


@pytest.mark.slow
def test_two_processes_give_the_same_bytes(run: Run, tmp_path: Path) -> None:
    other = Run(tmp_path, processes=2)
    for name in ("rows.csv", "curves.csv", "manifest.json"):
        assert (other.folder / name).read_bytes() == (run.folder / name).read_bytes()


def test_a_damaged_extractor_is_trained_again(run: Run) -> None:
    cell = run.cell("dbd")
    extractor, fingerprint = cell.defense.extractor, world(cell.scenario, run.cache).data.fingerprint
    assert extractor is not None
    entry = run.store.folder("extractor", extractor_key(extractor, cell.scenario, fingerprint)) / "entry.json"
    before = json.loads(entry.read_text())["content"]
    (entry.parent / "tensors.safetensors").write_bytes(b"nothing")
    run_extractor(extractor, cell.scenario, run.store, run.cache)  # its outcome stands, so the plan need not change
    read_extractor.__globals__["_read_extractor"].cache_clear()
    assert read_extractor(extractor, cell.scenario, run.store, run.cache).net is not None
    assert json.loads(entry.read_text())["content"]["tensors"] == before["tensors"]


def test_a_diverged_extractor_is_a_failed_cell_with_its_reason(run: Run, tmp_path: Path) -> None:
    cell = run.cell("dbd")
    extractor, w = cell.defense.extractor, world(cell.scenario, run.cache)
    assert extractor is not None
    store = Store(tmp_path)
    key = extractor_key(extractor, cell.scenario, w.data.fingerprint)
    store.write("extractor", key, {}, {"status": "failed", "reason": "self-supervised: it blew up"}, {})

    def fetch(wanted: Extractor) -> Fitted:
        return read_extractor(wanted, cell.scenario, store, run.cache)

    outcome = defend(cell, w, read_victim(cell.scenario, run.store, run.cache), fetch=fetch)
    assert (outcome["status"], outcome["reason"]) == ("failed", "no extractor: self-supervised: it blew up")


def test_clean_seeds_are_ten_untouched_samples_of_every_class(run: Run) -> None:
    poisoned = read_victim(run.cell("none").scenario, run.store, run.cache).poisoned
    mask = clean_seeds(poisoned, 3)
    for label in range(10):
        there = [i for i in range(len(mask)) if int(poisoned.true_labels[i]) == label and poisoned.role[i] == Role.CLEAN]
        chosen = [i for i in range(len(mask)) if mask[i] and int(poisoned.visible.labels[i]) == label]
        assert len(chosen) == min(10, len(there))
        assert set(chosen) <= set(there)
    assert not torch.equal(mask, clean_seeds(poisoned, 4))
