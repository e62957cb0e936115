"""Victims as files: exported from a store, loaded, run by the pipeline without training, checked, and refused where damaged."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

import benchmark.__main__ as cli
import benchmark.run.victim as stages
from benchmark.data.datasets import Dataset
from benchmark.rules.metrics import Score, score
from benchmark.run.keys import victim_key
from benchmark.run.session import run_matrix
from benchmark.run.victim import read_victim
from benchmark.run.world import world
from benchmark.settings.cells import Matrix, Scenario
from benchmark.settings.load import find_matrix, load_matrix
from benchmark.storage import zoo
from benchmark.storage.rows import Row, read
from benchmark.storage.store import Store
from benchmark.zoo import load, load_victim
from benchmark.zoo.check import judged
from benchmark.zoo.export import export, names_of, victims_of
from benchmark.zoo.load import opened
from models.spec import BadInput, canonical

ATTACKS = """
[[attack]]
name = "badnets"
label = "badnets 10 %"
[[attack]]
name = "blended"
rates = [0.1, 0.05]
[[attack]]
name = "wanet"
[[attack]]
name = "sig"
rate = 0.05
[[attack]]
name = "lc"
rate = 0.05
steps = 2
[[attack]]
name = "lf"
[[attack]]
name = "input-aware"
width = 2
mask_epochs = 1
batch = 32
[[attack]]
name = "bpp"
[[attack]]
name = "ssba"
bits = 4
epochs = 1
width = 2
min_bit_accuracy = 0.01
min_psnr = 0.01
[[attack]]
name = "trojannn"
steps = 5
[[attack]]
name = "adap-blend"
[[attack]]
name = "adap-patch"
[[attack]]
name = "advtrojan"
steps = 1
"""
TEXT = """
title = "a zoo"
seeds = [4, 5]
[dataset]
source = "digits"
clean_fraction = 0.2
train_limit = 100
test_limit = 30
[recipe]
epochs = 1
batch = 32
lr = 0.05
crop = 1
flip = false
weights = "half"
[[backbone]]
name = "vgg11-bn"
label = "VGG 11"
width = 2
hidden = 8
[[backbone]]
name = "resnet8"
width = 2
hidden = 4
attacks = ["blended"]
[[defense]]
name = "none"
[[defense]]
name = "clp"
tracks = ["model"]
[[defense]]
name = "abl"
tracks = ["train"]
preset = "smoke"
backbones = ["VGG 11"]
"""
NAMES = [
    "adap-blend", "adap-patch", "advtrojan", "badnets-10", "benign", "benign-resnet8-w2", "blended-10", "blended-10-resnet8-w2",
    "blended-5", "blended-5-resnet8-w2", "bpp", "input-aware", "lc", "lf", "sig", "ssba", "trojannn",
    "wanet",
]  # fmt: skip
KEPT = {"input-aware", "ssba", "trojannn"}
"""Whose files hold more than the network."""


class Trained:
    """A matrix whose victims of the first seed are stored, and the zoo that was exported from there."""

    def __init__(self, folder: Path) -> None:
        self.path, self.cache, self.zoo = folder / "animals.toml", folder / "cache", folder / "zoo"
        self.path.write_text(TEXT + ATTACKS)
        self.matrix = load_matrix(self.path)
        self.store = Store(self.cache / "store")
        self.printed = io.StringIO()
        for scenario in self.first:
            read_victim(scenario, self.store, self.cache)
        self.console = Console(file=self.printed, width=200)
        self.written = export(self.matrix, only=None, cache=self.cache, folder=self.zoo, console=self.console)

    @property
    def first(self) -> list[Scenario]:
        return [scenario for scenario in self.matrix.scenarios if scenario.seed == 4]

    def named(self, name: str) -> Scenario:
        return {found: one for one, found in names_of(victims_of(self.matrix, self.matrix.scenarios)).items()}[name]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    patch = pytest.MonkeyPatch()
    patch.setenv(zoo.VARIABLE, "")
    yield Trained(tmp_path_factory.mktemp("zoo"))
    patch.undo()


@pytest.fixture
def copy(trained: Trained, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained.zoo, tmp_path / "zoo"))


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def refused(text: str, *arguments: Any, **named: Any) -> None:
    with pytest.raises(BadInput, match=text) as caught:
        load_victim(*arguments, **named)
    assert "\n" not in str(caught.value)


# -- files ---------------------------------------------------------------------------------------------------------------------


def test_every_stored_victim_of_the_first_seed_and_every_twin_is_a_file_with_a_card(trained: Trained) -> None:
    assert sorted(trained.written) == NAMES == zoo.names(trained.zoo)
    assert sorted(path.stem for path in trained.zoo.glob("*.safetensors")) == NAMES
    assert "18 victims; all files in" in trained.printed.getvalue()
    for name in NAMES:
        tensors = load_file(trained.zoo / f"{name}.safetensors")
        assert {value.dtype for key, value in tensors.items() if key.startswith("net.")} == {torch.float16, torch.int64}
        assert any(key.startswith("trigger.") for key in tensors) == (name in KEPT), name
        text = (trained.zoo / f"{name}.json").read_text()
        card = json.loads(text)
        assert text == json.dumps(card, indent=1, sort_keys=True) + "\n"
        assert card["scenario"] == trained.named(name).spec()
        assert card["bytes"] == (trained.zoo / f"{name}.safetensors").stat().st_size
        assert card["licence"].startswith("Apache-2.0")
        assert set(card["manifest"]) == {"arithmetic", "versions"}
        assert ("implanted" in card["measured"]) == (not name.startswith("benign"))


def test_the_card_has_the_figures_of_the_stored_victim(trained: Trained) -> None:
    for name in NAMES:
        scenario, card = trained.named(name), json.loads((trained.zoo / f"{name}.json").read_text())
        stored, twin = (read_victim(one, trained.store, trained.cache).outcome for one in (scenario, scenario.twin()))
        fields = ("acc", "asr", "ra", "asr_benign", "ra_benign", "acc_loss", "val_acc")
        assert {one: card["measured"].get(one) for one in fields} == {one: stored.get(one) for one in fields}
        assert card["measured"]["acc_benign"] == twin["acc"]
        for cost in ("seconds", "samples_forward", "samples_backward", "train_size"):
            assert card["training"][cost] == stored[cost]


def test_exporting_again_changes_no_byte_and_a_part_only_its_own(trained: Trained, copy: Path) -> None:
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    export(trained.matrix, only=None, cache=trained.cache, folder=copy, console=quiet())
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    for path in copy.iterdir():
        path.unlink()
    named = export(trained.matrix, only="attack=blended 5 %,backbone=VGG 11", cache=trained.cache, folder=copy, console=quiet())
    assert sorted(named) == ["benign", "blended-5"]
    assert all(path.read_bytes() == before[path.name] for path in copy.iterdir())


def test_names_are_unique_whatever_the_labels(trained: Trained) -> None:
    one = trained.named("badnets-10")
    others = [dataclasses.replace(one, attack_label=label) for label in ("badnets-10", "BadNets (10%)")]
    assert list(names_of([one, *others]).values()) == ["badnets-10", "badnets-10-2", "badnets-10-3"]


def test_what_cannot_be_exported_is_refused(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tmp_path / "plain.toml"
    plain.write_text((TEXT + ATTACKS).replace('weights = "half"\n', ""))
    folder = tmp_path / "none"

    def fails(words: str, matrix: Matrix, only: str | None = None) -> None:
        with pytest.raises(BadInput, match=words):
            export(matrix, only=only, cache=trained.cache, folder=folder, console=quiet())
        assert not folder.exists()

    fails("benign: its weights are not rounded", load_matrix(plain))
    fails("none of its victims is in the store", untrained(trained))
    fails("takes victims of its first seed alone, which is 4", trained.matrix, "seed=5")
    monkeypatch.setattr(zoo, "LIMIT", 10_000)
    fails("more than 0.01 MB: export fewer victims", trained.matrix, "attack=lf")


def untrained(trained: Trained) -> Matrix:
    """The same matrix with more epochs."""

    def longer(one: Scenario) -> Scenario:
        return dataclasses.replace(one, recipe=dataclasses.replace(one.recipe, epochs=9))

    matrix = trained.matrix
    cells = tuple(dataclasses.replace(cell, scenario=longer(cell.scenario)) for cell in matrix.cells)
    return dataclasses.replace(matrix, scenarios=tuple(map(longer, matrix.scenarios)), cells=cells)


def test_a_victim_stored_without_its_trigger_is_exported_if_crafting_gives_it_again(trained: Trained, tmp_path: Path) -> None:
    """As stored by a version that did not keep triggers; input-aware's is learned with the victim."""
    cache = Path(shutil.copytree(trained.cache, tmp_path / "cache"))
    for name in KEPT:
        scenario = trained.named(name)
        key = victim_key(scenario, world(scenario, cache).data.fingerprint)
        store = Store(cache / "store")
        entry = store.read("victim", key)
        assert entry is not None
        shutil.rmtree(store.folder("victim", key))
        kept = {one: value for one, value in entry.tensors.items() if not one.startswith("trigger.")}
        store.write("victim", key, {}, entry.outcome, kept)
    export(trained.matrix, only="attack=ssba|trojannn", cache=cache, folder=tmp_path / "zoo", console=quiet())
    for name in ("ssba", "trojannn"):
        assert (tmp_path / "zoo" / f"{name}.safetensors").read_bytes() == (trained.zoo / f"{name}.safetensors").read_bytes()
    with pytest.raises(BadInput, match=r"input-aware: its trigger is learned with the victim, .*: remove .* and run"):
        export(trained.matrix, only="attack=input-aware", cache=cache, folder=tmp_path / "zoo", console=quiet())


