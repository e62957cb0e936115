from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from defenses import ct
from defenses.base import Inapplicable, Knowledge
from defenses.ct import CT, class_weights, distilled, flagged, log_ratio, main_axes, wrong_labels
from models.backbone import Network, Normalise
from models.classifier import Classifier
from models.cost import metered
from models.images import Batches, ImageSet, to_float
from models.recipe import Recipe
from models.spec import BadInput, derive_seed, generator
from models.training import fit

TINY = CT(
    base_epochs=1, pretrain_epochs=(1, 1, 1), pretrain_lr=0.05, pretrain_batch=8, iterations=(3, 2, 4), rates=(0.01, 0.02, 0.03),
    weights=(2.0, 3.0, 4.0), every=(2, 2, 2), kept=(0.5, 0.25), epochs=1, batch=8,
)  # fmt: skip


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def sines(count: int, step: float, *shape: int) -> np.ndarray:
    return np.sin(step * np.arange(1, count + 1)).reshape(shape)


def test_the_likelihood_ratio_at_the_reference_value():
    """Closed-form clusters; the number comes from the authors' function."""
    points = np.concatenate([sines(16, 0.9, 8, 2), 0.3 * sines(8, 1.7, 4, 2) + 3])
    assert math.exp(log_ratio(points, np.arange(12) >= 8)) == pytest.approx(34.482592, rel=1e-5)


def density(x: np.ndarray, cluster: np.ndarray) -> float:
    mean = cluster.sum(0) / len(cluster)
    cov = sum(np.outer(row - mean, row - mean) for row in cluster) / (len(cluster) - 1) + 0.001
    return -0.5 * ((x - mean) @ np.linalg.inv(cov) @ (x - mean) + math.log(np.linalg.det(cov))) - math.log(2 * math.pi)


def test_the_likelihood_ratio_by_a_loop_and_its_sizes():
    points = torch.randn(300, 2, generator=generator(0, "points")).double().numpy()
    fitted = np.arange(300) < 40
    points[fitted] += 2
    expected = 0.0
    for i in range(300):
        own = points[fitted] if fitted[i] else points[~fitted]
        expected += (density(points[i], own) - density(points[i], points[~fitted])) / 300
    assert log_ratio(points, fitted) == pytest.approx(expected, rel=1e-6)
    for count in (0, 1, 5, 298, 299, 300):  # 2 % are 6, 99 % are 297
        assert log_ratio(points, np.arange(300) < count) == 0
    assert log_ratio(points, np.arange(300) < 6) != 0
    assert log_ratio(points, np.arange(300) < 297) != 0
    assert log_ratio(points[:4], np.arange(4) < 3) == 0


def test_the_main_axes_are_those_of_the_covariance_and_the_mean_stays():
    features = torch.randn(50, 5, generator=generator(0, "features")) * torch.tensor([1.0, 5, 2, 0.1, 3]) + 7
    values = features.double().numpy()
    _, vectors = np.linalg.eigh(np.cov(values.T))
    expected = values @ vectors[:, [-1, -2]]
    np.testing.assert_allclose(np.abs(main_axes(features)), np.abs(expected), rtol=1e-6)
    assert np.abs(main_axes(features).mean(0)).max() > 1


def test_wrong_labels_are_never_the_predicted_and_every_other_class_has_its_turn():
    predicted = torch.arange(20) % 5
    for start in (0, 7):
        seen = [wrong_labels(predicted, step, 5) for step in range(start, start + 4)]
        for i, label in enumerate(predicted.tolist()):
            assert {int(wrong[i]) for wrong in seen} == set(range(5)) - {label}
    assert wrong_labels(torch.tensor([0, 1]), 3, 2).tolist() == [1, 0]


