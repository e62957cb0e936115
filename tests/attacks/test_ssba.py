from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attacks.base import Plan, Power, Role, apply, poison, uniforms
from attacks.ssba import SSBA, Decoder, Encoder, Hiding, Stamp, image_weight_at
from models.images import ImageSet, quantise, to_float
from models.recipe import Recipe
from models.spec import BadInput, derive_seed, generator
from models.training import Diverged, seeded

TINY = SSBA(bits=4, epochs=1, batch=16, lr=1e-3, width=2, min_bit_accuracy=0.0, min_psnr=0.0)


def pictures(count: int, shape: tuple[int, int, int], classes: int = 4) -> ImageSet:
    draw = torch.Generator().manual_seed(4)
    coarse = torch.rand(count, shape[0], 3, 3, generator=draw)
    images = quantise(torch.nn.functional.interpolate(coarse, size=shape[1:], mode="bilinear", align_corners=True))
    return ImageSet(images, torch.randint(0, classes, (count,), generator=draw), classes)


# -- the networks, layer by layer in loops -------------------------------------------------------------------------------------


def conv_by_hand(x: np.ndarray, conv: nn.Conv2d, stride: int, before: int, after: int) -> np.ndarray:
    """(C, H, W) -> (O, H', W'), with so many zeros before and after the pixels of either axis."""
    weight, bias = conv.weight.detach().double().numpy(), conv.bias.detach().double().numpy()
    size = weight.shape[2]
    padded = np.pad(x, ((0, 0), (before, after), (before, after)))
    height, width = ((side - size) // stride + 1 for side in padded.shape[1:])
    out = np.zeros((len(weight), height, width))
    for o, i, j in np.ndindex(*out.shape):
        out[o, i, j] = bias[o] + (weight[o] * padded[:, i * stride : i * stride + size, j * stride : j * stride + size]).sum()
    return out


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def enlarged_by_hand(x: np.ndarray, height: int, width: int) -> np.ndarray:
    out = np.zeros((len(x), height, width))
    for i, j in np.ndindex(height, width):
        out[:, i, j] = x[:, i * x.shape[1] // height, j * x.shape[2] // width]
    return out


def encoded_by_hand(image: np.ndarray, bits: np.ndarray, net: Encoder) -> np.ndarray:
    spread = net.spread.weight.detach().double().numpy() @ bits + net.spread.bias.detach().double().numpy()
    secret = relu(spread).reshape(net.channels, 16, 16)
    inputs = np.concatenate([enlarged_by_hand(secret, *image.shape[1:]), image])
    one = relu(conv_by_hand(inputs, net.down[0], 1, 1, 1))
    two = relu(conv_by_hand(one, net.down[1], 2, 1, 1))
    three = relu(conv_by_hand(two, net.down[2], 2, 1, 1))
    four = relu(conv_by_hand(three, net.down[3], 2, 1, 1))
    x = relu(conv_by_hand(four, net.down[4], 2, 1, 1))
    for stage, beside in enumerate([[four], [three], [two], [one, inputs]]):
        up = relu(conv_by_hand(enlarged_by_hand(x, *beside[0].shape[1:]), net.up[stage], 1, 0, 1))
        joined = [beside[0], *beside[1:], up]
        x = relu(conv_by_hand(np.concatenate(joined), net.merge[stage], 1, 1, 1))
    x = conv_by_hand(relu(conv_by_hand(x, net.refine, 1, 1, 1)), net.paint, 1, 0, 0)
    return 1 / (1 + np.exp(-x))


def decoded_by_hand(image: np.ndarray, net: Decoder) -> np.ndarray:
    convs = [layer for layer in net.layers if isinstance(layer, nn.Conv2d)]
    x = image
    for conv, stride in zip(convs, [2, 1, 2, 1, 2, 2, 2], strict=True):
        x = relu(conv_by_hand(x, conv, stride, 1, 1))
    first, last = (layer for layer in net.layers if isinstance(layer, nn.Linear))
    x = relu(first.weight.detach().double().numpy() @ x.ravel() + first.bias.detach().double().numpy())
    return last.weight.detach().double().numpy() @ x + last.bias.detach().double().numpy()


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 16, 16), (1, 9, 20), (2, 8, 35)])
def test_encoder_and_decoder_equal_their_layers_in_loops(channels, height, width) -> None:
    with seeded(1):
        encoder, decoder = Encoder(5, channels, 2), Decoder(5, (channels, height, width), 2, hidden=6)
    draw = torch.Generator().manual_seed(2)
    image = torch.rand(1, channels, height, width, generator=draw)
    bits = torch.tensor([[1.0, 0.0, 0.0, 1.0, 1.0]])
    pixels = image[0].double().numpy()
    with torch.no_grad():
        hidden = encoder(image, bits)
        assert np.allclose(hidden[0], encoded_by_hand(pixels, bits[0].double().numpy(), encoder), atol=1e-5)
        assert np.allclose(decoder(image)[0], decoded_by_hand(pixels, decoder), atol=1e-5)
    assert hidden.shape == image.shape


