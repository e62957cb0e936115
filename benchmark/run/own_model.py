"""Defend your own model: the same pipeline, with a checkpoint in place of a trained victim.

The post-training defenses of a matrix run on the checkpoint with a clean budget drawn from the named data set. Without an attack
only ACC is measured, because ASR needs a trigger. With an attack, its trigger (with the matrix's settings or the published
defaults) gives ASR and RA as well. For every defense the candidate chosen by validation is written as safetensors.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
from models.foreign import Library
from models.spec import BadInput, derive_seed, lookup, nearest
from models.weights import check_state, fit_state, read_state, save_weights

__all__ = ["NORMALISED", "Layout", "Opened", "Result", "defend_checkpoint", "defended", "opened", "victim_of"]

NORMALISED = {
    "data set": None,
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": ((0.0,), (1.0,)),
}
"""How a model's images are normalised: mean and standard deviation of every channel; None: those of the data set."""


@dataclass(frozen=True)
class Layout:
    """How the network's tensors are called in the file: (name in the network, name in the file), and the file's other tensors.

    Without names the network is the suite's own.
    """

    names: dict[str, str]
    unused: dict[str, Tensor]

    def state(self, net: Network) -> dict[str, Tensor]:
        """The tensors of a network under the file's names."""
        if not self.names:
            return net.state_dict()
        mine = {self.names.get(name, name.removeprefix("features.")): value for name, value in net.state_dict().items()}
        return self.unused | {name: value for name, value in mine.items() if not name.startswith("normalise.")}


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


def _architecture(name: str, state: dict[str, Tensor], path: Path, console: Console) -> Backbone:
    """The architecture of that name, of the suite or of another library."""
    if ":" not in name:
        return _backbone(name, state, path)
    found = Library.of(name, state)
    if found.stem != "as it is":
        notes(console)(f"{name}: the file's first conv is 3x3, so its stem is taken for one of small images, without max-pool")
    return found


class Opened(NamedTuple):
    """A checkpoint, ready for defenses.

    Attributes:
        cells: the post-training defenses of the matrix, each with the model's scenario.
        data: the data, with the model's normalisation.
        net: the network.
        layout: how its tensors are called in the file.
    """

    cells: list[Cell]
    data: World
    net: Network
    layout: Layout


def opened(
    checkpoint: Path,
    backbone: str,
    dataset: str,
    attack: str | None,
    matrix: str,
    *,
    cache: Path,
    console: Console,
    normalised: str = "data set",
    divide: Callable[[Scenario, Path], World] = world,
) -> Opened:
    """Reads a checkpoint and its data.

    Args:
        checkpoint: a file of weights, or a folder of timm's from the Hugging Face Hub (``config.json``, ``model.safetensors``).
        backbone: name of its architecture: of the suite, ``torchvision:<model>`` or ``timm:<model>``; empty: as the folder says.
        dataset: name of the data set that it classifies.
        attack: name of the attack whose trigger gives ASR and RA; None = ACC only.
        matrix: the matrix whose defenses run.
        cache: folder of decoded images.
        console: where notes are printed.
        normalised: how its images are normalised, a name of :data:`NORMALISED`; a checkpoint that holds it needs none.
        divide: gives the data of the scenario and the cache.

    Raises:
        BadInput: the checkpoint is missing, damaged, would run code, or does not fit the backbone or the data set's classes; an
            unknown name.
    """
    if checkpoint.stem.startswith(".") or not checkpoint.stem.isprintable():  # it names the folder of results
        raise BadInput(f"{str(checkpoint)!r}: results are called like the file, so {checkpoint.stem!r} cannot be one; rename it")
    if normalised not in NORMALISED:
        raise BadInput(f"unknown normalisation {normalised!r}{nearest(normalised, NORMALISED)}")
    file, backbone, given = _source(checkpoint, backbone)
    state = read_state(file)
    shape_of = _architecture(backbone, state, file, console)
    cells = _cells(matrix, dataset, shape_of, attack, console)
    torch.set_num_threads(1)
    w = _normalising(divide(cells[0].scenario, cache), given or NORMALISED[normalised])
    return Opened(cells, w, *_network(cells[0].scenario, w, state, file, console))


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
    normalised: str = "data set",
) -> Path:
    """Runs the defenses and writes ``<results>/my-model/<checkpoint>/``; returns that folder.

    Arguments and errors: see :func:`opened`; nothing is written where it raises. ``results``: folder of results; progress and the
    table are printed too.
    """
    cells, w, net, layout = opened(
        checkpoint, backbone, dataset, attack, matrix, cache=cache, console=console, normalised=normalised
    )  # fmt: skip
    scenario, victim = cells[0].scenario, victim_of(cells[0].scenario, w, net)
    before, before_val = victim.scorer(victim.net), victim.scorer.val_acc(victim.net)
    folder = results / "my-model" / checkpoint.stem
    found = [Result("none (the checkpoint as it is)", "", before, before_val, 0, "ok", "")]
    for number, (cell, name) in enumerate(zip(cells, _file_names(cells), strict=True), 1):
        line = f"[{number}/{len(cells)}] {cell.defense_label} ({cell.scope.value}): {cell.track.title}"
        console.print(line, highlight=False, markup=False)
        result, chosen = defended(cell, victim, w, before)
        if chosen is not None:
            save_weights(layout.state(chosen), folder / f"{name}.safetensors")
        found.append(result)
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


