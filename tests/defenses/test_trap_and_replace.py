from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from defenses import trap_and_replace
from defenses.base import Inapplicable, Knowledge
from defenses.trap_and_replace import TrapAndReplace, decoder, total_variation
from models import BACKBONES
from models.augmentations import cutmix
from models.backbone import before_block, unrolled
from models.cost import metered
from models.images import Batches, ImageSet
from models.recipe import Recipe
from models.resnet import WRN16, ResNet8
from models.spec import BadInput, derive_seed, generator

TINY = TrapAndReplace(epochs=2, batch=8, head_epochs=2, head_batch=8)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_total_variation_at_the_reference_value():
    """Closed-form input; the number comes from the authors' function."""
    images = 0.5 + 0.5 * torch.from_numpy(np.sin(0.11 * np.arange(1, 97))).float().view(2, 3, 4, 4)
    assert total_variation(images).item() == pytest.approx(0.01967018, abs=1e-5)


def test_total_variation_by_loops():
    x = torch.rand((2, 3, 4, 5), generator=generator(0, "images")).numpy()
    found = 0.0
    for n in range(2):
        for c in range(3):
            for i in range(4):
                for j in range(5):
                    found += (x[n, c, i + 1, j] - x[n, c, i, j]) ** 2 if i < 3 else 0.0
                    found += (x[n, c, i, j + 1] - x[n, c, i, j]) ** 2 if j < 4 else 0.0
    assert total_variation(torch.from_numpy(x)).item() == pytest.approx(found / x.size, rel=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES, ids=[backbone.name for backbone in BACKBONES])
@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_every_network_can_be_cut_decoded_and_put_together(backbone, blocks):
    for shape in ((3, 32, 32), (1, 28, 28)):
        net = backbone(width=2, hidden=4).build(10, shape, [0.5] * shape[0], [0.25] * shape[0], 0).eval()
        at, steps = before_block(net.features, blocks), unrolled(net.features)
        stem, tail = nn.Sequential(*steps[:at]), nn.Sequential(*steps[at:])
        images = torch.rand((2, *shape), generator=generator(0, "images"))
        with torch.no_grad():
            found = stem(net.normalise(images))
            assert torch.equal(tail(found), net.embed(images))
            rebuilt = decoder(tuple(found.shape[1:]), shape, 0)(found)
        assert rebuilt.shape == images.shape
        assert 0 <= rebuilt.min() <= rebuilt.max() <= 1
        convs = [step for step in tail if any(isinstance(part, nn.Conv2d) for part in step.modules())]
        assert len(convs) == blocks
        assert any(isinstance(part, nn.Conv2d) for part in stem.modules())
        ending = next(iter(tail.children()))
        assert not blocks or any(isinstance(part, nn.Conv2d) for part in ending.modules()), "the cut is next to the block"


def test_the_published_cut_and_decoder():
    """WRN-16-1: stem = first conv, two stages, one of two blocks of the third, 64 channels of 8 x 8 pixels."""
    net = WRN16(hidden=0).build(10, (3, 32, 32), [0.5] * 3, [0.25] * 3, 0).eval()
    at = before_block(net.features, 1)
    stem = unrolled(net.features)[:at]
    assert stem[-1] is net.features.layer3[0]
    assert unrolled(net.features)[at] is net.features.layer3[1]
    assert sum(map(id, stem)) == sum(
        map(id, (net.features.conv1, net.features.bn1, net.features.act, *net.features.layer1, *net.features.layer2, stem[-1]))
    )
    assert nn.Sequential(*stem)(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 8, 8)
    first, relu, last, sigmoid = decoder((64, 8, 8), (3, 32, 32), 0)
    for conv, sizes in ((first, (64, 32)), (last, (32, 3))):
        assert isinstance(conv, nn.ConvTranspose2d)
        assert (conv.in_channels, conv.out_channels, *conv.kernel_size, *conv.stride) == (*sizes, 4, 4, 2, 2)
    assert isinstance(relu, nn.ReLU)
    assert isinstance(sigmoid, nn.Sigmoid)
    assert unrolled(net.features)[before_block(net.features, 0)] is net.features.last[0]
    assert unrolled(net.features)[before_block(net.features, 2)] is net.features.layer3[0]


def test_cutmix_by_loops_and_its_share_is_that_of_the_pixels():
    draw = generator(0, "boxes")
    images, order = torch.rand((6, 2, 7, 9), generator=draw), torch.randperm(6, generator=draw)
    kept_shares = set()
    for _ in range(20):
        draws = torch.rand(3, generator=draw)
        keep, across, down = draws.tolist()
        wide, high = int(9 * (1 - keep) ** 0.5), int(7 * (1 - keep) ** 0.5)
        x, y = int(across * 9), int(down * 7)
        expected, inside = images.clone(), 0
        for i in range(7):
            for j in range(9):
                if y - high // 2 <= i < y + high // 2 and x - wide // 2 <= j < x + wide // 2:
                    expected[:, :, i, j] = images[order, :, i, j]
                    inside += 1
        mixed, kept = cutmix(images, order, draws)
        assert torch.equal(mixed, expected)
        assert kept == pytest.approx(1 - inside / 63)
        kept_shares.add(kept)
    assert len(kept_shares) > 5
    mixed, kept = cutmix(images, order, torch.tensor([0.9999, 0.5, 0.5]))
    assert torch.equal(mixed, images)
    assert kept == 1


