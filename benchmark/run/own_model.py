"""Defend your own model: the same pipeline, with a checkpoint in place of a trained victim.

The post-training defenses of a matrix run on the checkpoint with a clean budget drawn from the named data set. Without an attack
only ACC is measured, because ASR needs a trigger. With an attack, its trigger (with the matrix's settings or the published
defaults) gives ASR and RA as well. For every defense the candidate chosen by validation is written as safetensors.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from attacks import ATTACKS
from attacks.base import PoisonedSet, poison_test
from benchmark.rules.metrics import Score, Scorer
from benchmark.rules.selection import CandidateScore, Selection, choose
from benchmark.run.defend import defend
from benchmark.run.progress import notes
from benchmark.run.victim import Victim
from benchmark.run.world import World, fresh, world
from benchmark.settings.cells import Cell, Scenario
from benchmark.settings.load import find_matrix, load_matrix
from benchmark.storage.files import write_text
from defenses.base import Knowledge
from models import BACKBONES
from models.backbone import Backbone, Network
from models.spec import BadInput, derive_seed, lookup
from models.weights import check_state, fit_state, read_state, save_weights

__all__ = ["defend_checkpoint"]


def _backbone(name: str, state: dict[str, Tensor], path: Path) -> Backbone:
    """The architecture, with the width and head of the weights.

    Raises:
        BadInput: unknown name, or weights without a first conv or a head.
    """
    cls: type[Backbone] = lookup("backbone", BACKBONES, name)
    convs = [value for key, value in state.items() if key.startswith("features.") and value.ndim == 4]
    # Files keep tensors in any order, so layers of the head are sorted by their index.
    heads = [state[key] for key in sorted(state) if key.startswith("head.") and state[key].ndim == 2]
    if not convs or not heads:
        raise BadInput(
            f"{path}: does not fit {name}: it has no 'features.*' conv or no 'head.*' layer; tensors there begin with "
            f"{', '.join(sorted({key.split('.')[0] for key in state})[:4])}"
        )
    # The first stage is the narrowest. The conv with the fewest input channels need not be the first: a network may be narrower
    # than its images have channels.
    try:
        return cls(width=min(conv.shape[0] for conv in convs), hidden=heads[0].shape[0] if len(heads) > 1 else 0)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error


def defend_checkpoint(
    checkpoint: Path,
    backbone: str,
    dataset: str,
    attack: str | None,
    matrix: str,
    *,
    results: Path,
    cache: Path,
    console: Console,
) -> Path:
    """Runs the defenses and writes ``<results>/my-model/<checkpoint>/``; returns that folder.

    Args:
        checkpoint: a file of weights.
        backbone: name of its architecture.
        dataset: name of the data set that it classifies.
        attack: name of the attack whose trigger gives ASR and RA; None = ACC only.
        matrix: the matrix whose defenses run.
        results: folder of results.
        cache: folder of decoded images.
        console: where progress and the table are printed.

    Raises:
        BadInput: the checkpoint is missing, damaged, would run code, or does not fit the backbone or the data set's classes; an
            unknown name. Nothing is written then.
    """
    if checkpoint.stem.startswith(".") or not checkpoint.stem.isprintable():  # it names the folder of results
        raise BadInput(f"{str(checkpoint)!r}: results are called like the file, so {checkpoint.stem!r} cannot be one; rename it")
    state = read_state(checkpoint)
    shape_of = _backbone(backbone, state, checkpoint)
    if attack is not None:
        lookup("attack", ATTACKS, attack)
    cells = _cells(matrix, dataset, shape_of, attack, console)
    scenario = cells[0].scenario
    torch.set_num_threads(1)
    w = world(scenario, cache)
    victim = _victim(scenario, w, _network(scenario, w, state, checkpoint, console))
    before, before_val = victim.scorer(victim.net), victim.scorer.val_acc(victim.net)
    folder = results / "my-model" / checkpoint.stem
    found = [Result("none (the checkpoint as it is)", "", before, before_val, 0, "ok", "")]
    for number, (cell, name) in enumerate(zip(cells, _file_names(cells), strict=True), 1):
        line = f"[{number}/{len(cells)}] {cell.defense_label} ({cell.scope.value}): {cell.track.title}"
        console.print(line, highlight=False, markup=False)
        found.append(_defended(cell, victim, w, before, folder / f"{name}.safetensors"))
    write_text(folder / "defenses.csv", _csv(found))
    against = f"against {scenario.attack_label}" if scenario.attack else "no attack named: ACC only"
    console.print(_table(found, escape(f"{checkpoint.name} on {w.data.name}, {against} (percent)")))
    console.print(
        f"The clean budget ({len(w.clean) + len(w.validation)} images) is drawn from {w.data.name}'s training images; a model "
        f"that was trained on them has seen them.\ncleaned weights and defenses.csv: {folder}",
        highlight=False,
        markup=False,
    )
    return folder


def _network(scenario: Scenario, w: World, state: dict[str, Tensor], checkpoint: Path, console: Console) -> Network:
    """The checkpoint's network.

    Raises:
        BadInput: the weights do not fit it.
    """
    own = any(name.startswith("normalise.") for name in state)
    with torch.device("meta"):  # a file of a few bytes may claim a width that fills the memory
        blank = fresh(scenario, w, 0)
    check_state(blank, state if own else state | _normalisation(blank), checkpoint)
    net = fresh(scenario, w, 0)
    if not own:
        notes(console)("the checkpoint holds no normalisation; the data set's own is used")
        state |= _normalisation(net)
    fit_state(net, state, checkpoint)
    return net.eval()


def _victim(scenario: Scenario, w: World, net: Network) -> Victim:
    """The network as an attacked model; with the trigger's test set, if an attack is named."""
    triggered = None
    if scenario.attack is not None:
        crafted = scenario.attack.craft(w.train, scenario.plan, derive_seed(scenario.seed, "attack"))
        triggered = poison_test(w.data.test, crafted, scenario.plan)
    clean = PoisonedSet(w.train, torch.zeros(len(w.train), dtype=torch.int8), w.train.labels)
    return Victim(net, clean, triggered, Scorer(net, w.data.test, triggered, w.validation), {"status": "ok"})


