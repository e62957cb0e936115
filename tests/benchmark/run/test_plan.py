"""The plan of a run: which stages there are, what each waits for, and which of them a run needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmark.run.plan import Plan, Stage
from benchmark.settings.load import load_matrix
from benchmark.storage.store import Store
from models.spec import canonical

MATRIX = """
title = "planned"
seeds = [0, 1]
dataset = { source = "digits", clean_fraction = 0.2, train_limit = 100, test_limit = 40 }
recipe = { epochs = 0, precision = "tf32" }
[[backbone]]
name = "vgg11-bn"
width = 2
[[backbone]]
name = "vgg11-bn"
label = "given"
width = 2
frozen = { extractor = "clean", epochs = 2 }
[[extractor]]
name = "supervised"
label = "clean"
[[attack]]
name = "badnets"
[[defense]]
name = "none"
[[defense]]
name = "dbd"
tracks = ["train"]
"""


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    (tmp_path / "m.toml").write_text(MATRIX)
    matrix = load_matrix(tmp_path / "m.toml")
    return Plan(matrix, {canonical(matrix.scenarios[0].dataset): "print"})


def labels(stages: list[Stage]) -> list[str]:
    return [stage.label for stage in stages]


def store_with(folder: Path, *stages: Stage) -> Store:
    store = Store(folder / "store")
    for stage in stages:
        store.write(stage.kind, stage.key, {}, {"status": "ok"})
    return store


def test_every_stage_comes_once_and_after_those_it_waits_for(plan: Plan) -> None:
    order = list(plan.stages)
    assert all(order.index(other) < order.index(key) for key, stage in plan.stages.items() for other in stage.after)
    kinds = [stage.kind for stage in plan.stages.values()]
    assert kinds.count("victim") == 2 * 2 * 2, "two seeds, two backbones, attacked and benign"
    assert kinds.count("extractor") == 2 + 2, "one on clean images and one on poisoned ones per seed, shared by the backbones"
    assert kinds.count("defended") == len(plan.cells) == len(plan.matrix.cells) == 8
    victims = [stage for stage in plan.stages.values() if stage.kind == "victim"]
    assert [stage.scenario.attack_label for stage in victims] == ["none"] * 4 + ["badnets"] * 4


def test_what_each_kind_waits_for(plan: Plan) -> None:
    def waits(label: str) -> list[str]:
        (stage,) = [stage for stage in plan.stages.values() if stage.label == label]
        return [plan.stages[key].label for key in stage.after]

    clean = "extractor trained with labels on the clean images: given / seed 0"
    poisoned = "extractor self-supervised on the poisoned images: vgg11-bn-w2 / badnets / seed 0"
    assert waits(clean) == []
    assert waits("train given / badnets / seed 0") == [clean, "train given / none / seed 0"]
    assert waits("train vgg11-bn-w2 / none / seed 0") == []
    assert waits(poisoned) == ["train vgg11-bn-w2 / badnets / seed 0"]
    assert waits("dbd (whole) on given / badnets / seed 0") == [poisoned, clean, "train given / badnets / seed 0"]


def test_missing_is_what_the_rows_need_and_the_store_lacks(plan: Plan, tmp_path: Path) -> None:
    none = next(cell for cell in plan.cells if cell.label == "none (whole) on vgg11-bn-w2 / badnets / seed 0")
    needed = ["train vgg11-bn-w2 / none / seed 0", "train vgg11-bn-w2 / badnets / seed 0", none.label]
    assert labels(plan.missing([none], store_with(tmp_path))) == needed
    assert labels(plan.missing(plan.cells, store_with(tmp_path))) == labels(list(plan.stages.values()))
    # A cell that is cached needs nothing but the outcomes of its victim and the twin for its rows.
    store = store_with(tmp_path, none)
    assert labels(plan.missing([none], store)) == needed[:2]
    assert not plan.is_cached(none, store)
    store = store_with(tmp_path, *(plan.stages[key] for key in none.victims))
    assert plan.missing([none], store) == []
    assert plan.is_cached(none, store)


def test_a_stage_computes_as_precisely_as_its_victims_recipe(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []

    @contextmanager
    def noted(precision: str) -> Iterator[None]:
        entered.append(precision)
        yield

    monkeypatch.setattr("benchmark.run.plan.arithmetic", noted)
    for name in ("victim", "extractor", "cell"):
        monkeypatch.setattr(f"benchmark.run.plan.run_{name}", lambda *arguments, name=name: entered.append(name))
    for stage in plan.missing(plan.cells[1:2], store_with(tmp_path)):
        stage.run(store_with(tmp_path), tmp_path)
    assert entered == ["tf32", "victim", "tf32", "victim", "tf32", "extractor", "tf32", "cell"]
