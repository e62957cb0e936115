from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from defenses import cbd
from defenses.base import Inapplicable, Knowledge
from defenses.cbd import CBD, Critic, sample_weights
from models.augmentations import cutout
from models.cost import metered
from models.images import Batches, ImageSet
from models.recipe import Recipe
from models.spec import BadInput, derive_seed, generator, uniforms
from models.training import fit, seeded

TINY = CBD(biased_epochs=1, epochs=2, batch=8, hole=1)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_weights_at_the_reference_values():
    """Closed-form input; the numbers come from the authors' function."""
    found = sample_weights(torch.tensor([0.01, 1, 2, 4]), torch.tensor([2, 1, 0.5, 0.1]))
    assert found.tolist() == pytest.approx([0.00872605, 0.87696803, 1.40314889, 1.71115720], abs=1e-5)


def test_weights_by_a_loop_have_mean_one():
    draw = generator(0, "losses")
    biased, clean = (torch.rand(9, generator=draw) * 3 for _ in range(2))
    plain = [b / (c + b + 1e-8) for b, c in zip(biased.tolist(), clean.tolist(), strict=True)]
    expected = [9 * w / sum(plain) for w in plain]
    found = sample_weights(biased, clean)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert found.mean().item() == pytest.approx(1)


def test_the_critics_estimate_by_loops():
    critic, draw = Critic(3, 0).eval(), generator(0, "pairs")
    r, z = (torch.randn(5, 3, generator=draw) for _ in range(2))
    (first, last) = (module for module in critic.net if isinstance(module, nn.Linear))

    def value(i: int, j: int) -> float:
        x = np.concatenate([r[i].numpy(), z[j].numpy()])
        h = first.weight.detach().numpy() @ x + first.bias.detach().numpy()
        h = np.where(h > 0, h, 0.01 * h)
        return float(last.weight.detach().numpy()[0] @ h + last.bias.item())

    expected = 0.01 * np.mean([value(i, i) - value(i, (i + 1) % 5) for i in range(5)])
    assert critic(r, z).item() == pytest.approx(expected, rel=1e-5)
    assert critic(r, z[:1].expand(5, -1)).item() == pytest.approx(0, abs=1e-7)


def test_a_critic_is_divided_by_the_largest_singular_value():
    """Closed-form matrix; the authors' function divides by the square root of that value, 1.62882400."""
    matrix = torch.from_numpy(np.sin(0.21 * np.arange(1, 13))).float().view(3, 4)
    critic = Critic(2, 0)
    critic.net[1] = nn.Linear(4, 3)
    with torch.no_grad():
        critic.net[1].weight.copy_(matrix)
    bias = critic.net[1].bias.clone()
    critic.normalise()
    torch.testing.assert_close(critic.net[1].weight, matrix / 2.65306759, rtol=1e-5, atol=1e-6)
    assert math.sqrt(2.65306759) == pytest.approx(1.62882400, rel=1e-6)
    assert torch.equal(critic.net[1].bias, bias)
    for module in critic.net:
        if isinstance(module, nn.Linear):
            assert torch.linalg.matrix_norm(module.weight, 2).item() == pytest.approx(1, rel=1e-5)


