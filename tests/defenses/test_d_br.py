from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from defenses.base import Inapplicable, Knowledge
from defenses.d_br import DBR
from models.cost import metered
from models.images import Batches
from models.spec import BadInput, derive_seed
from models.training import logits

TINY = DBR(
    probe_epochs=1, intra_epochs=1, probe_batch=16, clean_share=0.5, poisoned_share=0.2, epochs=2, lr=0.01, batch=8, points=(1,)
)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_its_epochs_written_out(view_of, data_of, net_of):
    """One pass of ascent on the poisoned samples, one of descent on the clean ones, by one optimiser: plain loops."""
    view, data, net = view_of(TINY), data_of(3, 32), net_of().train()
    clean, poisoned, _ = TINY.distinguish(view)
    seed = derive_seed(view.seed, "d-br")
    first, second = (
        Batches(data.subset(side), 8, derive_seed(seed, purpose), crop=1, flip=True)
        for side, purpose in ((poisoned, "unlearn"), (clean, "relearn"))
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    for _ in range(2):
        for batches, sign in ((first, -1), (second, 1)):
            for images, labels, _ in batches:
                optimizer.zero_grad()
                (sign * cross_entropy(net(images), labels)).backward()
                optimizer.step()
    found = next(candidate for candidate in TINY.candidates(view) if candidate.is_default)
    for a, b in zip(found.model.state_dict().values(), net.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.isolated, poisoned)


def test_a_point_of_the_dial_is_the_training_that_ends_there(view_of, net_of):
    method = replace(TINY, points=(0, 1, 3))
    offered = list(method.candidates(view_of(method)))
    assert [(c.dial, c.is_default, c.strength) for c in offered] == [(0, False, 0), (1, False, 1), (2, True, 2), (3, False, 3)]
    assert same(offered[0].model, net_of())
    for candidate in offered[1:]:
        alone = replace(TINY, epochs=int(candidate.dial), points=())
        (model,) = (c.model for c in alone.candidates(view_of(alone)))
        assert same(candidate.model, model)


def test_it_parts_the_losses_of_poisoned_and_clean(view_of, data_of):
    method, data, gaps = replace(TINY, points=(0,), epochs=6), data_of(3, 32), []
    sides = method.distinguish(view_of(method))[:2]
    for candidate in method.candidates(view_of(method)):
        parts = map(data.subset, sides)
        clean, poisoned = (cross_entropy(logits(candidate.model, part.images), part.labels).item() for part in parts)
        gaps.append(poisoned - clean)
    assert gaps[1] > gaps[0] + 0.1


def test_passes_are_counted(view_of):
    with metered() as cost:
        list(TINY.candidates(view_of(TINY)))
    # Probe: two epochs, then two passes of the detector. Removal: two epochs of 6 poisoned and 17 clean samples, the last of the
    # three batches of clean ones a single sample, which is dropped.
    removal = 2 * (6 + 16)
    assert (cost.forward, cost.backward) == (2 * 32 + 2 * 32 + removal, 2 * 32 + removal)


def test_it_needs_the_model_and_the_poisoned_set(view_of, data_of):
    view = view_of(TINY)
    list(TINY.candidates(view))
    assert view.used == TINY.needs == Knowledge.MODEL | Knowledge.TRAIN
    few = replace(TINY, poisoned_share=0.05)
    with metered() as cost, pytest.raises(Inapplicable, match=r"poisoned_share = 0\.05 of 32 samples"):
        list(few.candidates(view_of(few)))
    assert cost.forward == 0


def test_the_published_settings():
    method = DBR()
    assert (method.epochs, method.lr, method.batch, method.weight_decay) == (20, 1e-4, 128, 5e-4)
    assert (method.probe_epochs, method.intra_epochs, method.clean_share, method.poisoned_share) == (2, 10, 0.2, 0.05)


@pytest.mark.parametrize("wrong", [{"epochs": -1}, {"lr": 11.0}, {"batch": 1}, {"points": (-1,)}, {"clean_share": 1.0}])
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(BadInput, match=f"d-br: {next(iter(wrong))} = "):
        DBR(**wrong)
