"""Verdicts on reproduction: the rule at its edges, against a twin that reads the files line by line; claims and reasons."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

import benchmark
from benchmark.analysis import published, reproduction
from benchmark.analysis.reproduction import AS_PUBLISHED, NOT_COMPARED, NOT_SOUGHT, UNDECIDED, WORSE, Judged, Reason
from benchmark.report.exhibits.catalogue import EXHIBITS
from benchmark.storage.rows import Row, frame

ROOT = Path(benchmark.__file__).parents[1]
FOLDER = ROOT / "benchmark" / "analysis" / "published"


def row(defense: str, seed: int = 0, **more: object) -> Row:
    settings: dict[str, object] = {
        "matrix": "m", "dataset": "cifar10-q95", "backbone": "resnet9-w16", "attack": "badnets 10 %", "rate": 0.1, "seed": seed,
        "track": "model+clean", "scope": "whole", "defense": defense, "cell": f"{defense}{seed}", "target": 0,
        "label_mode": "all-to-one", "realised_rate": 0.1, "control": defense == "none", "selection": "validation", "status": "ok",
        "acc": 0.88, "asr": 0.02, "ra": 0.8, "acc_undefended": 0.9, "asr_undefended": 0.96, "ra_undefended": 0.03,
        "acc_benign": 0.91, "asr_benign": 0.01, "implanted": True,
    }  # fmt: skip
    return Row(**{**settings, **more})  # type: ignore[arg-type]


def judged(*rows: Row) -> Judged:
    """The only comparison of an entry's rows, judged."""
    table = frame(list(rows))
    (one,) = published.comparisons(table, "model+clean")
    return reproduction.judged(one, table[table["selection"] == "validation"])


