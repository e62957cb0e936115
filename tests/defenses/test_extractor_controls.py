from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from defenses.base import DefenderView, Inapplicable, Knowledge, Scope
from defenses.extractor_controls import LinearProbe, NearestClassMean, class_means
from models.extractors import mlp
from models.images import to_float
from models.recipe import Recipe
from models.spec import BadInput, derive_seed, generator
from models.training import accuracy, predict


def only(defense, view):
    (candidate,) = defense.candidates(view)
    return candidate.model


def features_of(net, data):
    with torch.no_grad():
        return net.embed(to_float(data.images)).numpy()


def test_class_means_by_hand():
    z = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 0.0]])
    means, counts = class_means(z, torch.tensor([2, 2, 0]), 4)
    assert means.tolist() == [[5.0, 0.0], [0.0, 0.0], [2.0, 4.0], [0.0, 0.0]]
    assert counts.tolist() == [1, 0, 2, 0]


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("labels", ["clean", "train"])
def test_the_nearest_mean_is_that_of_a_loop_over_classes(metric, labels, net_of, data_of, view_of):
    extractor, clean, train, test = net_of(5), data_of(1), data_of(7, 40), data_of(9, 30)
    defense = NearestClassMean(labels=labels, metric=metric)
    model = only(defense, view_of(defense, extractor, clean=clean, train=train))
    data = clean if labels == "clean" else train
    z, y = features_of(extractor, data).astype(np.float64), data.labels.numpy()
    means = np.stack([z[y == k].mean(0) for k in range(4)])
    expected = []
    for point in features_of(extractor, test).astype(np.float64):
        if metric == "euclidean":
            distances = [np.sum((point - mean) ** 2) for mean in means]
        else:
            distances = [1 - point @ mean / np.linalg.norm(point) / np.linalg.norm(mean) for mean in means]
        expected.append(int(np.argmin(distances)))
    assert predict(model, test.images).tolist() == expected
    assert len(set(expected)) > 1


def test_a_class_without_samples_is_never_the_nearest(net_of, data_of, view_of):
    clean = data_of(1)
    clean = clean.subset(clean.labels != 2)
    defense = NearestClassMean()
    model = only(defense, view_of(defense, net_of(5), clean=clean))
    assert 2 not in predict(model, data_of(9, 40).images)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_the_probe_is_adam_on_frozen_features(net_of, data_of, view_of):
    """Two full-batch steps of Adam, written out from the formula."""
    extractor, clean = net_of(5), data_of(1)
    defense = LinearProbe(epochs=2, batch=24, lr=0.05)
    view = view_of(defense, extractor, clean=clean)
    model = only(defense, view)
    z, y = features_of(extractor, clean).astype(np.float64), clean.labels.numpy()
    linear = mlp(z.shape[1], (), 4, derive_seed(view.seed, "linear-probe", "weights"))[0]
    parameters = [linear.weight.detach().double().numpy(), linear.bias.detach().double().numpy()]
    m, v = [np.zeros_like(p) for p in parameters], [np.zeros_like(p) for p in parameters]
    for t in (1, 2):
        logits = z @ parameters[0].T + parameters[1]
        p = np.exp(logits - logits.max(1, keepdims=True))
        p = p / p.sum(1, keepdims=True) - np.eye(4)[y]
        for i, g in enumerate([p.T @ z / len(z), p.mean(0)]):
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g**2
            parameters[i] = parameters[i] - 0.05 * (m[i] / (1 - 0.9**t)) / (np.sqrt(v[i] / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(model.head[0].weight.detach(), parameters[0], atol=1e-4)
    np.testing.assert_allclose(model.head[0].bias.detach(), parameters[1], atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(model.features.state_dict().values(), extractor.features.state_dict().values(),
                                                 strict=True))  # fmt: skip


def test_both_learn_what_the_features_hold(net_of, data_of, view_of):
    draw = generator(0, "bright")
    data = data_of(1, 80)
    images = (60 * data.labels.view(-1, 1, 1, 1) + torch.randint(0, 20, (80, 3, 8, 8), generator=draw)).to(torch.uint8)
    clean = type(data)(images, data.labels, 4)
    for defense in (NearestClassMean(), LinearProbe(epochs=300, lr=0.05)):
        model = only(defense, view_of(defense, net_of(5), clean=clean))
        assert accuracy(model, clean) > 0.9


def test_they_reach_for_the_extractor_and_never_for_the_victim(net_of, data_of):
    for labels, knowledge in (("clean", Knowledge.CLEAN), ("train", Knowledge.TRAIN)):
        for defense in (NearestClassMean(labels=labels), LinearProbe(labels=labels, epochs=1)):
            assert defense.needs == Knowledge.EXTRACTOR | knowledge
            view = DefenderView(
                granted=~Knowledge.NONE, declared=defense.needs,
                sources={Knowledge.EXTRACTOR: lambda: net_of(5), Knowledge.CLEAN: lambda: (data_of(1), data_of(2)),
                         Knowledge.TRAIN: lambda: data_of(3)},
                fresh=net_of, num_classes=4, seed=0, scope=Scope.WHOLE, recipe=Recipe(),
            )  # fmt: skip
            only(defense, view)
            assert view.used == defense.needs


def test_an_empty_budget_is_refused(net_of, data_of, view_of):
    defense = NearestClassMean()
    with pytest.raises(Inapplicable, match="'clean' is empty"):
        only(defense, view_of(defense, clean=data_of(size=0)))


@pytest.mark.parametrize("wrong", [{"labels": "test"}, {"epochs": -1}, {"lr": 11.0}, {"batch": 0}])
def test_settings_of_the_probe_out_of_range_are_named(wrong):
    with pytest.raises(BadInput, match=f"linear-probe: {next(iter(wrong))}"):
        LinearProbe(**wrong)


@pytest.mark.parametrize("wrong", [{"labels": "test"}, {"metric": "manhattan"}])
def test_settings_of_the_means_out_of_range_are_named(wrong):
    with pytest.raises(BadInput, match=f"nearest-class-mean: {next(iter(wrong))}"):
        NearestClassMean(**wrong)


def test_the_head_is_one_linear_layer(net_of, view_of):
    for defense in (NearestClassMean(), LinearProbe(epochs=1)):
        head = only(defense, view_of(defense)).head
        assert [type(module) for module in head] == [nn.Linear]