def test_the_networks_have_the_published_widths() -> None:
    encoder, decoder = Encoder(100, 3, 32), Decoder(100, (3, 32, 32), 32)

    def sizes(net: nn.Module) -> list[tuple[int, int]]:
        return [(conv.in_channels, conv.out_channels) for conv in net.modules() if isinstance(conv, nn.Conv2d)]

    assert sizes(encoder.down) == [(6, 32), (32, 32), (32, 64), (64, 128), (128, 256)]
    assert sizes(encoder.up) == [(256, 128), (128, 64), (64, 32), (32, 32)]
    assert sizes(encoder.merge) == [(256, 128), (128, 64), (64, 32), (32 + 32 + 6, 32)]
    assert sizes(decoder) == [(3, 32), (32, 32), (32, 64), (64, 64), (64, 64), (64, 128), (128, 128)]
    linear = [(layer.in_features, layer.out_features) for layer in decoder.modules() if isinstance(layer, nn.Linear)]
    assert linear == [(128, 512), (512, 100)]


# -- the loss ------------------------------------------------------------------------------------------------------------------


def test_the_image_weight_waits_and_then_grows_on_a_line() -> None:
    found = [image_weight_at(since, 10.0, 1000, 3000) for since in (None, 0, 999, 1000, 1300, 2500, 4000, 9999)]
    assert found == pytest.approx([0, 0, 0, 0, 1, 5, 10, 10])


def hiding(attack: SSBA, shape: tuple[int, int, int]) -> Hiding:
    with seeded(1):
        encoder, decoder = Encoder(attack.bits, shape[0], attack.width), Decoder(attack.bits, shape, attack.width, hidden=6)
    return Hiding(encoder, decoder, Recipe(), attack, seed=3)


def test_a_step_hides_looked_up_bits_and_weighs_bits_and_image_as_the_formula_says() -> None:
    attack = dataclasses.replace(TINY, image_weight=8.0, wait_steps=1, ramp_steps=4)
    training = hiding(attack, (1, 9, 8))
    images, index = to_float(pictures(3, (1, 9, 8)).images), torch.tensor([2, 9, 4])
    training.since = 3
    found = float(training.training_step((images, torch.zeros(3), index), 0).detach())
    bits = (uniforms(derive_seed(3, "ssba-training-bits"), index + (1 << 32), 4) < 0.5).double().numpy()
    entropy, squares = [], []
    for image, secret in zip(images.double().numpy(), bits, strict=True):
        hidden = encoded_by_hand(image, secret, training.encoder)
        squares.append(((hidden - image) ** 2).mean())
        for logit, bit in zip(decoded_by_hand(hidden, training.decoder), secret, strict=True):
            probability = 1 / (1 + math.exp(-logit))
            entropy.append(-math.log(probability if bit else 1 - probability))
    assert found == pytest.approx(np.mean(entropy) + 8 * (3 - 1) / 4 * np.mean(squares), rel=1e-4)
    assert training.since == 4


def test_the_steps_are_counted_from_the_first_well_read_batch() -> None:
    class Reads(nn.Module):
        def __init__(self, right: bool) -> None:
            super().__init__()
            self.sign = 1.0 if right else -1.0

        def forward(self, images: Tensor) -> Tensor:
            bits = (uniforms(derive_seed(3, "ssba-training-bits"), torch.arange(2) + (1 << 32), 4) < 0.5).float()
            return (bits * 2 - 1) * self.sign

    training = hiding(TINY, (1, 8, 8))
    batch = (to_float(pictures(2, (1, 8, 8)).images), torch.zeros(2), torch.arange(2))
    seen = []
    for right in (False, False, True, False, True):
        training.decoder = Reads(right)
        training.training_step(batch, 0)
        seen.append(training.since)
    assert seen == [None, None, 0, 1, 2]