def slow_band(backbones: set[str], attack: str, rates: set[str], defense: str) -> tuple[float, float]:
    """Largest published ASR and loss of ACC in percent, line by line; only figures whose source prints an implanted victim."""
    lines: list[dict[str, str]] = []
    for name in ("undefended", "defended"):
        with (FOLDER / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            for line in csv.DictReader(file):
                line.setdefault("defense", "none")
                line.setdefault("labels", "all-to-one")
                lines.append({**line, "source": line.get("source", "BackdoorBench leaderboard").split(",")[0]})
    asr, loss = [], []
    for line in lines:
        if (line["dataset"], line["attack"], line["labels"], line["defense"]) != ("cifar10", attack, "all-to-one", defense):
            continue
        if line["backbone"] not in backbones or line["rate"] not in rates:
            continue
        for victim in lines:
            same = all(victim[key] == line[key] for key in ("dataset", "backbone", "attack", "labels", "rate", "source"))
            if same and victim["defense"] == "none" and float(victim["asr"]) >= 50:
                asr.append(float(line["asr"]))
                loss.append(float(victim["acc"]) - float(line["acc"]))
    return max(asr), max(loss)


RESIDUAL = {"preact-resnet18", "resnet18", "wrn16-1"}


@pytest.mark.parametrize(
    ("backbone", "attack", "rate", "defense", "networks", "rates"),
    [
        ("resnet9-w16", "badnets 10 %", 0.1, "anp", RESIDUAL, {"0.1"}),
        ("resnet9-w16", "blended 10 %", 0.1, "fine-tuning", RESIDUAL, {"0.1"}),
        ("resnet9-w16", "wanet", 0.02, "clp", RESIDUAL, {"0.01", "0.05"}),  # at 1 % the published victim is not implanted
        ("preact-resnet18-w16", "ssba", 0.1, "fine-pruning", {"preact-resnet18"}, {"0.1"}),
        ("vgg11-bn-w16", "wanet", 0.1, "anp", {"vgg19-bn"}, {"0.1"}),
        ("vgg11-bn-w16", "lf", 0.1, "anp", RESIDUAL, {"0.1"}),  # its family has no figures of LF
        ("three-convs", "bpp", 0.1, "clp", RESIDUAL | {"vgg19-bn"}, {"0.1"}),
    ],
)  # fmt: skip
def test_the_rule_at_its_edges(backbone: str, attack: str, rate: float, defense: str, networks: set[str], rates: set[str]) -> None:
    asr, loss = slow_band(networks, attack.split(" ", 1)[0], rates, defense)
    most_asr, most_loss = (asr + 5) / 100, (loss + 2) / 100

    def state(asr_here: float, loss_here: float, before: float = 1.0) -> tuple[str, tuple[str, ...]]:
        found = judged(row(defense, attack=attack, rate=rate, backbone=backbone, asr=asr_here, acc=0.9 - loss_here,
                           asr_undefended=before))  # fmt: skip
        assert (100 * found.asr[1], 100 * found.loss[1]) == pytest.approx((asr, loss))
        return found.state, found.worse

    passes = AS_PUBLISHED if most_asr < 1 else UNDECIDED  # where 100 % would pass, nothing can be shown
    assert state(min(1.0, most_asr - 1e-4), most_loss - 1e-4)[0] == passes
    assert state(0.0, most_loss - 0.01)[0] == passes  # better in both
    assert state(0.0, most_loss + 1e-4) == (WORSE, ("ACC",))
    if most_asr < 1:
        assert state(most_asr + 1e-4, most_loss - 1e-4) == (WORSE, ("ASR",))
        assert state(1.0, most_loss + 1e-4) == (WORSE, ("ASR", "ACC"))
    if 0.55 < most_asr < 1 and most_loss > 0:
        assert state(0.0, 0.0, most_asr - 1e-4)[0] == UNDECIDED  # a weaker victim passes as it is


def test_seeds_are_averaged_before_they_are_judged() -> None:
    asr = slow_band(RESIDUAL, "badnets", {"0.1"}, "anp")[0] / 100 + 0.05
    found = judged(row("anp", 0, asr=asr + 0.1, mark="no change"), row("anp", 1, asr=asr - 0.11))
    assert (found.state, found.seeds, found.idle) == (AS_PUBLISHED, 2, 1)
    assert found.after["asr"] == pytest.approx(asr - 0.005)
    assert judged(row("anp", 0, asr=asr + 0.1), row("anp", 1, asr=asr - 0.09)).state == WORSE


def test_what_is_not_implanted_is_not_compared() -> None:
    assert judged(row("anp", asr_undefended=0.3, implanted=False)).state == NOT_COMPARED
    assert judged(row("anp", attack="wanet", rate=0.005)).state == NOT_COMPARED  # nor where the published victims are not
    found = judged(row("abl", backbone="wrn16-1-w16"))
    assert (found.state, found.printed) == (NOT_COMPARED, ())  # the README of ABL prints no undefended victim
    assert all(math.isnan(end) for end in (*found.asr, *found.loss))


def one(state: str, attack: str = "badnets", *, idle: int = 0, leaky: str = "", implanted: bool = True) -> Judged:
    figures = published.printed()[:1]
    return Judged(("d", "b", attack), figures, (0, 0), (0, 0), {}, {}, 3, idle, state, ("ASR",), leaky, implanted)


@pytest.mark.parametrize(("states", "words"), [
    ([AS_PUBLISHED, AS_PUBLISHED], "reproduced"), ([AS_PUBLISHED, UNDECIDED], "reproduced"),
    ([AS_PUBLISHED, WORSE, NOT_COMPARED], "reproduced in part"), ([WORSE, UNDECIDED], "not reproduced"),
    ([UNDECIDED], "not comparable"), ([NOT_COMPARED], "not comparable"), ([], "not comparable"),
])  # fmt: skip
def test_the_verdict_on_an_entry(states: list[str], words: str) -> None:
    verdict = reproduction.judge([one(state) for state in states])
    assert verdict.words == words
    assert bool(verdict.why) is (words == "not comparable")
    assert (len(verdict.good), len(verdict.bad)) == (states.count(AS_PUBLISHED), states.count(WORSE))


def test_not_comparable_says_why() -> None:
    whys = {
        "no cell finished": [],
        "no published figure of an attack that was run": [judged(row("abl", backbone="wrn16-1-w16"))],
        "no scenario with a published figure is implanted": [one(NOT_COMPARED, implanted=False)],
        "nothing was changed in any cell": [one(WORSE, idle=3), one(UNDECIDED, idle=3)],
        "the undefended models would meet the published figures": [one(UNDECIDED, idle=1)],
    }
    assert {reproduction.judge(found).why for found in whys.values()} == set(whys)
    assert all(reproduction.judge(found).why == why for why, found in whys.items())
    assert reproduction.judge([one(WORSE, idle=3), one(AS_PUBLISHED)]).words == "reproduced in part"  # unchanged counts against


def test_reasons_come_from_the_file_or_from_the_rows_or_are_not_yet_sought(monkeypatch: pytest.MonkeyPatch) -> None:
    def words(*found: Judged, defense: str = "anp, budget 1 %") -> str:
        return reproduction.reason_words(defense, reproduction.judge(found))

    monkeypatch.setattr(reproduction, "reasons", lambda: [
        Reason("anp", "blended", "the radius", "selection"), Reason("clp", "", "the width", "pruned"),
        Reason("pruning", "", "x", "y"),
    ])  # fmt: skip
    assert words(one(AS_PUBLISHED)) == words(one(UNDECIDED)) == ""
    assert words(one(WORSE)) == NOT_SOUGHT
    assert words(one(WORSE, "blended 10 %"), one(AS_PUBLISHED)) == "the radius (selection)"
    assert words(one(WORSE), defense="clp") == "the width (pruned)"
    assert words(one(WORSE), defense="fine-pruning") == NOT_SOUGHT
    assert words(one(WORSE, leaky=AS_PUBLISHED)) == "chosen on the test ASR, it is as published on badnets (leaky rule)"
    assert words(one(WORSE, leaky=WORSE)) == NOT_SOUGHT


def test_the_leaky_rule_is_judged_too() -> None:
    found = judged(row("anp", asr=0.9), row("anp", selection="leaky", asr=0.01))
    assert (found.state, found.leaky) == (WORSE, AS_PUBLISHED)
    assert judged(row("fine-tuning", asr=0.9), row("fine-tuning", selection="leaky", asr=0.01)).leaky == ""


def test_every_claim_names_its_paper_and_a_figure_that_is_on_file() -> None:
    with (FOLDER / "claims.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    found = reproduction.claims()
    assert len(found) == len(lines)
    for line in lines:
        claim = found[line["defense"]]
        assert claim.claim
        assert "20" in claim.paper
        assert claim.place
        assert (claim.figure is not None) is bool(line["attack"])
    figure = found["dbd"].figure
    assert figure is not None
    assert (figure.acc, figure.asr) == pytest.approx((0.925, 0.0088))


def test_every_reason_names_an_experiment_that_exists() -> None:
    with (FOLDER / "reasons.csv").open(encoding="utf-8", newline="") as file:
        assert next(csv.reader(file)) == ["defense", "attack", "reason", "experiment"]
    for reason in reproduction.reasons():
        assert reason.reason
        assert reason.experiment in {exhibit.name for exhibit in EXHIBITS} or (ROOT / "results" / reason.experiment).exists()


def test_a_figures_victim_is_that_of_its_own_source() -> None:
    for figure in published.printed():
        victim = reproduction.victim_of(figure)
        if victim is not None:
            assert (victim.defense, victim.source.split(",")[0]) == ("none", figure.source.split(",")[0])
            for name in ("dataset", "backbone", "attack", "labels"):
                assert getattr(victim, name) == getattr(figure, name)
    without = {figure.source for figure in published.printed() if reproduction.victim_of(figure) is None}
    assert {source.split(",")[0] for source in without} <= {"ABL README", "BackdoorBench leaderboard"}

