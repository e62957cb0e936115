"""Prunable units: pairing of norms and convs, scores, threshold rules, and what pruning writes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models import BACKBONES
from models.backbone import Network
from models.resnet import ResNet8
from models.spec import generator, lookup
from models.units import (
    EMBEDDING,
    Masks,
    Scope,
    Writer,
    capture,
    density_valley,
    embedding_layer,
    fixed,
    hold,
    largest_within,
    mean_std,
    prune,
    select,
    top_share,
    unit_layers,
    weight_bounds,
)  # fmt: skip


def make(name: str, width: int = 3, hidden: int = 6) -> Network:
    """A network whose norms look trained: gamma, beta and running variance all differ by channel and some gamma are negative."""
    net = lookup("backbone", BACKBONES, name)(width=width, hidden=hidden).build(4, (3, 16, 16), [0.5] * 3, [0.25] * 3, 0)
    draw = generator("norms", name)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_var is not None
            assert module.running_mean is not None
            with torch.no_grad():
                module.weight.copy_(torch.randn(module.num_features, generator=draw))
                module.bias.copy_(torch.randn(module.num_features, generator=draw))
                module.running_var.copy_(torch.rand(module.num_features, generator=draw) + 0.1)
                module.running_mean.copy_(torch.randn(module.num_features, generator=draw))
    return net.eval()


def noise(count: int = 4) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=generator("unit-noise"))


# -- which convs a norm normalises ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "resnet18", "vgg11-bn", "vgg19-bn"])
def test_in_conv_norm_networks_each_norm_follows_one_conv_and_both_conventions_agree(name: str) -> None:
    net = make(name)
    layers = unit_layers(net)
    assert layers == unit_layers(net, pairing="registration")
    norms = [layer for layer in layers if layer.kind == "norm"]
    assert all(len(layer.writers) == 1 for layer in norms)
    convs = [f"features.{path}" for path, module in net.features.named_modules() if isinstance(module, nn.Conv2d)]
    assert [layer.writers[0] for layer in norms] == convs


PREACT_WRITERS = {
    "layer1.0.bn1": ["conv1"],
    "layer1.0.bn2": ["layer1.0.conv1"],
    "layer1.1.bn1": ["conv1", "layer1.0.conv2"],
    "layer1.1.bn2": ["layer1.1.conv1"],
    "layer2.0.bn1": ["conv1", "layer1.0.conv2", "layer1.1.conv2"],
    "layer2.0.bn2": ["layer2.0.conv1"],
    "layer2.1.bn1": ["layer2.0.conv2", "layer2.0.shortcut"],
    "layer2.1.bn2": ["layer2.1.conv1"],
    "layer3.0.bn1": ["layer2.0.conv2", "layer2.0.shortcut", "layer2.1.conv2"],
    "layer3.0.bn2": ["layer3.0.conv1"],
    "layer3.1.bn1": ["layer3.0.conv2", "layer3.0.shortcut"],
    "layer3.1.bn2": ["layer3.1.conv1"],
    "layer4.0.bn1": ["layer3.0.conv2", "layer3.0.shortcut", "layer3.1.conv2"],
    "layer4.0.bn2": ["layer4.0.conv1"],
    "layer4.1.bn1": ["layer4.0.conv2", "layer4.0.shortcut"],
    "layer4.1.bn2": ["layer4.1.conv1"],
}
"""Read off the block diagram: a norm before a block normalises everything that was added up to there in its stage."""


def test_norms_of_residual_sums_have_every_conv_that_writes_into_the_sum() -> None:
    norms = [layer for layer in unit_layers(make("preact-resnet18")) if layer.kind == "norm"]
    found = {layer.name.removeprefix("features."): [path.removeprefix("features.") for path in layer.writers] for layer in norms}
    assert found == PREACT_WRITERS


def test_a_residual_sum_really_is_the_sum_of_its_writers() -> None:
    net = make("preact-resnet18")
    layers = {layer.name: layer for layer in unit_layers(net) if layer.kind == "norm"}
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    for path, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _m, _i, output, path=path: outputs.__setitem__(path, output))
        elif path in layers:
            module.register_forward_hook(lambda _m, given, _o, path=path: inputs.__setitem__(path, given[0]))
    net(noise())
    for path, layer in layers.items():
        total = sum(outputs[writer] for writer in layer.writers)
        assert torch.allclose(inputs[path], torch.as_tensor(total), atol=1e-4), path


def test_registration_order_is_wrong_on_seven_norms_of_preact_resnet18() -> None:
    net = make("preact-resnet18")
    flow = {layer.name: layer.writers for layer in unit_layers(net) if layer.kind == "norm"}
    order = {layer.name: layer.writers for layer in unit_layers(net, pairing="registration") if layer.kind == "norm"}
    differ = {name for name in flow if flow[name] != order[name]}
    assert differ == {f"features.layer{block}.bn1" for block in ("1.1", "2.0", "2.1", "3.0", "3.1", "4.0", "4.1")}
    assert order["features.layer2.1.bn1"] == ("features.layer2.0.shortcut",)


def test_convs_without_a_norm_are_units_of_their_own() -> None:
    kinds = [layer.kind for layer in unit_layers(make("vgg11"))]
    assert kinds == ["conv"] * 8 + ["linear"]
    assert [layer.kind for layer in unit_layers(make("vgg11"), pairing="registration")] == ["linear"]


def test_the_head_alone_and_never_the_classes() -> None:
    (only,) = unit_layers(make("resnet8"), Scope.HEAD)
    assert (only.name, only.kind, only.size, only.head, only.writers) == ("head.0", "linear", 6, True, ("head.0",))
    assert unit_layers(make("resnet8", hidden=0), Scope.HEAD) == ()
    assert all(not layer.head for layer in unit_layers(make("resnet8", hidden=0)))


# -- scores --------------------------------------------------------------------------------------------------------------------


def bounds_by_hand(net: Network, name: str, writers: tuple[str, ...], epsilon: bool) -> list[float]:
    """One channel at a time, with numpy's full SVD of the (C_in, kh kw) kernel."""
    state = {key: value.numpy().astype(np.float64) for key, value in net.state_dict().items()}
    scores = []
    for unit in range(len(state[f"{writers[0]}.weight"])):
        total = 0.0
        for writer in writers:
            kernel = state[f"{writer}.weight"][unit]
            matrix = kernel.reshape(len(kernel), -1) if kernel.ndim == 3 else kernel[None]
            total += np.linalg.svd(matrix)[1][0] ** 2
        score = float(np.sqrt(total))
        if f"{name}.running_var" in state:
            variance = state[f"{name}.running_var"][unit] + (1e-5 if epsilon else 0.0)
            score *= abs(state[f"{name}.weight"][unit]) / float(np.sqrt(variance))
        scores.append(score)
    return scores


