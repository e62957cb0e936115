from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from defenses.base import Inapplicable, Knowledge, Scope
from defenses.clp import CLP
from defenses.holder_pruning import HolderPruning, holder_constants, quotients
from models.backbone import Network, Normalise
from models.images import to_float
from models.spec import BadInput, generator
from models.units import select, unit_layers, weight_bounds

ALPHAS = (0.1, 0.3, 0.5, 0.7, 1.0)


def mlp(seed: int = 0, width: int = 6, hidden: tuple[int, ...] = (5,)) -> Network:
    draw = generator(seed, "mlp")
    layers: list[nn.Module] = []
    for inputs, outputs in zip((width, *hidden), (*hidden, 3), strict=True):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    head = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return Network(Normalise([0.0], [1.0]), nn.Flatten(), head).eval()


def samples(seed: int, size: int = 12, width: int = 6):
    draw = generator(seed, "samples")
    return torch.rand((size, width), generator=draw) * 2, torch.randint(0, 3, (size,), generator=draw)


def constants(net, z, y, **settings):
    chosen = {"alpha": 0.5, "radii": (0.2,), "clip": False, "space": "feature", **settings}
    return holder_constants(net, unit_layers(net, Scope.HEAD), [(z, y)], **chosen)


def brute_force(net, z, y, alpha, radii, clip):
    """The 5-unit MLP by hand: gradient of cross-entropy through one ReLU layer, one pair at a time, in float64."""
    w1, b1, w2, b2 = (p.detach().double().numpy() for p in net.head.parameters())
    best = np.zeros(len(w1))
    for a, label in zip(z.double().numpy(), y.tolist(), strict=True):
        u = w1 @ a + b1
        logits = w2 @ np.maximum(u, 0) + b2
        p = np.exp(logits - logits.max())
        p /= p.sum()
        p[label] -= 1
        gradient = w1.T @ ((w2.T @ p) * (u > 0))
        for radius in radii:
            b = a + radius * np.sign(gradient)
            if clip:
                b = np.maximum(b, 0)
            distance = math.sqrt(sum((b - a) ** 2))
            if distance:
                for k in range(len(w1)):
                    change = abs(max(w1[k] @ b + b1[k], 0) - max(u[k], 0))
                    best[k] = max(best[k], change / distance**alpha)
    return best


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("radii", [(0.2,), (0.05, 0.2, 0.8)])
@pytest.mark.parametrize("clip", [False, True])
def test_constants_equal_a_numpy_twin(alpha, radii, clip):
    net, (z, y) = mlp(), samples(1)
    z[:, :2] = 0.0  # on the border of the clipped box
    found = constants(net, z, y, alpha=alpha, radii=radii, clip=clip)["head.0"]
    np.testing.assert_allclose(found.numpy(), brute_force(net, z, y, alpha, radii, clip), rtol=1e-4, atol=1e-6)


def test_pairs_without_distance_count_nothing():
    change, distance = torch.tensor([[3.0, 1.0], [5.0, 0.0]]), torch.tensor([4.0, 0.0])
    assert quotients(change, distance, 0.5).tolist() == [[1.5, 0.5], [0.0, 0.0]]
    net, (z, y) = mlp(), samples(1)
    with torch.no_grad():
        net.head[0].bias.fill_(-100.0)  # dead units, zero gradient, b = a
    assert constants(net, z, y)["head.0"].tolist() == [0.0] * 5


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("rule", ["density", "mean-std", "top-p"])
def test_alpha_cannot_change_what_a_fixed_step_prunes(rule, seed):
    net, (z, y) = mlp(seed, hidden=(40,)), samples(seed, 30)
    policy = HolderPruning(rule=rule, u=1.0).policy
    found = {alpha: constants(net, z, y, alpha=alpha) for alpha in ALPHAS}
    distance = 0.2 * math.sqrt(6)
    for alpha in ALPHAS:
        torch.testing.assert_close(found[alpha]["head.0"], found[1.0]["head.0"] * distance ** (1 - alpha), rtol=1e-5, atol=1e-9)
        assert torch.equal(select(found[alpha], policy)["head.0"], select(found[1.0], policy)["head.0"])
    assert select(found[1.0], policy)["head.0"].any()


