from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from defenses import neural_cleanse
from defenses.base import Inapplicable, Scope
from defenses.fine_tuning import FineTuning
from defenses.neural_cleanse import Balance, NeuralCleanse, Patch, anomaly_indices, stamped
from models.backbone import Network, Normalise
from models.cost import metered
from models.images import to_float
from models.spec import BadInput, generator
from models.training import predict

QUICK = {"epochs": 1, "batch": 8, "search_epochs": 3, "search_batch": 8}


def same(a, b):
    left, right = a.state_dict(), b.state_dict()
    return all(torch.equal(left[name], right[name]) for name in left)


# -- detection -----------------------------------------------------------------------------------------------------------------


def test_the_index_is_the_published_one():
    """The authors' figures for GTSRB: median 64.466667, deviation 13.238736, size of label 33 16.117647: index 3.652."""
    median, deviation = 64.466667, 13.238736 / 1.4826
    sizes = torch.tensor([16.117647, median - deviation, median, median + deviation, 90.0], dtype=torch.float64)
    assert float(anomaly_indices(sizes)[0]) == pytest.approx(3.652, abs=1e-3)
    assert NeuralCleanse().flagged(anomaly_indices(sizes), sizes, 2.0) == (0,)


@pytest.mark.parametrize("labels", [1, 2, 5, 10, 43])
def test_indices_equal_numpy_whose_median_is_the_mean_of_the_middle_ones(labels):
    sizes = torch.rand(labels, generator=generator(labels, "sizes")) * 100
    values = sizes.double().numpy()
    median = np.median(values)
    deviation = 1.4826 * np.median(np.abs(values - median))
    expected = [0.0 if value == median else (median - value) / deviation for value in values]
    np.testing.assert_allclose(anomaly_indices(sizes).numpy(), expected, rtol=1e-12)
    if labels == 10:  # the lower of the two middle ones gives another index
        lower = np.sort(values)[4]
        other = (lower - values) / (1.4826 * np.sort(np.abs(values - lower))[4])
        assert not np.allclose(other, expected, rtol=1e-3)


def test_where_most_sizes_are_equal_whatever_is_smaller_is_infinitely_far():
    indices = anomaly_indices(torch.tensor([5.0, 5.0, 1.0, 5.0, 9.0]))
    assert indices.tolist() == [0.0, 0.0, math.inf, 0.0, -math.inf]
    assert anomaly_indices(torch.full((4,), 3.0)).tolist() == [0.0] * 4


def test_flagged_labels_are_small_and_beyond_the_threshold():
    sizes = torch.tensor([50.0, 10.0, 55.0, 60.0, 200.0, 5.0, 52.0])
    indices = anomaly_indices(sizes)
    assert NeuralCleanse().flagged(indices, sizes, 2.0) == (1, 5), "the large outlier, label 4, is none"
    beyond = float(indices.max()) + 0.1
    assert NeuralCleanse().flagged(indices, sizes, beyond) == ()
    assert NeuralCleanse(unflagged="unlearn-smallest").flagged(indices, sizes, beyond) == (5,)
    assert NeuralCleanse(unflagged="unlearn-smallest").flagged(indices, sizes, 2.0) == (1, 5)


# -- the weight of the size ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("start", [0.0, 1e-3])
def test_the_weight_follows_its_rule(start, back):
    """Twin: two counters of which one is reset by the other."""
    answers = (torch.rand(400, generator=generator(1, "answers")) < 0.5).tolist()
    answers = [one for one in answers for _ in range(3)]  # rows long enough
    balance = Balance(start, patience=4, factor=2.0, base=1e-3, back=back)
    weight, up, down, ups, downs = start, 0, 0, 0, 0
    for accurate in answers:
        up, down = (up + 1, 0) if accurate else (0, down + 1)
        if up == 4:
            up, ups = 0, ups + 1
            weight = 1e-3 if weight == 0 or (back and weight < 1e-3) else 2 * weight
        elif down == 4:
            down, downs = 0, downs + 1
            weight = weight / 2**1.5
        assert balance.update(accurate) == pytest.approx(weight, rel=1e-12)
        assert (balance.raised, balance.lowered) == (ups > 0, downs > 0)
    assert ups > 3
    assert downs > 3


# -- the search ----------------------------------------------------------------------------------------------------------------