def test_its_two_trainings_written_out(view_of, data_of, net_of):
    """A biased network by plain training with Cutout, then weighted steps of SGD at 1, a tenth, a hundredth of the rate."""
    method = replace(TINY, epochs=4, points=())
    view, data = view_of(method), data_of(3, 32)
    recipe = method.recipe(1, view.recipe)
    own = derive_seed(view.seed, "cbd", "shortcut")
    biased = net_of(derive_seed(view.seed, "cbd", "biased"))
    fit(cbd.CutOut(biased, recipe, 1, own), data, recipe, own)
    net, seed = net_of(derive_seed(view.seed, "cbd", "weights")), derive_seed(view.seed, "cbd", "training")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    batches = Batches(data, 8, seed, crop=1, flip=True)
    for epoch, lr in enumerate((0.1, 0.01, 0.01, 0.001)):  # up to 0.2 x 4 and 0.7 x 4 epochs
        optimizer.param_groups[0]["lr"] = lr
        net.train()
        for images, labels, index in batches:
            images = cutout(images, uniforms(derive_seed(seed, "cutout", epoch), index, 2), 1)
            with torch.no_grad():
                shortcut = cross_entropy(biased.eval()(images), labels, reduction="none")
            losses = cross_entropy(net(images), labels, reduction="none")
            share = shortcut / (losses.detach() + shortcut + 1e-8)
            optimizer.zero_grad()
            (losses * share / share.mean()).mean().backward()
            optimizer.step()
    (candidate,) = method.candidates(view)
    for a, b in zip(candidate.model.state_dict().values(), net.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert candidate.isolated is None


def test_rates_are_the_published_ones_at_full_length(net_of):
    module = cbd._Deconfounded(net_of(), CBD().recipe(100, TINY.recipe(1, view_recipe())), 0, 0, net_of(1), None, 0.2)
    seen = [module.rate_factor(epoch) for epoch in (0, 19, 19.99, 20, 69, 70, 99)]
    assert seen == [1, 1, 1, 0.1, 0.1, 0.01, 0.01]


def view_recipe() -> Recipe:
    return Recipe(epochs=1, batch=8, crop=1)


def test_a_point_of_the_dial_is_the_training_that_ends_there(view_of):
    method = replace(TINY, points=(0, 2))
    offered = list(method.candidates(view_of(method)))
    assert [(c.dial, c.is_default, c.strength) for c in offered] == [(0, False, 0), (1, True, 1), (2, False, 2)]
    alone = replace(TINY, biased_epochs=2)
    assert same(next(alone.candidates(view_of(alone))).model, offered[2].model)
    assert not same(offered[1].model, offered[2].model)


def test_the_critic_matters_with_disentangling_alone(view_of):
    plain, other = (replace(TINY, critic_lr=lr) for lr in (0.2, 0.1))
    a, b = (next(method.candidates(view_of(method))).model for method in (plain, other))
    assert same(a, b)
    with_critic, other = (replace(TINY, critic_lr=lr, disentangle=True) for lr in (0.2, 0.1))
    c, d = (next(method.candidates(view_of(method))).model for method in (with_critic, other))
    assert not same(a, c)
    assert not same(c, d)


def test_a_critic_learns_to_see_what_two_embeddings_share(net_of, data_of):
    """Trained on an untrained network beside itself: the estimate grows, and neither network changes."""
    recipe, net, twin = CBD(batch=32).recipe(1, view_recipe()), net_of(), net_of()
    module = cbd._Deconfounded(net, recipe, 0, 0, net_of(), Critic(6, 0), 0.01)
    data = data_of(3, 32)
    module.loader(data, 0)
    images = next(iter(module.passes))[0]
    z = net.embed(images).detach()
    before = module.train().critic(z, z).item()
    with seeded(0):
        for _ in range(20):
            module.on_train_epoch_start()
    after = module.critic(z, z).item()
    assert after > before
    assert same(net, twin)
    assert not module.biased.training
    assert not module.critic.training
    assert module.net.training


def test_passes_of_both_networks_are_counted(view_of):
    with metered() as cost:
        list(TINY.candidates(view_of(TINY)))
    assert (cost.forward, cost.backward) == (32 + 2 * 2 * 32, 32 + 2 * 32)
    method = replace(TINY, disentangle=True)
    with metered() as cost:
        list(method.candidates(view_of(method)))
    assert (cost.forward, cost.backward) == (32 + 4 * 2 * 32, 32 + 2 * 32)


def test_samples_that_are_learned_early_are_hardly_learned(view_of):
    """Four brightness levels; a quarter of the samples wear a bright corner and label 0. The corner is the shortcut."""
    draw = generator(0, "levels")
    true = torch.arange(320) % 4
    images = (40 * true.view(-1, 1, 1, 1) + torch.randint(0, 80, (320, 3, 8, 8), generator=draw)).to(torch.uint8)
    poison = torch.zeros(320, dtype=torch.bool)
    poison[torch.randperm(320, generator=draw)[:80]] = True
    images[poison, :, :4, :4] = 255
    data = ImageSet(images, torch.where(poison, torch.zeros_like(true), true), 4)
    method = CBD(biased_epochs=6, epochs=4, batch=16, hole=0)
    view = view_of(method, train=data)
    biased = method.biased(view, data, 6)
    with torch.no_grad():
        losses = cross_entropy(biased(images / 255), data.labels, reduction="none")
    weights = sample_weights(losses, torch.full_like(losses, math.log(4)))
    assert weights[poison].mean() < 0.7 * weights[~poison].mean()


def test_it_needs_the_poisoned_set_alone(view_of, data_of):
    view = view_of(TINY)
    list(TINY.candidates(view))
    assert view.used == TINY.needs == Knowledge.TRAIN
    with pytest.raises(Inapplicable, match="holds 1 samples"):
        list(TINY.candidates(view_of(TINY, train=data_of(3, 1))))


@pytest.mark.parametrize(
    "wrong",
    [{"biased_epochs": -1}, {"epochs": -1}, {"lr": 11.0}, {"batch": 1}, {"weight_decay": 2.0}, {"hole": -1},
     {"critic_lr": 11.0}, {"points": (-1,)}],
)  # fmt: skip
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(BadInput, match=f"cbd: {next(iter(wrong))} = "):
        CBD(**wrong)
