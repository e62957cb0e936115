from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from defenses.base import Inapplicable, Knowledge, Scope
from defenses.clp import CLP
from defenses.controls import NoDefense, PerfectFilter, RandomPruning, TrainingFromScratch
from defenses.holder_pruning import HolderPruning
from models.classifier import Classifier
from models.recipe import Recipe
from models.spec import BadInput, derive_seed
from models.training import fit


def states_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


def test_none_is_the_victim(net_of, view_of):
    (candidate,) = NoDefense().candidates(view_of(NoDefense()))
    assert states_equal(candidate.model, net_of())
    assert candidate.dial is None


@pytest.mark.parametrize(
    ("like", "settings"),
    [
        ("clp", (("grid", (0.2, 0.5)),)),
        ("pruning", ()),
        ("holder-pruning", (("pairs", "clean"), ("rule", "top-p"), ("share", 0.4))),
    ],
)
def test_random_pruning_takes_as_many_other_units_and_writes_alike(net_of, view_of, like, settings):
    control = RandomPruning(like=like, like_settings=settings)
    original, net = control.imitated(), net_of(hidden=40)
    assert control.needs == original.needs
    mine = list(control.candidates(view_of(control, net, Scope.HEAD)))
    theirs = list(original.candidates(view_of(original, net, Scope.HEAD)))
    assert [(c.dial, c.is_default, c.strength) for c in mine] == [(c.dial, c.is_default, c.strength) for c in theirs]
    differs = False
    for a, b in zip(mine, theirs, strict=True):
        for name, mask in a.masks.items():
            assert int(mask.sum()) == int(b.masks[name].sum())
            differs = differs or not torch.equal(mask, b.masks[name])
            layer = a.model.get_submodule(name)
            assert not layer.weight[mask].any()
            assert not layer.bias[mask].any()
            assert torch.equal(layer.weight[~mask], net.get_submodule(name).weight[~mask])
    assert differs


def test_random_pruning_keeps_the_writer_the_nesting_and_the_seed(view_of):
    settings = (("iterations", 20), ("batch", 8), ("lr", 0.8))
    control = RandomPruning(like="anp", like_settings=settings)
    offered = list(control.candidates(view_of(control)))
    again = list(control.candidates(view_of(control)))
    other = list(control.candidates(view_of(control, seed=4)))
    assert all(states_equal(a.model, b.model) for a, b in zip(offered, again, strict=True))
    assert any(not torch.equal(a.masks[n], b.masks[n]) for a, b in zip(offered, other, strict=True) for n in a.masks)
    for fewer, more in pairwise(offered):
        assert all(bool((~mask | more.masks[name]).all()) for name, mask in fewer.masks.items())
    mask = offered[-1].masks["features.4"]
    norm = offered[-1].model.features[4]
    assert mask.any()
    assert not norm.weight[mask].any()
    assert norm.bias[mask].all()  # ANP keeps beta, so its control does


def test_random_pruning_names_what_it_cannot_imitate(view_of, net_of):
    with pytest.raises(BadInput, match="did you mean 'clp'"):
        RandomPruning(like="clpp")
    for like in ("fine-pruning", "none", "random-pruning"):
        with pytest.raises(BadInput, match=r"prunes and does nothing else: pruning, anp, .*clp, holder-pruning"):
            RandomPruning(like=like)
    with pytest.raises(BadInput, match="clp has no setting 'uu'"):
        RandomPruning(like_settings=(("uu", 3.0),))
    with pytest.raises(BadInput, match="clp: u"):
        RandomPruning(like_settings=(("u", -3.0),))
    control = RandomPruning()
    with pytest.raises(Inapplicable, match="no hidden units"):
        list(control.candidates(view_of(control, net_of(hidden=0), Scope.HEAD)))


def test_settings_of_the_imitated_method_reach_it():
    assert RandomPruning(like_settings=(("u", 2.0),)).imitated() == CLP(u=2.0)
    holder = RandomPruning(like="holder-pruning", like_settings=(("estimator", "weight-bound"),))
    assert holder.imitated() == HolderPruning(estimator="weight-bound")
    assert holder.needs == Knowledge.MODEL


@pytest.mark.parametrize(
    ("control", "seed", "size", "epochs"), [(TrainingFromScratch(epochs=2), 1, 24, 2), (PerfectFilter(), 4, 32, 1)]
)
def test_trained_controls_equal_plain_training_of_a_fresh_network(net_of, data_of, view_of, control, seed, size, epochs):
    view = view_of(control)
    (candidate,) = control.candidates(view)
    assert view.used == control.needs  # the victim itself is never touched
    recipe = Recipe(epochs=epochs, batch=8, crop=1)
    twin = net_of(derive_seed(3, control.name, "weights"))
    fit(Classifier(twin, recipe), data_of(seed, size), recipe, derive_seed(3, control.name, "batches"))
    assert states_equal(candidate.model, twin)


def test_without_epochs_the_network_is_fresh(net_of, view_of):
    control = TrainingFromScratch(epochs=0)
    (candidate,) = control.candidates(view_of(control))
    assert states_equal(candidate.model, net_of(derive_seed(3, control.name, "weights")))
    with pytest.raises(BadInput, match="epochs"):
        TrainingFromScratch(epochs=-1)


def test_what_it_imitates_is_part_of_its_key(monkeypatch):
    before = RandomPruning().spec()
    monkeypatch.setattr(CLP, "revision", CLP.revision + 1)
    assert RandomPruning().spec() != before
