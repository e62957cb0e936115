"""Where stages end, on every network of the catalogue, against running the features module by module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models import BACKBONES
from models.cost import Cost, metered
from models.resnet import WRN16, PreActResNet18, ResNet8, ResNet9
from models.spec import generator
from models.stages import maps, stages
from models.vgg import VGG11, VGG11BN


def built(backbone, side=32):
    return backbone.build(4, (3, side, side), [0.5] * 3, [0.25] * 3, 3).eval()


def images(side=32):
    return torch.rand((2, 3, side, side), generator=generator(0, "stages"))


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        (ResNet8(width=2), ["layer1.0", "layer2.0", "layer3.0"]),
        (PreActResNet18(width=2), ["layer1.1", "layer2.1", "layer3.1", "layer4.1"]),
        (WRN16(width=2), ["layer1.1", "layer2.1", "last.1"]),
        (ResNet9(width=2), ["5", "10", "14", "16"]),
        (VGG11BN(width=2), ["2", "6", "13", "20", "27"]),
        (VGG11(width=2), ["1", "4", "9", "14", "19"]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_stages_of_known_networks(backbone, expected):
    assert [path.removeprefix("features.") for path in stages(built(backbone), (3, 32, 32))] == expected


@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda kind: kind.name)
def test_maps_equal_those_of_running_module_by_module(backbone):
    net = built(backbone(width=2))
    paths = stages(net, (3, 32, 32))
    with torch.no_grad(), maps(net, paths) as seen:
        logits = net(images())
        x, by_size = net.normalise(images()), {}
        for module in net.features.children():
            x = module(x)
            if x.ndim == 4:
                by_size[x.shape[2:]] = x
    twin = [value for size, value in by_size.items() if size.numel() > 1]
    assert len(paths) == len(twin) >= 3
    assert all(torch.equal(seen[path], value) for path, value in zip(paths, twin, strict=True))
    assert torch.equal(logits, net.head(x))


def test_finding_them_leaves_no_trace():
    net = built(ResNet8(width=2)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with metered() as cost:
        paths = stages(net, (3, 32, 32))
        with maps(net, paths):
            pass
    assert cost == Cost()
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


def test_maps_of_one_position_are_left_out_and_other_networks_may_have_none():
    assert len(stages(built(VGG11BN(width=2), 16), (3, 16, 16))) == 4
    net = built(ResNet8(width=2))
    net.features = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert stages(net, (3, 32, 32)) == ()
