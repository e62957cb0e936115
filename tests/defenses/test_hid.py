from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from defenses import hid
from defenses.base import Inapplicable, Knowledge
from defenses.hid import HID, clean_split, mixmatch_loss, sharpened
from defenses.holder_pruning import holder_constants
from models.backbone import Network
from models.extractors import SelfSupervised, embeddings, fit_head, mlp
from models.images import ImageSet, to_float
from models.spec import BadInput, derive_seed, generator
from models.training import fit
from models.units import Scope, Writer, fixed, prune, select, unit_layers

TINY = HID(
    ssl_epochs=1, ssl_batch=16, rounds=1, hidden=(6,), head_epochs=3, head_lr=0.05, head_batch=16, semi_epochs=1, semi_batch=8
)


def sines(count: int, step: float, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.sin(step * np.arange(1, count + 1))).float().view(shape)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def default(candidates):
    (chosen,) = [candidate for candidate in candidates if candidate.is_default]
    return chosen


def test_mixmatch_losses_at_the_reference_values():
    """Closed-form inputs; the two numbers come from DBD's authors' functions."""
    given = torch.eye(10)[torch.tensor([1, 2, 3, 4])]
    lx, lu = mixmatch_loss(
        2 * sines(40, 0.3, 4, 10), given, 2 * sines(80, 0.9, 8, 10), sines(80, 0.4, 8, 10).softmax(1)
    )
    assert lx.item() == pytest.approx(2.60990357, rel=1e-6)
    assert lu.item() == pytest.approx(0.01453918, rel=1e-5)


def test_sharpening_by_hand():
    p = torch.tensor([[0.5, 0.3, 0.2]])
    expected = [v**2 / (0.25 + 0.09 + 0.04) for v in (0.5, 0.3, 0.2)]
    assert sharpened(p, 0.5)[0].tolist() == pytest.approx(expected)
    torch.testing.assert_close(sharpened(p, 1.0), p)


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


def test_one_mixmatch_step_against_plain_numpy(net_of, data_of, monkeypatch):
    """Guess, sharpen, mix with one share, both losses at the ramp's place: written out on the network's own probabilities."""
    net, labelled, unlabelled = net_of(), data_of(1, 6), data_of(2, 10)
    recipe = replace(TINY.semi, crop=0, flip=False)
    module = hid._MixMatch(net, recipe, unlabelled, replace(TINY, unlabelled_weight=3.0), 0)
    module.total_steps = 4
    first, second = to_float(unlabelled.images[:6]), to_float(unlabelled.images[4:])
    monkeypatch.setattr(module, "two_views", lambda count: (first, second))
    monkeypatch.setattr(type(module), "global_step", 1)
    order = torch.randperm(18, generator=generator(0, "order"))
    monkeypatch.setattr(torch, "randperm", lambda count: order)
    share = torch.tensor(0.3)
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self: share)
    images = to_float(labelled.images)
    loss = module.eval().training_step((images, labelled.labels, torch.arange(6)), 0).item()

    def probabilities(x):
        with torch.no_grad():
            return net(x).double().softmax(1).numpy()

    guess = ((probabilities(first) + probabilities(second)) / 2) ** 2
    guess /= guess.sum(1, keepdims=True)
    targets = np.concatenate([np.eye(4)[labelled.labels], guess, guess])
    inputs = torch.cat([images, first, second])
    p = probabilities(0.7 * inputs + 0.3 * inputs[order])
    mixed = 0.7 * targets + 0.3 * targets[order.numpy()]
    lx = -(mixed[:6] * np.log(p[:6])).sum(1).mean()
    lu = np.square(p[6:] - mixed[6:]).mean()
    assert loss == pytest.approx(lx + 3.0 * 1 / 4 * lu, rel=1e-4)


def test_two_views_show_the_same_images_each_with_its_own_crop(net_of, data_of):
    images = torch.arange(10, dtype=torch.uint8).mul(20).view(-1, 1, 1, 1).expand(10, 3, 8, 8).contiguous()
    data = ImageSet(images, torch.zeros(10, dtype=torch.int64), 4)
    module = hid._MixMatch(net_of(), replace(TINY.semi, crop=2, flip=False), data, TINY, 0)
    first, second = module.two_views(7)
    assert torch.equal(first.amax((1, 2, 3)), second.amax((1, 2, 3)))
    assert first.shape == (7, 3, 8, 8)
    assert not torch.equal(first, second)


def test_one_round_without_pruning_is_its_four_stages(net_of, data_of, view_of):
    """Self-supervised features, head on the labels as given, split, semi-supervised training: the pipeline written out."""
    method = replace(TINY, rule="mean-std", u=100.0, grid=())
    view, data = view_of(method), data_of(3, 32)
    net = SelfSupervised("poisoned", 1, 16).build(view.fresh, data, view.recipe, derive_seed(view.seed, "hid", "extractor")).net
    seed = derive_seed(view.seed, "hid", "round", 0)
    z = embeddings(net, data)
    head = mlp(6, (6,), 4, derive_seed(seed, "head"))
    fit_head(head, z, data.labels, epochs=3, lr=0.05, batch=16, seed=derive_seed(seed, "fit"))
    clean = clean_split(head(z).detach(), data.labels, 0.5)
    twin = Network(net.normalise, net.features, head)
    recipe = replace(method.semi, crop=1)
    fit(hid._MixMatch(twin, recipe, data.subset(~clean), method, derive_seed(seed, "unlabelled")), data.subset(clean), recipe,
        derive_seed(seed, "semi"))  # fmt: skip
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
    assert same(method.pruned(net, data, 0), twin)


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


def test_soft_cross_entropy_is_what_torch_means_by_it():
    logits, targets = sines(12, 0.7, 3, 4), sines(12, 0.2, 3, 4).softmax(1)
    by_hand = -(targets * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(cross_entropy(logits, targets), by_hand)