def _normalisation(net: Network) -> dict[str, Tensor]:
    return {name: value for name, value in net.state_dict().items() if name.startswith("normalise.")}


@dataclass(frozen=True)
class Result:
    """One line of the outcome; shares in [0, 1], NaN = not measured."""

    defense: str
    selection: str
    score: Score
    val_acc: float
    pruned: int
    status: str
    reason: str


def _cells(matrix: str, dataset: str, backbone: Backbone, attack: str | None, console: Console) -> list[Cell]:
    """One cell per post-training defense of the matrix, on the named data set, with the matrix's attack settings if it has any."""
    loaded = load_matrix(find_matrix(matrix), notes(console))
    known = [s for s in loaded.scenarios if s.attack is not None and s.attack.name == attack]
    model = known[0] if known else loaded.scenarios[0]
    instance = model.attack if known else lookup("attack", ATTACKS, attack)() if attack is not None else None
    scenario = dataclasses.replace(
        model,
        dataset=dataclasses.replace(model.dataset, source=dataset),
        backbone=backbone,
        backbone_label=backbone.name,
        attack=instance,
        attack_label=attack or "none",
    )
    withheld = ~(Knowledge.MODEL | Knowledge.CLEAN)
    return [
        dataclasses.replace(cell, scenario=scenario)
        for cell in loaded.cells
        if cell.scenario == model and not cell.defense.needs & withheld and cell.defense.name != "none"
    ]


def _defended(cell: Cell, victim: Victim, w: World, before: Score, file: Path) -> Result:
    """Runs one defense and writes the candidate chosen by validation to ``file``; without clean images, the published default."""
    kept: list[Network] = []
    outcome = defend(cell, w, victim, kept)
    label = f"{cell.defense_label} ({cell.scope.value})"
    if outcome["status"] != "ok":
        return Result(label, "", Score(math.nan), math.nan, 0, outcome["status"], outcome["reason"])
    measured = [CandidateScore.read(candidate) for candidate in outcome["candidates"]]
    how = Selection.VALIDATION if Knowledge.CLEAN in cell.track.grants else Selection.DEFAULT
    chosen = choose(how, measured, before, cell.tau)
    assert chosen is not None
    save_weights(kept[chosen], file)
    m = measured[chosen]
    return Result(label, how.value, m, m.val_acc, m.pruned, "ok", m.note)


def _file_names(cells: list[Cell]) -> list[str]:
    """File names after the cells' defenses; numbered where two would be the same."""
    labels = [f"{cell.defense_label} ({cell.scope.value})" for cell in cells]
    plain = ["".join(letter if letter.isalnum() or letter in "-." else "-" for letter in label) for label in labels]
    names = [name.strip("-").replace("--", "-") for name in plain]
    return [name if names.count(name) == 1 else f"{name}-{number}" for number, name in enumerate(names, 1)]


def _table(results: list[Result], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("defense")
    for name in ("ACC", "ASR", "RA", "validation", "pruned"):
        table.add_column(name, justify="right")
    table.add_column("chosen by")
    for r in results:
        shares = [_percent(value) for value in (r.score.acc, r.score.asr, r.score.ra, r.val_acc)]
        ended = r.selection if r.status == "ok" else f"{r.status}: {r.reason}"
        table.add_row(escape(r.defense), *shares, str(r.pruned), escape(ended))
    return table


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def _csv(results: list[Result]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["defense", "selection", "acc", "asr", "ra", "val_acc", "pruned", "status", "reason"])
    for r in results:
        shares = ["" if math.isnan(v) else f"{v:.6f}" for v in (r.score.acc, r.score.asr, r.score.ra, r.val_acc)]
        writer.writerow([r.defense, r.selection, *shares, r.pruned, r.status, r.reason])
    return out.getvalue()