@pytest.mark.parametrize(("share", "divisor"), [(0.1, 5), (0.5, 2), (0.02, 100)])
def test_what_is_distilled_by_a_loop(share, divisor):
    draw = generator(0, "losses")
    losses = torch.randint(0, 8, (60,), generator=draw).float()
    labels = (torch.rand(60, generator=draw) * 4).long() * 2
    losses[labels == 6] += 10  # a class that would not be kept
    order = sorted(range(60), key=lambda i: (losses[i].item(), i))
    expected = set(order[: int(60 * share)])
    for label in set(labels.tolist()):
        own = [i for i in order if labels[i] == label]
        expected |= set(own[: len(own) // divisor])
    assert set(torch.nonzero(distilled(losses, labels, share, divisor)).flatten().tolist()) == expected


def test_rare_classes_weigh_more():
    labels = torch.tensor([0, 0, 0, 1])
    expected = [1 / math.sqrt(0.75 + 0.001), 1 / math.sqrt(0.25 + 0.001), 1 / math.sqrt(0.001)]
    assert class_weights(labels, 3).tolist() == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_a_mixed_step(net_of):
    classes = torch.tensor([1.0, 2.0, 3.0, 4.0])
    module = ct._Confusing(net_of(), TINY.recipe(1, 0.1, VIEW), ImageSet(NO_IMAGES, NO_LABELS, 4), 1, 2, 20.0, classes)
    images = torch.rand((6, 3, 8, 8), generator=generator(0, "images"))
    wrong, labels = torch.tensor([1, 2, 3, 0]), torch.tensor([3, 1])
    rows = module(images).detach().log_softmax(1)
    confused = -sum(rows[i, label].item() for i, label in enumerate(wrong.tolist())) / 4
    weighted = sum(classes[label].item() * rows[4 + i, label].item() for i, label in enumerate(labels.tolist()))
    fitted = -weighted / (classes[3] + classes[1]).item()
    found = module.training_step((images, wrong, labels), 0)
    assert found.item() == pytest.approx((19 * confused + fitted) / 20, rel=1e-5)
    assert module.training_step((images[:4], wrong, wrong[:0]), 0).item() == pytest.approx(confused, rel=1e-5)


class VIEW:
    recipe = Recipe(epochs=1, batch=8, crop=1)


NO_IMAGES, NO_LABELS = torch.zeros((0, 3, 8, 8), dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)


def test_every_second_step_has_samples_of_the_distilled_set(net_of, data_of):
    module = ct._Confusing(net_of(), TINY.recipe(1, 0.1, VIEW), data_of(1), 7, 2, 20.0, torch.ones(4))
    batches = list(module.loader(data_of(3, 20), 5))
    assert len(batches) == len(module.loader(data_of(3, 20), 5)) == 7
    assert [len(labels) for _, _, labels in batches] == [8, 0, 8, 0, 8, 0, 8]
    assert [len(images) - len(labels) for images, _, labels in batches] == [8] * 7


def test_its_rounds_written_out(view_of, data_of, net_of):
    """Base network; per round: training on the distilled set, a confused copy, its losses; at last shifted clean labels join."""
    view, data, clean = view_of(TINY), data_of(3, 32), data_of(1)
    base = TINY.trained(view, data, 1, "base")
    with torch.no_grad():
        named = base(to_float(clean.images)).argmax(1)
    net, kept, pretrained = net_of(derive_seed(view.seed, "ct", "weights")), torch.ones(32, dtype=torch.bool), []
    for number, (steps, rate, weight) in enumerate(zip((3, 2, 4), (0.01, 0.02, 0.03), (2.0, 3.0, 4.0), strict=True)):
        seed, part = derive_seed(view.seed, "ct", "round", number), data.subset(kept)
        learned = part
        if number == 2:
            learned = ImageSet(
                torch.cat([part.images, clean.images]), torch.cat([part.labels, (clean.labels + 1) % 4]), 4
            )  # fmt: skip
        recipe = Recipe(
            epochs=1, batch=8, lr=0.05, momentum=0.9, weight_decay=1e-4, schedule="constant", crop=0, flip=False
        )  # fmt: skip
        fit(Classifier(net, recipe), learned, recipe, derive_seed(seed, "pretrain"))
        pretrained.append(copy.deepcopy(net))
        found = copy.deepcopy(net).train()
        optimizer = torch.optim.SGD(found.parameters(), lr=rate, momentum=0.7, weight_decay=1e-4)
        shares = torch.bincount(part.labels, minlength=4) / len(part)
        classes = 1 / (shares + 0.001).sqrt() if number < 2 else torch.ones(4)
        own = derive_seed(seed, "confuse")

        def forever(images: ImageSet, purpose: str, own=own):
            batches = Batches(images, 8, derive_seed(own, purpose), drop_last=True)
            while True:
                yield from batches

        first = forever(ImageSet(clean.images, named, 4), "clean")
        second = forever(part, "poisoned")
        for step in range(steps):
            images, predicted, _ = next(first)
            wrong = (predicted + 1 + step % 3) % 4
            if step % 2 == 0:
                others, labels, _ = next(second)
                answers = found(torch.cat([images, others]))
                loss = (weight - 1) * cross_entropy(answers[:8], wrong)
                loss = (loss + cross_entropy(answers[8:], labels, weight=classes)) / weight
            else:
                loss = cross_entropy(found(images), wrong)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found.eval()
        if number < 2:
            with torch.no_grad():
                losses = cross_entropy(found(to_float(data.images)), data.labels, reduction="none")
            kept = distilled(losses, data.labels, (0.5, 0.25)[number], (50, 100)[number])
    for a, b in zip(TINY.confused(view).state_dict().values(), found.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert not same(pretrained[0], pretrained[1])


def test_the_last_round_weighs_all_classes_alike_and_the_last_distillation_keeps_fewer_of_each(view_of, data_of, monkeypatch):
    data = data_of(3, 32)
    data = ImageSet(data.images, data.labels * (torch.arange(32) % 3 > 0), 4)  # class 0 is the largest
    shares, weights = [], []

    def watched(losses, labels, share, divisor):
        shares.append((share, divisor))
        return distilled(losses, labels, share, divisor)

    class Watched(ct._Confusing):
        def __init__(self, *given):
            super().__init__(*given)
            weights.append(given[-1])

    monkeypatch.setattr(ct, "distilled", watched)
    monkeypatch.setattr(ct, "_Confusing", Watched)
    TINY.confused(view_of(TINY, train=data))
    assert shares == [(0.5, 50), (0.25, 100)]
    torch.testing.assert_close(weights[0], class_weights(data.labels, 4))
    assert weights[0][0] < weights[0][1:].min()
    assert weights[2].tolist() == [1, 1, 1, 1]


def test_the_last_training_written_out(view_of, data_of, net_of, monkeypatch):
    data = data_of(3, 32)
    fitted, ratios = torch.arange(32) % 3 == 0, np.array([0.0, 5.0, 0.0, 0.1])
    monkeypatch.setattr(CT, "confused", lambda *_: None)
    monkeypatch.setattr(CT, "suspicious", lambda *_: (fitted, ratios))
    view = view_of(TINY)
    (candidate,) = TINY.candidates(view)
    removed = fitted & (data.labels == 1)
    assert torch.equal(candidate.isolated, removed)
    suspected = [ratios[label] if number % 3 == 0 else -1 for number, label in enumerate(data.labels.tolist())]
    assert candidate.suspicion.tolist() == suspected
    assert candidate.note == "removed from classes [1]; largest log ratio 5.00"
    recipe = Recipe(
        epochs=1, batch=8, lr=0.1, momentum=0.9, weight_decay=1e-4, schedule="multistep", crop=1, flip=True
    )  # fmt: skip
    net = net_of(derive_seed(view.seed, "ct", "last"))
    fit(Classifier(net, recipe), data.subset(~removed), recipe, derive_seed(view.seed, "ct", "last", "batches"))
    assert same(candidate.model, net)


def test_a_point_of_the_dial_trains_again_only_where_it_removes_other_samples(view_of, monkeypatch):
    method = replace(TINY, thresholds=(1.0, 1.2, 200.0))
    fitted, ratios = torch.arange(32) % 3 == 0, np.array([0.0, 5.0, 0.0, 0.0])
    monkeypatch.setattr(CT, "confused", lambda *_: None)
    monkeypatch.setattr(CT, "suspicious", lambda *_: (fitted, ratios))
    with metered() as cost:
        offered = list(method.candidates(view_of(method)))
    assert [(c.dial, c.is_default) for c in offered] == [(1.0, False), (1.2, False), (1.5, True), (200.0, False)]
    assert [c.strength for c in offered] == [2, 2, 2, 0]
    assert cost.backward == 30 + 32
    assert same(offered[0].model, offered[2].model)
    assert offered[0].model is not offered[2].model
    assert not same(offered[2].model, offered[3].model)
    assert not offered[3].isolated.any()


def test_the_most_suspicious_class_and_all_that_are_certain_are_flagged():
    ratios = np.log([1.0, 1.8, 2.1, 1.7])
    assert flagged(ratios, 1.5, 0.5).tolist() == [False, False, True, False]
    assert flagged(ratios, 1.0, 0.5).tolist() == [False, True, True, True]
    assert flagged(np.log([1.0, 1.4]), 1.5, 0.5).tolist() == [False, False]
    assert flagged(np.log([2.5, 1.6, 2.2]), 1.5, 0.5).tolist() == [True, False, True]
    assert flagged(np.log([1.0, 0.5]), 0.0, 0.0).tolist() == [True, True]


def test_samples_that_form_a_cluster_of_their_own_are_found():
    """Class 0 has 20 samples far from its others, which the network fits as 0; the others it gives to class 1."""
    draw = generator(0, "clusters")
    pixels = torch.randint(60, 100, (120, 3, 1, 1), generator=draw)
    labels = torch.arange(120) // 60
    odd = torch.arange(120) < 20
    pixels[odd] += 120
    data = ImageSet(pixels.to(torch.uint8), labels, 2)
    head = nn.Linear(3, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 1, 1], [0, 0, 0]]))
        head.bias.copy_(torch.tensor([-1.5, 0]))
    net = Network(Normalise([0.0] * 3, [1.0] * 3), nn.Flatten(), nn.Sequential(head)).eval()
    fitted, ratios = TINY.suspicious(net, data)
    assert torch.equal(fitted, odd | (labels == 1))
    assert ratios[0] > math.log(2)
    assert ratios[1] == 0, "all of class 1 are fitted"


