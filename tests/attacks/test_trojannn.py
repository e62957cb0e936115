from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from attacks.base import Plan, apply
from attacks.trojannn import TrojanNN, connected, place, search
from models.backbone import Network, Normalise
from models.images import ImageSet, to_float
from models.spec import BadInput, generator


def network(features: nn.Module, width: int, channels: int, hidden: int = 0, seed: int = 2) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in features.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.reset_parameters()
        layers = [nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 4)] if hidden else [nn.Linear(width, 4)]
        head = nn.Sequential(*layers)
    return Network(Normalise([0.4] * channels, [0.2] * channels), features, head)


def linear(shape: tuple[int, int, int], width: int = 6) -> Network:
    """Embedding = E (x - 0.4) / 0.2 + e."""
    return network(nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), width)), width, shape[0]).eval()


def convolutional(channels: int = 3) -> Network:
    features = nn.Sequential(
        nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Softplus(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return network(features, 6, channels, hidden=5)


def pictures(shape: tuple[int, int, int], count: int = 4) -> ImageSet:
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    return ImageSet(images, torch.zeros(count, dtype=torch.int64), 4)


def patch_by_hand(
    net: Network, start: np.ndarray, top: int, left: int, shape: tuple[int, int, int], neurons: list[int], attack: TrojanNN
) -> np.ndarray:
    """For :func:`linear`: the gradient by its formula, Adam and its rate by theirs."""
    layer = net.features[1]  # type: ignore[index]
    weight, bias = (value.detach().double().numpy() for value in (layer.weight, layer.bias))
    z, first, second = start.astype(np.float64), np.zeros(start.shape), np.zeros(start.shape)
    side = start.shape[1]
    for step in range(attack.steps):
        image = np.zeros(shape)
        image[:, top : top + side, left : left + side] = (np.tanh(z) + 1) / 2
        gradient = np.zeros(start.shape)
        for neuron in neurons:
            active = weight[neuron] @ ((image - 0.4) / 0.2).ravel() + bias[neuron]
            share = weight[neuron].reshape(shape)[:, top : top + side, left : left + side] / 0.2 * (1 - np.tanh(z) ** 2) / 2
            gradient += -2 * (attack.value - abs(active)) * np.sign(active) * share
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        rate = attack.lr * (1 + math.cos(math.pi * step / attack.steps)) / 2
        z = z - rate * (first / (1 - 0.9 ** (step + 1))) / (np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8)
    return (np.tanh(z) + 1) / 2


def test_the_best_connected_neurons_are_found() -> None:
    net = convolutional()
    layer = net.head[0]
    assert isinstance(layer, nn.Linear)
    sums = {i: sum(abs(layer.weight[k, i].item()) for k in range(5)) for i in range(6)}
    ranked = sorted(sums, key=lambda i: -sums[i])
    assert connected(net, 3).tolist() == ranked[:3]
    assert connected(net, 100).tolist() == ranked


@pytest.mark.parametrize(
    ("size", "margin", "height", "width", "rows", "columns"),
    [
        (8, 3, 32, 32, (21, 29), (21, 29)),
        (8, 3, 16, 16, (10, 14), (10, 14)),
        (8, 3, 64, 64, (42, 58), (42, 58)),
        (8, 3, 24, 40, (16, 22), (32, 38)),
        (8, 3, 8, 8, (5, 7), (5, 7)),
        (1, 0, 8, 9, (7, 8), (8, 9)),
    ],
)
def test_the_square_stands_where_it_should(size, margin, height, width, rows, columns) -> None:
    left, right, top, bottom = place(size, margin, height, width)
    assert (top, height - bottom) == rows
    assert (left, width - right) == columns


def test_the_patch_equals_the_formula_on_a_linear_network() -> None:
    shape, attack = (3, 8, 12), TrojanNN(value=7.0, steps=25)
    data, net = pictures(shape), linear(shape)
    start = torch.randn(3, 2, 2, generator=generator(5, "trojannn-patch")).numpy()
    head = net.head[0]
    assert isinstance(head, nn.Linear)
    neurons = np.argsort(-head.weight.detach().abs().sum(0).numpy())[:2].tolist()
    values = patch_by_hand(net, start, 5, 9, shape, neurons, attack)
    crafted = attack.craft(data, Plan(), 5, net)
    expected = data.images.double().numpy() / 255
    expected[:, :, 5:7, 9:11] = values
    for trigger in (crafted.train, crafted.test):
        assert np.allclose(trigger(to_float(data.images), torch.arange(4)), expected, atol=1e-4)


def test_a_step_goes_against_the_finite_difference() -> None:
    """Adam's first step has length lr in every coordinate, whatever the gradient's size."""
    net, around = convolutional().double().eval().requires_grad_(False), (4, 1, 4, 1)
    start = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    neurons = connected(net, 2)

    def loss(z: torch.Tensor) -> float:
        image = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
        image[0, :, 4:7, 4:7] = (torch.tanh(z) + 1) / 2
        return float(((3.0 - net.embed(image)[0, neurons].abs()) ** 2).sum())

    moved = torch.atanh(search(net, start, around, neurons, 3.0, 0.01, 1) * 2 - 1) - start
    for pixel in np.ndindex(3, 3, 3):
        up, down = start.clone(), start.clone()
        up[pixel] += 1e-4
        down[pixel] -= 1e-4
        assert float(moved[pixel]) == pytest.approx(-0.01 * np.sign(loss(up) - loss(down)), rel=1e-3)


def test_the_patch_excites_its_neurons_more_than_noise_does() -> None:
    net, data = convolutional().eval(), ImageSet(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), 4)
    neurons, black = connected(net, 2), to_float(data.images)

    def reached(steps: int) -> float:
        trigger = TrojanNN(steps=steps).craft(data, Plan(), 0, net).test
        with torch.no_grad():
            return float(net.embed(trigger(black, torch.arange(1)))[0, neurons].abs().sum())

    assert reached(100) > reached(10) > reached(0)


def test_only_the_square_changes_and_it_is_the_same_everywhere() -> None:
    data = pictures((3, 32, 32))
    shown = apply(TrojanNN(steps=3).craft(data, Plan(), 0, convolutional()).test, data.images, torch.arange(4))
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[21:29, 21:29] = True
    assert torch.equal(shown[:, :, ~inside], data.images[:, :, ~inside])
    assert all(torch.equal(one[:, inside], shown[0][:, inside]) for one in shown)
    assert float(inside.double().mean()) == 0.0625


def test_another_seed_starts_from_other_noise() -> None:
    data, net = pictures((1, 16, 16)), convolutional(1)
    one, other = (TrojanNN(steps=1).craft(data, Plan(), seed, net).test(to_float(data.images), torch.arange(4)) for seed in (0, 1))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("training", [True, False])
def test_the_surrogate_is_left_as_it_was(training) -> None:
    net = convolutional().train(training)
    before = copy.deepcopy(net.state_dict())
    TrojanNN(steps=2).craft(pictures((3, 16, 16)), Plan(), 0, net)
    assert net.training is training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_it_needs_a_surrogate() -> None:
    with pytest.raises(BadInput, match=r"trojannn: .* none was given"):
        TrojanNN().craft(pictures((1, 8, 8)), Plan(), 0)


def test_a_square_that_does_not_fit_is_refused() -> None:
    with pytest.raises(BadInput, match=r"trojannn: size .* 11 pixels do not fit images of 9 x 40"):
        place(32, 8, 9, 40)


@pytest.mark.parametrize(
    "settings", [{"size": 0}, {"margin": 32}, {"neurons": 0}, {"value": 0}, {"lr": 0}, {"steps": -1}]
)
def test_settings_out_of_range_are_named(settings) -> None:
    with pytest.raises(BadInput, match=f"trojannn: {next(iter(settings))} = "):
        TrojanNN(**settings)