@pytest.mark.parametrize("name", ["resnet8", "resnet9", "vgg11-bn", "preact-resnet18", "wrn16-1", "vgg11"])
@pytest.mark.parametrize("pairing", ["dataflow", "registration"])
def test_weight_bounds_by_hand(name: str, pairing: str) -> None:
    net = make(name, width=2)
    layers = unit_layers(net, pairing="dataflow" if pairing == "dataflow" else "registration")
    for epsilon in (False, True):
        scores = weight_bounds(net, layers, norm_epsilon=epsilon)
        assert list(scores) == [layer.name for layer in layers]
        for layer in layers:
            expected = bounds_by_hand(net, layer.name, layer.writers, epsilon)
            assert scores[layer.name].tolist() == pytest.approx(expected, rel=1e-4), layer.name


def test_the_sum_rule_bounds_the_stacked_operator_and_the_largest_writer_would_not() -> None:
    draw = generator("stack")
    pieces = [torch.randn(3, 9, generator=draw, dtype=torch.float64) for _ in range(3)]
    each = [float(torch.linalg.svdvals(piece)[0]) for piece in pieces]
    together = float(torch.linalg.svdvals(torch.cat(pieces))[0])
    assert max(each) < together <= float(np.sqrt(np.square(each).sum()))


def test_a_linear_unit_is_bounded_by_the_norm_of_its_row() -> None:
    net = make("resnet8")
    (layer,) = unit_layers(net, Scope.HEAD)
    weight = net.get_submodule("head.0").weight
    assert isinstance(weight, Tensor)
    assert torch.allclose(weight_bounds(net, [layer])["head.0"], weight.detach().norm(dim=1))