def two_ways() -> tuple[Network, torch.Tensor, torch.Tensor]:
    """Unit 0 answers the first feature steeply but is cut short by clipping; unit 1 answers the second one weakly, at full step."""
    net = mlp(hidden=(2,), width=2)
    with torch.no_grad():
        net.head[0].weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        net.head[0].bias.fill_(0.5)
        net.head[2].weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]))
        net.head[2].bias.zero_()
    return net, torch.tensor([[0.01, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])


def test_alpha_matters_where_clipping_makes_distances_vary():
    net, z, y = two_ways()
    ranked = {alpha: constants(net, z, y, alpha=alpha, radii=(0.5,), clip=True)["head.0"] for alpha in (0.1, 1.0)}
    assert ranked[1.0][0] > ranked[1.0][1]
    assert ranked[0.1][0] < ranked[0.1][1]


def test_alpha_matters_over_several_radii():
    """Unit 0 saturates after a short way (a second layer, bent), unit 1 never does: a small alpha prefers the long way."""
    net = mlp(hidden=(3, 2), width=1)
    with torch.no_grad():
        net.head[0].weight.copy_(torch.tensor([[-1.0], [1.0], [0.0]]))
        net.head[0].bias.copy_(torch.tensor([-0.9, 2.0, 0.0]))
        net.head[2].weight.copy_(torch.tensor([[-2.0, 0.0, 0.0], [0.0, 0.6, 0.0]]))
        net.head[2].bias.copy_(torch.tensor([0.2, 0.0]))
        net.head[4].weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]))
        net.head[4].bias.zero_()
    z, y = torch.tensor([[-1.0]]), torch.tensor([1])
    ranked = {a: constants(net, z, y, alpha=a, radii=(0.1, 2.0))["head.2"] for a in (0.1, 1.0)}
    assert ranked[1.0][0] > ranked[1.0][1]
    assert ranked[0.1][0] < ranked[0.1][1]


def test_scaling_a_unit_scales_its_constant():
    net, (z, y) = mlp(), samples(2)
    scaled = copy.deepcopy(net)
    with torch.no_grad():  # unit 3 three times as large, and read a third as strongly: the network is the same function
        scaled.head[0].weight[3] *= 3
        scaled.head[0].bias[3] *= 3
        scaled.head[2].weight[:, 3] /= 3
    expected = constants(net, z, y)["head.0"]
    assert expected[3] > 0
    expected[3] *= 3
    torch.testing.assert_close(constants(scaled, z, y)["head.0"], expected, rtol=1e-5, atol=1e-9)


def test_permuting_units_permutes_their_constants():
    net, (z, y) = mlp(), samples(2)
    order = torch.tensor([4, 2, 0, 1, 3])
    moved = copy.deepcopy(net)
    with torch.no_grad():
        moved.head[0].weight.copy_(net.head[0].weight[order])
        moved.head[0].bias.copy_(net.head[0].bias[order])
        moved.head[2].weight.copy_(net.head[2].weight[:, order])
    expected = constants(net, z, y)["head.0"]
    assert len(expected.unique()) > 3
    torch.testing.assert_close(constants(moved, z, y)["head.0"], expected[order], rtol=1e-5, atol=1e-9)


def test_more_pairs_never_lower_a_constant():
    net, (z, y) = mlp(), samples(3)
    few, many = constants(net, z[:4], y[:4])["head.0"], constants(net, z, y)["head.0"]
    assert (many >= few - 1e-9).all()
    assert (many > few + 1e-6).any()
    batched = holder_constants(
        net, unit_layers(net, Scope.HEAD), [(z[:5], y[:5]), (z[5:], y[5:])], alpha=0.5, radii=(0.2,), clip=False, space="feature"
    )
    torch.testing.assert_close(batched["head.0"], many, rtol=1e-5, atol=1e-9)


