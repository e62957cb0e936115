from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn.functional import interpolate

from models.classifier import Classifier
from models.cost import metered
from models.extractors import EXTRACTORS, Pretrained, SelfSupervised, Supervised, embeddings, fit_head, mlp
from models.images import ImageSet, to_float
from models.recipe import Recipe
from models.simclr import SimCLR
from models.spec import BadInput, canonical, derive_seed, generator
from models.training import fit, seeded
from models.vgg import VGG11BN
from models.weights import save_weights

RECIPE = Recipe(epochs=2, batch=8, crop=1)


def data_of(channels: int = 3, size: int = 16, seed: int = 0) -> ImageSet:
    images = torch.randint(0, 256, (size, channels, 8, 8), generator=generator(seed, "images"))
    return ImageSet(images.to(torch.uint8), torch.arange(size) % 4, 4)


def fresh(seed: int):
    return VGG11BN(width=2, hidden=6).build(4, (3, 8, 8), [0.5] * 3, [0.25] * 3, seed)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Tiny(nn.Module):
    """A stand-in for a large architecture: a conv trunk and a linear classifier, the names of torchvision's resnets."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3, stride=2)
        self.fc = nn.Linear(5, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.conv1(x)).mean((2, 3)))


class Headless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3)


@pytest.fixture
def timm(monkeypatch):
    """A module that answers to timm's three calls."""
    models = {"tiny": Tiny, "headless": Headless}
    stand_in = types.SimpleNamespace(list_models=lambda: list(models), create_model=lambda name: models[name]())
    monkeypatch.setitem(sys.modules, "timm", stand_in)


@pytest.fixture
def weights(tmp_path):
    with seeded(3):
        net = Tiny(7)
    path = tmp_path / "tiny.safetensors"
    save_weights(net, path)
    return net, path


def test_supervised_is_the_plain_training_and_charges_it():
    data = data_of()
    built = Supervised().build(fresh, data, RECIPE, 5)
    twin = fit(
        Classifier(fresh(derive_seed(5, "supervised", "weights")), RECIPE), data, RECIPE, derive_seed(5, "supervised", "batches")
    )
    assert same(built.net, twin.net)
    assert (built.samples_forward, built.samples_backward) == (32, 32)
    assert Supervised(epochs=1).build(fresh, data, RECIPE, 5).samples_forward == 16
    assert Supervised().reads == "clean"
    assert not built.net.training


