"""Did the attacks work, and as strongly as in the literature?"""

from __future__ import annotations

import pandas as pd

from benchmark.analysis import intervals, stats
from benchmark.report.exhibits import evidence as ev
from benchmark.report.figures import Dots
from benchmark.report.words import gate_words, scenario_words

COLUMNS = (
    *ev.text(dataset="Dataset", backbone="Backbone", attack="Attack"), *ev.share(rate="Rate"),
    *ev.text(victims="Victims", verdict="Verdict", implanted="Seeds that pass alone"),
    *ev.interval(asr="ASR", asr_benign="ASR, benign twin"), *ev.difference(effect="Effect"), *ev.interval(acc="ACC"),
    *ev.difference(loss="Loss of ACC to the benign twin"), *ev.points(loss_low="at least"), *ev.text(literature="Literature"),
)  # fmt: skip


def frame(source: ev.Source) -> pd.DataFrame:
    every = ev.before_defense(source.rows).assign(victims=lambda rows: ev.victims_words(rows))
    found, lines = stats.scenarios(source.rows), []
    for place, here in every.groupby(stats.SCENARIO, sort=False):
        lines.append({**dict(zip(stats.SCENARIO, place, strict=True)), "victims": here["victims"].iloc[0],
                      "rate": float(here["rate"].iloc[0]), "implanted": ev.implanted_words(here),
                      **ev.means_of(here, ("acc", "asr", "loss", "asr_benign", "effect")),
                      "literature": " / ".join(dict.fromkeys(here["literature"]))})  # fmt: skip
    verdicts = every.loc[every["literature"] != "no reference", "literature"].value_counts()
    table = ev.table_of(lines, "there is no attack", gate=gate_words(source.rows), references=dict(sorted(verdicts.items())),
                        gaps=_gaps(every))  # fmt: skip
    table["verdict"] = [scenario_words(line) for _, line in found.iterrows()]
    table["loss_low"] = list(found["acc_loss_low"])
    return table


def _gaps(every: pd.DataFrame) -> list[tuple[str, str, intervals.Interval]]:
    """(attack, victims, difference in ASR): victims on given features minus the same backbone trained end to end."""
    own, frozen = every[every["features"] == ""], every[every["features"] != ""]
    gaps = []
    for (attack, victims), mine in frozen.groupby(["attack", "victims"], sort=False):
        for backbone, other in own[own["attack"] == attack].groupby("backbone", sort=False):
            if str(mine["backbone"].iloc[0]).startswith(str(backbone)):
                gap = ev.paired_gap(mine.assign(backbone=backbone), other, "asr")[0]
                gaps.append((str(attack), str(victims), gap))
    return gaps


def figure(table: pd.DataFrame) -> Dots:
    series = {"ASR": "asr", "ASR of the benign twin": "asr_benign", "ACC": "acc"}
    panel = ev.dot_panel(table, "Undefended models", "%", series, lambda line: f"{line['attack']} on {line['backbone']}")
    return Dots((panel,), "Means over all seeds, implanted or not.")