def test_zero_variance_is_infinitely_suspicious() -> None:
    net = make("resnet8")
    norm = net.get_submodule("features.bn1")
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_var is not None
    norm.running_var[:2] = 0
    with torch.no_grad():
        norm.weight[1] = 0
    scores = weight_bounds(net, unit_layers(net))["features.bn1"]
    assert torch.isinf(scores).tolist() == [True, True, False]


def test_capture_sees_units_after_relu_and_leaves_no_hook_behind() -> None:
    net = make("vgg11-bn")
    layers = unit_layers(net)
    with capture(net, layers) as seen:
        net(noise())
    assert {name: value.shape[1] for name, value in seen.items()} == {layer.name: layer.size for layer in layers}
    assert all((value >= 0).all() for value in seen.values())
    assert seen["features.1"].shape == (4, 3, 16, 16)
    assert torch.equal(seen["head.0"], torch.relu(net.head[0](net.embed(noise()))))
    kept = dict(seen)
    net(noise() * 0)
    assert all(seen[name] is kept[name] for name in kept)
    assert not any(module._forward_hooks for module in net.modules())


# -- threshold rules -----------------------------------------------------------------------------------------------------------


def test_fixed_prunes_at_the_threshold() -> None:
    assert fixed(2.0)(torch.tensor([1.0, 2.0, 3.0, torch.inf])).tolist() == [False, True, True, True]


@pytest.mark.parametrize(("share", "pruned"), [(0.0, []), (0.2, [1]), (0.4, [1, 3]), (0.6, [0, 1, 3]), (1.0, [0, 1, 2, 3, 4])])
def test_top_share_gives_ties_to_the_lower_index(share: float, pruned: list[int]) -> None:
    mask = top_share(share)(torch.tensor([2.0, torch.inf, 1.0, 3.0, 2.0]))
    assert torch.nonzero(mask).flatten().tolist() == pruned


def test_mean_std_by_hand() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0, 10.0])
    values = np.array([1.0, 2.0, 3.0, 10.0])
    for u in (0.0, 0.5, 1.0, 1.4, 1.6):
        threshold = values.mean() + u * np.sqrt(((values - values.mean()) ** 2).sum() / 3)
        assert mean_std(u)(scores).tolist() == [value > threshold for value in values]
    assert mean_std(1.4)(scores).tolist() == [False, False, False, True]
    assert not mean_std(1.6)(scores).any()


def test_mean_std_prunes_infinite_scores_and_leaves_them_out_of_the_statistics() -> None:
    scores = torch.tensor([1.0, 1.0, 1.0, 1.0, 5.0, torch.inf])
    assert mean_std(1.5)(scores).tolist() == [False, False, False, False, True, True]
    assert mean_std(1.0)(torch.tensor([4.0, torch.inf])).tolist() == [False, True]
    assert not mean_std(0.0)(torch.full((5,), 2.0)).any()
    assert mean_std(3.0)(torch.empty(0)).tolist() == []


def two_modes() -> Tensor:
    """56 scores around 1 and 8 around 20, log-normal."""
    draw = generator("modes")
    return torch.exp(torch.cat([0.2 * torch.randn(56, generator=draw), 3.0 + 0.2 * torch.randn(8, generator=draw)]))