def trap_by_hand(method, view, net, at, data):
    """The first training in plain PyTorch: Adam with a cosine by epoch, on the three losses."""
    steps = unrolled(net.features)
    stem, tail = nn.Sequential(*steps[:at]), nn.Sequential(*steps[at:])
    seed = derive_seed(view.seed, "trap-and-replace", "training")
    with torch.no_grad():
        found = stem.eval()(net.normalise(torch.zeros(1, 3, 8, 8)))
    rebuild = decoder(tuple(found.shape[1:]), (3, 8, 8), derive_seed(seed, "decoder"))
    optimizer = torch.optim.Adam([*net.parameters(), *rebuild.parameters()], lr=1e-3, weight_decay=5e-4)
    net.train()
    batches = Batches(data, 8, seed, crop=1, flip=True)
    for epoch in range(2):
        optimizer.param_groups[0]["lr"] = 1e-3 * 0.5 * (1 + np.cos(np.pi * epoch / 2))
        for images, labels, _ in batches:
            h = stem(net.normalise(images))
            x = rebuild(h)
            loss = cross_entropy(net.head(tail(h)), labels) + 10 * (x - images).square().mean() + total_variation(x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


def test_its_first_training_written_out(view_of, data_of, net_of):
    view = view_of(TINY)
    net, at = TINY.trap(view, 1)
    twin = trap_by_hand(TINY, view, net_of(derive_seed(view.seed, "trap-and-replace", "trap")), at, data_of(3, 32))
    for a, b in zip(net.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert at == 3


def test_its_second_training_written_out(view_of, data_of, net_of):
    """Adam on tail and head alone, CutMix in every batch, smoothed soft targets of both labels, no dropout here."""
    method = replace(TINY, dropout=0.0)
    view, trapped = view_of(method), net_of(8)
    found = method.replace(view, trapped, 3)
    net = net_of(derive_seed(view.seed, "trap-and-replace", "replace"))
    for i in range(3):
        net.features[i].load_state_dict(trapped.features[i].state_dict())
    own = [*net.features[3:].parameters(), *net.head.parameters()]
    optimizer = torch.optim.Adam(own, lr=0.03, weight_decay=5e-4)
    seed = derive_seed(view.seed, "trap-and-replace", "head")
    batches = Batches(data_of(1), 8, seed, crop=1, flip=True)
    net.features[3:].train()
    net.head.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for epoch in range(2):
            optimizer.param_groups[0]["lr"] = 0.03 * 0.5 * (1 + np.cos(np.pi * epoch / 2))
            for images, labels, _ in batches:
                order = torch.randperm(len(images))
                mixed, kept = cutmix(images, order, torch.rand(3))
                hard = kept * one_hot(labels, 4) + (1 - kept) * one_hot(labels[order], 4)
                soft = 0.9 * hard + 0.1 / 4
                optimizer.zero_grad()
                (-(soft * net(mixed).log_softmax(1)).sum(1).mean()).backward()
                optimizer.step()
    for a, b in zip(found.state_dict().values(), net.eval().state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backbone", BACKBONES, ids=[backbone.name for backbone in BACKBONES])
def test_the_stem_stays_bit_for_bit_and_all_behind_it_is_new(backbone, view_of, monkeypatch):
    """On every network of the catalogue: weights, running statistics and their counters; trained head and tail are not kept."""
    view = view_of(TINY)
    monkeypatch.setattr(view, "fresh", lambda seed: backbone(width=2, hidden=0).build(4, (3, 8, 8), [0.5] * 3, [0.25] * 3, seed))
    trapped, at = TINY.trap(view, 1)
    before = copy.deepcopy(trapped)
    found = TINY.replace(view, trapped, at)
    assert same(trapped, before)
    fresh = view.fresh(derive_seed(view.seed, "trap-and-replace", "replace"))
    old, new, start = (unrolled(net.features) for net in (trapped, found, fresh))
    assert all(same(a, b) for a, b in zip(old[:at], new[:at], strict=True))
    assert any(not same(a, b) for a, b in zip(start[:at], new[:at], strict=True))
    assert not same(old[at], new[at])
    assert not same(start[at], new[at])
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in found.modules())


def test_the_decoder_has_no_part_in_the_answer(view_of, monkeypatch):
    """Other weights of the decoder change the logits only through training; with no epochs, not at all."""
    method, found = replace(TINY, epochs=0), []
    for seed in range(2):
        monkeypatch.setattr(trap_and_replace, "decoder", lambda channels, shape, _, seed=seed: decoder(channels, shape, seed))
        found.append(next(method.candidates(view_of(method))).model)
    assert same(*found)


def test_poisoned_labels_reach_the_stem_alone(view_of, data_of):
    data = data_of(3, 32)
    other = ImageSet(data.images, data.labels.roll(1), 4)
    untrained, trained = replace(TINY, epochs=0), TINY
    for method, equal in ((untrained, True), (trained, False)):
        a, b = (next(method.candidates(view_of(method, train=given))).model for given in (data, other))
        assert same(a, b) is equal


def test_dropout_is_inside_the_new_block_while_training_alone(net_of):
    net = ResNet8(width=2, hidden=0).build(4, (3, 8, 8), [0.5] * 3, [0.25] * 3, 0)
    recipe = Recipe(epochs=1, batch=8)
    module = trap_and_replace._Replacing(net, recipe, before_block(net.features, 1), 0.1, 0.5)
    seen: list[Tensor] = []
    block = net.features.layer3[0]
    block.conv2.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    active: list[Tensor] = []
    block.bn1.register_forward_hook(lambda _, __, out: active.append(out.relu()))
    images = torch.rand((4, 3, 8, 8), generator=generator(0, "images"))
    module.train()
    net(images)
    positive = active[0] > 0
    dropped = (seen[0] == 0) & positive
    assert 0.4 < dropped.sum() / positive.sum() < 0.6
    torch.testing.assert_close(seen[0][positive & ~dropped], 2 * active[0][positive & ~dropped])
    module.eval()
    net(images)
    assert torch.equal(seen[1], active[1])
    plain = trap_and_replace._Replacing(net_of(hidden=0), recipe, before_block(net_of().features, 0), 0.1, 0.5)
    assert plain.net.head._forward_pre_hooks


def test_a_point_of_the_dial_is_the_training_with_so_many_blocks(view_of):
    method = replace(TINY, points=(0,))
    offered = list(method.candidates(view_of(method)))
    assert [(c.dial, c.is_default, c.strength) for c in offered] == [(0, False, 0), (1, True, 1)]
    alone = replace(TINY, blocks=0)
    assert same(next(alone.candidates(view_of(alone))).model, offered[0].model)
    assert all(c.isolated is None for c in offered)


def test_passes_of_both_trainings_are_counted(view_of):
    with metered() as cost:
        list(TINY.candidates(view_of(TINY)))
    assert (cost.forward, cost.backward) == (2 * 32 + 2 * 24, 2 * 32 + 2 * 24)


def test_it_needs_the_poisoned_set_and_clean_images(view_of, data_of, net_of):
    view = view_of(TINY)
    list(TINY.candidates(view))
    assert view.used == TINY.needs == Knowledge.TRAIN | Knowledge.CLEAN
    with pytest.raises(Inapplicable, match="clean budget holds 0 samples"):
        list(TINY.candidates(view_of(TINY, clean=data_of(0, 0))))
    with pytest.raises(Inapplicable, match="poisoned training set holds 1 samples"):
        list(TINY.candidates(view_of(TINY, train=data_of(0, 1))))


def test_networks_that_cannot_be_cut_are_refused(view_of, net_of, monkeypatch):
    deep = replace(TINY, blocks=2)
    with pytest.raises(Inapplicable, match="2 blocks in a row; 2 cannot be cut off"):
        list(deep.candidates(view_of(deep)))

    class Whole(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    def fresh(seed):
        net = net_of(seed)
        net.features = Whole(net.features)
        return net

    head = replace(TINY, blocks=0)
    view = view_of(head)
    monkeypatch.setattr(view, "fresh", fresh)
    with pytest.raises(Inapplicable, match="the features are one module"):
        list(head.candidates(view))


@pytest.mark.parametrize(
    "wrong",
    [{"blocks": -1}, {"rebuild_weight": -1.0}, {"variation_weight": -1.0}, {"epochs": -1}, {"lr": 11.0}, {"batch": 1},
     {"head_epochs": -1}, {"head_lr": 11.0}, {"head_batch": 1}, {"weight_decay": 2.0}, {"dropout": 1.0}, {"smoothing": 2.0},
     {"points": (-1,)}],
)  # fmt: skip
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(BadInput, match=f"trap-and-replace: {next(iter(wrong))} = "):
        TrapAndReplace(**wrong)


def test_the_recipes_are_the_published_ones():
    method, own = TrapAndReplace(), Recipe()
    trap = method.recipe(method.epochs, method.lr, method.batch, own)
    head = method.recipe(method.head_epochs, method.head_lr, method.head_batch, own)
    assert (trap.epochs, trap.lr, trap.batch) == (200, 1e-3, 256)
    assert (head.epochs, head.lr, head.batch) == (100, 0.03, 64)
    assert {(r.optimizer, r.schedule, r.weight_decay, r.crop, r.flip) for r in (trap, head)} == {("adam", "cosine", 5e-4, 4, True)}