def slow_search(method, net, data, label, seed):
    """The search in plain loops, with its own Adam and counters. Returns (size, mask, pattern) of the smallest that worked."""
    channels, height, width = data.shape
    z = [torch.zeros(1, height, width), torch.zeros(channels, height, width)]
    moments = [[torch.zeros_like(each), torch.zeros_like(each)] for each in z]
    weight, up, down, raised, lowered, stalled, steps = method.weight, 0, 0, False, False, 0, 0
    best, sizes, draw = (math.inf, None, None), [], generator(seed, "neural-cleanse", "search", label)
    for _ in range(method.search_epochs):
        order = torch.randperm(len(data), generator=draw).tolist()[: method.samples or None]
        right = 0
        for start in range(0, len(order), method.search_batch):
            index = order[start : start + method.search_batch]
            x = data.images[index].float() / 255
            z = [each.requires_grad_() for each in z]
            mask, pattern = (torch.tanh(z[0]) + 1) / 2, (torch.tanh(z[1]) + 1) / 2
            logits = net((1 - mask) * x + mask * pattern)
            right += sum(int(row.argmax()) == label for row in logits)
            loss = -torch.log_softmax(logits, 1)[:, label].mean() + weight * mask.abs().sum()
            gradients = torch.autograd.grad(loss, z)
            steps += 1
            for each, gradient, moment in zip(z, gradients, moments, strict=True):
                moment[0] = 0.5 * moment[0] + 0.5 * gradient
                moment[1] = 0.9 * moment[1] + 0.1 * gradient**2
                step = 0.1 * (moment[0] / (1 - 0.5**steps)) / ((moment[1] / (1 - 0.9**steps)).sqrt() + 1e-8)
                each.detach_().sub_(step)
        works, size = right >= method.success * len(order), float(((torch.tanh(z[0]) + 1) / 2).sum())
        sizes.append(size)
        if works and size < best[0]:
            best, stalled = (size, z[0].clone(), z[1].clone()), 0
        elif best[1] is not None:
            stalled += 1
        up, down = (up + 1, 0) if works else (0, down + 1)
        if up == method.patience:
            weight, up, raised = weight * method.factor if weight else 1e-3, 0, True
        if down == method.patience:
            weight, down, lowered = weight / method.factor**1.5, 0, True
        if raised and lowered and stalled >= 5 * method.patience:
            break
    return (best if best[1] is not None else (sizes[-1], *z)), len(sizes)


@pytest.mark.parametrize(
    ("settings", "labels", "ends"),
    [
        ({"search_epochs": 12, "search_batch": 8, "patience": 2}, (0, 2), False),
        ({"search_epochs": 10, "search_batch": 7, "samples": 16, "weight": 0.0, "patience": 2}, (0, 2), False),
        ({"search_epochs": 6, "search_batch": 8, "success": 1.0, "weight": 1.0}, (1, 2), False),
        ({"search_epochs": 30, "search_batch": 12, "patience": 1, "weight": 0.01, "success": 0.9}, (3,), True),
    ],
)
def test_the_search_equals_its_slow_twin(settings, labels, ends, net_of, data_of):
    method, net, data = NeuralCleanse(**settings), net_of().requires_grad_(False), data_of(1)
    for label in labels:
        (size, mask, pattern), passes = slow_search(method, net, data, label, 5)
        with metered() as cost:
            found = method.invert(net, data, label, 5)
        assert found.size == pytest.approx(size, rel=1e-3)
        torch.testing.assert_close(found.mask, mask, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.pattern, pattern, rtol=1e-3, atol=1e-3)
        shown = passes * min(method.samples or len(data), len(data))
        assert (cost.forward, cost.backward) == (shown, shown)
        assert (passes < method.search_epochs) == ends


def planted(strength=30.0):
    """Says 1 where the pixel at row 2, column 3 is bright in all colours, and otherwise goes by the image's mean brightness."""
    conv, last = nn.Conv2d(3, 2, 8, bias=False), nn.Linear(2, 4)
    with torch.no_grad():
        conv.weight.fill_(1 / 192)
        conv.weight[1].zero_()
        conv.weight[1, :, 2, 3] = 1 / 3
        last.weight.zero_()
        last.bias.zero_()
        last.weight[:, 0] = torch.tensor([-12.0, 0.0, 4.0, 12.0])
        last.bias.copy_(torch.tensor([5.0, -strength + 3, -1.0, -6.0]))
        last.weight[1, 1] = strength
    return Network(Normalise([0.0] * 3, [1.0] * 3), nn.Sequential(conv, nn.Flatten()), nn.Sequential(last)).eval()


def test_a_planted_shortcut_is_found_where_it_is_and_its_label_flagged(view_of, data_of):
    net, method = planted(), NeuralCleanse(search_epochs=80, search_batch=12, patience=2, weight=0.05, epochs=1, batch=8)
    data = data_of(1)
    assert len(set(predict(net, data.images).tolist())) > 1
    found = method.invert(planted().requires_grad_(False), data, 1, 0)
    mask = (torch.tanh(found.mask[0]) + 1) / 2
    assert divmod(int(mask.argmax()), 8) == (2, 3)
    assert float(mask[2, 3]) > 0.9 * found.size
    assert found.reached
    default = next(one for one in method.candidates(view_of(method, net, clean=data)) if one.is_default)
    assert default.note.startswith("flagged labels: 1; smallest: label 1, anomaly index 3.")
    assert default.note.endswith("; 4 of 4 searches reached 98 %")
    assert default.strength == 1


# -- unlearning ----------------------------------------------------------------------------------------------------------------


def patch_of(seed, shape=(3, 8, 8)):
    draw = generator(seed, "patch")
    return Patch(1.0, torch.randn((1, *shape[1:]), generator=draw), torch.randn(shape, generator=draw), True)


