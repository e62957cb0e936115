"""`doctor`: signs by hand, a verdict that is exact on benign networks, a stated rule, and a page that claims no more."""

from __future__ import annotations

import io
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from benchmark.data.datasets import Dataset
from benchmark.doctor import examine as doctor
from benchmark.doctor import signs
from benchmark.doctor.page import headline
from benchmark.doctor.signs import Signs, effect, index, measured, outlier, shift, triggered
from benchmark.doctor.treatment import Treated, recommended, suspects
from benchmark.doctor.twins import shared, whole
from benchmark.doctor.verdict import Verdict, judged, most_probable
from benchmark.run.own_model import Opened
from benchmark.run.world import World
from defenses.neural_cleanse import NeuralCleanse, Patch
from models.backbone import Network, Normalise
from models.images import ImageSet
from models.resnet import ResNet8
from models.spec import BadInput, generator
from models.weights import save_weights


def patch(size: float, reached: bool = True) -> Patch:
    return Patch(size, torch.zeros(1, 4, 4), torch.zeros(1, 4, 4), reached)


# -- signs ---------------------------------------------------------------------------------------------------------------------


def test_the_sign_is_the_largest_index_of_a_trigger_that_works() -> None:
    sizes = [60.0, 80.0, 4.0, 70.0, 75.0]
    # median 70, deviations 10 10 66 0 5: their median 10, times 1.4826
    value, label = index(tuple(map(patch, sizes)))
    assert (label, value) == (2, pytest.approx(66 / 14.826))
    value, label = index(tuple(patch(size, reached=size != 4.0) for size in sizes))
    assert (label, value) == (0, pytest.approx(10 / 14.826))
    assert index(tuple(patch(size, reached=False) for size in sizes)) == (0.0, -1)
    assert index((patch(1.0), patch(9.0))) == (0.0, -1), "of two sizes none is an outlier"


def test_the_largest_weights_by_hand() -> None:
    torch.default_generator.manual_seed(0)
    conv, fc = nn.Conv2d(1, 4, 1, bias=False), nn.Linear(4, 3)
    conv.weight.data = torch.tensor([1.0, 1.0, 1.0, 5.0]).reshape(4, 1, 1, 1)
    features = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = Network(Normalise((0.0,), (1.0,)), features, nn.Sequential(fc))
    assert outlier(net) == pytest.approx((5 - 2) / 2)  # mean 2, deviation 2
    conv.weight.data.fill_(1.0)
    assert outlier(net) == 0.0
    assert shift(net, torch.zeros(4, 1, 4, 4, dtype=torch.uint8)) == 0.0, "no batch norms"


def test_a_channel_with_other_statistics_shows() -> None:
    net = ResNet8(width=4, hidden=0).build(3, (1, 8, 8), (0.5,), (0.25,), 0).eval()
    images = torch.randint(0, 256, (64, 1, 8, 8), generator=generator("shift"), dtype=torch.uint8)
    with torch.no_grad():
        net.train()
        for _ in range(60):
            net(images / 255)
        net.eval()
    before = shift(net, images)
    norm = next(part for part in net.modules() if isinstance(part, nn.BatchNorm2d))
    assert norm.running_mean is not None
    norm.running_mean[1] += 5
    assert shift(net, images) > before + 0.3


