"""``doctor``: signs, verdict, defenses, recommendation, and the page that tells of them."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn.functional import cross_entropy

from benchmark.doctor.page import write_page
from benchmark.doctor.signs import KINDS, SEARCH, SIGNS, Signs, index, measured
from benchmark.doctor.treatment import Suspect, Treated, recommended, suspects, treated
from benchmark.doctor.twins import Twin, shared, twin, whole
from benchmark.doctor.verdict import FEWEST, Verdict, judged
from benchmark.run.own_model import Opened, opened
from benchmark.storage.files import write_text
from benchmark.storage.machine import cores
from benchmark.storage.store import Store
from models.images import to_float
from models.spec import BadInput, derive_seed
from models.weights import save_weights

__all__ = ["Examined", "examine"]


@dataclass(frozen=True)
class Examined:
    """What was found.

    Attributes:
        name: of the checkpoint's file.
        model, signs, verdict: the checkpoint, what was measured on it, and how it compares with the twins.
        twins: the benign networks.
        triggers: those whose effect was measured after every defense.
        found: the model as given, then every defense.
        chosen: the defense that is recommended; None = none is.
        seconds: that the examination took.
    """

    name: str
    model: Opened
    signs: Signs
    twins: list[Twin]
    verdict: Verdict
    triggers: tuple[Suspect, ...]
    found: list[Treated]
    chosen: Treated | None
    seconds: float


class _Progress:
    """Lines with what is done and how long the rest takes, at most one in ten seconds."""

    def __init__(self, console: Console, what: str) -> None:
        self.console, self.what, self.begun, self.said = console, what, time.monotonic(), 0.0

    def __call__(self, part: str, done: int, total: int) -> None:
        passed = time.monotonic() - self.begun
        if passed - self.said < 10 and done < total:
            return
        self.said = passed
        rest = f", about {_minutes(passed / done * (total - done))} left" if done else ""
        self.console.print(f"{self.what}: {part} ({done} of {total}{rest})", highlight=False, markup=False)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _expected(model: Opened) -> float:
    """Seconds that the search takes, from the time of one of its steps."""
    w, net = model.data, model.net
    count = min(SEARCH.samples, len(w.clean))
    part = to_float(w.clean.images[: SEARCH.search_batch]).requires_grad_()
    torch.autograd.grad(cross_entropy(net(part), w.clean.labels[: len(part)]), part)  # the first pass chooses kernels
    begun = time.monotonic()
    torch.autograd.grad(cross_entropy(net(part), w.clean.labels[: len(part)]), part)
    steps = len(KINDS) * w.clean.num_classes * SEARCH.search_epochs * -(-count // SEARCH.search_batch)
    return steps * (time.monotonic() - begun)


def examine(
    checkpoint: Path,
    backbone: str,
    images: str,
    *,
    matrix: str,
    twins: int,
    epochs: int,
    normalised: str,
    results: Path,
    cache: Path,
    console: Console,
) -> Path:
    """Examines a checkpoint and writes ``<results>/doctor/<checkpoint>/``: ``report.html``, ``report.json`` and, where a defense is
    recommended, ``cleaned.safetensors``; returns that folder.

    Args:
        checkpoint, backbone, normalised, cache: see :func:`benchmark.run.own_model.opened`.
        images: a data set by name, or ``folder:PATH``; clean images of the model's classes.
        matrix: the matrix whose post-training defenses are tried.
        twins: benign networks that are trained to compare with; with fewer than four the verdict is not calibrated.
        epochs: of a twin's training.
        results: folder of results. console: where progress is printed.

    Raises:
        BadInput: see :func:`benchmark.run.own_model.opened`; nothing is written then.
    """
    if 0 < twins < FEWEST:
        raise BadInput(f"twins = {twins}: it takes at least {FEWEST} to compare with; 0 compares with none")
    begun = time.monotonic()
    model = opened(
        checkpoint, backbone, images, None, matrix, cache=cache, console=console, normalised=normalised,
        divide=shared if twins else whole,
    )  # fmt: skip
    torch.set_num_threads(cores())  # one process alone, unlike the cells of a run
    say = partial(console.print, highlight=False, markup=False)
    expected = _expected(model)
    say(f"search of triggers: about {_minutes(expected)} at most for the model" + f", and for each of {twins} twins" * bool(twins))
    seed = derive_seed("doctor", "search")
    signs = measured(model.net, model.data.clean, seed, _Progress(console, "search"))
    store, scenario, benign = Store(cache / "store"), model.cells[0].scenario, list[Twin]()
    progress = _Progress(console, "benign twins")
    for number in range(twins):
        benign.append(twin(scenario, model.data, epochs, number, store))
        progress(f"twin {number + 1}: ACC {100 * benign[-1].acc:.1f} %", number + 1, twins)
    verdict = judged(signs.values, [one.values for one in benign])
    triggers = suspects(signs)
    found = treated(model, triggers, _Progress(console, "defenses"))
    chosen = recommended(found)
    seconds = time.monotonic() - begun
    folder = results / "doctor" / checkpoint.stem
    done = Examined(checkpoint.name, model, signs, benign, verdict, triggers, found, chosen, seconds)
    if chosen is not None and chosen.net is not None:
        save_weights(model.layout.state(chosen.net), folder / "cleaned.safetensors")
    write_text(folder / "report.json", json.dumps(_record(done), indent=1, allow_nan=False) + "\n")
    page = write_page(done, folder / "report.html")
    say(f"report: {page}")
    return folder


def _number(value: float) -> float | None:
    return None if math.isnan(value) else min(max(value, -1e9), 1e9)


def _record(done: Examined) -> dict[str, Any]:
    """Everything that was measured, as plain JSON; what was not measured is null."""
    verdict = done.verdict
    return {
        "model": done.name,
        "backbone": done.model.cells[0].scenario.backbone_label,
        "images": {"name": done.model.data.data.name, "fingerprint": done.model.data.data.fingerprint},
        "signs": {name: _number(value) for name, value in done.signs.values.items()},
        "triggers": {
            kind: [{"class": at, "size": one.size, "works": one.reached} for at, one in enumerate(found)]
            for kind, found in done.signs.triggers.items()
        },
        "most suspicious": {kind: index(found)[1] for kind, found in done.signs.triggers.items()},
        "twins": [{"acc": one.acc, "signs": one.values} for one in done.twins],
        "p": _number(verdict.p),
        "probability at most": _number(verdict.probability),
        "deviations": {SIGNS[name]: _number(value) for name, value in verdict.deviations.items()},
        "defenses": [
            {"name": one.name or "as given", "validation ACC": _number(one.val_acc), "test ACC": _number(one.test_acc),
             "effects": {kind: _number(value) for kind, value in one.effects.items()}, "reason": one.reason}
            for one in done.found
        ],
        "recommended": done.chosen.name if done.chosen else None,
        "seconds": round(done.seconds, 1),
    }  # fmt: skip
