from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from benchmark.settings.load import find_matrix, load_matrix, matrix_names
from benchmark.settings.presets import PUBLISHED, presets
from defenses import dbd
from defenses.base import Inapplicable, Knowledge
from defenses.dbd import DBD, HEAD_START, symmetric_cross_entropy
from models.classifier import Classifier
from models.extractors import SelfSupervised
from models.images import ImageSet, to_float
from models.mixmatch import MixMatch, ramped
from models.recipe import Recipe
from models.spec import BadInput, derive_seed, generator
from models.training import fit

TINY = DBD(ssl_epochs=1, ssl_batch=16, head_epochs=1, head_batch=8, semi_epochs=2, iterations=2, semi_batch=8)


def sines(count: int, step: float, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.sin(step * np.arange(1, count + 1))).float().view(shape)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_symmetric_cross_entropy_at_the_reference_values():
    """Closed-form input; the numbers come from DBD's authors' function."""
    found = symmetric_cross_entropy(3 * sines(40, 0.7, 4, 10), torch.tensor([0, 3, 7, 9]))
    assert found.tolist() == pytest.approx([8.163973, 9.68749, 8.150245, 9.062933], rel=1e-6)
    assert found.mean().item() == pytest.approx(8.76616096, rel=1e-6)


def test_symmetric_cross_entropy_by_loops_with_both_floors():
    logits, labels = torch.tensor([[1.0, -2.0, 0.5], [30.0, 0.0, -30.0]]), [1, 2]
    for row, label, found in zip(logits.tolist(), labels, symmetric_cross_entropy(logits, torch.tensor(labels)), strict=True):
        p = [math.exp(v) / sum(map(math.exp, row)) for v in row]
        reverse = -sum(max(q, 1e-7) * math.log(1.0 if c == label else 1e-4) for c, q in enumerate(p))
        assert found.item() == pytest.approx(-0.1 * math.log(p[label]) + reverse, rel=1e-5)


