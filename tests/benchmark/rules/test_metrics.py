"""ACC, ASR, RA, DER and the gate against by-hand counts and torchmetrics."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy

from attacks.base import PoisonedTest
from benchmark.rules.metrics import Score, Scorer, der, gate, score
from models import BACKBONES
from models.backbone import Network, Normalise
from models.images import ImageSet
from models.spec import generator, lookup
from models.units import Scope, Writer, prune, top_share, unit_layers


class Brightness(nn.Module):
    """Features = mean brightness of each image, so that a hand can tell what is predicted."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(1, 2, 3), keepdim=False)[:, None]


def brightness_net(num_classes: int) -> Network:
    """Predicts the class whose number is nearest to ``brightness * (num_classes - 1)``."""
    head = nn.Linear(1, num_classes)
    with torch.no_grad():
        levels = torch.arange(num_classes) / (num_classes - 1)
        head.weight[:, 0] = 2 * levels
        head.bias[:] = -(levels**2)
    return Network(Normalise([0.0], [1.0]), Brightness(), nn.Sequential(head)).eval()


def flat(values: list[int]) -> torch.Tensor:
    """One flat grey image per value."""
    return torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4).contiguous()


def test_acc_asr_ra_are_counted_on_their_own_sets() -> None:
    net = brightness_net(3)
    test = ImageSet(flat([0, 0, 128, 255, 255]), torch.tensor([0, 1, 1, 2, 0]), 3)
    triggered = PoisonedTest(flat([0, 0, 128, 255]), torch.tensor([1, 2, 1, 2]), torch.tensor([0, 0, 0, 0]), torch.arange(4))
    got = score(net, test, triggered)
    # Predictions on the clean images are 0 0 1 2 2, on the triggered ones 0 0 1 2.
    assert got == Score(acc=3 / 5, asr=2 / 4, ra=2 / 4)
    assert got.asr + got.ra <= 1
    twin = multiclass_accuracy(torch.tensor([0, 0, 1, 2, 2]), test.labels, num_classes=3, average="micro")
    assert got.acc == pytest.approx(float(twin))


def test_without_an_attack_only_acc_is_measured() -> None:
    got = score(brightness_net(2), ImageSet(flat([0, 255]), torch.tensor([0, 1]), 2), None)
    assert got.acc == 1
    assert math.isnan(got.asr)
    assert math.isnan(got.ra)
    assert math.isnan(der(Score(1.0), got))


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (Score(0.9344, 0.9771, 0), Score(0.9244, 0.0491, 0), 0.9590),  # FT-SAM paper, Blended
        (Score(0.9182, 0.9379, 0), Score(0.9221, 0.0163, 0), 0.9608),  # FT-SAM paper, BadNets: a gain of ACC counts for nothing
        (Score(0.9, 0.5, 0), Score(0.9, 0.5, 0), 0.5),
        (Score(0.9, 0.5, 0), Score(0.9, 0.8, 0), 0.5),
    ],
)
def test_der_equals_published_figures(before: Score, after: Score, expected: float) -> None:
    assert der(before, after) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(
    ("asr", "benign", "implanted", "adversarial", "word"),
    [
        (0.50, 0.0, True, False, "implanted: ASR 50.0, of which the poison explains 50.0 points"),
        (0.49, 0.0, False, False, "not implanted: ASR 49.0 < 50"),
        (0.65, 0.16, False, False, "the poison explains 49.0 < 50 points"),
        (0.995, 0.995, False, True, "adversarial: the benign twin answers the trigger, too (its ASR 99.5, the victim's 99.5)"),
        (0.99, 0.21, False, True, "adversarial"),
        (0.70, 0.20, True, False, "implanted"),
        (0.99, math.nan, True, False, "effect not measured"),
        (math.nan, math.nan, False, False, "not implanted"),
    ],
)
def test_gate(asr: float, benign: float, implanted: bool, adversarial: bool, word: str) -> None:
    verdict = gate(asr, benign)
    assert (verdict.implanted, verdict.adversarial) == (implanted, adversarial)
    assert word in verdict.words


@pytest.mark.parametrize("name", ["resnet8", "vgg11-bn", "preact-resnet18"])
def test_reused_embeddings_give_the_same_scores_as_full_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = lookup("backbone", BACKBONES, name)(width=2, hidden=16).build(10, (1, 16, 16), [0.3], [0.4], 0).eval()
    draw = generator("scorer")
    images = torch.randint(0, 256, (1203, 1, 16, 16), generator=draw, dtype=torch.uint8)  # two full batches and a part
    labels = torch.randint(0, 10, (1203,), generator=draw)
    test = ImageSet(images, labels, 10)
    triggered = PoisonedTest(images[:700], labels[:700], (labels[:700] + 1) % 10, torch.arange(700))
    scorer = Scorer(net, test, triggered, test.subset(torch.arange(40)))
    passes = []
    normalise = Normalise.forward
    monkeypatch.setattr(Normalise, "forward", lambda self, x: passes.append(len(x)) or normalise(self, x))
    for share in (0.0, 0.2, 0.5, 0.9):
        masks = {layer.name: top_share(share)(torch.rand(layer.size, generator=draw)) for layer in unit_layers(net, Scope.HEAD)}
        pruned = prune(net, masks, Writer.OUTPUT)
        got, val = scorer(pruned), scorer.val_acc(pruned)
        spent = sum(size for size in passes if size > 1)  # one image alone is a look at the shapes
        assert got == score(pruned, test, triggered)
        assert val == score(pruned, scorer.validation, None).acc
        passes.clear()
        assert spent == (1203 + 700 + 40 if share == 0 else 0)


def test_a_part_is_evenly_spaced_over_both_sets_and_at_most_all_of_them() -> None:
    net = lookup("backbone", BACKBONES, "vgg11-bn")(width=2, hidden=8).build(10, (1, 16, 16), [0.3], [0.4], 0).eval()
    images = torch.randint(0, 256, (60, 1, 16, 16), generator=generator("part"), dtype=torch.uint8)
    labels = torch.arange(60) // 6
    triggered = PoisonedTest(images[:54], labels[:54], labels[:54] * 0 + 9, torch.arange(54))
    scorer = Scorer(net, ImageSet(images, labels, 10), triggered, ImageSet(images[:5], labels[:5], 10))
    part = scorer.on_part(net, 10)
    assert torch.equal(part.test.labels, torch.arange(10)), "sets that are sorted by class keep every class"
    assert part.triggered is not None
    assert torch.equal(part.triggered.source, torch.arange(10) * 54 // 10)
    assert part(net) == score(net, part.test, part.triggered)
    assert scorer.on_part(net, 1000)(net) == scorer(net)


def test_a_network_with_other_features_gets_its_own_pass() -> None:
    net = lookup("backbone", BACKBONES, "vgg11-bn")(width=2, hidden=8).build(10, (1, 16, 16), [0.3], [0.4], 0).eval()
    images = torch.randint(0, 256, (50, 1, 16, 16), generator=generator("other"), dtype=torch.uint8)
    test = ImageSet(images, torch.arange(50) % 10, 10)
    scorer = Scorer(net, test, None, test)
    scorer(net)
    layers = [layer for layer in unit_layers(net, Scope.WHOLE) if not layer.head]
    gone = prune(net, {layer.name: torch.ones(layer.size, dtype=torch.bool) for layer in layers[-1:]}, Writer.GAMMA_BETA)
    assert scorer(gone).acc == score(gone, test, None).acc
