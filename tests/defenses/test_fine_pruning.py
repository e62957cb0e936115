"""Fine-pruning: pruning and fine-tuning are its two ends, and what it pruned stays pruned."""

from __future__ import annotations

import pytest
import torch

from defenses.base import Scope
from defenses.fine_pruning import FinePruning
from defenses.fine_tuning import FineTuning
from defenses.pruning import Pruning
from models.resnet import ResNet8
from models.spec import BadInput
from models.units import EMBEDDING


def states_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("scope", [Scope.HEAD, Scope.WHOLE])
def test_fine_pruning_without_epochs_is_pruning(view_of, scope):
    tuned, pruning = FinePruning(epochs=0, tau=0.2), Pruning(tau=0.2)
    (found,) = tuned.candidates(view_of(tuned, scope=scope))
    expected = next(c for c in pruning.candidates(view_of(pruning, scope=scope)) if c.is_default)
    assert found.dial == expected.dial
    assert states_equal(found.model, expected.model)


@pytest.mark.parametrize("scope", [Scope.HEAD, Scope.WHOLE])
def test_fine_pruning_of_nothing_is_fine_tuning(view_of, scope):
    both, tuning = FinePruning(epochs=2, batch=8, shares=(0.0,)), FineTuning(epochs=2, batch=8)
    at_zero = next(candidate for candidate in both.candidates(view_of(both, scope=scope)) if candidate.dial == 0)
    (expected,) = tuning.candidates(view_of(tuning, scope=scope))
    assert states_equal(at_zero.model, expected.model)


@pytest.mark.parametrize("scope", [Scope.HEAD, Scope.WHOLE])
def test_pruned_units_are_exactly_zero_after_fine_tuning(view_of, scope):
    defense = FinePruning(epochs=2, batch=8, lr=0.1, weight_decay=0.1, shares=(0.5, 0.8))
    offered = list(defense.candidates(view_of(defense, scope=scope)))
    assert len({candidate.dial for candidate in offered}) == len(offered) >= 2
    assert sum(candidate.is_default for candidate in offered) == 1
    for candidate in offered:
        for name, mask in candidate.masks.items():
            if name == EMBEDDING:
                weight = candidate.model.head[0].weight.T
            else:
                module = candidate.model.get_submodule(name)
                weight = module.weight
                assert not module.bias[mask].any()
            assert not weight[mask].any()
            assert weight[~mask].any()


def test_units_before_a_shortcut_are_held_at_zero_too(view_of):
    """No ReLU stands between such a unit and the sum, so its gradient is not zero and only holding keeps it pruned."""
    net = ResNet8(width=2).build(4, (3, 8, 8), [0.5] * 3, [0.25] * 3, 0).eval()
    defense = FinePruning(epochs=2, batch=8, lr=0.1, weight_decay=0.1, shares=(0.5,), site="last-conv")
    candidate = next(c for c in defense.candidates(view_of(defense, net)) if c.dial == 0.5)
    ((name, mask),) = candidate.masks.items()
    norm = candidate.model.get_submodule(name)
    assert int(mask.sum()) == 4
    assert not norm.weight[mask].any()
    assert not norm.bias[mask].any()
    assert not torch.equal(norm.weight[~mask], net.get_submodule(name).weight[~mask])


def test_settings_out_of_range_are_named():
    with pytest.raises(BadInput, match="tau"):
        FinePruning(tau=2.0)
    with pytest.raises(BadInput, match="shares"):
        FinePruning(shares=(1.0,))
