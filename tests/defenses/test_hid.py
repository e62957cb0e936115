from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from defenses.base import Inapplicable, Knowledge
from defenses.hid import HID, clean_split
from defenses.holder_pruning import holder_constants
from models.backbone import Network
from models.extractors import SelfSupervised, embeddings, fit_head, mlp
from models.images import ImageSet
from models.mixmatch import MixMatch
from models.spec import BadInput, derive_seed, generator
from models.training import fit
from models.units import Scope, Writer, fixed, prune, select, unit_layers

TINY = HID(
    ssl_epochs=1, ssl_batch=16, rounds=1, hidden=(6,), head_epochs=3, head_lr=0.05, head_batch=16, semi_epochs=1, semi_batch=8
)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def default(candidates):
    (chosen,) = [candidate for candidate in candidates if candidate.is_default]
    return chosen


def test_the_clean_split_is_that_of_a_loop():
    draw = generator(0, "logits")
    labels = torch.randint(0, 3, (50,), generator=draw)
    logits = 2 * torch.eye(3)[labels] + torch.randn(50, 3, generator=draw)
    expected = np.zeros(50, dtype=bool)
    losses = [-math.log(math.exp(r[y]) / sum(map(math.exp, r))) for r, y in zip(logits.tolist(), labels.tolist(), strict=True)]
    for label in range(3):
        members = sorted((i for i in range(50) if labels[i] == label), key=lambda i: (losses[i], i))
        for i in members[: math.floor(0.6 * len(members))]:
            expected[i] = int(np.argmax(logits[i].numpy())) == label
    found = clean_split(logits, labels, 0.6)
    assert found.tolist() == expected.tolist()
    assert 0 < int(found.sum()) < int((logits.argmax(1) == labels).sum())


def test_a_label_the_head_contradicts_is_never_clean():
    labels = torch.tensor([0, 0, 1])
    logits = torch.tensor([[5.0, 0.0], [0.0, 5.0], [0.0, 5.0]])
    assert clean_split(logits, labels, 1.0).tolist() == [True, False, True]


def test_one_round_without_pruning_is_its_four_stages(net_of, data_of, view_of):
    """Self-supervised features, head on the labels as given, split, semi-supervised training: the pipeline written out."""
    method = replace(TINY, rule="mean-std", u=100.0, grid=())
    view, data = view_of(method), data_of(3, 32)
    net = SelfSupervised("poisoned", 1, 16).build(view.fresh, data, view.recipe, derive_seed(view.seed, "extractor")).net
    seed = derive_seed(view.seed, "hid", "round", 0)
    z = embeddings(net, data)
    head = mlp(6, (6,), 4, derive_seed(seed, "head"))
    fit_head(head, z, data.labels, epochs=3, lr=0.05, batch=16, seed=derive_seed(seed, "fit"))
    clean = clean_split(head(z).detach(), data.labels, 0.5)
    twin = Network(net.normalise, net.features, head)
    recipe = replace(method.semi, crop=1)
    module = MixMatch(
        twin, recipe, lambda *_: clean, iterations=max(1, int(clean.sum()) // 8), sharpen=0.5, mixup=0.75, weight=15.0, ramp=1
    )
    fit(module, data, recipe, derive_seed(seed, "semi"))
    (candidate,) = method.candidates(view)
    assert same(candidate.model, twin)
    assert torch.equal(candidate.isolated, ~clean)
    assert candidate.pruned == 0
    assert 2 <= int(clean.sum()) <= 16


def test_the_inner_step_is_holder_pruning(net_of, data_of):
    net, data = net_of(hidden=8), data_of(3, 32)
    z = embeddings(net, data)
    eps = 0.1 * float(z.norm(dim=1).median()) / math.sqrt(6)
    layers = unit_layers(net, Scope.HEAD)
    scores = holder_constants(
        net, layers, [(z, data.labels)], alpha=0.5, radii=[eps], clip=False, space="feature"
    )
    found = TINY.constants(net, data, 0)
    torch.testing.assert_close(found["head.0"], scores["head.0"], rtol=1e-4, atol=1e-7)
    method = replace(TINY, rule="top-p", share=0.5)
    top = torch.argsort(scores["head.0"], descending=True)[:4]
    threshold = float(scores["head.0"][top].min()) * (1 - 1e-6)
    twin = prune(net, select(scores, fixed(threshold)), Writer.OUTPUT)
    pruned = method.pruned(net, data, 0)
    assert same(pruned.model, twin)
    assert pruned.pruned == 4
    assert same(replace(TINY, rule="none").pruned(net, data, 0).model, net)


def test_it_sorts_out_labels_that_the_images_contradict(net_of, data_of, view_of):
    """Four brightness levels; a fifth of the samples wear a wrong label. They must end among the isolated ones."""
    draw = generator(0, "levels")
    true = torch.arange(160) % 4
    images = (60 * true.view(-1, 1, 1, 1) + torch.randint(0, 15, (160, 3, 8, 8), generator=draw)).to(torch.uint8)
    wrong = torch.zeros(160, dtype=torch.bool)
    wrong[torch.randperm(160, generator=draw)[:32]] = True
    data = ImageSet(images, torch.where(wrong, torch.zeros_like(true), true), 4)
    wrong &= true != 0
    method = replace(TINY, ssl_epochs=0, rounds=2, hidden=(32,), head_epochs=60, head_lr=0.02, semi_epochs=2)
    chosen = default(method.candidates(view_of(method, train=data)))
    assert chosen.isolated is not None
    assert chosen.isolated[wrong].double().mean() > 0.9
    assert "taken for clean" in chosen.note


def test_rounds_end_once_the_split_has_settled(net_of, view_of):
    always = replace(TINY, rounds=5, settled=1.0)
    assert default(always.candidates(view_of(always))).note.startswith("1 rounds")
    never = replace(TINY, rounds=2, settled=0.0)
    assert default(never.candidates(view_of(never))).note.startswith("2 rounds")


def test_labels_guide_everything_but_the_extractor(data_of, view_of):
    data = data_of(3, 32)
    other = ImageSet(data.images, data.labels.roll(1), 4)
    method = replace(TINY, semi_epochs=0)
    a, b = (default(method.candidates(view_of(method, train=given))).model for given in (data, other))
    assert same(a.features, b.features)
    assert not same(a.head, b.head)


def test_it_needs_the_poisoned_set_alone(view_of, data_of):
    view = view_of(TINY)
    assert TINY.needs == Knowledge.TRAIN
    list(TINY.candidates(view))
    assert view.used == Knowledge.TRAIN
    with pytest.raises(Inapplicable, match="holds 1 samples"):
        list(TINY.candidates(view_of(TINY, train=data_of(3, 1))))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"rounds": 0}, "rounds"), ({"settled": 2.0}, "settled"), ({"hidden": ()}, "hidden"), ({"head_epochs": -1}, "head_epochs"),
     ({"head_lr": 11.0}, "head_lr"), ({"head_batch": 0}, "head_batch"), ({"rule": "fixed"}, "rule"), ({"alpha": 0.0}, "alpha"),
     ({"clean_share": 0.0}, "clean_share"), ({"sharpen": 0.0}, "sharpen"), ({"mixup": 0.0}, "mixup"), ({"ssl_lr": 11.0}, "lr"),
     ({"unlabelled_weight": -1.0}, "unlabelled_weight"), ({"semi_batch": 1}, "batch"), ({"ssl_epochs": -1}, "epochs")],
)  # fmt: skip
def test_settings_out_of_range_are_named(wrong, named):
    with pytest.raises(BadInput, match=f": {named} = "):
        HID(**wrong)
