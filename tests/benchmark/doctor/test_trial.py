"""The trial of `doctor`: verdicts and figures by hand, and a small matrix from training to the page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmark.doctor import trial
from benchmark.doctor.trial import figures, main, networks, table
from benchmark.doctor.trial_page import picture, write_trial
from benchmark.settings.load import load_matrix
from benchmark.storage.store import Store
from defenses.neural_cleanse import NeuralCleanse
from models.spec import BadInput

MATRIX = """
title = "four networks"
seeds = [0]
dataset = { source = "digits", clean_fraction = 0.3, train_limit = 300, test_limit = 100 }
recipe = { epochs = 2, lr = 0.1, crop = 0, flip = false }
[[backbone]]
name = "resnet8"
width = 2
[[attack]]
name = "badnets"
[[attack]]
name = "blended"
[[defense]]
name = "none"
[[defense]]
name = "clp"
tracks = ["model"]
grid = []
"""


def network(strength: float, asr: float | None = None, **more: Any) -> dict[str, Any]:
    signs = {"patch": strength, "additive": 1.0, "weights": 2.0, "statistics": 0.0}
    given = {"attack": "none" if asr is None else "badnets", "seed": 0, "acc": 0.9, "asr": asr, "signs": signs}
    return given | {"classes": {"patch": 3, "additive": -1}, "target": -1, "treated": [], "recommended": ""} | more


def cured(asr: float, acc: float) -> dict[str, Any]:
    after = {"name": "clp (whole)", "val_acc": 0.9, "acc": acc, "asr": asr, "effects": {}}
    return {"treated": [{**after, "name": "", "acc": 0.9, "asr": 1.0}, after], "recommended": "clp (whole)"}


BENIGN = [network(strength) for strength in (1.0, 2.0, 3.0, 4.0, 5.0)]
ATTACKED = [
    network(13.0, 1.0, target=3, **cured(0.05, 0.88)), network(2.5, 0.9, target=4, **cured(0.05, 0.86)),
    network(14.0, 0.8, target=-1, **cured(0.15, 0.90)), network(15.0, 0.7, target=3),
]  # fmt: skip


def test_every_network_is_compared_with_the_other_benign_ones() -> None:
    lines = table([*ATTACKED, *BENIGN])
    assert lines["sd_patch"].iloc[0] == pytest.approx(10 / math.sqrt(2.5))
    assert lines["sd_patch"].iloc[4] == pytest.approx((1 - 3.5) / torch.tensor([2.0, 3, 4, 5]).std().item())
    assert lines["flagged"].tolist() == [True, False, True, True, False, False, False, False, True]
    assert lines["p"].tolist()[0] == 1 / 6
    # The weaker three deviate most in signs that are the same in all networks, by 0.
    assert sorted(lines["p"][4:]) == [0.2, 0.4, 1.0, 1.0, 1.0]
    assert lines["class_found"].tolist() == ["target", "other", "", "target", "", "", "", "", ""]
    # Removed: ASR below 10 %, and not more than three points of ACC lost.
    assert lines["removed"].tolist()[:4] == [True, False, False, False]
    assert lines["asr_after"].tolist()[:3] == [0.05, 0.05, 0.15]
    assert math.isnan(lines["asr_after"].iloc[3])


def test_the_figures_by_hand() -> None:
    lines = table([*ATTACKED, *BENIGN])
    found = figures(lines, "patch")
    pairs = [(bad > good) + 0.5 * (bad == good) for bad in (13, 2.5, 14, 15) for good in (1, 2, 3, 4, 5)]
    assert found.auroc.mean == pytest.approx(sum(pairs) / len(pairs))
    assert found.auroc.low <= found.auroc.mean <= found.auroc.high
    right = [*lines["probability"][:4], *(1 - lines["probability"][4:])]
    assert found.cross_entropy == pytest.approx(-sum(map(math.log, right)) / 9)


def test_the_page_counts_what_the_table_says(tmp_path: Path) -> None:
    lines = table([*ATTACKED, *BENIGN])
    write_trial(lines, "m", "b", tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "4 attacked and 5 benign networks (backbone b, matrix `m`)" in page
    assert "3 of 4 attacked networks have stronger signs than every benign one, and 1 of 5 benign networks" in page
    assert "Attacked, but not: badnets, seed 0." in page
    assert "at most 3 points of ACC in 1 of 4 attacked networks." in page
    assert len(pd.read_csv(tmp_path / "networks.csv")) == 9
    assert (tmp_path / "networks.png").stat().st_size > 0
    (panel,) = picture(lines).panels
    assert panel.names[:2] == ("badnets, seed 0", "badnets, seed 0")
    assert panel.names[4:] == ("benign, seed 0",) * 5
    assert len(panel.series) == 4


@pytest.mark.slow
def test_a_trial_from_training_to_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "four.toml").write_text(MATRIX)
    monkeypatch.setattr(trial, "SEARCH", NeuralCleanse(search_epochs=1, samples=8, search_batch=4))
    monkeypatch.setattr("benchmark.doctor.signs.SEARCH", NeuralCleanse(search_epochs=1, samples=8, search_batch=4))
    monkeypatch.setattr(trial, "TREATED_BY", str(tmp_path / "four.toml"))
    monkeypatch.setattr(trial, "_implanted", lambda *_: True)
    scenario = next(one for one in load_matrix(tmp_path / "four.toml").scenarios if one.attack_label == "badnets")
    store = Store(tmp_path / "c" / "store")
    app = typer.Typer()
    app.command()(main)
    order = ["--matrix", str(tmp_path / "four.toml"), "--benign", "5", "--processes", "1", "--cache", str(tmp_path / "c"), "--out",
             str(tmp_path / "out"), "--backbone", "resnet8-w2"]  # fmt: skip
    nothing = CliRunner().invoke(app, order)
    assert nothing.exit_code == 2
    assert "no attacked network of resnet8-w2 is in" in nothing.stderr
    trial.read_victim(scenario, store, tmp_path / "c")
    bad, good = networks(str(tmp_path / "four.toml"), "resnet8-w2", 5, store, tmp_path / "c")
    assert [one.attack_label for one in bad] == ["badnets"], "blended was not trained"
    assert [(one.attack, one.seed) for one in good] == [(None, number) for number in range(5)]
    result = CliRunner().invoke(app, order)
    assert result.exit_code == 0, result.output
    lines = pd.read_csv(tmp_path / "out" / "networks.csv")
    assert lines["attack"].fillna("none").tolist() == ["badnets"] + ["none"] * 5
    assert lines["asr"].notna().tolist() == [True] + [False] * 5
    assert "6 of 6: none, seed 4" in result.stderr
    monkeypatch.setattr(trial, "measured", lambda *_: pytest.fail("a network was examined again"))
    assert CliRunner().invoke(app, order).exit_code == 0
    with pytest.raises(BadInput, match="has no networks of backbone 'resnet9-w2'; did you mean 'resnet8-w2'"):
        networks(str(tmp_path / "four.toml"), "resnet9-w2", 5, store, tmp_path / "c")