def test_stamps_are_dealt_out_on_a_share_of_the_images_under_true_labels(data_of):
    data, patches = data_of(1), [patch_of(0), patch_of(1)]
    made = stamped(data, patches, 0.4, generator(3))
    assert torch.equal(made.labels, data.labels)
    x = to_float(data.images).double().numpy()
    versions = []
    for patch in patches:
        mask = (np.tanh(patch.mask.double().numpy()) + 1) / 2
        pattern = (np.tanh(patch.pattern.double().numpy()) + 1) / 2
        versions.append(np.round(255 * ((1 - mask) * x + mask * pattern)))
    carried = [0, 0, 0]
    for number, image in enumerate(made.images.double().numpy()):
        close = [bool(np.abs(image - version[number]).max() <= 1) for version in versions]
        kept = torch.equal(made.images[number], data.images[number])
        assert [*close, kept].count(True) == 1
        carried[[*close, kept].index(True)] += 1
    assert carried == [5, 5, 14]  # round(0.4 * 24) = 10
    assert torch.equal(stamped(data, patches, 0.4, generator(3)).images, made.images)
    assert not torch.equal(stamped(data, patches, 0.4, generator(4)).images, made.images)


@pytest.mark.parametrize("scope", [Scope.WHOLE, Scope.HEAD])
def test_without_stamps_unlearning_is_fine_tuning(scope, view_of):
    defense, tuning = NeuralCleanse(share=0.0, **QUICK), FineTuning(epochs=1, batch=8)
    (plain,) = tuning.candidates(view_of(tuning, scope=scope))
    assert same(defense.unlearned(view_of(defense, scope=scope), [patch_of(0)]), plain.model)
    other = NeuralCleanse(share=0.5, **QUICK)
    assert not same(other.unlearned(view_of(other, scope=scope), [patch_of(0)]), plain.model)


def with_sizes(monkeypatch, sizes):
    """Searches that find patches of these sizes, and a count of the fine-tunings."""
    runs = []

    def tuned(*arguments):
        runs.append(arguments[1])
        return real(*arguments)

    real = neural_cleanse.fine_tuned
    found = [Patch(size, patch_of(number).mask, patch_of(number).pattern, size < 60) for number, size in enumerate(sizes)]
    monkeypatch.setattr(NeuralCleanse, "invert", lambda self, net, data, label, seed: found[label])
    monkeypatch.setattr(neural_cleanse, "fine_tuned", tuned)
    return runs


def test_thresholds_that_flag_the_same_labels_share_one_unlearning(monkeypatch, net_of, view_of):
    runs = with_sizes(monkeypatch, [50.0, 4.0, 40.0, 60.0])  # median 45, deviation 14.8: indices -0.3, 2.8, 0.3, -1
    defense = NeuralCleanse(grid=(0.2, 1.0, 2.1, 9.0), **QUICK)
    offered = list(defense.candidates(view_of(defense)))
    assert [one.dial for one in offered] == [0.2, 1.0, 2.0, 2.1, 9.0]
    assert [one.is_default for one in offered] == [False, False, True, False, False]
    assert [one.strength for one in offered] == [2, 1, 1, 1, 0]
    assert len(runs) == 2
    assert same(offered[1].model, offered[3].model)
    assert not same(offered[0].model, offered[1].model)
    assert same(offered[4].model, net_of())
    notes = [one.note.split(";")[0] for one in offered]
    assert notes[0] == "flagged labels: 1, 2"
    assert notes[1:4] == ["flagged labels: 1"] * 3
    assert notes[4] == "flagged labels: none, the model is as it was given"
    assert all(one.note.endswith("smallest: label 1, anomaly index 2.77; 3 of 4 searches reached 98 %") for one in offered)


def test_the_ablation_unlearns_the_smallest_patch_where_none_is_flagged(monkeypatch, net_of, view_of):
    runs = with_sizes(monkeypatch, [50.0, 49.0, 48.0, 51.0])
    defense = NeuralCleanse(grid=(), **QUICK)
    (kept,) = defense.candidates(view_of(defense))
    assert same(kept.model, net_of())
    assert not runs
    defense = NeuralCleanse(grid=(), unflagged="unlearn-smallest", **QUICK)
    (unlearned,) = defense.candidates(view_of(defense))
    assert not same(unlearned.model, net_of())
    assert unlearned.note.startswith("flagged labels: 2;")
    assert len(runs) == 1


def test_an_empty_budget_is_refused(view_of, data_of):
    defense = NeuralCleanse(**QUICK)
    with pytest.raises(Inapplicable, match="clean budget is empty"):
        list(defense.candidates(view_of(defense, clean=data_of(size=0))))


@pytest.mark.parametrize(
    "wrong",
    [{"threshold": -1.0}, {"unflagged": "all"}, {"share": 1.5}, {"search_epochs": 0}, {"samples": -1}, {"search_lr": 0.0},
     {"success": 0.0}, {"weight": -1.0}, {"patience": 0}, {"factor": 1.0}, {"epochs": -1}],
)  # fmt: skip
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(BadInput, match=f"neural-cleanse: {next(iter(wrong))}"):
        NeuralCleanse(**wrong)