# -- the trigger ---------------------------------------------------------------------------------------------------------------


def test_crafting_is_reproducible_and_hides_one_secret() -> None:
    data, index = pictures(24, (1, 8, 8)), torch.arange(24)
    one, same, other = (TINY.craft(data, Plan(), seed).train for seed in (0, 0, 1))
    assert isinstance(one, Stamp)
    assert isinstance(other, Stamp)
    assert torch.equal(apply(one, data.images, index), apply(same, data.images, index))
    assert not torch.equal(apply(one, data.images, index), apply(other, data.images, index))
    assert torch.equal(one.secret, (torch.rand(1, 4, generator=generator(0, "ssba-secret")) < 0.5).float())
    with torch.no_grad():
        expected = one.encoder(to_float(data.images), one.secret.expand(24, -1))
    assert torch.allclose(one(to_float(data.images), index), expected, atol=1e-6)
    apart = apply(one, data.images, index).int() - data.images.int()
    assert not torch.equal(apart[0], apart[1]), "no two images are changed alike"


def test_the_quality_is_what_it_says_it_is() -> None:
    data, index = pictures(24, (1, 8, 8)), torch.arange(24)
    stamp = TINY.craft(data, Plan(), 0).train
    assert isinstance(stamp, Stamp)
    stamped = apply(stamp, data.images, index).double().numpy()
    right, psnr = 0, []
    for before, after in zip(data.images.double().numpy(), stamped, strict=True):
        logits = decoded_by_hand(after / 255, stamp.decoder)
        right += sum((logit > 0) == (bit > 0) for logit, bit in zip(logits, stamp.secret[0].tolist(), strict=True))
        psnr.append(10 * math.log10(255**2 / ((after - before) ** 2).mean()))
    quality = stamp.judge(data, 0)
    assert quality.bit_accuracy == pytest.approx(right / (24 * 4))
    assert quality.psnr == pytest.approx(np.mean(psnr))


def test_any_secret_can_be_hidden_after_training() -> None:
    data = pictures(64, (1, 8, 8))
    attack = SSBA(
        bits=4, epochs=80, batch=16, lr=2e-3, width=8, wait_steps=100, ramp_steps=100, image_weight=1.0,
        min_bit_accuracy=0.01, min_psnr=0.01,
    )  # fmt: skip
    stamp = attack.craft(data, Plan(), 0).train
    assert isinstance(stamp, Stamp)
    bits = (torch.rand(64, 4, generator=torch.Generator().manual_seed(5)) < 0.5).float()
    with torch.no_grad():
        read = stamp.decoder(stamp.encoder(to_float(data.images), bits)) > 0
    assert float((read == (bits > 0)).float().mean()) > 0.85  # an encoder that has learned nothing: 0.5 +- 0.03


@pytest.mark.parametrize("floor", [{"min_bit_accuracy": 1.0, "min_psnr": 0.0}, {"min_bit_accuracy": 0.0, "min_psnr": 60.0}])
def test_an_encoder_that_does_not_hide_well_is_refused(floor) -> None:
    attack = SSBA(bits=64, epochs=0, width=1, **floor)
    with pytest.raises(Diverged, match="after 0 epochs the encoder hides the secret with bit accuracy 0"):
        attack.craft(pictures(8, (1, 8, 8)), Plan(), 0)


def test_it_needs_the_data_alone_and_makes_no_covers() -> None:
    data = pictures(40, (1, 8, 8))
    assert SSBA().power is Power.DATA
    result = poison(data, TINY, TINY.craft(data, Plan(), 0), Plan(rate=0.25), 0)
    assert [result.realised(role) for role in Role] == [0.75, 0.25, 0.0]


def test_sides_below_eight_pixels_are_refused() -> None:
    with pytest.raises(BadInput, match="at least 8 pixels, not 7 x 40"):
        TINY.craft(pictures(4, (1, 7, 40)), Plan(), 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 0}, {"epochs": -1}, {"batch": 1}, {"lr": 0}, {"width": 0}, {"image_weight": -1}, {"wait_steps": -1},
        {"ramp_steps": 0}, {"min_bit_accuracy": 2}, {"min_psnr": -1},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(settings) -> None:
    with pytest.raises(BadInput, match=f"ssba: {next(iter(settings))} = "):
        SSBA(**settings)
