"""Every architecture of the catalogue: shapes, sizes, traceability, reproducible initialisation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import fx, nn

from models import BACKBONES
from models.backbone import Backbone, Network
from models.spec import BadInput, generator, lookup
from models.units import unit_layers

SHAPES = [(3, 8, 8), (1, 16, 16), (3, 9, 14), (3, 32, 32), (1, 64, 64)]
NAMES = ["resnet8", "resnet9", "resnet20", "resnet18", "preact-resnet18", "wrn16-1", "vgg11-bn", "vgg19-bn", "vgg11"]


def make(name: str, width: int = 2, hidden: int = 4, shape: tuple[int, int, int] = (3, 16, 16), seed: int = 0) -> Network:
    return lookup("backbone", BACKBONES, name)(width=width, hidden=hidden).build(
        5, shape, [0.5] * shape[0], [0.25] * shape[0], seed
    )


def noise(shape: tuple[int, int, int], count: int = 3) -> torch.Tensor:
    return torch.rand(count, *shape, generator=generator("noise", list(shape)))


def test_the_catalogue_is_in_table_order() -> None:
    assert [kind.name for kind in BACKBONES] == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_image_gives_an_embedding_and_logits(name: str, shape: tuple[int, int, int]) -> None:
    net = make(name, shape=shape)
    images = noise(shape)
    z = net.embed(images)
    first = net.head[0]
    assert isinstance(first, nn.Linear)
    assert z.shape == (3, first.in_features)
    assert net(images).shape == (3, 5)
    net(images).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert torch.equal(net.eval()(images), net.head(net.embed(images)))


@pytest.mark.parametrize("name", NAMES)
def test_features_trace_and_the_trace_computes_the_same(name: str) -> None:
    net = make(name).eval()
    images = net.normalise(noise((3, 16, 16)))
    assert torch.equal(fx.symbolic_trace(net.features)(images), net.features(images))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_arguments_build_the_same_weights_whatever_was_drawn_before(name: str) -> None:
    before = torch.random.get_rng_state()
    first = make(name).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.rand(7)
        second, other = make(name).state_dict(), make(name, seed=1).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize(
    ("name", "norms", "channels"),
    [
        ("resnet8", 9, 16 * 3 + 4 * 32 + 4 * 64 - 32 - 64),
        ("resnet18", 20, 4800),
        ("preact-resnet18", 16, 3392),
        ("vgg11-bn", 8, 64 + 128 + 2 * 256 + 4 * 512),
        ("vgg19-bn", 16, 2 * 64 + 2 * 128 + 4 * 256 + 8 * 512),
        ("vgg11", 0, 0),
    ],
)
def test_norms_and_their_channels_at_the_default_width(name: str, norms: int, channels: int) -> None:
    with torch.device("meta"):
        trunk, _ = lookup("backbone", BACKBONES, name)().trunk((3, 32, 32))
    found = [module.num_features for module in trunk.modules() if isinstance(module, nn.BatchNorm2d)]
    assert (len(found), sum(found)) == (norms, channels)


@pytest.mark.parametrize(
    ("name", "parameters"),
    # The literature's counts: He et al. Table 6 gives 0.27M for ResNet-20, kuangliu's zoo 11.17M for both 18-layer networks,
    # Zagoruyko and Komodakis 0.2M for WRN-16-1; VGG with a 512-10 classifier by hand.
    [("resnet20", 0.27e6), ("resnet18", 11.17e6), ("preact-resnet18", 11.17e6), ("wrn16-1", 0.175e6), ("vgg19-bn", 20.04e6)],
)
def test_parameters_as_published(name: str, parameters: float) -> None:
    with torch.device("meta"):
        trunk, width = lookup("backbone", BACKBONES, name)().trunk((3, 32, 32))
    count = sum(parameter.numel() for parameter in trunk.parameters()) + (width + 1) * 10
    assert count == pytest.approx(parameters, rel=0.02)


def test_preact_resnet18_ends_without_a_norm() -> None:
    net = make("preact-resnet18")
    assert [layer.name for layer in unit_layers(net) if layer.kind == "conv"] == ["features.layer4.1.conv2"]
    net.features.get_submodule("layer4.1").register_forward_hook(lambda _module, _inputs, output: -torch.ones_like(output))
    assert (net.embed(noise((3, 16, 16))) == -1).all()


def test_wide_resnet_ends_with_norm_and_relu() -> None:
    z = make("wrn16-1", width=4).embed(noise((3, 16, 16)))
    assert (z >= 0).all()
    assert (z > 0).any()


@pytest.mark.parametrize("name", NAMES)
def test_an_untrained_network_neither_explodes_nor_vanishes(name: str) -> None:
    net = make(name, width=16, hidden=0, shape=(3, 32, 32))
    z = net.embed(noise((3, 32, 32), 8))
    assert 0.03 < z.detach().std() < 30


def test_he_init_has_the_variance_it_promises() -> None:
    conv = make("vgg11", width=32).features.get_submodule("3")
    assert isinstance(conv, nn.Conv2d)
    assert float(conv.weight.detach().std()) == pytest.approx(math.sqrt(2 / (32 * 9)), rel=0.05)
    assert conv.bias is not None
    assert (conv.bias == 0).all()
    conv = make("resnet8", width=32).features.get_submodule("layer2.0.conv1")
    assert isinstance(conv, nn.Conv2d)
    assert float(conv.weight.detach().std()) == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.05)


@pytest.mark.parametrize("kind", BACKBONES)
def test_the_smallest_width_with_a_linear_head(kind: type[Backbone]) -> None:
    net = kind(width=1, hidden=0).build(2, (1, 8, 8), [0.0], [1.0], 0)
    assert len(net.head) == 1
    assert net(noise((1, 8, 8), 2)).shape == (2, 2)


def test_images_are_normalised_inside_the_network() -> None:
    net = make("resnet8").eval()
    images = noise((3, 16, 16))
    assert torch.equal(net.embed(images), net.features((images - 0.5) / 0.25))


def test_sizes_out_of_range_are_refused() -> None:
    with pytest.raises(BadInput, match="resnet8: width = 0 is out of range"):
        lookup("backbone", BACKBONES, "resnet8")(width=0)
    with pytest.raises(BadInput, match="vgg11: hidden = -1 is out of range"):
        lookup("backbone", BACKBONES, "vgg11")(hidden=-1)
    with pytest.raises(BadInput, match="did you mean 'preact-resnet18'"):
        lookup("backbone", BACKBONES, "preactresnet18")


@pytest.mark.parametrize("name", NAMES)
def test_no_strided_1x1_conv_whose_gradient_corrupts_memory(name: str) -> None:
    convs = [module for module in make(name).modules() if isinstance(module, nn.Conv2d)]
    assert all(conv.stride == (1, 1) or conv.kernel_size != (1, 1) for conv in convs)


def test_the_sliced_shortcut_is_the_strided_conv() -> None:
    net = make("resnet8", width=8, shape=(3, 9, 14))
    conv = net.features.get_submodule("layer2.0.shortcut.0")
    assert isinstance(conv, nn.Conv2d)
    x = torch.rand(2, 8, 9, 14, generator=generator("shortcut"))
    expected = nn.functional.conv2d(x, conv.weight, stride=2)
    assert expected.shape == (2, 16, 5, 7)
    assert torch.allclose(conv(x), expected, atol=1e-6)
