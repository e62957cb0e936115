"""Networks of torchvision and timm: they compute what the library's module does, and what is pruned has no path to the logits."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from models.backbone import Network, Normalise
from models.bounded import relus
from models.foreign import Adapted, Library, adapt, library_model
from models.spec import BadInput
from models.units import Scope, UnitLayer, Writer, capture, prune, unit_layers, weight_bounds

TORCHVISION = [
    "resnet18", "resnext50_32x4d", "densenet121", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5",
    "efficientnet_b0", "regnet_x_400mf", "regnet_y_400mf", "googlenet", "alexnet",
]  # fmt: skip
TIMM = ["resnet18d", "resnet10t", "seresnet18", "regnetx_002", "mobilenetv3_small_050", "ghostnet_050", "repvgg_a0", "densenet121"]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)

NAMES = [f"torchvision:{name}" for name in TORCHVISION]
if importlib.util.find_spec("timm"):
    NAMES += [f"timm:{name}" for name in TIMM]


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=NAMES)
def known(request: pytest.FixtureRequest) -> tuple[Adapted, Tensor, list[str]]:
    """A network, the logits of the library's own module for :func:`images`, and the module's tensors."""
    torch.default_generator.manual_seed(1)
    module = library_model(request.param, 5).eval()
    normalise = Normalise(MEAN, STD)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):  # as drawn, they do nothing: no pair could be told from another
                part.weight.uniform_(0.5, 1.5)
                part.bias.uniform_(-0.5, 0.5)
                assert part.running_mean is not None
                part.running_mean.uniform_(-0.1, 0.1)
        logits = module(normalise(images()))
    return adapt(module, normalise, request.param), logits, list(module.state_dict())


def outputs(net: Network, layers: tuple[UnitLayer, ...]) -> dict[str, Tensor]:
    with torch.no_grad(), capture(net, layers, "output") as seen:
        net(images())
    return dict(seen)


def test_it_computes_the_very_same_logits(known: tuple[Adapted, Tensor, list[str]]) -> None:
    found, logits, _ = known
    with torch.no_grad():
        assert torch.equal(found.net(images()), logits)
        assert torch.equal(found.net.head(found.net.embed(images())), logits)


def test_every_tensor_has_the_name_it_had(known: tuple[Adapted, Tensor, list[str]]) -> None:
    found, _, own = known
    assert sorted([*found.names.values(), *found.unused]) == sorted(own)
    assert {name.split(".")[0] for name in set(found.net.state_dict()) - set(found.names)} == {"normalise"}


def test_every_relu_is_a_module_of_its_own(known: tuple[Adapted, Tensor, list[str]]) -> None:
    found, _, _ = known
    places = relus(found.net)
    assert len(set(places)) == len(places)
    assert not any(getattr(part, "inplace", False) for part in found.net.modules())


def test_a_masked_unit_has_no_path_to_the_logits_and_its_neighbours_are_as_before(known: tuple[Adapted, Tensor, list[str]]) -> None:
    found, _, _ = known
    layers = unit_layers(found.net, Scope.WHOLE)
    assert layers
    for layer in (layers[0], layers[len(layers) // 2], layers[-1]):
        mask = torch.zeros(layer.size, dtype=torch.bool)
        mask[:: max(2, layer.size // 3)] = True
        pruned = prune(found.net, {layer.name: mask}, Writer.GAMMA_BETA)
        before, after = outputs(found.net, (layer,))[layer.name], outputs(pruned, (layer,))[layer.name]
        assert not after[:, mask].any()
        assert torch.equal(after[:, ~mask], before[:, ~mask])
        with torch.no_grad():
            logits = pruned(images())
            _disturb(pruned, layer, mask)
            assert torch.equal(pruned(images()), logits), layer.name
            _disturb(found.net, layer, mask)
            moved = outputs(found.net, (layer,))[layer.name]
            _disturb(found.net, layer, mask, back=True)
        assert not torch.equal(moved[:, mask], before[:, mask]), f"{layer.name}: nothing was disturbed"


def _disturb(net: Network, layer: UnitLayer, mask: Tensor, *, back: bool = False) -> None:
    """Changes what a norm's units read; a conv's or linear layer's units are their own rows, of which pruning leaves nothing."""
    module = net.get_submodule(layer.name)
    if isinstance(module, nn.BatchNorm2d):
        assert module.running_mean is not None
        module.running_mean[mask] += -1.0 if back else 1.0
    else:
        assert isinstance(module, (nn.Conv2d, nn.Linear))
        module.weight[mask] *= 0.5 if back else 2.0