Means = tuple[tuple[float, ...], tuple[float, ...]]


def _source(checkpoint: Path, backbone: str) -> tuple[Path, str, Means | None]:
    """The file of weights, the architecture, and how its images are normalised, where a folder of timm's says so."""
    config = checkpoint / "config.json"
    if not config.is_file():
        if not backbone:
            raise BadInput(f"{checkpoint}: name its architecture with --backbone; a file of weights does not say it")
        return checkpoint, backbone, None
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        model = settings["architecture"]
        own = settings.get("pretrained_cfg", {})
        means = tuple(map(float, own["mean"])), tuple(map(float, own["std"]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{config}: no configuration of timm's: 'architecture', and 'mean' and 'std' in 'pretrained_cfg' ({error!r}); of other "
            "libraries give the file of weights and --backbone"
        ) from error
    if not isinstance(model, str) or len(means[0]) != len(means[1]) or not min(means[1], default=0.0) > 0:
        raise BadInput(f"{config}: architecture {model!r}, mean {means[0]}, std {means[1]}: not a name and positive deviations")
    return checkpoint / "model.safetensors", backbone or f"timm:{model}", means


def _normalising(w: World, means: Means | None) -> World:
    """The data with the model's own normalisation; one value stands for every channel."""
    if means is None:
        return w
    channels = len(w.mean)
    mean, std = (values * channels if len(values) == 1 else values for values in means)
    if len(mean) != channels:
        raise BadInput(f"{w.data.name}: its images have {channels} channels, the model's normalisation {len(mean)}")
    return dataclasses.replace(w, mean=mean, std=std)


def _foreign(library: Library, w: World, state: dict[str, Tensor], file: Path) -> tuple[Network, Layout]:
    """A network of another library with the checkpoint's weights.

    Raises:
        BadInput: as :meth:`models.foreign.Library.adapted`, or the weights do not fit it.
    """
    arguments = (w.data.train.num_classes, w.data.train.shape, w.mean, w.std)
    with torch.device("meta"):  # a file of a few bytes may claim a width that fills the memory
        blank = library.adapted(*arguments)
    wanted = {blank.names[name]: value for name, value in blank.net.state_dict().items() if name in blank.names}
    check_state(wanted, {name: value for name, value in state.items() if name not in blank.unused}, file)
    net = library.build(*arguments, 0)
    names = blank.names
    net.load_state_dict({name: state[names[name]] if name in names else value for name, value in net.state_dict().items()})
    return net.eval(), Layout(names, {name: state[name] for name in sorted(blank.unused) if name in state})


def _network(scenario: Scenario, w: World, state: dict[str, Tensor], checkpoint: Path, console: Console) -> tuple[Network, Layout]:
    """The checkpoint's network, and how its tensors are called in the file.

    Raises:
        BadInput: the weights do not fit it.
    """
    if isinstance(scenario.backbone, Library):
        return _foreign(scenario.backbone, w, state, checkpoint)
    own = any(name.startswith("normalise.") for name in state)
    with torch.device("meta"):  # a file of a few bytes may claim a width that fills the memory
        blank = fresh(scenario, w, 0)
    check_state(blank, state if own else state | _normalisation(blank), checkpoint)
    net = fresh(scenario, w, 0)
    if not own:
        notes(console)("the checkpoint holds no normalisation; the data set's own is used")
        state |= _normalisation(net)
    fit_state(net, state, checkpoint)
    return net.eval(), Layout({}, {})


def victim_of(scenario: Scenario, w: World, net: Network) -> Victim:
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
    own = model.dataset.source != dataset  # the matrix's limits are for its own images
    limits: dict[str, None] = {"train_limit": None, "test_limit": None} if own else {}
    scenario = dataclasses.replace(
        model,
        dataset=dataclasses.replace(model.dataset, source=dataset, **limits),
        backbone=backbone,
        backbone_label=getattr(backbone, "model", backbone.name),
        attack=instance,
        attack_label=attack or "none",
    )
    withheld = ~(Knowledge.MODEL | Knowledge.CLEAN)
    return [
        dataclasses.replace(cell, scenario=scenario)
        for cell in loaded.cells
        if cell.scenario == model and not cell.defense.needs & withheld and cell.defense.name != "none"
    ]


def defended(cell: Cell, victim: Victim, w: World, before: Score) -> tuple[Result, Network | None]:
    """Runs one defense; its outcome, and the candidate chosen by validation, without clean images the published default.

    Args:
        before: scores of the model as it is.
    """
    kept: list[Network] = []
    outcome = defend(cell, w, victim, kept)
    label = f"{cell.defense_label} ({cell.scope.value})"
    if outcome["status"] != "ok":
        return Result(label, "", Score(math.nan), math.nan, 0, outcome["status"], outcome["reason"]), None
    measured = [CandidateScore.read(candidate) for candidate in outcome["candidates"]]
    how = Selection.VALIDATION if Knowledge.CLEAN in cell.track.grants else Selection.DEFAULT
    chosen = choose(how, measured, before, cell.tau)
    assert chosen is not None
    m = measured[chosen]
    return Result(label, how.value, m, m.val_acc, m.pruned, "ok", m.note), kept[chosen]


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
