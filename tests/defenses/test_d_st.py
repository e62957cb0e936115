from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from defenses import d_st
from defenses.base import Inapplicable, Knowledge
from defenses.d_st import DST, semi_supervised_contrastive_loss, warmed_up
from models.augmentations import VIEW_DRAWS, simclr_view
from models.backbone import Network
from models.cost import metered
from models.extractors import mlp
from models.images import Batches
from models.recipe import Recipe
from models.simclr import contrastive_loss
from models.spec import BadInput, derive_seed, generator, uniforms
from models.training import seeded

TINY = DST(
    probe_epochs=1, intra_epochs=1, probe_batch=16, clean_share=0.5, poisoned_share=0.2, ssl_epochs=2, ssl_batch=16,
    warm_up_epochs=1, head_epochs=2, head_batch=8, head_lr=0.1, grid=(),
)  # fmt: skip


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def pairs() -> torch.Tensor:
    z = torch.from_numpy(np.sin(0.37 * np.arange(1, 61))).float().view(6, 2, 5)
    return z / z.norm(dim=-1, keepdim=True)


LABELS = torch.tensor([0, 0, 1, 1, 0, 1])
CLEAN = torch.tensor([0, 0, 0, 2, 1, 0]) == 0  # the others are uncertain and poisoned


def by_loops(z: torch.Tensor, labels: list[int], clean: list[bool], t: float) -> float:
    flat = [*z[:, 0].double().numpy(), *z[:, 1].double().numpy()]
    flat = [row / np.linalg.norm(row) for row in flat]
    size, terms = len(labels), []
    for i in range(2 * size):
        own = i % size
        positives = []
        for j in range(2 * size):
            if j == i:
                continue
            second_view = j % size == own
            if second_view or (clean[own] and labels[j % size] == labels[own]):
                positives.append(j)
        others = math.log(sum(math.exp(flat[i] @ flat[k] / t) for k in range(2 * size) if k != i))
        terms.append(np.mean([flat[i] @ flat[p] / t - others for p in positives]))
    return -t / 0.07 * float(np.mean(terms))


