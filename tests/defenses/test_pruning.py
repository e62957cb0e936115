from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from defenses.base import Inapplicable, Scope
from defenses.pruning import Pruning, last_layers, least_active, mean_activations
from models.images import to_float
from models.resnet import PreActResNet18, ResNet8
from models.spec import BadInput
from models.training import accuracy


def states_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def numpy_forward(net, images):
    """Feature maps after the second norm and ReLU, by explicit loops: float64 (N, 6, 8, 8)."""
    x = (images.numpy().astype(np.float64) / 255 - 0.5) / 0.25
    for conv, norm in ((net.features[0], net.features[1]), (net.features[3], net.features[4])):
        weight = conv.weight.detach().double().numpy()
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        y = np.zeros((len(x), weight.shape[0], *x.shape[2:]))
        for row in range(3):
            for column in range(3):
                window = padded[:, :, row : row + x.shape[2], column : column + x.shape[3]]
                y += np.einsum("nchw,oc->nohw", window, weight[:, :, row, column])
        stats = (norm.running_mean, norm.running_var, norm.weight.detach(), norm.bias.detach())
        mean, var, gamma, beta = (s.double().numpy()[None, :, None, None] for s in stats)
        x = np.maximum((y - mean) / np.sqrt(var + norm.eps) * gamma + beta, 0)
    return x


def test_order_and_masks_equal_a_numpy_twin(net_of, data_of):
    net, data = net_of(), data_of(1)
    layers = last_layers(net, Scope.WHOLE, "last-conv")
    assert [layer.name for layer in layers] == ["features.4"]
    found = mean_activations(net, layers, data.images, batch=7)["features.4"]
    twin = numpy_forward(net, data.images).mean((0, 2, 3))
    np.testing.assert_allclose(found.numpy(), twin, rtol=1e-5, atol=1e-7)
    # Without a shortcut, what the classifier reads is what the last convolution gives, before pooling.
    (read,) = mean_activations(net, last_layers(net, Scope.WHOLE, "classifier-input"), data.images, batch=7).values()
    np.testing.assert_allclose(read.numpy(), twin, rtol=1e-5, atol=1e-7)
    mask = least_active({"features.4": found}, 0.5)["features.4"]
    assert set(mask.nonzero().ravel().tolist()) == set(np.argsort(twin, kind="stable")[:3].tolist())


def test_ties_go_to_the_lower_index_and_the_last_unit_stays():
    activations = {"a": torch.tensor([0.0, 2.0, 0.0, 0.0])}
    assert least_active(activations, 0.5)["a"].tolist() == [True, False, True, False]
    assert least_active(activations, 0.99)["a"].tolist() == [True, False, True, True]
    assert least_active({"a": torch.zeros(1)}, 0.9)["a"].tolist() == [False]


def test_the_last_convolution_is_not_a_shortcut():
    resnet = ResNet8(width=2).build(4, (3, 8, 8), [0.5] * 3, [0.25] * 3, 0)
    assert last_layers(resnet, Scope.WHOLE, "last-conv")[0].name.endswith("bn2")
    preact = PreActResNet18(width=2).build(4, (3, 8, 8), [0.5] * 3, [0.25] * 3, 0)
    (layer,) = last_layers(preact, Scope.WHOLE, "last-conv")
    assert layer.kind == "conv"
    assert layer.name.endswith("conv2")


@pytest.mark.parametrize("scope", [Scope.HEAD, Scope.WHOLE])
def test_the_default_is_the_last_level_before_accuracy_gives_way(net_of, data_of, view_of, scope):
    tau, net, validation = 0.11, net_of(5), data_of(2, 40)
    with torch.no_grad():  # labels the victim itself gives, so that pruning costs accuracy
        validation = type(validation)(validation.images, net(to_float(validation.images)).argmax(1), 4)
    defense = Pruning(tau=tau)
    offered = list(defense.candidates(view_of(defense, net, scope, validation=validation)))
    shares = [candidate.dial for candidate in offered]
    assert shares == sorted(set(shares))
    assert shares[0] == 0
    twin = 0.0
    for candidate in offered:
        if accuracy(candidate.model, validation) < 1 - tau:
            break
        twin = candidate.dial
    assert [candidate.dial for candidate in offered if candidate.is_default] == [twin]
    assert 0 < twin < shares[-1]
    assert states_equal(offered[0].model, net)


def test_activations_before_pooling_are_rectified_on_pre_activation_nets(data_of):
    """The embedding of PreAct-ResNet is the mean of a sum without ReLU; activations are its positive part, before the mean."""
    net, images = PreActResNet18(width=2).build(4, (3, 8, 8), [0.5] * 3, [0.25] * 3, 0).eval(), data_of(1).images
    maps = []
    net.features.pool.register_forward_pre_hook(lambda _module, inputs: maps.append(inputs[0]))
    (found,) = mean_activations(net, last_layers(net, Scope.WHOLE, "classifier-input"), images).values()
    twin = np.maximum(maps[0].detach().double().numpy(), 0).mean((0, 2, 3))
    np.testing.assert_allclose(found.numpy(), twin, rtol=1e-5, atol=1e-7)
    assert (maps[0] < 0).any()


def test_a_network_without_a_pool_is_read_at_its_embedding(net_of, data_of):
    net, images = net_of(), data_of(1).images
    net.features[-1] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    (found,) = mean_activations(net, last_layers(net, Scope.WHOLE, "classifier-input"), images).values()
    twin = net.embed(to_float(images)).detach().relu().double().mean(0)
    torch.testing.assert_close(found, twin, rtol=1e-5, atol=1e-7)


def test_pruned_channels_are_silent_and_only_they_change(net_of, data_of, view_of):
    defense = Pruning(site="last-conv")
    net, images = net_of(), to_float(data_of(5).images)
    for candidate in defense.candidates(view_of(defense, net)):
        (mask,) = candidate.masks.values()
        before, after = net.embed(images), candidate.model.embed(images)
        assert not after[:, mask].any()
        assert torch.equal(after[:, ~mask], before[:, ~mask])
        assert candidate.strength == candidate.pruned == int(mask.sum())
        assert candidate.dial == candidate.pruned / len(mask)


def test_channels_cut_at_the_classifiers_input_are_as_if_they_were_zero(net_of, data_of, view_of):
    defense = Pruning()
    net, images = net_of(), to_float(data_of(5).images)
    for candidate in defense.candidates(view_of(defense, net)):
        (mask,) = candidate.masks.values()
        z = net.embed(images)
        torch.testing.assert_close(candidate.model(images), net.head(z * ~mask))
        assert states_equal(candidate.model.features, net.features)
        assert candidate.strength == candidate.pruned == int(mask.sum())


def test_missing_units_and_samples_are_refused(net_of, data_of, view_of):
    defense = Pruning()
    with pytest.raises(Inapplicable, match="no hidden units"):
        list(defense.candidates(view_of(defense, net_of(hidden=0), Scope.HEAD)))
    with pytest.raises(Inapplicable, match="must hold samples"):
        list(defense.candidates(view_of(defense, validation=data_of(size=0))))


def test_settings_out_of_range_are_named():
    with pytest.raises(BadInput, match="levels"):
        Pruning(levels=(0.0, 1.0))
    with pytest.raises(BadInput, match="site"):
        Pruning(site="first-conv")
