"""Tiny networks, data and views for the tests of the defenses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from defenses.base import DefenderView, Defense, Knowledge, Scope
from models.backbone import Network, Normalise
from models.images import ImageSet
from models.recipe import Recipe
from models.spec import generator

ALL = Knowledge.MODEL | Knowledge.CLEAN | Knowledge.TRAIN | Knowledge.EXTRACTOR | Knowledge.ROLES


def make_net(seed: int = 0, hidden: int = 10, norm: bool = True) -> Network:
    """conv-norm-ReLU twice and an MLP head, with norms that look trained; ``norm=False`` leaves plain convs with biases."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 4), (4, 6)):
        layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=not norm))
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()] if norm else [nn.ReLU()]
    features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, 4)) if hidden else nn.Sequential(nn.Linear(6, 4))
    net = Network(Normalise([0.5] * 3, [0.25] * 3), features, head)
    draw = generator(seed, "tiny")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.4)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.rand(module.num_features, generator=draw) + 0.5)
                module.running_mean.copy_(torch.randn(module.num_features, generator=draw) * 0.1)
                module.running_var.copy_(torch.rand(module.num_features, generator=draw) + 0.5)
    return net.eval()


def make_data(seed: int = 0, size: int = 24) -> ImageSet:
    draw = generator(seed, "data")
    labels = torch.arange(size) % 4
    images = torch.randint(0, 120, (size, 3, 8, 8), generator=draw) + 30 * labels.view(-1, 1, 1, 1)
    return ImageSet(images.to(torch.uint8), labels, 4)


def make_view(
    defense: Defense,
    net: Network | None = None,
    scope: Scope = Scope.WHOLE,
    granted: Knowledge = ALL,
    seed: int = 3,
    validation: ImageSet | None = None,
    clean: ImageSet | None = None,
    train: ImageSet | None = None,
    recipe: Recipe | None = None,
) -> DefenderView:
    victim = make_net() if net is None else net
    parts = make_data(1) if clean is None else clean, make_data(2, 12) if validation is None else validation
    poisoned = make_data(3, 32) if train is None else train
    sources = {
        Knowledge.MODEL: lambda: victim,
        Knowledge.CLEAN: lambda: parts,
        Knowledge.TRAIN: lambda: poisoned,
        Knowledge.EXTRACTOR: lambda: victim,
        Knowledge.ROLES: lambda: make_data(4, 32),
    }
    return DefenderView(
        granted=granted, declared=defense.needs, sources=sources, fresh=make_net, num_classes=4, seed=seed, scope=scope,
        recipe=recipe or Recipe(epochs=1, batch=8, crop=1),
    )  # fmt: skip


@pytest.fixture
def net_of() -> Callable[..., Network]:
    return make_net


@pytest.fixture
def data_of() -> Callable[..., ImageSet]:
    return make_data


@pytest.fixture
def view_of() -> Callable[..., DefenderView]:
    return make_view
