"""Shared passes and remembered predictions: the plain predictions, bit for bit, with fewer layers run."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from models import BACKBONES, training
from models.backbone import Network
from models.images import to_float
from models.spec import generator, lookup
from models.training import predict
from models.units import EMBEDDING, Scope, Writer, embedding_layer, prune, top_share, unit_layers
from models.variants import Variants

NAMES = ("resnet8", "preact-resnet18", "wrn16-1", "vgg11-bn", "vgg11")


def made(name: str, seed: int = 0) -> Network:
    net = lookup("backbone", BACKBONES, name)(width=2, hidden=8).build(10, (1, 8, 8), [0.3], [0.4], seed)
    net.train()(to_float(pictures(64)))  # running statistics of its own
    return net.eval()


def pictures(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 1, 8, 8), generator=generator("variants", count), dtype=torch.uint8)


def edited(net: Network, writer: Writer) -> Iterator[Network]:
    """The network itself; pruned in one layer after the other, in the head, in what the classifier reads, and everywhere."""
    draw = generator("masks")
    layers = unit_layers(net, Scope.WHOLE)
    masks = {layer.name: top_share(0.4)(torch.rand(layer.size, generator=draw)) for layer in layers}
    yield copy.deepcopy(net)
    for layer in (*layers[::5], *reversed(layers[::4])):
        yield prune(net, {layer.name: masks[layer.name]}, writer)
    yield prune(net, {EMBEDDING: top_share(0.4)(torch.rand(embedding_layer(net).size, generator=draw))}, writer)
    yield prune(net, {layer.name: masks[layer.name] for layer in unit_layers(net, Scope.HEAD)}, writer)
    yield prune(net, masks, writer)
    moved = copy.deepcopy(net)
    with torch.no_grad():
        for value in moved.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=draw))
    yield moved


@pytest.mark.parametrize("room", [0, 30_000, 2**29])
@pytest.mark.parametrize("name", NAMES)
def test_predictions_and_logits_are_the_plain_ones(name: str, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net, sets = made(name), {"many": pictures(503 if name == "vgg11-bn" else 50), "few": pictures(20)}  # 503: a batch and a part
    variants, logits = Variants(net, sets, room), []
    argmax = Tensor.argmax
    monkeypatch.setattr(Tensor, "argmax", lambda x, dim: logits.append(x.clone()) or argmax(x, dim))
    ran = 0
    for one in edited(net, Writer.GAMMA):
        for which, images in sets.items():
            expected = predict(one, images)
            plain = torch.cat(logits)
            logits.clear()
            assert torch.equal(variants.predict(one, which), expected)
            if logits:  # otherwise they are remembered
                assert torch.equal(torch.cat(logits), plain), "not only the classes, which may agree by luck"
                ran += 1
            logits.clear()
    assert ran > 10
    held = sum(x.nbytes for kept in variants._kept.values() for batches in kept.values() for x in batches)
    assert held <= room
    assert (held > 0) == (room > 0)


def test_only_what_is_edited_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    net, ran = made("resnet8"), []
    variants = Variants(net, {"all": pictures(30)})
    run = nn.Module._call_impl

    def counted(module: nn.Module, x: Tensor) -> Tensor:
        if isinstance(module, nn.Conv2d | nn.Linear) and len(x) > 1:
            ran.append(module)
        return run(module, x)  # type: ignore[no-any-return]

    monkeypatch.setattr(nn.Module, "__call__", counted)

    def layers_run(one: Network) -> int:
        ran.clear()
        variants.predict(one, "all")
        return len(ran)

    def without(layer: str, first: int = 0) -> Network:
        mask = torch.zeros(net.get_submodule(layer).weight.shape[0], dtype=torch.bool)  # type: ignore[union-attr, arg-type]
        mask[first] = True
        return prune(net, {layer: mask}, Writer.GAMMA_BETA)

    assert layers_run(net) == 11  # stem, 2 + 3 + 3 in the blocks, 2 in the head
    assert layers_run(copy.deepcopy(net)) == 0
    assert layers_run(without("features.layer3.0.bn2")) == 3 + 2
    assert layers_run(without("features.layer3.0.bn2")) == 0, "the same weights in another network"
    assert layers_run(without("features.layer3.0.bn2", 1)) == 3 + 2, "another channel"
    assert layers_run(without("head.0")) == 2
    assert layers_run(without("features.bn1")) == 10
    assert layers_run(made("resnet8", seed=1)) == 11


def test_a_network_that_may_run_in_another_way_is_run_as_it_is() -> None:
    net, images = made("vgg11-bn"), pictures(20)
    variants = Variants(net, {"all": images, "none": images[:0]})
    before = variants.predict(net, "all")
    hooked = copy.deepcopy(net)
    hooked.head.register_forward_hook(lambda _module, _inputs, out: out.roll(1, dims=1))
    assert torch.equal(variants.predict(hooked, "all"), (before + 1) % 10)
    negated = copy.deepcopy(net)
    negated.features[1].eps = 10.0  # no part of the state
    assert torch.equal(variants.predict(negated, "all"), predict(negated, images))
    assert variants.predict(net, "none").shape == (0,)


def test_a_layer_that_writes_into_its_input_spoils_nothing() -> None:
    net, images = made("vgg11-bn"), pictures(60)
    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
    variants = Variants(net, {"all": images})
    for one in (*edited(net, Writer.GAMMA), *edited(net, Writer.GAMMA_BETA)):
        assert torch.equal(variants.predict(one, "all"), predict(one, images))


def test_a_batch_without_memory_is_tried_again_and_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net, images = made("resnet8"), pictures(120)
    expected = predict(net, images)
    variants, head = Variants(net, {"all": images}), type(net.head[0])
    forward = head.forward

    def cramped(module: nn.Linear, x: Tensor) -> Tensor:
        if len(x) > 64:
            raise MemoryError
        return forward(module, x)

    monkeypatch.setattr(head, "forward", cramped)
    assert torch.equal(variants.predict(net, "all"), expected)
    assert all(sum(map(len, batches)) == 120 for batches in variants._kept["all"].values())
    assert training.FLOOR <= 64


def test_no_more_predictions_are_kept_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.variants.KNOWN", 3)
    net, images = made("vgg11-bn"), pictures(20)
    variants = Variants(net, {"all": images})
    for one in edited(net, Writer.GAMMA):
        assert torch.equal(variants.predict(one, "all"), predict(one, images))
        assert len(variants._known) <= 3