def test_passes_are_counted(view_of):
    with metered() as cost:
        list(TINY.candidates(view_of(TINY)))
    base, last, clean = 32, 32, 24
    pretrain = 32 + 16 + 8 + clean
    confusion = 8 * (3 + 2) + 8 * (2 + 1) + 8 * (4 + 2)
    looked = clean + 2 * 32 + 2 * 32  # base on clean images; losses after two rounds; predictions and features at the end
    assert cost.backward in range(base + pretrain + confusion + last - 16, base + pretrain + confusion + last + 1)
    assert cost.forward - cost.backward == looked


def test_it_needs_the_poisoned_set_and_clean_images(view_of, data_of):
    view = view_of(TINY)
    list(TINY.candidates(view))
    assert view.used == TINY.needs == Knowledge.TRAIN | Knowledge.CLEAN
    few = replace(TINY, kept=(0.5, 0.05))
    with pytest.raises(Inapplicable, match="a round has 1 of 32 samples, and 24 clean ones"):
        list(few.candidates(view_of(few)))
    with pytest.raises(Inapplicable, match="and 0 clean ones"):
        list(TINY.candidates(view_of(TINY, clean=data_of(0, 0))))


def test_the_published_rounds():
    method = CT()
    assert method.pretrain_epochs == (100, 100, 40, 40, 40, 40)
    assert method.iterations == (6000, 6000, 6000, 6000, 2000, 2000)
    assert method.rates == (0.001, 0.001, 0.001, 0.01, 0.01, 0.01)
    assert method.weights == (20, 20, 20, 30, 30, 15)
    assert [int(share * 50_000) for share in method.kept] == [25_000, 10_000, 2_000, 1_000, 500]
    recipe = method.recipe(1, 0.01, VIEW)
    assert (recipe.batch, recipe.momentum, recipe.weight_decay, recipe.crop, recipe.flip) == (32, 0.9, 1e-4, 0, False)


@pytest.mark.parametrize(
    "wrong",
    [{"base_epochs": -1}, {"pretrain_epochs": (1, 1)}, {"pretrain_lr": 11.0}, {"pretrain_batch": 1}, {"iterations": (0,) * 6},
     {"rates": (0.1,)}, {"weights": (0.5,) * 6}, {"every": (0,) * 6}, {"kept": (0.0,)}, {"threshold": -1.0}, {"margin": -1.0},
     {"epochs": -1}, {"lr": 11.0}, {"batch": 1}, {"weight_decay": 2.0}, {"thresholds": (-1.0,)}],
)  # fmt: skip
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(BadInput, match=f"ct: {next(iter(wrong))} = "):
        CT(**wrong)