class Reads(nn.Module):
    """Answers 1 where the upper left pixel is above one half, else 0; never 2."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        corner = 20 * (x[:, 0, 0, 0] - 0.5)
        return torch.stack([-corner, corner, torch.full_like(corner, -50.0)], 1)


def corner() -> Network:
    class Net(Network):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.features(x)
            return found

    return Net(Normalise((0.0,), (1.0,)), Reads(), nn.Sequential(nn.Linear(3, 3))).eval()


@pytest.mark.parametrize("kind", ["patch", "additive"])
def test_the_search_finds_the_one_pixel_that_matters_and_its_effect_is_counted(kind: str) -> None:
    data = ImageSet(torch.full((40, 1, 4, 4), 40, dtype=torch.uint8), torch.arange(40) % 3, 3)
    search = NeuralCleanse(search_epochs=40, samples=0, search_batch=20, patience=2, success=0.95)
    net = corner()
    found = search.invert(net.requires_grad_(False), data, 1, 0, signs.KINDS[kind])
    assert found.reached
    shown = triggered(data.images[:1] / 255, kind, found)[0, 0]
    changed = (shown - 40 / 255).abs()
    assert changed[0, 0] > 0.3
    assert changed[0, 0] == changed.max()
    assert effect(net, data, kind, found, 1) == 1.0
    assert effect(net, data, kind, found, 2) == 0.0
    only = data.subset((data.labels == 1).nonzero()[:, 0])
    assert math.isnan(effect(net, only, kind, found, 1)), "no image of another class"


def test_every_class_is_searched_for_every_kind_and_progress_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signs, "SEARCH", NeuralCleanse(search_epochs=1, samples=4, search_batch=2))
    net = ResNet8(width=2, hidden=0).build(3, (1, 8, 8), (0.5,), (0.25,), 0).eval()
    data = ImageSet(torch.zeros(6, 1, 8, 8, dtype=torch.uint8), torch.arange(6) % 3, 3)
    told: list[tuple[str, int, int]] = []
    found = measured(net, data, 0, lambda *news: told.append(news))
    assert [one[1:] for one in told] == [(number, 6) for number in range(1, 7)]
    assert {kind: len(triggers) for kind, triggers in found.triggers.items()} == {"patch": 3, "additive": 3}
    assert list(found.values) == list(signs.SIGNS)
    assert all(parameter.requires_grad for parameter in net.parameters())


# -- verdict -------------------------------------------------------------------------------------------------------------------


def test_the_verdict_by_hand() -> None:
    twins = [{"a": value, "b": 1.0} for value in (1.0, 2.0, 3.0, 4.0, 5.0)]
    strong = judged({"a": 13.0, "b": 1.0}, twins)
    assert (strong.twins, strong.stronger, strong.p) == (5, 0, 1 / 6)
    assert strong.deviations == pytest.approx({"a": 10 / math.sqrt(2.5), "b": 0.0})
    assert strong.probability == pytest.approx(1 / (1 - math.e / 6 * math.log(1 / 6)))
    weak = judged({"a": 1.5, "b": 1.0}, twins)
    assert weak.p > 0.5
    assert weak.probability == 0.5
    few = judged({"a": 99.0, "b": 1.0}, twins[:3])
    assert math.isnan(few.p)
    assert few.deviations == {}
    assert judged({"a": 3.0, "b": 2.0}, twins).deviations["b"] == math.inf  # it is 1 in every benign network


def test_p_is_exact_on_benign_networks_whatever_their_signs() -> None:
    """Every one of ten networks in turn is the model: each p from 1/10 to 10/10 is had once."""
    draw = torch.randn(10, 3, generator=generator("verdict"), dtype=torch.float64).exp()
    every = [dict(zip("abc", map(float, line), strict=True)) for line in draw]
    found = [judged(one, [other for other in every if other is not one]).p for one in every]
    assert sorted(found) == pytest.approx([number / 10 for number in range(1, 11)])


def test_a_small_p_is_no_probability() -> None:
    assert most_probable(1e-9) > 0.99
    # As users of the bound tabulate it: no effect has a probability of at least 28.9 % and 11.1 %.
    assert [round(most_probable(p), 3) for p in (0.05, 0.01)] == [0.711, 0.889]
    assert most_probable(0.4) == most_probable(1.0) == 0.5
    values = [most_probable(p) for p in np.linspace(0.001, 1, 50)]
    assert all(first >= second for first, second in itertools.pairwise(values))


# -- treatment -----------------------------------------------------------------------------------------------------------------


def outcome(name: str, val_acc: float, *effects: float) -> Treated:
    net = corner() if effects else None
    return Treated(name, val_acc, val_acc, dict(zip(("patch", "additive"), effects, strict=False)), net, "" if effects else "why")


def test_the_rule_of_recommendation() -> None:
    given = outcome("", 0.90, 0.95, 0.90)
    mild, best, worse = outcome("mild", 0.90, 0.5, 0.2), outcome("best", 0.88, 0.1, 0.2), outcome("worse", 0.86, 0.0, 0.0)
    assert recommended([given, mild, best, worse]) is best, "worse costs four points; mild leaves more"
    assert recommended([given, outcome("same", 0.90, 0.95, 0.1), worse]) is None, "the strongest trigger still works"
    assert recommended([given, outcome("failed", math.nan)]) is None
    tied = outcome("tied", 0.89, 0.2, 0.2)
    assert recommended([given, best, tied]) is tied, "of equal effect, the more accurate"


def test_suspects_are_outliers_else_the_smallest() -> None:
    some = tuple(map(patch, (60.0, 80.0, 4.0, 70.0, 75.0)))
    none = tuple(patch(size, reached=False) for size in (9.0, 5.0, 7.0))
    found = suspects(Signs({"patch": some, "additive": none}, 0.0, 0.0))
    assert [(one.kind, one.label) for one in found] == [("patch", 2), ("additive", 1)]


# -- the whole -----------------------------------------------------------------------------------------------------------------

MATRIX = """
title = "two defenses"
seeds = [0]
dataset = { source = "digits", clean_fraction = 0.3, test_limit = 300 }  # more than the images of a user
recipe = { epochs = 0, crop = 0, flip = false }
[[backbone]]
name = "resnet8"
width = 1
[[attack]]
name = "badnets"
[[defense]]
name = "none"
[[defense]]
name = "clp"
tracks = ["model"]
grid = []
[[defense]]
name = "bnp"
tracks = ["model+clean"]
grid = []
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images of three classes, a matrix, a checkpoint, and a search of one pass."""
    draw = generator("doctor")
    for number in range(90):
        path = tmp_path / "images" / f"class-{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = torch.randint(0, 180, (8, 8), generator=draw, dtype=torch.uint8)
        image[: 2 + number % 3] += 70
        Image.fromarray(np.asarray(image)).save(path)
    (tmp_path / "two.toml").write_text(MATRIX)
    save_weights(ResNet8(width=2, hidden=0).build(3, (1, 8, 8), (0.5,), (0.25,), 0), tmp_path / "mine.safetensors")
    quick = NeuralCleanse(search_epochs=1, samples=8, search_batch=4)
    for module in ("signs", "twins", "examine"):
        monkeypatch.setattr(f"benchmark.doctor.{module}.SEARCH", quick)
    return tmp_path


def examined(place: Path, twins: int, out: io.StringIO | None = None, **more: Any) -> Path:
    settings: dict[str, Any] = {"matrix": str(place / "two.toml"), "twins": twins, "epochs": 1, "normalised": "data set"}
    return doctor.examine(
        place / "mine.safetensors", "resnet8", f"folder:{place / 'images'}", **settings | more, results=place / "r",
        cache=place / "c", console=Console(file=out or io.StringIO(), width=200),
    )  # fmt: skip


@pytest.mark.slow
def test_an_examination_writes_a_page_its_figures_and_what_it_recommends(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    folder = examined(place, 0, out)
    record = json.loads((folder / "report.json").read_text())
    assert record["p"] is None
    assert [one["name"] for one in record["defenses"]] == ["as given", "clp (whole)", "bnp (whole)"]
    assert all(one["validation ACC"] is not None for one in record["defenses"])
    page = (folder / "report.html").read_text()
    assert "so no probability is given: train benign twins" in page
    assert "src=\"http" not in page
    assert "about " in out.getvalue()
    assert (folder / "cleaned.safetensors").exists() == (record["recommended"] is not None)
    monkeypatch.setattr("benchmark.doctor.treatment.LOWERS", -1.0)
    monkeypatch.setattr("benchmark.doctor.treatment.COSTS", 1.0)
    folder = examined(place, 0)
    cleaned = load_file(folder / "cleaned.safetensors")
    assert cleaned.keys() == load_file(place / "mine.safetensors").keys()
    assert "<b>Recommended: " in (folder / "report.html").read_text()


@pytest.mark.slow
def test_twins_give_a_probability_and_are_trained_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = json.loads((examined(place, 4) / "report.json").read_text())
    assert first["p"] in [number / 5 for number in range(1, 6)]
    assert len(first["twins"]) == 4
    monkeypatch.setattr("benchmark.doctor.twins.fit", lambda *_: pytest.fail("a twin was trained again"))
    again = json.loads((examined(place, 4) / "report.json").read_text())
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    page = (place / "r" / "doctor" / "mine" / "report.html").read_text()
    assert "Of 4 benign networks of this kind" in page
    assert "That the twins are like this model in everything but a backdoor" in page


def test_too_few_twins_and_wrong_names_are_refused(place: Path) -> None:
    with pytest.raises(BadInput, match=r"^twins = 2: it takes at least 4 to compare with; 0 compares with none$"):
        examined(place, 2)
    with pytest.raises(BadInput, match="did you mean 'imagenet'"):
        examined(place, 0, normalised="imagnet")
    assert not (place / "r").exists()


def test_twins_never_see_the_images_of_the_search(place: Path) -> None:
    from benchmark.settings.load import load_matrix

    scenario = load_matrix(place / "two.toml").scenarios[0]
    scenario = replace(scenario, dataset=replace(scenario.dataset, source=f"folder:{place / 'images'}", test_limit=None))
    w = shared(scenario, place / "c")
    held = {bytes(image.numpy().tobytes()) for image in torch.cat([w.clean.images, w.validation.images])}
    assert not held & {bytes(image.numpy().tobytes()) for image in w.train.images}
    assert len(held) == len(w.clean) + len(w.validation) == len(w.data.train) // 2
    every = whole(scenario, place / "c")
    assert len(every.clean) + len(every.validation) == len(every.data.train)


def test_what_the_headline_says() -> None:
    class Done:
        verdict = Verdict(12, 0, 1 / 13, most_probable(1 / 13), {})

    done: Any = Done()
    assert headline(done) == (
        "Of 12 benign networks of this kind, none show signs as strong as this model's (p = 0.08). If one model in two had a "
        "backdoor, this one has it with a probability of at most 65 %."
    )
    done.verdict = Verdict(12, 5, 6 / 13, 0.5, {})
    assert headline(done).endswith("5 show signs as strong as this model's (p = 0.46). That is no evidence of a backdoor.")
    done.verdict = Verdict(0, 0, math.nan, math.nan, {})
    sizes = tuple(map(patch, (60.0, 80.0, 4.0, 70.0, 75.0)))
    done.signs = Signs({"patch": sizes, "additive": tuple(replace(one, reached=False) for one in sizes)}, 0.0, 0.0)
    data: Any = Dataset("d", None, None, tuple("abcde"), "")  # type: ignore[arg-type]
    done.model = Opened([], World(data, *[None] * 5), None, None)  # type: ignore[arg-type]
    said = "The largest anomaly index is 4.5 (patch, class c); the authors of Neural Cleanse flag patches above 2."
    assert headline(done).startswith(said)
    done.signs = Signs({"patch": tuple(replace(one, reached=False) for one in sizes)}, 0.0, 0.0)
    assert headline(done).startswith("No trigger that was found works; ")