# -- loading -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_victim_is_the_stored_one_bit_for_bit(trained: Trained, tmp_path: Path, name: str) -> None:
    model, found = load_victim(name, cache=tmp_path, folder=trained.zoo)
    stored = read_victim(trained.named(name), trained.store, trained.cache)
    w = world(trained.named(name), trained.cache)
    assert not model.training
    for key, value in stored.net.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    for part in ("clean", "validation"):
        assert torch.equal(getattr(found, part).images, getattr(w, part).images)
    assert torch.equal(found.test.images, w.data.test.images)
    assert found.card["scenario"] == trained.named(name).spec()
    if name.startswith("benign"):
        assert found.triggered is found.target is stored.triggered is None
        return
    assert found.target == 0
    assert found.triggered is not None
    assert stored.triggered is not None
    for field in dataclasses.fields(found.triggered):
        assert torch.equal(getattr(found.triggered, field.name), getattr(stored.triggered, field.name))
    again = score(model, found.test, found.triggered)
    assert (again.acc, again.asr, again.ra) == tuple(found.card["measured"][share] for share in ("acc", "asr", "ra"))


def test_an_unknown_name_gives_the_nearest(trained: Trained) -> None:
    refused("no victim 'badnet-10' there; did you mean 'badnets-10'?", "badnet-10", folder=trained.zoo)
    refused(r"no victim '\.\./zoo/lc' there", "../zoo/lc", folder=trained.zoo)


