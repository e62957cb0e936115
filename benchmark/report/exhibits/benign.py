"""Whether every row has the same benign accuracy and the same undefended figures."""

from __future__ import annotations

import pandas as pd

from benchmark.analysis import intervals, stats
from benchmark.report.exhibits import evidence as ev
from models.spec import digest

figure = ev.no_figure
COLUMNS = (
    *ev.text(dataset="Dataset", backbone="Backbone", recipe="Recipe", attacks="Attacks"), *ev.count(seeds="Seeds"),
    *ev.interval(benign="Benign ACC"), *ev.count(distinct="Distinct values per seed", rows="Rows"),
)  # fmt: skip


def frame(source: ev.Source) -> pd.DataFrame:
    recipes = {(s.backbone_label, s.attack_label): digest(s.recipe.spec())[:8] for s in source.matrix.scenarios}
    rows = source.rows[source.rows["attack"] != stats.NO_ATTACK]
    if rows.empty:
        raise ev.Missing("there is no attack")
    rows = rows.assign(recipe=[recipes.get(place, "") for place in zip(rows["backbone"], rows["attack"], strict=True)])
    lines = []
    for (dataset, backbone, recipe), mine in rows.groupby(["dataset", "backbone", "recipe"], sort=False):
        by_seed = mine.groupby("seed")["acc_benign"]
        lines.append({"dataset": dataset, "backbone": backbone, "recipe": recipe,
                      "attacks": ", ".join(dict.fromkeys(mine["attack"])), "seeds": mine["seed"].nunique(),
                      "distinct": int(by_seed.nunique(dropna=False).max()), "rows": len(mine),
                      **ev.bounded("benign", intervals.interval([by_seed.first().to_list()]))})  # fmt: skip
    values = rows.groupby(stats.WORLD)[["acc_undefended", "asr_undefended", "ra_undefended"]].nunique(dropna=False).max(axis=1)
    return ev.table_of(lines, models=len(values), equal=int((values == 1).sum()), unrated=int(rows["rate"].isna().sum()))