def test_a_head_is_trained_alone_on_frozen_features(net_of, data_of, view_of):
    """Adam on the symmetric loss, features in evaluation mode: against a bare loop on the embeddings."""
    data = data_of(3, 32)
    recipe = replace(TINY.recipe(view_of(TINY), 1, 32), crop=0, flip=False)
    net, twin = net_of(), net_of()
    dbd.tune(dbd._Head(net, recipe, dbd.Scope.HEAD), data, 0)
    assert same(net.features, twin.features)
    optimizer = torch.optim.Adam(twin.head.parameters(), lr=0.002)
    symmetric_cross_entropy(twin(to_float(data.images)), data.labels).mean().backward()
    optimizer.step()
    for a, b in zip(net.head.parameters(), twin.head.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_split_keeps_half_of_the_labels_those_of_lowest_loss(net_of, data_of):
    net, data = net_of(), data_of(3, 33)
    with torch.no_grad():
        losses = symmetric_cross_entropy(net(to_float(data.images)), data.labels)
    expected = np.zeros(33, dtype=bool)
    expected[np.argsort(losses.numpy(), kind="stable")[:16]] = True
    assert TINY.split(net.train(), data).tolist() == expected.tolist()
    assert net.training


def test_its_stages_written_out(view_of, data_of):
    """Features without labels, head, semi-supervised training with a new split each epoch: the pipeline written out."""
    view, data = view_of(TINY), data_of(3, 32)
    own = derive_seed(view.seed, "extractor")
    net = SelfSupervised("poisoned", 1, 16).build(view.fresh, data, view.recipe, own).net
    adam = Recipe(epochs=1, batch=8, lr=0.002, optimizer="adam", weight_decay=0, schedule="constant", crop=1, flip=True)

    class Head(Classifier):
        def train(self, mode=True):
            super().train(mode)
            self.net.features.eval()
            return self

        def loss(self, logits, labels, index):
            return symmetric_cross_entropy(logits, labels).mean()

        def trainable(self):
            return list(self.net.head.parameters())

    fit(Head(net, adam), data, adam, derive_seed(view.seed, "dbd", "head"))
    recipe = replace(adam, epochs=2)
    module = MixMatch(
        net, recipe, TINY.split, iterations=2, sharpen=0.5, mixup=0.75, weight=15.0, ramp=2, head_start=2 * 10 / 190
    )
    fit(module, data, recipe, derive_seed(view.seed, "dbd", "semi"))
    (candidate,) = TINY.candidates(view)
    assert same(candidate.model, net)
    assert torch.equal(candidate.isolated, ~module.labelled)
    assert int(candidate.isolated.sum()) == 16


def test_labels_reach_everything_but_the_extractor(view_of, data_of, monkeypatch):
    data = data_of(3, 32)
    other = ImageSet(data.images, data.labels.roll(1), 4)
    found = []

    def watched(module, data, seed):
        found.append([parameter.clone() for parameter in module.net.features.parameters()])
        return tune(module, data, seed)

    tune = dbd.tune
    monkeypatch.setattr(dbd, "tune", watched)
    a, b = (next(TINY.candidates(view_of(TINY, train=given))).model for given in (data, other))
    assert all(map(torch.equal, *found))
    assert not same(a, b)


def test_it_sorts_out_labels_that_the_images_contradict(view_of):
    """Four brightness levels; a fifth of the samples wear a wrong label. They must end on the unlabelled side."""
    draw = generator(0, "levels")
    true = torch.arange(160) % 4
    images = (60 * true.view(-1, 1, 1, 1) + torch.randint(0, 15, (160, 3, 8, 8), generator=draw)).to(torch.uint8)
    wrong = torch.zeros(160, dtype=torch.bool)
    wrong[torch.randperm(160, generator=draw)[:32]] = True
    data = ImageSet(images, torch.where(wrong, torch.zeros_like(true), true), 4)
    wrong &= true != 0
    method = replace(TINY, ssl_epochs=0, head_epochs=60, head_batch=32, lr=0.02, semi_epochs=1)
    (candidate,) = method.candidates(view_of(method, train=data))
    assert candidate.isolated[wrong].double().mean() > 0.9


def test_it_needs_the_poisoned_set_alone_and_two_samples_a_side(view_of, data_of):
    view = view_of(TINY)
    list(TINY.candidates(view))
    assert view.used == TINY.needs == Knowledge.TRAIN
    with pytest.raises(Inapplicable, match=r"clean_share = 0\.5 of 3 samples"):
        list(TINY.candidates(view_of(TINY, train=data_of(3, 3))))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"ssl_epochs": -1}, "epochs"), ({"ssl_batch": 1}, "batch"), ({"ssl_lr": 11.0}, "lr"), ({"blur": 2.0}, "blur"),
     ({"head_epochs": -1}, "head_epochs"), ({"head_batch": 1}, "head_batch"), ({"lr": 11.0}, "lr"),
     ({"clean_share": 1.0}, "clean_share"), ({"semi_epochs": 0}, "semi_epochs"), ({"iterations": 0}, "iterations"),
     ({"semi_batch": 1}, "semi_batch"), ({"sharpen": 0.0}, "sharpen"), ({"mixup": 0.0}, "mixup"),
     ({"unlabelled_weight": -1.0}, "unlabelled_weight")],
)  # fmt: skip
def test_settings_out_of_range_are_named(wrong, named):
    with pytest.raises(BadInput, match=f": {named} = "):
        DBD(**wrong)


def _first_weight(method, view_of, data_of):
    """Weight of Lu at the first step, as MixMatch is given it, and its final weight."""
    seen = []

    class Stop(Exception):
        pass

    class Watched(MixMatch):
        def training_step(self, batch, batch_idx):
            position = self.head_start + int(self.global_step) / self.iterations
            seen.append(ramped(self.weight, position, self.ramp))
            raise Stop

    quick = replace(method, ssl_epochs=1, ssl_batch=16, head_epochs=1, head_batch=8, semi_batch=8)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dbd, "MixMatch", Watched)
        with pytest.raises(Stop):
            list(quick.candidates(view_of(quick)))
    return seen[0]


def _everywhere():
    """DBD as every preset and every shipped matrix sets it, by name."""
    found = {f"preset {name}": DBD(**settings) for name, settings in presets()["dbd"].items()} | {f"preset {PUBLISHED}": DBD()}
    for name in matrix_names():
        methods = (cell.defense for cell in load_matrix(find_matrix(name)).cells)
        found |= {f"matrix {name}": method for method in methods if isinstance(method, DBD)}
    return found


@pytest.mark.parametrize(("name", "method"), _everywhere().items(), ids=lambda value: value if isinstance(value, str) else "")
def test_the_weight_of_unlabelled_samples_starts_low_at_every_length(name, method, view_of, data_of):
    """Official: MixMatch starts in epoch 10 of a ramp of 190, so with 10/190 of the final weight."""
    assert HEAD_START == 10 / 190
    assert _first_weight(method, view_of, data_of) == pytest.approx(method.unlabelled_weight * 10 / 190)
