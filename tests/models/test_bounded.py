"""ReLUs with an upper bound are part of the network: it is copied, saved, loaded and scored like any other."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from models import BACKBONES
from models.backbone import Network, Normalise
from models.bounded import BoundedReLU, bounded, relus, with_bounds
from models.images import to_float
from models.spec import BadInput, generator
from models.training import predict
from models.units import Scope, unit_layers
from models.variants import Variants
from models.weights import load_weights, read_state, save_weights

EACH = [pytest.param(kind, id=kind.name) for kind in BACKBONES]


def made(kind, hidden=6) -> Network:
    net = kind(width=2, hidden=hidden).build(4, (3, 16, 16), [0.5] * 3, [0.25] * 3, 0)
    net.train()(to_float(pictures(32)))  # running statistics of its own
    return net.eval()


def pictures(count):
    return torch.randint(0, 256, (count, 3, 16, 16), generator=generator("bounded", count), dtype=torch.uint8)


def outputs(net, paths, x):
    """What the modules at ``paths`` return for the images ``x``."""
    seen = {}
    handles = [
        net.get_submodule(path).register_forward_hook(lambda m, i, o, path=path: seen.__setitem__(path, o)) for path in paths
    ]
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    return seen


def some_bounds(net, share):
    """Bounds by position at a share of the largest activation of every ReLU."""
    seen = outputs(net, relus(net), to_float(pictures(20)))
    return {path: share * output.amax(0) for path, output in seen.items()}


def test_an_activation_is_cut_at_its_bound_and_never_below_zero():
    x = torch.randn(3, 2, 4, 5, generator=generator("x"))
    bound = torch.randn(2, 4, 5, generator=generator("bound"))
    for each in (bound, bound[:, :1, :1]):
        expected = np.minimum(np.maximum(x.numpy(), 0), np.maximum(each.numpy(), 0))
        np.testing.assert_array_equal(BoundedReLU(each)(x).detach().numpy(), expected)


@pytest.mark.parametrize("kind", EACH)
def test_every_relu_of_every_backbone_can_be_bounded_and_infinity_changes_nothing(kind):
    net, x = made(kind), to_float(pictures(5))
    paths = relus(net)
    assert paths == tuple(outputs(net, paths, x)), "in the order of the forward pass"
    assert len(paths) == sum(isinstance(module, nn.ReLU) for module in net.modules())
    assert relus(net, Scope.HEAD) == ("head.1",)
    loose = bounded(net, {path: torch.tensor(torch.inf) for path in paths})
    assert torch.equal(loose(x), net(x))
    tight = bounded(net, some_bounds(net, 0.3))
    assert not torch.equal(tight(x), net(x))
    assert type(tight) is Network
    assert unit_layers(tight) == unit_layers(net)
    assert not any(isinstance(module, BoundedReLU) for module in net.modules())


@pytest.mark.parametrize("kind", EACH[:1])
def test_lower_bounds_never_raise_an_activation_of_their_layer(kind):
    net, x = made(kind), to_float(pictures(6))
    for path, bound in some_bounds(net, 0.8).items():
        levels = [outputs(bounded(net, {path: share * bound}), [path], x)[path] for share in (1.0, 0.5, 0.1, 0.0, -1.0)]
        plain = outputs(net, [path], x)[path]
        for higher, lower in zip([plain, *levels], levels, strict=False):
            assert bool((lower <= higher).all())
        assert not levels[-1].any()


@pytest.mark.parametrize("kind", EACH)
def test_a_bounded_network_is_copied_saved_and_scored_like_any_other(kind, tmp_path):
    net, images = made(kind), pictures(30)
    tight = bounded(net, some_bounds(net, 0.4))
    assert torch.equal(copy.deepcopy(tight)(to_float(images)), tight(to_float(images)))
    file = tmp_path / "tight.safetensors"
    save_weights(tight, file)
    again = with_bounds(made(kind), read_state(file))
    assert not torch.equal(again.head[1].bound, torch.zeros(6))
    load_weights(again, file)
    assert torch.equal(again(to_float(images)), tight(to_float(images)))
    with pytest.raises(BadInput, match=r"\.bound' .* is not in the network"):
        load_weights(made(kind), file)
    variants = Variants(net, {"all": images})
    for other in (tight, bounded(net, {relus(net)[-1]: torch.zeros(6)}), net):
        assert torch.equal(variants.predict(other, "all"), predict(other, images))


def test_bounds_are_copies_and_mode_stays():
    net, bound = made(BACKBONES[0]), torch.ones(6)
    tight = bounded(net, {"head.1": bound})
    bound.zero_()
    assert bool((tight.head[1].bound == 1).all())
    assert not tight.head[1].training
    assert bounded(net.train(), {"head.1": bound}).head[1].training
    for nothing in ({}, {"features.conv1.bound": bound, "head.0.bound": bound, "nowhere.bound": bound}):
        assert same_state(with_bounds(net, nothing), net), "only a ReLU has bounds"
    assert repr(tight.head[1]) == "BoundedReLU(6)"


def same_state(a, b):
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


class _Calls(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.conv, self.act, self.how = nn.Conv2d(3, 2, 1), nn.ReLU(), how

    def forward(self, x):
        x = self.conv(x)
        if self.how == "function":
            return torch.relu(x).mean((2, 3))
        if self.how == "method":
            return x.relu_().mean((2, 3))
        return self.act(self.act(x) - 1).mean((2, 3))


@pytest.mark.parametrize(("how", "words"), [("function", "as a function"), ("method", "as a function"), ("twice", "features.act")])
def test_relus_that_cannot_have_bounds_of_their_own_are_named(how, words):
    net = Network(Normalise([0.5] * 3, [0.2] * 3), _Calls(how), nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)))
    with pytest.raises(ValueError, match=words):
        relus(net)
    assert relus(net, Scope.HEAD) == ("head.1",)