def test_the_folder_of_the_zoo_can_be_named(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(zoo.VARIABLE, str(trained.zoo))
    monkeypatch.setenv("LEVELFIELD_CACHE", str(tmp_path / "there"))
    load_victim("lf")
    monkeypatch.delenv(zoo.VARIABLE)
    assert zoo.home() == Path(cli.__file__).parents[1] / "results" / "zoo"


@pytest.mark.parametrize("place", [0, 8, 100, 0.5, -1])
def test_a_flipped_byte_is_refused_by_name_before_anything_is_loaded(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: float
) -> None:
    path = copy / "sig.safetensors"
    content = bytearray(path.read_bytes())
    content[int(place * len(content)) if isinstance(place, float) else place] ^= 1
    path.write_bytes(content)
    monkeypatch.setattr(zoo, "load", lambda raw: pytest.fail("it was read"))
    refused(r"sig\.safetensors: damaged, or not the file of its card", "sig", cache=tmp_path / "cache", folder=copy)


def changed(folder: Path, name: str, **fields: Any) -> None:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_card_that_does_not_fit_is_refused_by_name(copy: Path, tmp_path: Path) -> None:
    where: dict[str, Any] = {"cache": tmp_path / "cache", "folder": copy}
    changed(copy, "sig", sha256="0" * 64)
    refused(r"sig\.safetensors: damaged, or not the file of its card", "sig", **where)
    changed(copy, "lf", revision=1)
    refused(r"lf\.json: made under revision 1 of the victims' keys, and this version has revision \d", "lf", **where)
    scenario = json.loads((copy / "wanet.json").read_text())["scenario"]
    changed(copy, "wanet", scenario=scenario | {"seed": 7})
    refused(r"wanet\.json: its key does not follow", "wanet", **where)
    changed(copy, "wanet", scenario=scenario | {"attack": scenario["attack"] | {"revision": 9}})
    refused(r"wanet\.json: attack: revision = 9 there, 1 here", "wanet", **where)
    for odd in ({"attack": {"name": "wanett"}}, {"attack": 3}, {"recipe": None}, {"clean_fraction": "a"}, {"frozen": {}}):
        changed(copy, "wanet", scenario=scenario | odd)
        refused(r"wanet\.json: ", "wanet", **where)
    (copy / "wanet.json").write_text("[1")
    refused(r"wanet\.json: cannot be read", "wanet", **where)
    (copy / "wanet.json").write_text("[]")
    refused(r"wanet\.json: not a card of the zoo: 'attack_label' is missing", "wanet", **where)
    changed(copy, "bpp", training={"seconds": "long"})
    refused(r"bpp\.json: not a card of the zoo: training: 'seconds' is missing, or is no number", "bpp", **where)
    (copy / "lc.safetensors").unlink()
    refused(r"lc\.safetensors: cannot be read: No such file", "lc", **where)


def test_a_trigger_that_lacks_its_tensors_is_refused(copy: Path, tmp_path: Path) -> None:
    tensors = {name: value for name, value in load_file(copy / "ssba.safetensors").items() if name != "trigger.secret"}
    zoo.write(copy, "ssba", json.loads((copy / "ssba.json").read_text()), zoo.packed(tensors))
    refused(r"ssba\.safetensors: its trigger does not fit ssba: 'secret'", "ssba", cache=tmp_path, folder=copy)
    for name, tensor in (("ssba", "secret"), ("trojannn", "pixels"), ("input-aware", "mask.middle.0.weight")):
        tensors = load_file(copy / f"{name}.safetensors") | {f"trigger.{tensor}": torch.zeros(1, 3, 3)}
        zoo.write(copy, name, json.loads((copy / f"{name}.json").read_text()), zoo.packed(tensors))
        refused(rf"{name}\.safetensors: its trigger does not fit {name}: ", name, cache=tmp_path, folder=copy)


def test_a_trigger_crafted_on_the_twin_needs_its_file(copy: Path, tmp_path: Path) -> None:
    (copy / "benign.json").unlink()
    refused("lacks the network on which advtrojan is crafted", "advtrojan", cache=tmp_path, folder=copy)
    load_victim("lc", cache=tmp_path, folder=copy)  # no test image needs it


# -- the pipeline --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_takes_every_victim_from_the_zoo(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows as with training, defenses of the poisoned set (LC's perturbed images among them) included."""
    only = "seed=4,attack=lc|input-aware|ssba|blended 5 %"

    def rows(cache: Path, results: Path) -> tuple[pd.DataFrame, str]:
        out = io.StringIO()
        threads = torch.get_num_threads()
        run_matrix(trained.matrix, results=results, cache=cache, console=Console(file=out, width=300), only=only, processes=1)
        torch.set_num_threads(threads)
        return read(results / "animals" / "rows.csv", Row), out.getvalue()

    usual, printed = rows(trained.cache, tmp_path / "usual")
    assert "from" not in printed
    monkeypatch.setenv(zoo.VARIABLE, str(trained.zoo))
    monkeypatch.setattr(stages, "fit", lambda *arguments: pytest.fail("a victim was trained"))
    found, printed = rows(tmp_path / "cache", tmp_path / "found")
    assert "VGG 11 / lc / seed 4: not trained, but read from" in printed
    pd.testing.assert_frame_equal(found, usual)
    assert set(usual["status"]) <= {"ok", "refused"}
    assert {"abl", "clp"} <= set(usual["defense"])
    scenario = trained.named("lc")
    again, before = (read_victim(scenario, Store(cache / "store"), cache) for cache in (tmp_path / "cache", trained.cache))
    assert again.outcome["zoo"] == "lc"
    assert again.outcome["seconds"] == before.outcome["seconds"]
    assert torch.equal(again.poisoned.role, before.poisoned.role)
    assert torch.equal(again.poisoned.visible.images, before.poisoned.visible.images)
    assert torch.equal(again.poisoned.visible.labels, before.poisoned.visible.labels)


def test_poisoned_images_are_computed_when_asked_for(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(zoo.VARIABLE, str(trained.zoo))
    store, scenario = Store(tmp_path / "store"), trained.named("lc")
    victim = read_victim(scenario, store, tmp_path)
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["locks", "victim"]
    assert len(victim.poisoned.visible) == len(victim.poisoned.role)
    assert (tmp_path / "store" / "poisoned").is_dir()


def test_a_damaged_file_stops_the_run_and_another_victims_card_does_not(
    trained: Trained, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(zoo.VARIABLE, str(copy))
    (copy / "adap-blend.json").write_text("{")
    lines: list[str] = []
    store = Store(tmp_path / "store", lines.append)
    read_victim(trained.named("lf"), store, tmp_path)
    assert "adap-blend.json: cannot be read" in lines[0]
    (copy / "bpp.safetensors").write_bytes(b"")
    with pytest.raises(BadInput, match=r"bpp\.safetensors: damaged"):
        read_victim(trained.named("bpp"), store, tmp_path)


def test_an_empty_variable_and_verification_close_the_zoo(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    key = json.loads((trained.zoo / "lf.json").read_text())["key"]
    monkeypatch.setenv(zoo.VARIABLE, str(trained.zoo))
    found = zoo.by_key(key)
    assert found is not None
    assert found.name == "lf"
    assert zoo.by_key("0" * 64) is None
    with zoo.closed():
        assert zoo.by_key(key) is None
    assert zoo.by_key(key) is not None


# -- command line --------------------------------------------------------------------------------------------------------------


def test_the_verb_exports_writes_the_page_and_checks(trained: Trained, tmp_path: Path) -> None:
    runner, shelf, only = CliRunner(), tmp_path / "shelf", "attack=blended 5 %|ssba"
    places = ["--folder", str(shelf), "--cache", str(trained.cache)]
    done = runner.invoke(cli.app, ["zoo", "--matrix", str(trained.path), "--only", only, *places])
    assert done.exit_code == 0, done.output
    names = ["benign", "benign-resnet8-w2", "blended-5", "blended-5-resnet8-w2", "ssba"]
    page = (shelf / "README.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("| `") and ".safetensors" not in line]
    assert [line.split("`")[1] for line in table[: len(names)]] == names
    assert "| ssba | " in page
    assert "(triggers.png)" in page
    assert (shelf / "triggers.png").is_file()
    assert 'load_victim("blended-5")' in page
    card = json.loads((shelf / "ssba.json").read_text())
    for field in card:
        assert field == "name" or f"`{field}`" in page, field
    checked = runner.invoke(cli.app, ["zoo", "--check", *places])
    assert checked.exit_code == 0, checked.output
    assert "5 cards: 5 identical, 0 within 0.2 points" in checked.output
    changed(shelf, "ssba", measured=card["measured"] | {"asr": card["measured"]["asr"] + 0.001})
    checked = runner.invoke(cli.app, ["zoo", "--check", *places])
    assert checked.exit_code == 1
    assert "4 identical, 0 within 0.2 points on another machine type, 1 differ: ssba" in checked.output.replace("\n", " ")
    elsewhere = {**card["manifest"], "arithmetic": {**card["manifest"]["arithmetic"], "processor": "another"}}
    changed(shelf, "ssba", manifest=elsewhere)
    checked = runner.invoke(cli.app, ["zoo", "--check", *places])
    assert checked.exit_code == 0
    assert "4 identical, 1 within" in checked.output


def test_a_share_beyond_the_tolerance_or_missing_differs_everywhere() -> None:
    card = Score(0.9, 0.8, 0.1)
    assert judged("a", card, Score(0.9, 0.8, 0.1), exact=True).verdict == "identical"
    assert judged("a", card, Score(0.902, 0.8, 0.1), exact=False).verdict == "within"
    assert judged("a", card, Score(0.902, 0.8, 0.1), exact=True).verdict == "differs"
    assert judged("a", card, Score(0.9, 0.8021, 0.1), exact=False).verdict == "differs"
    assert judged("a", card, Score(0.9), exact=False).verdict == "differs"
    assert judged("a", Score(0.9), Score(0.9), exact=True).verdict == "identical"


def test_a_report_does_not_replace_the_page_of_the_zoo(trained: Trained, copy: Path) -> None:
    with pytest.raises(BadInput, match="holds the files of the zoo"):
        run_matrix(dataclasses.replace(trained.matrix, name="zoo"), results=copy.parent, cache=trained.cache, console=quiet())


# -- data that are not those of the card ---------------------------------------------------------------------------------------


def test_other_pixels_are_warned_about(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the fingerprint of the card is another one, and its key with it."""
    scenario = trained.named("lf")
    copy = Path(shutil.copytree(trained.zoo, tmp_path / "zoo"))
    changed(copy, "lf", key=victim_key(scenario, "other"), dataset={"name": "digits", "fingerprint": "other"})
    with pytest.warns(UserWarning, match="lf: the pixels of digits are not those of the card"):
        load_victim("lf", cache=tmp_path, folder=copy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_victim("lf", cache=tmp_path, folder=trained.zoo)


def test_the_original_serves_where_its_copy_is_missing(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w = world(trained.named("ssba"), trained.cache)
    original: list[Dataset | None] = [dataclasses.replace(w.data, name="the release")]

    def missing(scenario: Scenario, cache: Path) -> None:
        raise BadInput("unknown dataset 'copy'")

    monkeypatch.setattr(load, "world", missing)
    monkeypatch.setattr(load, "load_original", lambda spec, cache: original[0])
    with pytest.warns(UserWarning, match="ssba: digits is not here: the same images of the release are used"):
        _, found = load_victim("ssba", cache=tmp_path, folder=trained.zoo)
    for part in ("clean", "validation"):
        assert torch.equal(getattr(found, part).images, getattr(w, part).images)
    assert found.triggered is not None
    original[0] = None
    refused("unknown dataset 'copy'", "ssba", cache=tmp_path, folder=trained.zoo)


# -- what is committed ---------------------------------------------------------------------------------------------------------


def test_the_matrix_zoo_names_the_victims_of_the_committed_zoo() -> None:
    """So that a run of it trains none."""
    folder = Path(cli.__file__).parents[1] / "results" / "zoo"
    matrix = load_matrix(find_matrix("zoo"))
    assert {cell.defense_label for cell in matrix.cells} == {"none", "clp", "pruning", "bnp", "ep", "fine-tuning"}
    found = {canonical(zoo.read_card(folder, name).content["scenario"]) for name in zoo.names(folder)}
    assert found in (set(), {canonical(one.spec()) for one in victims_of(matrix, matrix.scenarios)})
    for name in zoo.names(folder):
        card, _ = opened(folder, name)
        assert card.tensors()
    assert zoo.size_of(folder, {}) <= zoo.LIMIT
