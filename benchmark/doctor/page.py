"""The page of an examination: one HTML file without anything outside of it, for people who do not read tables of figures."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import torch
from PIL import Image
from torch import Tensor

from benchmark.doctor.signs import SEARCH, SIGNS, index, triggered
from benchmark.doctor.treatment import COSTS, LOWERS
from benchmark.storage.files import write_text
from defenses.neural_cleanse import Patch, anomaly_indices
from models.images import quantise, to_float

if TYPE_CHECKING:
    from benchmark.doctor.examine import Examined

__all__ = ["headline", "write_page"]

MOST = 10
"""Classes whose triggers are shown, the most suspicious first."""
SIDE = 96
"""Pixels of a picture's longer side, at least."""
SEARCHED = {"patch": "A patch that replaces pixels", "additive": "A pattern that is added to all pixels"}


def headline(done: Examined) -> str:
    """The verdict in two sentences."""
    v = done.verdict
    if math.isnan(v.p):
        kind, (value, label) = max(((kind, index(found)) for kind, found in done.signs.triggers.items()), key=lambda one: one[1])
        largest = f"The largest anomaly index is {value:.1f} ({kind}, class {done.model.data.data.class_names[label]})"
        return (
            f"{largest if label >= 0 else 'No trigger that was found works'}; the authors of Neural Cleanse flag patches above "
            f"{SEARCH.threshold:g}. How often a benign network of this kind shows as much was not measured, so no probability is "
            "given: train benign twins (--twins 12) to have one."
        )
    who = "none" if not v.stronger else str(v.stronger)
    verb = "shows" if v.stronger == 1 else "show"
    seen = f"Of {v.twins} benign networks of this kind, {who} {verb} signs as strong as this model's (p = {v.p:.2f})."
    if v.probability <= 0.5:
        return f"{seen} That is no evidence of a backdoor."
    return f"{seen} If one model in two had a backdoor, this one has it with a probability of at most {100 * v.probability:.0f} %."


def _png(image: Tensor) -> str:
    """A data URL of an image float (C, H, W) in [0, 1], enlarged by whole pixels."""
    pixels = quantise(image).permute(1, 2, 0).squeeze(-1).cpu().numpy()
    picture = Image.fromarray(pixels)
    scale = max(1, -(-SIDE // max(picture.size)))
    out = io.BytesIO()
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _trigger(kind: str, trigger: Patch, shape: tuple[int, int, int]) -> Tensor:
    """The trigger on grey."""
    return triggered(torch.full((1, *shape), 0.5), kind, trigger)[0]


def _pictures(done: Examined, kind: str, example: Tensor) -> list[dict[str, Any]]:
    found, w = done.signs.triggers[kind], done.model.data
    indices = anomaly_indices(torch.tensor([one.size for one in found]))
    order = sorted(range(len(found)), key=lambda label: (not found[label].reached, found[label].size))[:MOST]
    return [
        {
            "name": w.data.class_names[label], "size": f"{found[label].size:.1f}", "index": f"{float(indices[label]):.1f}",
            "works": found[label].reached, "trigger": _png(_trigger(kind, found[label], w.data.train.shape)),
            "shown": _png(triggered(example, kind, found[label])[0]),
        }
        for label in order
    ]  # fmt: skip


def _signs(done: Examined) -> list[dict[str, str]]:
    """Every sign of the model beside the twins'."""
    lines = []
    for name, value in done.signs.values.items():
        twins = [one.values[name] for one in done.twins]
        spread = f"{min(twins):.2f} to {max(twins):.2f}" if twins else "not measured"
        deviation = done.verdict.deviations.get(name)
        lines.append({"name": SIGNS[name], "value": f"{value:.2f}", "twins": spread,
                      "deviation": "" if deviation is None else f"{deviation:+.1f}"})  # fmt: skip
    return lines


def _defenses(done: Examined) -> list[dict[str, Any]]:
    def percent(value: float) -> float:
        return 0.0 if math.isnan(value) else round(100 * value, 1)

    return [
        {
            "name": one.name or "the model as given", "acc": percent(one.test_acc), "worst": percent(one.worst),
            "ended": one.reason if one.net is None else "", "chosen": one is done.chosen,
        }
        for one in done.found
    ]  # fmt: skip


def write_page(done: Examined, path: Path) -> Path:
    """Writes the page; returns its path.

    Raises:
        BadInput: it cannot be written.
    """
    w = done.model.data
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True)  # fmt: skip
    example = to_float(w.data.test.images[:1])
    twins = done.twins
    text = environment.get_template("page.html.j2").render(
        name=done.name, network=done.model.cells[0].scenario.backbone_label, data=w.data.name,
        images=len(w.clean) + len(w.validation), headline=headline(done), twins=len(twins), signs=_signs(done),
        accuracy=f"{100 * sum(one.acc for one in twins) / len(twins):.1f}" if twins else "",
        kinds=[(SEARCHED[kind], _pictures(done, kind, example)) for kind in done.signs.triggers], example=_png(example[0]),
        suspects=[(one.kind, w.data.class_names[one.label]) for one in done.triggers], defenses=_defenses(done), chosen=done.chosen,
        costs=f"{100 * COSTS:g}", lowers=f"{100 * LOWERS:g}", minutes=f"{done.seconds / 60:.1f}",
    )  # fmt: skip
    write_text(path, text)
    return path
