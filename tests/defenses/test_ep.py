from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from defenses.base import Inapplicable, Knowledge, Scope
from defenses.ep import EP, entropies, far_below, peaks
from models.cost import metered
from models.images import to_float
from models.resnet import ResNet8
from models.spec import BadInput, generator
from models.units import unit_layers


def histogram_entropy(values, width):
    """Counts of every open interval from the lowest to the highest edge, in numpy."""
    x = np.asarray(values, dtype=np.float64)
    x = (x - x.mean()) / x.std(ddof=1)
    first, last = math.floor(x.min() / width) - 1, math.ceil(x.max() / width) + 1
    entropy = 0.0
    for i in range(first, last):
        count = int(((x > i * width) & (x < (i + 1) * width)).sum())
        if count:
            entropy -= count / len(x) * math.log(count / len(x))
    return entropy


@pytest.mark.parametrize("width", [0.01, 0.1, 0.73])
def test_entropies_equal_a_loop_over_the_bins(width):
    values = torch.randn((60, 5), generator=generator(0, "values"), dtype=torch.float64) * 3 + 1
    values[:3, 2] += 40
    found = entropies(values, width)
    for unit in range(5):
        assert float(found[unit]) == pytest.approx(histogram_entropy(values[:, unit], width), rel=1e-9)
    assert int(found.argmin()) == 2, "two populations far apart"


def test_entropies_by_hand():
    """-1, 0, 1 standardised: the middle is on an edge and in no bin. 0, 0, 0, 1: standardised -1/2 three times, and 3/2."""
    values = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert float(entropies(values[:3, :1], 0.7)[0]) == pytest.approx(2 / 3 * math.log(3))
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert float(entropies(values[:, 1:], 0.35)[0]) == pytest.approx(expected)


def test_a_constant_unit_is_kept_and_left_out(view_of, net_of):
    scores = torch.tensor([5.0, 5.1, 4.9, 5.0, torch.nan, 1.0], dtype=torch.float64)
    known = np.delete(scores.numpy(), 4)
    for u in (1.0, 1.7, 2.0):
        expected = known < known.mean() - u * known.std(ddof=1)
        assert np.delete(far_below(scores, u).numpy(), 4).tolist() == expected.tolist()
        assert not far_below(scores, u)[4]
    assert far_below(scores, 1.7)[5]
    assert not far_below(scores, 2.0).any()
    net, defense = net_of(), EP()
    with torch.no_grad():
        net.features[0].weight[1] = 0.0
    assert all(not candidate.masks["features.1"][1] for candidate in defense.candidates(view_of(defense, net)))


@pytest.mark.parametrize("norm", [True, False])
def test_peaks_are_the_largest_pre_activations(net_of, data_of, norm):
    net, images = net_of(norm=norm), data_of(1).images
    x = net.normalise(to_float(images))
    expected, features, step = {}, net.features, 3 if norm else 2
    for block in range(2):
        for place in range(step * block, step * block + step - 1):
            x = features[place](x)
        name = f"features.{step * block + step - 2}"
        expected[name] = np.array([[channel.max() for channel in sample] for sample in x.detach().numpy()])
        x = torch.relu(x)
    expected["head.0"] = net.head[0](x.mean((2, 3))).detach().numpy()
    with metered() as cost:
        found = peaks(net, unit_layers(net), images)
    assert (cost.forward, cost.backward) == (len(images), 0)
    assert list(found) == list(expected)
    for name, values in found.items():
        np.testing.assert_allclose(values.numpy(), expected[name], rtol=1e-5, atol=1e-6)


def test_masks_equal_the_formula_on_the_drawn_samples(data_of, view_of):
    net = ResNet8(width=8).build(4, (3, 8, 8), [0.5] * 3, [0.25] * 3, 1).eval()
    defense, data = EP(batch=20, width=0.1, grid=(0.5, 1.0, 1.5)), data_of(3, 32)
    view = view_of(defense, net)
    offered = list(defense.candidates(view))
    assert view.used == Knowledge.MODEL | Knowledge.TRAIN
    drawn = torch.randperm(32, generator=generator(view.seed, "ep", "draw"))[:20]
    values = peaks(net, unit_layers(net), data.subset(drawn).images)
    assert [candidate.dial for candidate in offered] == [0.5, 1, 1.5, 3]
    assert [candidate.is_default for candidate in offered] == [False, False, False, True]
    for candidate in offered:
        for name, mask in candidate.masks.items():
            scores = np.array([histogram_entropy(column, 0.1) for column in values[name].T.numpy()])
            assert mask.tolist() == (scores < scores.mean() - candidate.dial * scores.std(ddof=1)).tolist()
    assert offered[0].pruned > offered[2].pruned > 0


def test_labels_do_not_matter(data_of, view_of):
    defense, data = EP(grid=(0.5,)), data_of(3, 32)
    other = type(data)(data.images, data.labels.roll(1), 4)
    first, second = (next(iter(defense.candidates(view_of(defense, train=each)))).masks for each in (data, other))
    assert all(torch.equal(mask, second[name]) for name, mask in first.items())


@pytest.mark.parametrize("scope", [Scope.HEAD, Scope.WHOLE])
def test_gamma_is_written_and_nothing_else(net_of, view_of, scope):
    defense, net = EP(u=0.5), net_of()
    candidate = next(c for c in defense.candidates(view_of(defense, net, scope)) if c.is_default)
    assert candidate.pruned > 0
    expected = net.state_dict()
    for name, mask in candidate.masks.items():
        expected[f"{name}.weight"][mask] = 0
        if name.startswith("head"):
            expected[f"{name}.bias"][mask] = 0
    assert all(torch.equal(value, expected[name]) for name, value in candidate.model.state_dict().items())


def test_refusals(net_of, data_of, view_of):
    defense = EP()
    with pytest.raises(Inapplicable, match="no hidden units"):
        list(defense.candidates(view_of(defense, net_of(hidden=0), Scope.HEAD)))
    with pytest.raises(Inapplicable, match="training set holds 1"):
        list(defense.candidates(view_of(defense, train=data_of(size=1))))
    assert EP(u=2.5).z_threshold == 2.5


@pytest.mark.parametrize("wrong", [{"u": -1.0}, {"width": 0.0}, {"batch": 1}])
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(BadInput, match=f"ep: {next(iter(wrong))}"):
        EP(**wrong)