def test_the_convs_that_a_norm_reads_are_found(known: tuple[Adapted, Tensor, list[str]]) -> None:
    """Doubling one filter of a norm's only writer changes that channel of what the norm reads, and no other."""
    found, _, _ = known
    paired = [layer for layer in unit_layers(found.net) if layer.kind == "norm" and len(layer.writers) == 1]
    for layer in paired[:: max(1, len(paired) // 4)]:
        writer = found.net.get_submodule(layer.writers[0])
        assert isinstance(writer, nn.Conv2d)
        with torch.no_grad(), capture(found.net, (layer,), "input") as seen:
            found.net(images())
            before = seen[layer.name].clone()
            writer.weight[0] *= 2
            found.net(images())
            after = seen[layer.name].clone()
            writer.weight[0] *= 0.5
        assert torch.equal(after[:, 1:], before[:, 1:])
        assert torch.allclose(after[:, 0], 2 * before[:, 0], atol=1e-5) or writer.bias is not None
    bounds = weight_bounds(found.net, paired)
    assert all(bool((bound > 0).all()) for bound in bounds.values())


# -- what it refuses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torchvision:resnet17", "torchvision has no classifier 'resnet17'; did you mean 'resnet18'?"),
        ("torchvison:resnet18", "unknown library 'torchvison' in 'torchvison:resnet18'; did you mean 'torchvision'?"),
        ("torchvision:fasterrcnn_resnet50_fpn", "torchvision has no classifier 'fasterrcnn_resnet50_fpn'"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name: str, words: str) -> None:
    with pytest.raises(BadInput, match="^" + words.replace("?", r"\?")):
        library_model(name, 5)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), Odd())
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.stem(x).mean((2, 3)))
        return logits


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x if x.sum() > 0 else -x


class Twice(nn.Module):
    """One ReLU for two places, functions in place, and an addition that would overwrite what a norm gave."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.second, self.fc = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = out = self.norm(self.conv(x))
        out = self.relu(out) + 0.0
        out = self.second(out).relu_()
        out += x
        logits: Tensor = self.fc(nn.functional.relu(self.relu(out), inplace=True).mean((2, 3)))
        return logits


def two(_: object = None) -> nn.Module:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.fc(x.mean((2, 3))), x

    return Two()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Branching, r"mine: its module 'stem\.1' cannot be traced by torch\.fx, so its units cannot be found: symbolically traced"),
        (lambda: library_model("torchvision:squeezenet1_1", 5), "mine: its logits come from the operation 'flatten', not"),
        (two, "mine: returns a tuple, not one tensor of logits"),
        (lambda: nn.Sequential(nn.Conv2d(3, 5, 1), nn.Flatten()), r"mine: its logits come from '1' \(Flatten\), not from a"),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name_with_the_reason(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(BadInput, match="^" + words):
        adapt(make(), Normalise(MEAN, STD), "mine")


def test_images_that_a_network_cannot_read_are_refused() -> None:
    with pytest.raises(BadInput, match=r"^torchvision:alexnet: cannot read images of 3 x 8 x 8: "):
        Library(model="torchvision:alexnet").build(5, (3, 8, 8), MEAN, STD, 0)
    with pytest.raises(BadInput, match=r"^torchvision:resnet18 reads images of three channels, these have 1$"):
        Library().build(5, (1, 32, 32), MEAN[:1], STD[:1], 0)


def test_shared_relus_and_steps_in_place_are_taken_apart() -> None:
    torch.default_generator.manual_seed(0)
    module = Twice().eval()
    with torch.no_grad():
        logits = module(Normalise(MEAN, STD)(images()))
    found = adapt(module, Normalise(MEAN, STD))
    with torch.no_grad():
        assert torch.equal(found.net(images()), logits)
    assert len(relus(found.net)) == 4
    (norm,) = (layer for layer in unit_layers(found.net) if layer.kind == "norm")
    alone = nn.Sequential(found.net.normalise, module.conv, module.norm)
    with torch.no_grad():
        assert torch.equal(outputs(found.net, (norm,))[norm.name], alone(images())), "a later step wrote into what the norm gave"


# -- as an architecture --------------------------------------------------------------------------------------------------------


def test_the_stem_for_small_images_is_read_from_the_weights() -> None:
    plain = library_model("torchvision:resnet18", 5).state_dict()
    assert Library.of("torchvision:resnet18", plain) == Library()
    assert Library.of("torchvision:resnet18", plain | {"conv1.weight": torch.zeros(64, 3, 3, 3)}).stem == "small images"
    small = Library(stem="small images").build(5, (3, 32, 32), MEAN, STD, 0)
    with torch.no_grad():
        maps = {}
        small.features.get_submodule("layer1.0.conv1").register_forward_hook(lambda _m, x, _y: maps.update(x=x[0]))
        small(images()[:, :, :32, :32])
    assert maps["x"].shape[2:] == (32, 32)
    with pytest.raises(BadInput, match=r"^torchvision:mobilenet_v2: has no stem"):
        Library(model="torchvision:mobilenet_v2", stem="small images").build(5, (3, 32, 32), MEAN, STD, 0)


def test_the_same_seed_gives_the_same_weights_and_leaves_the_generator_alone() -> None:
    torch.default_generator.manual_seed(3)
    first = Library().build(5, (3, 32, 32), MEAN, STD, 7)
    drawn = torch.rand(1)
    second = Library().build(5, (3, 32, 32), MEAN, STD, 7)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    torch.default_generator.manual_seed(3)
    assert torch.equal(torch.rand(1), drawn)
