"""Whether the poisoned training set is larger than the clean one."""

from __future__ import annotations

import pandas as pd

from benchmark.analysis import stats
from benchmark.report.exhibits import evidence as ev

figure = ev.no_figure
COLUMNS = (
    *ev.text(dataset="Dataset"), *ev.count(whole="Training images released", pool="held out as clean budget"),
    *ev.count(clean="|D|: left to the attacker", least="|D'|: published, least", most="most", models="Attacked models"),
    *ev.share(poison="Largest share poisoned"),
)  # fmt: skip


def frame(source: ev.Source) -> pd.DataFrame:
    sizes = source.manifest.get("datasets", {})
    pools = {scenario.clean_fraction for scenario in source.matrix.scenarios}
    rows = source.rows[(source.rows["train_images"] > 0) & (source.rows["attack"] != stats.NO_ATTACK)]
    rows = rows[rows["used"].str.contains("train")]
    lines = []
    for dataset, mine in rows.groupby("dataset", sort=False):
        if dataset in sizes and len(pools) == 1:
            whole = int(sizes[dataset]["train"])
            pool = round(next(iter(pools)) * whole)
            lines.append({
                "dataset": dataset, "whole": whole, "pool": pool, "clean": whole - pool, "least": int(mine["train_images"].min()),
                "most": int(mine["train_images"].max()), "models": len(mine.drop_duplicates(stats.WORLD)),
                "poison": float(mine["realised_rate"].max()),
            })  # fmt: skip
    return ev.table_of(lines, "no defense used the training set, or the manifest lacks its size")