def test_pretrained_features_are_resize_normalise_trunk(timm, weights):
    net, path = weights
    built = Pretrained(str(path), model="tiny", library="timm", size=16).build(fresh, data_of(), RECIPE, 0)
    images = to_float(data_of().images)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    large = interpolate((images - mean) / std, (16, 16), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = torch.relu(net.conv1(large)).mean((2, 3))
        torch.testing.assert_close(built.net.embed(images), expected)
        assert built.net(images).shape == (16, 4)
    assert (built.samples_forward, built.samples_backward) == (0, 0)
    assert not built.net.training


def test_a_grey_image_is_shown_as_three_equal_channels(timm, weights):
    built = Pretrained(str(weights[1]), model="tiny", library="timm", size=8).build(fresh, data_of(1), RECIPE, 0)
    grey = to_float(data_of(1).images)
    with torch.no_grad():
        torch.testing.assert_close(built.net.embed(grey), built.net.embed(grey.expand(-1, 3, -1, -1)))
    with pytest.raises(BadInput, match="2 channels"):
        Pretrained(str(weights[1]), model="tiny", library="timm").build(fresh, data_of(2), RECIPE, 0)


def test_a_real_architecture_of_torchvision(tmp_path):
    with seeded(0):
        net = torchvision.models.resnet18(num_classes=3)
    path = tmp_path / "resnet18.safetensors"
    save_weights(net, path)
    built = Pretrained(str(path), size=32).build(fresh, data_of(size=2), RECIPE, 0)
    assert embeddings(built.net, data_of(size=2)).shape == (2, 512)


def test_the_content_of_the_file_is_the_setting_not_its_place(weights, tmp_path):
    one = Pretrained(str(weights[1]), model="tiny", library="timm")
    copied = tmp_path / "elsewhere.bin"
    copied.write_bytes(weights[1].read_bytes())
    other = Pretrained(str(copied), model="tiny", library="timm")
    assert one.spec() == other.spec()
    assert str(tmp_path) not in canonical(one)
    with seeded(4):
        save_weights(Tiny(7), copied)
    assert one.spec() != Pretrained(str(copied), model="tiny", library="timm").spec()
    assert one.reads == "nothing"


def test_what_is_missing_is_named(timm, weights, tmp_path, monkeypatch):
    path = weights[1]
    with pytest.raises(BadInput, match=r"tiny\.safetensor'.*No such file.*did you mean 'tiny\.safetensors'"):
        Pretrained(str(tmp_path / "tiny.safetensor"))
    with pytest.raises(BadInput, match="no model 'tyni'; did you mean 'tiny'"):
        Pretrained(str(path), model="tyni", library="timm").build(fresh, data_of(), RECIPE, 0)
    with pytest.raises(BadInput, match="headless has no linear classifier"):
        Pretrained(str(path), model="headless", library="timm").build(fresh, data_of(), RECIPE, 0)
    with pytest.raises(BadInput, match=r"'conv1[.]weight' is 5 x 3 x 3 x 3, but the network's is 64 x 3 x 7 x 7"):
        Pretrained(str(path), model="resnet18").build(fresh, data_of(), RECIPE, 0)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(BadInput, match="'timm' is not installed"):
        Pretrained(str(path), model="tiny", library="timm").build(fresh, data_of(), RECIPE, 0)


@pytest.mark.parametrize("wrong", [{"library": "keras"}, {"size": 4}, {"mean": (0.5,)}, {"std": (0.1, 0.0, 0.1)}])
def test_settings_of_the_pretrained_out_of_range_are_named(wrong, weights):
    with pytest.raises(BadInput, match=f"pretrained: {next(iter(wrong))}"):
        Pretrained(str(weights[1]), **wrong)


def test_epochs_of_the_supervised_are_checked():
    with pytest.raises(BadInput, match="supervised: epochs"):
        Supervised(epochs=-1)


def test_embeddings_are_those_of_evaluation_mode_and_are_tallied():
    net, data = fresh(0).train(), data_of()
    with metered() as cost:
        z = embeddings(net, data)
    assert net.training
    net.eval()
    with torch.no_grad():
        torch.testing.assert_close(z, net.embed(to_float(data.images)))
    assert (cost.forward, cost.backward) == (16, 0)


def test_a_head_is_the_same_from_the_same_seed_and_has_the_layers_asked_for():
    head = mlp(6, (5, 4), 3, 1)
    assert [(m.in_features, m.out_features) for m in head if isinstance(m, nn.Linear)] == [(6, 5), (5, 4), (4, 3)]
    assert [type(m) for m in head] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    before = torch.random.get_rng_state()
    assert same(head, mlp(6, (5, 4), 3, 1))
    assert not torch.equal(head[0].weight, mlp(6, (5, 4), 3, 2)[0].weight)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_trained_head_separates_what_can_be_separated_and_sees_every_sample():
    draw = generator(0, "clusters")
    labels = torch.arange(40) % 4
    z = 3 * torch.eye(4)[labels] + 0.1 * torch.randn(40, 4, generator=draw)
    seen = []

    def loss(logits, given):
        seen.append(len(given))
        return torch.nn.functional.cross_entropy(logits, given)

    head = fit_head(mlp(4, (8,), 4, 0), z, labels, epochs=60, lr=0.05, batch=16, seed=0, loss=loss)
    with torch.no_grad():
        assert (head(z).argmax(1) == labels).all()
    assert seen[:3] == [16, 16, 8]
    assert not head.training
    again = fit_head(mlp(4, (8,), 4, 0), z, labels, epochs=60, lr=0.05, batch=16, seed=0)
    np.testing.assert_array_equal(head[0].weight.detach(), again[0].weight.detach())


def test_self_supervised_looks_at_no_label_leaves_the_head_and_is_the_training_of_its_settings():
    data = data_of()
    method = SelfSupervised(epochs=2, batch=8, lr=3.2, temperature=0.3, blur=0.25, symmetric=True)
    built = method.build(fresh, data, RECIPE, 3)
    other = method.build(fresh, ImageSet(data.images, data.labels.flip(0), 4), RECIPE, 3)
    twin = fresh(derive_seed(3, "self-supervised", "weights"))
    assert same(built.net, other.net)
    assert same(built.net.head, twin.head)
    assert not same(built.net.features, twin.features)
    assert (built.samples_forward, built.samples_backward) == (2 * 32, 2 * 32)
    recipe = Recipe(epochs=2, batch=8, lr=0.05, weight_decay=1e-4, crop=0, flip=False)
    settings = {"temperature": 0.3, "flip": True, "blur": 0.25, "symmetric": True}
    module = SimCLR(twin, recipe, width=16, seed=derive_seed(3, "self-supervised", "views"), **settings)
    fit(module, data, recipe, derive_seed(3, "self-supervised", "batches"))
    assert same(built.net, twin)


def test_origins_say_what_they_read():
    assert [kind.name for kind in EXTRACTORS] == ["self-supervised", "supervised", "pretrained"]
    assert SelfSupervised().reads == "poisoned"
    assert SelfSupervised(on="clean").reads == "clean"


@pytest.mark.parametrize(
    "wrong",
    [{"on": "test"}, {"epochs": -1}, {"batch": 1}, {"lr": 11.0}, {"temperature": 0.0}, {"weight_decay": 2.0}, {"blur": 1.5}],
)
def test_settings_of_the_self_supervised_out_of_range_are_named(wrong):
    with pytest.raises(BadInput, match=f"self-supervised: {next(iter(wrong))}"):
        SelfSupervised(**wrong)
