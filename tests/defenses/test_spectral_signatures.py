from __future__ import annotations

import numpy as np
import pytest
import torch

from defenses.base import Inapplicable, Knowledge
from defenses.spectral_signatures import SpectralSignatures, outlier_scores
from models.classifier import Classifier
from models.cost import metered
from models.images import to_float
from models.spec import BadInput, derive_seed, generator
from models.training import fit


def slow_scores(features):
    """The leading eigenvector of the covariance by power iteration in numpy, one sample at a time."""
    x = features - features.mean(0)
    covariance = sum(np.outer(row, row) for row in x)
    v = np.random.default_rng(0).normal(size=x.shape[1])
    for _ in range(5000):
        v = covariance @ v
        v /= np.linalg.norm(v)
    return np.array([np.dot(row, v) ** 2 for row in x])


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_scores_equal_a_power_iteration():
    features = torch.randn((40, 6), generator=generator(0, "features"), dtype=torch.float64) * torch.arange(1, 7) + 3
    np.testing.assert_allclose(outlier_scores(features).numpy(), slow_scores(features.numpy()), rtol=1e-6, atol=1e-9)


def test_scores_by_hand():
    """On the line (1, 1): -2, 0, 0, 2 along it; the squared distances from the mean."""
    features = torch.tensor([[0.0, 0.0], [2.0, 2.0], [2.0, 2.0], [4.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(outlier_scores(features), torch.tensor([8.0, 0.0, 0.0, 8.0], dtype=torch.float64))
    assert not outlier_scores(features[:1]).any()


def test_a_shifted_minority_scores_highest():
    features = torch.randn((50, 8), generator=generator(1, "features"), dtype=torch.float64)
    features[45:] += 6
    assert set(outlier_scores(features).argsort(descending=True)[:5].tolist()) == {45, 46, 47, 48, 49}


def test_the_share_of_every_label_is_removed_and_a_network_trained_on_the_rest(net_of, data_of, view_of):
    method, data = SpectralSignatures(rate=0.2, rates=(0.1, 0.2)), data_of(3, 32)
    view = view_of(method)
    with metered() as cost:
        offered = list(method.candidates(view))
    assert [(c.dial, c.is_default) for c in offered] == [(0.3, True), (0.15, False)]
    with torch.no_grad():
        z = net_of().embed(to_float(data.images)).double().numpy()
    suspected = np.zeros(32)
    for label in range(4):
        members = np.flatnonzero(data.labels.numpy() == label)
        suspected[members] = slow_scores(z[members])
    for candidate, count in zip(offered, (2, 1), strict=True):  # floor(0.3 * 8), floor(0.15 * 8)
        expected = set()
        for label in range(4):
            members = np.flatnonzero(data.labels.numpy() == label)
            expected |= set(members[np.argsort(-slow_scores(z[members]))[:count]].tolist())
        assert set(torch.nonzero(candidate.isolated).flatten().tolist()) == expected
        assert candidate.strength == 4 * count
        np.testing.assert_allclose(candidate.suspicion.numpy(), suspected, rtol=1e-3, atol=1e-7)
        twin = net_of(derive_seed(view.seed, "spectral-signatures", "weights"))
        seed = derive_seed(view.seed, "spectral-signatures", "batches")
        fit(Classifier(twin, view.recipe), data.subset(~candidate.isolated), view.recipe, seed)
        assert same(candidate.model, twin)
    assert view.used == Knowledge.MODEL | Knowledge.TRAIN
    assert view.trained
    assert (cost.forward, cost.backward) == (32 + 24 + 28, 24 + 28), "one pass for the features, one epoch for each network"


def test_where_nothing_is_removed_the_victim_stays(net_of, view_of):
    method = SpectralSignatures(rate=0.05)  # 0.075 of 8 samples
    view = view_of(method)
    (candidate,) = method.candidates(view)
    assert not candidate.isolated.any()
    assert not view.trained
    assert same(candidate.model, net_of())


def test_a_training_set_of_one_sample_is_refused(data_of, view_of):
    method = SpectralSignatures()
    with pytest.raises(Inapplicable, match="training set holds 1"):
        list(method.candidates(view_of(method, train=data_of(size=1))))


@pytest.mark.parametrize("wrong", [{"rate": 0.0}, {"factor": 11.0}, {"rates": (1.0,)}, {"factor": 9.99, "rate": 0.2}])
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(BadInput, match=f"spectral-signatures: {next(iter(wrong))}"):
        SpectralSignatures(**wrong)
