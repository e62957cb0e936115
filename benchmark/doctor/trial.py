"""How good is ``doctor``? ``python -m benchmark.doctor.trial``: attacked and benign networks, each examined as a stranger's.

The attacked networks are those of a matrix with a given backbone that are in the store or the zoo, and whose attack is implanted.
The benign ones are their benign twin, trained with as many seeds as asked for. Every network is compared with all benign ones but
itself, as ``doctor`` compares a model with its twins. Attacked networks are also treated, and what ``doctor`` recommends is scored
with the trigger, which it never sees.

AUROC and cross-entropy are the figures of TrojAI (arXiv 2003.07233). Each finished network is stored: a second call goes on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import typer
from rich.console import Console

from benchmark.analysis.intervals import Interval
from benchmark.doctor.signs import KINDS, SEARCH, index, measured
from benchmark.doctor.treatment import COSTS, recommended, suspects, treated
from benchmark.doctor.verdict import judged
from benchmark.rules.metrics import gate, nan_of
from benchmark.run.keys import victim_key
from benchmark.run.local import single_thread
from benchmark.run.own_model import Layout, Opened
from benchmark.run.victim import read_victim
from benchmark.run.world import world
from benchmark.settings.cells import Scenario
from benchmark.settings.load import find_matrix, load_matrix
from benchmark.storage import zoo
from benchmark.storage.store import Store
from defenses.base import Knowledge
from models.spec import BadInput, derive_seed, digest, generator, nearest

__all__ = ["REMOVED", "Figures", "figures", "main", "networks", "table"]

TREATED_BY = "zoo"
"""The matrix whose post-training defenses are tried: the quick ones."""
REMOVED = 0.10
"""ASR below which a backdoor is counted as removed (ours)."""
RESAMPLES = 2000
"""Of the interval of an AUROC, as in :mod:`benchmark.analysis.intervals`."""


# -- one network ---------------------------------------------------------------------------------------------------------------


def networks(matrix: str, backbone: str, benign: int, store: Store, cache: Path) -> tuple[list[Scenario], list[Scenario]]:
    """The attacked networks that are there and implanted, and the benign ones, whether they are there or not.

    Args:
        matrix: its name. backbone: its label of the networks. benign: how many benign ones. store, cache: where networks are kept.

    Raises:
        BadInput: the matrix has no such backbone.
    """
    loaded = load_matrix(find_matrix(matrix))
    mine = [one for one in loaded.scenarios if one.backbone_label == backbone and not one.frozen]
    if not mine:
        labels = sorted({one.backbone_label for one in loaded.scenarios})
        raise BadInput(f"matrix {matrix!r} has no networks of backbone {backbone!r}{nearest(backbone, labels)}")

    def there(one: Scenario) -> bool:
        key = victim_key(one, world(one, cache).data.fingerprint)
        return store.has("victim", key) or zoo.by_key(key) is not None

    attacked = [one for one in mine if one.attack is not None and there(one)]
    first = dataclasses.replace(mine[0].twin(), seed=0)
    return [one for one in attacked if _implanted(one, store, cache)], [
        dataclasses.replace(first, seed=number) for number in range(benign)
    ]


def _implanted(scenario: Scenario, store: Store, cache: Path) -> bool:
    outcome = read_victim(scenario, store, cache).outcome
    if outcome["status"] != "ok":
        return False
    return gate(nan_of(outcome["asr"]), nan_of(outcome["asr_benign"])).implanted


def examined(scenario: Scenario, root: Path, cache: Path) -> dict[str, Any]:
    """Signs of one network and, of an attacked one, what becomes of it under every defense; from the store where it is there.

    Returns:
        ``attack``, ``seed``, ``acc``, ``asr``; ``signs`` by name; ``classes``, the most suspicious class of every kind of trigger
        (-1: none); ``target`` (-1: none or several); ``treated``: of the network as it was and of every defense ``name``,
        ``val_acc``, ``acc``, ``asr``, ``effects``; ``recommended``: a name, or "".
    """
    single_thread()
    store = Store(root)
    w = world(scenario, cache)
    cells = [
        dataclasses.replace(cell, scenario=scenario)
        for cell in load_matrix(find_matrix(TREATED_BY)).cells
        if not cell.defense.needs & ~(Knowledge.MODEL | Knowledge.CLEAN) and cell.defense.name != "none"
    ] if scenario.attack is not None else []  # fmt: skip
    cells = list({cell.defense_label: cell for cell in cells}.values())
    settings = {"scenario": scenario.spec(), "search": SEARCH.spec(), "defenses": [cell.defense.spec() for cell in cells]}
    key = digest("doctor-trial", settings, w.data.fingerprint)

    def compute() -> None:
        victim = read_victim(scenario, store, cache)
        signs = measured(victim.net, w.clean, derive_seed("doctor", "search"))
        found = treated(Opened(cells, w, victim.net, Layout({}, {})), suspects(signs)) if cells else []
        chosen = recommended(found) if found else None
        scores = [None if one.net is None else victim.scorer(one.net) for one in found]
        store.write("trial", key, settings, {
            "attack": scenario.attack_label, "seed": scenario.seed, "acc": victim.outcome["acc"], "asr": victim.outcome["asr"],
            "signs": signs.values, "classes": {kind: index(triggers)[1] for kind, triggers in signs.triggers.items()},
            "target": _target(victim.triggered),
            "treated": [
                {"name": one.name, "val_acc": one.val_acc, "acc": got.acc, "asr": got.asr, "effects": one.effects}
                for one, got in zip(found, scores, strict=True) if got is not None
            ],
            "recommended": chosen.name if chosen else "",
        })  # fmt: skip

    store.once("trial", key, compute)
    entry = store.read("trial", key)
    assert entry is not None
    return entry.outcome


def _target(triggered: Any) -> int:
    """The class that all triggered images are sent to; -1 for none or several."""
    if triggered is None:
        return -1
    targets = triggered.target_labels.unique()
    return int(targets[0]) if len(targets) == 1 else -1


# -- all of them ---------------------------------------------------------------------------------------------------------------


class Figures(NamedTuple):
    """How well a score tells attacked networks from benign ones.

    Attributes:
        auroc: with its 95 % interval, which resamples networks of both kinds.
        cross_entropy: of the probabilities, in nats.
    """

    auroc: Interval
    cross_entropy: float


def table(found: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """A line per network: as :func:`examined` gives it, with its verdict against the benign ones.

    Columns: ``attack``, ``seed``, ``acc``, ``asr`` (NaN: benign), the signs and their ``sd_`` deviations, ``strength`` (the largest
    deviation), ``p``, ``flagged`` (stronger than every benign network), ``probability``, ``class_found`` ("target", "other"; "" for
    none, or where no single class is the target), ``recommended``, ``acc_after``, ``asr_after``, ``removed`` (ASR below 10 %, and
    ACC within 3 points of the model's).
    """
    benign = [one for one in found if one["asr"] is None]
    lines = []
    for one in found:
        verdict = judged(one["signs"], [other["signs"] for other in benign if other is not one])
        after = next((other for other in one["treated"] if other["name"] == one["recommended"] != ""), None)
        lines.append({
            "attack": one["attack"], "seed": one["seed"], "acc": one["acc"], "asr": nan_of(one["asr"]), **one["signs"],
            **{f"sd_{name}": value for name, value in verdict.deviations.items()},
            "strength": min(max(verdict.deviations.values(), default=math.nan), 1e9),
            "p": verdict.p, "flagged": verdict.stronger == 0,
            "probability": verdict.probability, "class_found": _class_words(one), "recommended": one["recommended"],
            "acc_after": after["acc"] if after else math.nan, "asr_after": after["asr"] if after else math.nan,
            "removed": bool(after and after["asr"] < REMOVED and after["acc"] >= one["acc"] - COSTS),
        })  # fmt: skip
    return pd.DataFrame(lines)


def _class_words(one: Mapping[str, Any]) -> str:
    """Whether the class with the largest anomaly index is the target."""
    kind = max(KINDS, key=lambda name: float(one["signs"][name]))
    label = one["classes"][kind]
    return "" if min(label, one["target"]) < 0 else "target" if label == one["target"] else "other"


def figures(lines: pd.DataFrame, score: str = "strength") -> Figures:
    """The figures of a table's score, a column of which larger values mean a backdoor."""
    bad = lines["asr"].notna().to_numpy()
    values = lines[score].to_numpy(dtype=float)
    pairs = np.heaviside(values[bad][:, None] - values[~bad], 0.5)  # (attacked, benign): which of the two is larger
    draw = generator("doctor", "trial")
    one, other = (torch.randint(count, (RESAMPLES, count), generator=draw).numpy() for count in pairs.shape)
    again = pairs[one[:, :, None], other[:, None, :]].mean((1, 2))
    low, high = np.quantile(again, [0.025, 0.975])
    chance = lines["probability"].clip(1e-6, 1 - 1e-6)
    entropy = float(-np.log(np.where(bad, chance, 1 - chance)).mean())
    return Figures(Interval(float(pairs.mean()), float(low), float(high)), entropy)


# -- the command ---------------------------------------------------------------------------------------------------------------


def main(
    matrix: Annotated[str, typer.Option(help="The matrix of the networks.")] = "cifar10-cpu",
    backbone: Annotated[str, typer.Option(help="Its label of their backbone.")] = "resnet9-w16",
    benign: Annotated[int, typer.Option(min=5, help="Benign networks; those that are missing are trained.")] = 13,
    processes: Annotated[int, typer.Option(min=1)] = 2,
    cache: Path = Path(".cache"),
    out: Annotated[Path, typer.Option(help="Folder of the table, the picture and the page.")] = Path("results/detection"),
) -> None:
    """Examines the networks that are missing in the store, and writes the page."""
    from benchmark.doctor.trial_page import write_trial

    console = Console(stderr=True)
    try:
        bad, good = networks(matrix, backbone, benign, Store(cache / "store"), cache)
        if not bad:
            raise BadInput(f"no attacked network of {backbone} is in {cache / 'store'} or the zoo: make benchmark MATRIX={matrix}")
        found = []
        work = [(one, cache / "store", cache) for one in (*bad, *good)]
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            for number, one in enumerate((pool.map if processes > 1 else map)(examined, *zip(*work, strict=True)), 1):
                found.append(one)
                console.print(f"{number} of {len(work)}: {one['attack']}, seed {one['seed']}", highlight=False)
        write_trial(table(found), matrix, backbone, out)
    except BadInput as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(main)