def test_the_loss_at_the_reference_value():
    """Closed-form input; the number comes from the authors' function."""
    assert semi_supervised_contrastive_loss(pairs(), LABELS, CLEAN, 0.1).item() == pytest.approx(16.04530334, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_the_loss_by_loops_ignores_length(temperature):
    expected = by_loops(pairs(), LABELS.tolist(), CLEAN.tolist(), temperature)
    assert semi_supervised_contrastive_loss(pairs(), LABELS, CLEAN, temperature).item() == pytest.approx(expected, rel=1e-5)
    longer = pairs() * torch.linspace(0.5, 3, 12).view(6, 2, 1)
    assert semi_supervised_contrastive_loss(longer, LABELS, CLEAN, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_the_positives_are_not_symmetric():
    """A clean anchor is pulled to a poisoned sample of its label, which is itself pulled to its second view alone."""
    z = pairs()[:2]
    labels = torch.tensor([0, 0])
    both, one, none = (
        semi_supervised_contrastive_loss(z, labels, torch.tensor(clean), 0.1).item()
        for clean in ((True, True), (True, False), (False, False))
    )
    assert one == pytest.approx(by_loops(z, [0, 0], [True, False], 0.1), rel=1e-5)
    assert len({round(value, 4) for value in (both, one, none)}) == 3


def test_without_clean_samples_it_is_the_symmetric_contrastive_loss():
    nobody = torch.zeros(6, dtype=torch.bool)
    expected = 0.1 / 0.07 * contrastive_loss(pairs(), 0.1, symmetric=True).item()
    assert semi_supervised_contrastive_loss(pairs(), LABELS, nobody, 0.1).item() == pytest.approx(expected, rel=1e-5)


def test_the_rate_grows_for_ten_epochs_then_falls_along_a_cosine():
    """As the formulas of the recipe have it, at a peak of 0.5."""

    def expected(epoch: int) -> float:
        low = 0.5 * 0.1**3
        return low + (0.5 - low) * (1 + math.cos(math.pi * epoch / 200)) / 2

    for epoch in (10, 57, 199):
        assert 0.5 * warmed_up(epoch + 0.7, 200, 10) == pytest.approx(expected(epoch))
    for done in (0, 3.25, 9.99):
        assert 0.5 * warmed_up(done, 200, 10) == pytest.approx(0.01 + (expected(10) - 0.01) * done / 10)
    assert warmed_up(0, 5, 0) == 1
    assert warmed_up(2, 2, 10) < 1


def test_its_extractor_written_out(view_of, data_of, net_of):
    """Two views of every image, a projection without norm, the loss above, SGD: a plain loop."""
    view, data = view_of(TINY), data_of(3, 32)
    clean = torch.arange(32) % 3 == 0
    net, seed = net_of(derive_seed(view.seed, "d-st", "weights")).train(), derive_seed(view.seed, "d-st", "extractor")
    with seeded(derive_seed(seed, "projection")):
        projection = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 128))
    lr = 0.5 * 16 / 512
    optimizer = torch.optim.SGD([*net.features.parameters(), *projection.parameters()], lr=lr, momentum=0.9, weight_decay=1e-4)
    batches, step = Batches(data, 16, seed), 0
    for epoch in range(2):
        for images, labels, index in batches:
            optimizer.param_groups[0]["lr"] = lr * warmed_up(step / 2, 2, 1)
            keys = [derive_seed(seed, "view", number, epoch) for number in range(2)]
            views = torch.cat([simclr_view(images, uniforms(key, index, VIEW_DRAWS), True, 0.0) for key in keys])
            z = projection(net.embed(views))
            optimizer.zero_grad()
            semi_supervised_contrastive_loss(torch.stack(z.chunk(2), 1), labels, clean[index], 0.1).backward()
            optimizer.step()
            step += 1
    found = TINY.extractor_of(view, clean)
    for a, b in zip(found.features.state_dict().values(), net.features.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert same(found.head, mlp(6, (), 4, derive_seed(seed, "head")))


def test_its_classifier_written_out(view_of, data_of, monkeypatch):
    """Strong views, frozen features, cross-entropy of clean minus a weight times that of poisoned; uncertain samples left out."""
    method = replace(TINY, ssl_epochs=0, unlearning=0.3)
    view, data = view_of(method), data_of(3, 32)
    clean, poisoned = torch.arange(32) % 3 == 0, torch.arange(32) % 8 == 1
    monkeypatch.setattr(DST, "distinguish", lambda *_: (clean, poisoned, torch.zeros(len(clean))))
    net = method.extractor_of(view, clean)
    used = clean | poisoned
    part, bad, seed = data.subset(used), poisoned[used], derive_seed(view.seed, "d-st", "head")
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1, momentum=0.9)
    batches = Batches(part, 8, seed)
    for epoch in range(2):
        for images, labels, index in batches:
            views = simclr_view(images, uniforms(derive_seed(seed, "view", epoch), index, VIEW_DRAWS), True, 0.0)
            with torch.no_grad():
                z = net.eval().embed(views)
            loss = torch.zeros(())
            for side, weight in ((~bad[index], 1.0), (bad[index], -0.3)):
                if side.any():
                    loss = loss + weight * cross_entropy(net.head(z[side]), labels[side])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    (candidate,) = method.candidates(view)
    for a, b in zip(candidate.model.state_dict().values(), net.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert torch.equal(candidate.isolated, poisoned)


def test_a_batch_without_one_side_has_the_loss_of_the_other(net_of):
    logits, labels = torch.randn(4, 3, generator=generator(0, "logits")), torch.tensor([0, 1, 2, 0])
    for poisoned, factor in ((torch.zeros(4, dtype=torch.bool), 1.0), (torch.ones(4, dtype=torch.bool), -0.5)):
        module = d_st._Classifying(net_of(), Recipe(epochs=1, batch=8), poisoned, 0.5, True, 0)
        found = module.loss(logits, labels, torch.arange(4))
        assert found.item() == pytest.approx(factor * cross_entropy(logits, labels).item(), rel=1e-6)


def test_weights_of_the_dial_share_their_extractor(view_of):
    method = replace(TINY, grid=(0.0, 0.5))
    offered = list(method.candidates(view_of(method)))
    assert [(c.dial, c.is_default, c.strength) for c in offered] == [(0, False, 0), (0.001, True, 0.001), (0.5, False, 0.5)]
    assert same(offered[0].model.features, offered[2].model.features)
    assert not same(offered[0].model.head, offered[2].model.head)
    alone = replace(TINY, unlearning=0.5)
    assert same(next(alone.candidates(view_of(alone))).model, offered[2].model)
    assert all(isinstance(c.model, Network) and len(c.model.head) == 1 for c in offered)


def test_passes_are_counted(view_of):
    with metered() as cost:
        list(TINY.candidates(view_of(TINY)))
    probe, views, used = 2 * 32, 2 * 2 * 32, 2 * (6 + 17)  # the last batch of 23 has 7 samples
    assert (cost.forward, cost.backward) == (probe + 2 * 32 + views + used, probe + views)


def test_it_needs_the_poisoned_set_alone(view_of):
    view = view_of(TINY)
    list(TINY.candidates(view))
    assert view.used == TINY.needs == Knowledge.TRAIN
    few = replace(TINY, poisoned_share=0.05)
    with pytest.raises(Inapplicable, match=r"poisoned_share = 0\.05 of 32 samples"):
        list(few.candidates(view_of(few)))


@pytest.mark.parametrize(
    "wrong",
    [{"ssl_epochs": -1}, {"ssl_batch": 1}, {"ssl_lr": 11.0}, {"warm_up_epochs": -1}, {"temperature": 0.0},
     {"ssl_weight_decay": 2.0}, {"head_epochs": -1}, {"head_batch": 1}, {"head_lr": 11.0}, {"unlearning": -1.0}, {"grid": (-1.0,)},
     {"clean_share": 1.0}],
)  # fmt: skip
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(BadInput, match=f"d-st: {next(iter(wrong))} = "):
        DST(**wrong)
