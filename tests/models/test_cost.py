"""Samples forward and backward, counted exactly."""

from __future__ import annotations

import pytest
import torch

from models.backbone import Network
from models.cost import Cost, metered
from models.resnet import ResNet8


@pytest.fixture
def net() -> Network:
    return ResNet8(width=2, hidden=4).build(3, (1, 8, 8), [0.5], [0.25], seed=0)


def test_forward_and_backward_are_counted_by_sample(net: Network) -> None:
    with metered() as cost:
        net(torch.rand(5, 1, 8, 8))
        net(torch.rand(3, 1, 8, 8)).sum().backward()
    assert cost == Cost(forward=8, backward=3)


def test_no_grad_counts_no_backward_and_the_head_alone_counts_nothing(net: Network) -> None:
    with metered() as cost:
        with torch.no_grad():
            z = net.embed(torch.rand(4, 1, 8, 8))
        net.head(z).sum().backward()
    assert cost == Cost(forward=4, backward=0)


def test_frozen_features_have_no_backward_unless_the_input_asks_for_one(net: Network) -> None:
    net.features.requires_grad_(False)
    with metered() as cost:
        net(torch.rand(4, 1, 8, 8)).sum().backward()
        assert cost == Cost(4, 0)
        net(torch.rand(2, 1, 8, 8, requires_grad=True)).sum().backward()
    assert cost == Cost(6, 2)


def test_meters_nest_and_close(net: Network) -> None:
    outer = Cost(forward=100)
    with metered(outer):
        net(torch.rand(2, 1, 8, 8))
        with metered() as inner, metered(inner):
            net(torch.rand(3, 1, 8, 8)).sum().backward()
    net(torch.rand(7, 1, 8, 8)).sum().backward()
    assert outer == Cost(105, 3)
    assert inner == Cost(6, 6)


def test_a_meter_closes_when_the_block_fails(net: Network) -> None:
    with pytest.raises(ZeroDivisionError), metered() as cost:
        raise ZeroDivisionError
    net(torch.rand(2, 1, 8, 8))
    assert cost == Cost(0, 0)


def test_equal_meters_are_told_apart_on_closing(net: Network) -> None:
    with metered() as outer:
        with metered():
            pass
        net(torch.rand(2, 1, 8, 8))
    assert outer.forward == 2


def test_a_standard_epoch_is_forward_and_backward_over_the_training_set() -> None:
    assert Cost(50, 50).epochs(50) == 1
    assert Cost(30, 0).epochs(10) == 1