def valley_by_hand(scores: np.ndarray) -> float | None:
    """The documented rule with loops: a sum of Gaussians on 512 points, then a walk to the right."""
    values = np.log(scores[scores > 0] + 1e-12)
    n = len(values)
    std = np.sqrt(((values - values.mean()) ** 2).sum() / (n - 1))
    iqr = np.percentile(values, 75) - np.percentile(values, 25)
    width = 0.9 * min(std, iqr / 1.34) * n ** (-1 / 5)
    grid = np.linspace(values.min() - 3 * width, values.max() + 3 * width, 512)
    density = np.array([np.exp(-((x - values) ** 2) / (2 * width**2)).sum() for x in grid])
    main = int(np.argmax(density))
    for low in range(main + 1, 511):
        if not (density[low] < density[low - 1] and density[low] <= density[low + 1]):
            continue
        modes = [k for k in range(low + 1, 511) if density[k] > density[k - 1] and density[k] >= density[k + 1]]
        if not modes:
            return None
        lower = min(density[main], max(density[k] for k in modes))
        if density[low] <= 0.8 * lower and (values > grid[low]).mean() <= 0.3:
            return float(np.exp(grid[low]))
    return None


def test_density_valley_splits_two_clear_modes_where_the_slow_twin_does() -> None:
    scores = two_modes()
    mask = density_valley()(scores)
    assert mask.tolist() == [False] * 56 + [True] * 8
    threshold = valley_by_hand(scores.double().numpy())
    assert threshold is not None
    assert mask.tolist() == (scores > threshold).tolist()


@pytest.mark.parametrize("number", range(12))
def test_density_valley_agrees_with_the_slow_twin_on_random_mixtures(number: int) -> None:
    draw = generator("mixture", number)
    parts = [torch.randn(40, generator=draw), 1.0 + 0.3 * number + 0.5 * torch.randn(10, generator=draw)]
    scores = torch.exp(torch.cat(parts))
    threshold = valley_by_hand(scores.double().numpy())
    expected = mean_std(3.0)(scores) if threshold is None else scores > threshold
    assert density_valley()(scores).tolist() == expected.tolist()


def test_density_valley_falls_back_when_there_is_one_mode_or_too_few_units() -> None:
    spaced = torch.exp(torch.erfinv(torch.linspace(-0.95, 0.95, 60)))
    assert valley_by_hand(spaced.double().numpy()) is None
    for u in (1.0, 3.0):
        assert torch.equal(density_valley(u)(spaced), mean_std(u)(spaced))
    assert density_valley(1.0)(spaced).any()
    few = torch.tensor([1.0, 1.0, 1.0, 1.1, 1.1, 1.1, 50.0])
    assert torch.equal(density_valley(2.0)(few), mean_std(2.0)(few))
    same = torch.full((20,), 2.0)
    assert not density_valley()(same).any()


def test_density_valley_needs_at_most_thirty_percent_above() -> None:
    scores = torch.exp(torch.cat([torch.linspace(-0.5, 0.5, 33), torch.linspace(3.5, 4.8, 27)]))
    assert valley_by_hand(scores.double().numpy()) is None
    assert torch.equal(density_valley()(scores), mean_std(3.0)(scores))


def test_density_valley_spares_dead_units_and_prunes_infinite_ones() -> None:
    scores = torch.cat([torch.zeros(5), two_modes(), torch.tensor([torch.inf])])
    assert density_valley()(scores).tolist() == [False] * 61 + [True] * 9
    small = torch.tensor([0.0, 1.0, 2.0, torch.inf])
    assert density_valley()(small).tolist() == [False, False, False, True]


@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e4])
def test_the_density_rule_does_not_depend_on_the_scale_of_the_scores(factor: float) -> None:
    assert torch.equal(density_valley()(factor * two_modes()), density_valley()(two_modes()))


def test_largest_within_stops_at_the_first_fall() -> None:
    levels: list[Masks] = [{"head.0": torch.arange(5) < k} for k in range(5)]

    def accuracy_of(values: list[float]) -> int:
        return largest_within(levels, lambda masks: values[int(masks["head.0"].sum())], floor=0.8)

    assert accuracy_of([0.9, 0.85, 0.8, 0.7, 0.9]) == 2
    assert accuracy_of([0.9, 0.9, 0.9, 0.9, 0.9]) == 4
    assert accuracy_of([0.5, 0.9, 0.9, 0.9, 0.9]) == 0