def test_at_alpha_one_constants_stay_below_the_weight_bounds():
    net, (z, y) = mlp(hidden=(7, 5)), samples(4)
    found, rows = constants(net, z, y, alpha=1.0, radii=(0.1, 1.0)), weight_bounds(net, unit_layers(net, Scope.HEAD))
    assert all(scores.max() > 0.05 for scores in found.values())
    first = float(torch.linalg.matrix_norm(net.head[0].weight.detach(), 2))
    assert (found["head.0"] <= rows["head.0"].double() * (1 + 1e-5)).all()
    assert (found["head.2"] <= rows["head.2"].double() * first * (1 + 1e-5)).all()


def test_with_weight_bounds_and_alpha_one_it_is_clp(net_of, view_of):
    net = net_of(hidden=64)
    with torch.no_grad():
        net.head[0].weight[5] *= 8
    for u in (1.0, 2.0, 3.0):
        holder = HolderPruning(alpha=1.0, estimator="weight-bound", rule="mean-std", u=u)
        clp = CLP(u=u, grid=())
        mine = next(c for c in holder.candidates(view_of(holder, net, Scope.HEAD)) if c.is_default)
        (theirs,) = clp.candidates(view_of(clp, net, Scope.HEAD))
        assert mine.masks.keys() == theirs.masks.keys() == {"head.0"}
        assert torch.equal(mine.masks["head.0"], theirs.masks["head.0"])
        assert mine.pruned > 0
        for name, value in mine.model.state_dict().items():
            assert torch.equal(value, theirs.model.state_dict()[name])


def test_pixel_constants_equal_a_loop_over_images(net_of, data_of, view_of):
    net, data = net_of(), data_of(3, 6)
    defense = HolderPruning(estimator="pixel-fgsm", alpha=0.7, clip=True)
    found = defense.scores(view_of(defense, net, train=data))
    best = {layer.name: torch.zeros(layer.size) for layer in unit_layers(net)}
    for image, label in zip(to_float(data.images), data.labels, strict=True):
        a = image[None].clone().requires_grad_()
        nn.functional.cross_entropy(net(a), label[None]).backward()
        b = (a + 8 / 255 * a.grad.sign()).clamp(0, 1)
        states = []
        for x in (a, b):  # the layers one after the other, by index
            first = net.features[2](net.features[1](net.features[0](net.normalise(x))))
            second = net.features[5](net.features[4](net.features[3](first)))
            hidden = net.head[1](net.head[0](net.features[7](net.features[6](second))))
            states.append({"features.1": first, "features.4": second, "head.0": hidden})
        for name in best:
            for k in range(len(best[name])):
                change = (states[0][name][0, k] - states[1][name][0, k]).detach().reshape(-1).norm()
                best[name][k] = max(best[name][k], change / (b - a).detach().norm() ** 0.7)
    assert found.keys() == best.keys()
    for name in best:
        torch.testing.assert_close(found[name].float(), best[name], rtol=1e-3, atol=1e-5)


def test_distance_between_embeddings_divides_by_their_change(net_of, data_of, view_of):
    data = data_of(3, 1)
    scores = {}
    for distance in ("input", "feature"):
        defense = HolderPruning(estimator="pixel-fgsm", alpha=1.0, distance=distance)
        scores[distance] = defense.scores(view_of(defense, scope=Scope.HEAD, train=data))["head.0"]
    net = net_of()
    a = to_float(data.images).requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(net(a), data.labels), a)
    b = a + 8 / 255 * gradient.sign()
    ratio = float((b - a).detach().norm() / (net.embed(b) - net.embed(a)).detach().norm())
    torch.testing.assert_close(scores["feature"], scores["input"] * ratio, rtol=1e-3, atol=1e-6)


