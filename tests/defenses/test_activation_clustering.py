from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA, FastICA

from defenses import activation_clustering
from defenses.activation_clustering import ActivationClustering, halves, reduced
from defenses.base import Inapplicable, Knowledge
from models.classifier import Classifier
from models.images import ImageSet
from models.spec import BadInput, derive_seed, generator
from models.training import fit


def blobs(few, many, gap, seed=0, dims=12):
    """``many`` samples around the origin and ``few`` around a point ``gap`` away; the few come last."""
    points = torch.randn((few + many, dims), generator=generator(seed, "blobs"), dtype=torch.float64)
    points[many:] += gap
    return points


def test_principal_components_are_those_of_a_library():
    points = blobs(10, 30, 3.0) * torch.arange(1, 13)
    expected = PCA(5).fit_transform(points.numpy())
    found = reduced(points, 5, whiten=False).numpy()
    np.testing.assert_allclose(np.abs(found), np.abs(expected), rtol=1e-6, atol=1e-9)
    white = reduced(points, 5, whiten=True).numpy()
    np.testing.assert_allclose(white.T @ white / 40, np.eye(5), atol=1e-9)


def test_independent_components_have_the_distances_of_the_whitened_ones():
    """So k-means cannot tell them from each other, whatever rotation is found."""
    points = blobs(10, 30, 3.0) * torch.arange(1, 13)
    independent = FastICA(5, whiten="unit-variance", random_state=0, max_iter=2000, tol=1e-3).fit_transform(points.numpy())
    whitened = reduced(points, 5, whiten=True)
    distances = np.linalg.norm(independent[:, None] - independent[None], axis=2)
    np.testing.assert_allclose(torch.cdist(whitened, whitened).numpy(), distances, rtol=1e-6, atol=1e-6)


def test_components_without_variance_are_left_out():
    points = blobs(3, 5, 2.0, dims=4)
    points[:, 2] = 7.0
    points[:, 3] = points[:, 0]
    assert reduced(points, 10, whiten=True).shape == (8, 2)
    assert reduced(points[:1], 10, whiten=True).shape == (1, 0)
    assert not halves(reduced(points[:1], 10, whiten=True), 0).any()


def test_two_means_equal_the_best_of_all_splits():
    """Every split of 9 points: the one of least squared distance to the two means."""
    points = blobs(3, 6, 4.0, dims=2)

    def cost(split):
        parts = (points[torch.tensor(split)], points[~torch.tensor(split)])
        return sum(float((part - part.mean(0)).square().sum()) for part in parts if len(part))

    best = min(product([False, True], repeat=9), key=cost)
    small = torch.tensor(best if sum(best) < 5 else [not value for value in best])
    assert torch.equal(halves(points, 0), small)
    assert small.tolist() == [False] * 6 + [True] * 3


def test_the_smaller_cluster_is_found_whichever_comes_first():
    points = blobs(3, 9, 8.0)
    assert halves(points, 0).tolist() == [False] * 9 + [True] * 3
    assert halves(points.flip(0), 0).tolist() == [True] * 3 + [False] * 9
    even = torch.tensor([[0.0], [0.1], [9.0], [9.1]], dtype=torch.float64)
    assert halves(even, 0).tolist() == [False, False, True, True]


def silhouette(points, small):
    """Mean of (b - a) / max(a, b), by loops."""
    values = []
    for i, mine in enumerate(small):
        distances = [float((points[i] - point).norm()) for point in points]
        same = [d for j, d in enumerate(distances) if small[j] == mine and j != i]
        other = [d for j, d in enumerate(distances) if small[j] != mine]
        a, b = np.mean(same) if same else 0.0, np.mean(other)
        values.append((b - a) / max(a, b) if same else 0.0)
    return float(np.mean(values))


def test_the_silhouette_rule_asks_that_clusters_fit():
    features = blobs(6, 24, 2.0)
    points = reduced(features, 10, whiten=True)
    small = halves(points, 0)
    value = silhouette(points, small.tolist())
    for threshold, kept in ((value - 1e-6, True), (value + 1e-6, False)):
        method = ActivationClustering(rule="silhouette", silhouette=threshold)
        assert torch.equal(method.smaller(features, 0), small & kept)
    assert torch.equal(ActivationClustering(silhouette=1.0).smaller(features, 0), small), "the other rule does not ask"


STRANGE = (2, 3, 4, 8)
"""Red images added to the 10 samples of every label: 17, 23, 29 and 44 % of them."""


@pytest.fixture
def poisoned(data_of):
    data = data_of(3, 40)
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor(STRANGE))
    red = torch.zeros((len(labels), 3, 8, 8), dtype=torch.uint8)
    red[:, 0] = 255 - torch.randint(0, 9, (len(labels), 8, 8), generator=generator(0, "red"))
    return ImageSet(torch.cat([data.images, red]), torch.cat([data.labels, labels]), 4)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("components", ["independent", "principal"])
def test_small_clusters_are_removed_and_a_network_trained_on_the_rest(net_of, view_of, poisoned, components):
    method = ActivationClustering(size=0.25, sizes=(0.5, 0.29, 0.25), components=components, dims=2)
    view = view_of(method, train=poisoned)
    offered = list(method.candidates(view))
    assert [(c.dial, c.is_default) for c in offered] == [(0.25, True), (0.5, False), (0.29, False)]
    suspected = []  # one minus the share of the label's samples that are in the same cluster
    for place, label in enumerate(poisoned.labels.tolist()):
        share = STRANGE[label] / int((poisoned.labels == label).sum())
        suspected.append(1 - share if place >= 40 else share)
    for candidate, labels in zip(offered, (2, 4, 3), strict=True):
        torch.testing.assert_close(candidate.suspicion, torch.tensor(suspected, dtype=torch.float64), rtol=1e-6, atol=0)
        expected = (torch.arange(len(poisoned)) >= 40) & (poisoned.labels < labels)
        assert torch.equal(candidate.isolated, expected)
        assert candidate.note == f"a cluster of {labels} of 4 labels removed"
        assert candidate.strength == sum(STRANGE[:labels])
        twin = net_of(derive_seed(view.seed, "activation-clustering", "weights"))
        seed = derive_seed(view.seed, "activation-clustering", "batches")
        fit(Classifier(twin, view.recipe), poisoned.subset(~expected), view.recipe, seed)
        assert same(candidate.model, twin)
    assert view.used == Knowledge.MODEL | Knowledge.TRAIN


def test_where_no_cluster_is_small_the_victim_stays(net_of, view_of, monkeypatch):
    monkeypatch.setattr(activation_clustering, "halves", lambda points, _: torch.arange(len(points)) % 2 == 1)
    method = ActivationClustering(size=0.5)
    view = view_of(method)
    (candidate,) = method.candidates(view)
    assert not candidate.isolated.any()
    assert not view.trained
    assert same(candidate.model, net_of())


def test_a_training_set_of_one_sample_is_refused(data_of, view_of):
    method = ActivationClustering()
    with pytest.raises(Inapplicable, match="training set holds 1"):
        list(method.candidates(view_of(method, train=data_of(size=1))))


@pytest.mark.parametrize("wrong", [{"size": 0.6}, {"sizes": (0.0,)}, {"dims": 0}, {"rule": "smaller"}, {"silhouette": 2.0}])
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(BadInput, match=f"activation-clustering: {next(iter(wrong))}"):
        ActivationClustering(**wrong)