def test_select_works_layer_by_layer() -> None:
    scores = {"a": torch.tensor([1.0, 9.0]), "b": torch.tensor([100.0, 50.0])}
    masks = select(scores, top_share(0.5))
    assert {name: mask.tolist() for name, mask in masks.items()} == {"a": [False, True], "b": [True, False]}


# -- what pruning writes -------------------------------------------------------------------------------------------------------


def every_other(net: Network) -> Masks:
    return {layer.name: torch.arange(layer.size) % 2 == 0 for layer in unit_layers(net)}


@pytest.mark.parametrize("name", ["resnet8", "preact-resnet18", "vgg11"])
@pytest.mark.parametrize("writer", list(Writer))
def test_empty_masks_leave_the_logits_bit_equal(name: str, writer: Writer) -> None:
    net = make(name)
    empty = {layer.name: torch.zeros(layer.size, dtype=torch.bool) for layer in unit_layers(net)}
    for masks in ({}, empty):
        assert torch.equal(prune(net, masks, writer)(noise()), net(noise()))


@pytest.mark.parametrize("name", ["resnet8", "resnet9", "preact-resnet18", "wrn16-1", "vgg11-bn", "vgg11"])
@pytest.mark.parametrize("writer", list(Writer))
def test_pruned_units_are_silent_or_constant(name: str, writer: Writer) -> None:
    net = make(name)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    masks = every_other(net)
    pruned = prune(net, masks, writer)
    layers = unit_layers(pruned)
    with capture(pruned, layers) as seen:
        pruned(noise())
    for layer in layers:
        off = seen[layer.name][:, masks[layer.name]]
        if layer.kind == "norm" and writer is Writer.GAMMA:
            beta = before[f"{layer.name}.bias"][masks[layer.name]]
            assert torch.equal(off, torch.relu(beta)[None, :, None, None].expand_as(off))
        else:
            assert (off == 0).all()
        on = ~masks[layer.name]
        assert torch.equal(pruned.state_dict()[f"{layer.name}.weight"][on], before[f"{layer.name}.weight"][on])
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not torch.equal(pruned(noise()), net(noise()))


def test_hold_keeps_units_pruned_after_an_optimiser_step() -> None:
    net = make("resnet8")
    masks = every_other(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net.train()
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(noise()), torch.arange(4)).backward()
        optimizer.step()
        state = net.state_dict()
        # A silent unit has no gradient, but the momentum of earlier steps still moves it.
        assert any((state[f"{name}.bias"][mask] != 0).any() for name, mask in masks.items())
        hold(net, masks, Writer.GAMMA_BETA)
        for name, mask in masks.items():
            assert (state[f"{name}.weight"][mask] == 0).all()
            assert (state[f"{name}.bias"][mask] == 0).all()
            assert (state[f"{name}.weight"][~mask] != 0).any()


def test_the_embeddings_channels_are_units_of_the_classifiers_input() -> None:
    """Cut by hand: the columns of the head's first weight; the features stay, bit for bit."""
    net = ResNet8(width=2, hidden=4).build(4, (3, 8, 8), [0.5] * 3, [0.25] * 3, 0).eval()
    layer = embedding_layer(net)
    assert (layer.name, layer.kind, layer.size) == (EMBEDDING, "input", 8)
    mask = torch.tensor([True, False] * 4)
    pruned = prune(net, {EMBEDDING: mask}, Writer.OUTPUT)
    expected = net.head[0].weight.detach().clone()
    expected[:, mask] = 0
    assert torch.equal(pruned.head[0].weight, expected)
    assert torch.equal(pruned.head[0].bias, net.head[0].bias)
    for name, value in net.features.state_dict().items():
        assert torch.equal(pruned.features.state_dict()[name], value)