def test_the_automatic_step_is_a_tenth_of_the_typical_feature(net_of, data_of, view_of):
    net, data = net_of(), data_of(3, 32)
    z = net.embed(to_float(data.images)).detach()
    norms = sorted(z.norm(dim=1).tolist())
    eps = 0.1 * norms[(len(norms) - 1) // 2] / math.sqrt(6)
    automatic, explicit = HolderPruning(), HolderPruning(eps=eps)
    found = automatic.scores(view_of(automatic, net, Scope.HEAD))["head.0"]
    torch.testing.assert_close(found, explicit.scores(view_of(explicit, net, Scope.HEAD))["head.0"], rtol=1e-3, atol=1e-6)


def test_max_pairs_limits_the_samples(view_of):
    few, all_of_them = HolderPruning(max_pairs=3, eps=0.1), HolderPruning(eps=0.1)
    low = few.scores(view_of(few, scope=Scope.HEAD))["head.0"]
    high = all_of_them.scores(view_of(all_of_them, scope=Scope.HEAD))["head.0"]
    assert (low <= high + 1e-6).all()
    assert (low < high - 1e-6).any()


def test_the_dial_is_the_share_really_pruned(net_of, view_of):
    defense = HolderPruning(rule="top-p", share=0.2)
    offered = list(defense.candidates(view_of(defense, net_of(hidden=20), Scope.HEAD)))
    assert [candidate.pruned for candidate in offered] == [0, 1, 2, 4, 6, 10]
    assert [candidate.dial for candidate in offered] == [0, 0.05, 0.1, 0.2, 0.3, 0.5]
    assert [candidate.dial for candidate in offered if candidate.is_default] == [0.2]
    off_grid = HolderPruning(rule="top-p", share=0.4)
    offered = list(off_grid.candidates(view_of(off_grid, net_of(hidden=20), Scope.HEAD)))
    assert [candidate.dial for candidate in offered if candidate.is_default] == [0.4]
    assert len(offered) == 7


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({}, Knowledge.MODEL | Knowledge.TRAIN),
        ({"pairs": "clean"}, Knowledge.MODEL | Knowledge.CLEAN),
        ({"estimator": "weight-bound"}, Knowledge.MODEL),
    ],
)
def test_needs_follow_the_settings(settings, needs, view_of):
    defense = HolderPruning(**settings)
    assert defense.needs == needs
    view = view_of(defense, scope=Scope.HEAD)
    list(defense.candidates(view))
    assert view.used == needs


def test_refusals(net_of, data_of, view_of):
    defense = HolderPruning()
    with pytest.raises(Inapplicable, match="no hidden units"):
        list(defense.candidates(view_of(defense, net_of(hidden=0), Scope.HEAD)))
    with pytest.raises(Inapplicable, match="pixel-fgsm"):
        list(defense.candidates(view_of(defense, scope=Scope.WHOLE)))
    with pytest.raises(Inapplicable, match="'train' is empty"):
        list(defense.candidates(view_of(defense, scope=Scope.HEAD, train=data_of(size=0))))
    behind = HolderPruning(estimator="pixel-fgsm", distance="feature")
    with pytest.raises(Inapplicable, match="distance 'input'"):
        list(behind.candidates(view_of(behind, scope=Scope.WHOLE)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"alpha": 0.0},
        {"alpha": 1.1},
        {"estimator": "fgsm"},
        {"rule": "fixed"},
        {"radii": ()},
        {"distance": "feature"},
        {"eps": 0.0},
    ],
)
def test_settings_out_of_range_are_named(wrong):
    field = {"rule": "threshold"}.get(next(iter(wrong)), next(iter(wrong)))
    with pytest.raises(BadInput, match=f"holder-pruning: {field} = "):
        HolderPruning(**wrong)


def test_the_default_prunes_the_p_units_of_highest_constant(net_of, view_of):
    """Algorithm 2 of the paper, and so never nothing where a layer has five units or more."""
    defense = HolderPruning(pairs="clean", share=0.25)
    assert defense.rule == "top-p"
    scores = defense.scores(view_of(defense, net_of(hidden=8), Scope.HEAD))
    (candidate,) = (c for c in defense.candidates(view_of(defense, net_of(hidden=8), Scope.HEAD)) if c.is_default)
    ((name, mask),) = candidate.masks.items()
    assert sorted(mask.nonzero().flatten().tolist()) == sorted(scores[name].argsort(descending=True)[:2].tolist())
