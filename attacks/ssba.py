"""SSBA. Li, Li, Wu, Li, He and Lyu, "Invisible Backdoor Attack with Sample-Specific Triggers", ICCV 2021, arXiv 2012.03816.

A network that hides a bit string in an image is trained on the training set, as in StegaStamp (Tancik, Mildenhall and Ng, CVPR
2020, arXiv 1904.05343): an encoder changes the image, a decoder reads the bits back. One fixed secret is then hidden in every
poisoned image. What it takes to hide it differs from image to image, so that no two images carry the same pixel change. At test
time hiding the secret in any image sends it to the target.

Needs: the training data. Edits: every pixel of a poisoned image, and its label. Dial: the plan's rate.
Deviations from the paper: encoder, decoder and loss are BackdoorBench's (cross-entropy of the bits plus a mean squared error of
the image whose weight grows; the encoder gives the image itself): the paper's adds a perceptual distance, which needs a network
trained on other data, and a critic. The secret is drawn, without an error-correcting code. Convs start from He's initial weights
(ours): from PyTorch's own the secret fades on its way through so many layers, and short trainings never learn to read it. The
decoder's linear layer and the encoder's scales follow the image size. An encoder that does not hide well enough is refused, not
used (``min_bit_accuracy``, ``min_psnr``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate, mse_loss, pad

from attacks.base import Attack, Crafted, Plan, apply, uniforms
from attacks.generated import in_fixed_batches, part, prefixed
from models.backbone import Network, he_init
from models.images import ImageSet, to_float
from models.loop import Loop
from models.recipe import Recipe
from models.spec import BadInput, BatchSize, EpochCount, Ge, Le, PositiveShare, Share, derive_seed, generator
from models.training import Diverged, default_device, optimise, seeded

__all__ = ["SSBA", "Decoder", "Encoder", "Hiding", "Quality", "Stamp", "image_weight_at"]

SECRET_SIDE = 16
HALVINGS = 5
CONVINCED = 0.9
"""Share of bits read correctly in one batch from which on the image counts too (BackdoorBench)."""
JUDGED = 1000
"""Training images on which a finished encoder is judged, at most."""


class Encoder(nn.Module):
    """(images float (N, C, H, W) in [0, 1], bits float (N, bits)) -> images of the same shape in (0, 1).

    A linear layer spreads the bits over C channels of 16x16, scaled to the image; a U-Net of five scales works on both. Its
    channels are w, w, 2w, 4w, 8w down and 4w, 2w, w, w up, w = ``width``. Sides of at least 8 pixels.
    """

    def __init__(self, bits: int, channels: int, width: int) -> None:
        super().__init__()
        down = [width, width, 2 * width, 4 * width, 8 * width]
        up = [4 * width, 2 * width, width, width]
        self.channels = channels
        self.spread = nn.Linear(bits, SECRET_SIDE * SECRET_SIDE * channels)
        self.down = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=1 if stage == 0 else 2, padding=1)
            for stage, (before, after) in enumerate(zip([2 * channels, *down], down, strict=False))
        )
        self.up = nn.ModuleList(nn.Conv2d(before, after, 2) for before, after in zip([down[-1], *up], up, strict=False))
        beside = [*down[-2::-1]]
        beside[-1] += 2 * channels  # the last one also reads the inputs
        self.merge = nn.ModuleList(nn.Conv2d(skip + after, after, 3, padding=1) for skip, after in zip(beside, up, strict=True))
        self.refine = nn.Conv2d(width, width, 3, padding=1)
        self.paint = nn.Conv2d(width, channels, 1)
        he_init(self, "fan_in")

    def forward(self, images: Tensor, bits: Tensor) -> Tensor:
        secret = self.spread(bits).relu().view(-1, self.channels, SECRET_SIDE, SECRET_SIDE)
        inputs = torch.cat([interpolate(secret, size=images.shape[2:]), images], dim=1)
        x, skips = inputs, []
        for conv in self.down:
            x = conv(x).relu()
            skips.append(x)
        skips = skips[-2::-1]
        skips[-1] = torch.cat([skips[-1], inputs], dim=1)
        for conv, merge, skip in zip(self.up, self.merge, skips, strict=True):
            # A kernel of 2x2 keeps the size with one more row and column, below and to the right.
            x = conv(pad(interpolate(x, size=skip.shape[2:]), [0, 1, 0, 1])).relu()
            x = merge(torch.cat([skip, x], dim=1)).relu()
        x = self.paint(self.refine(x).relu())
        # The logistic function, written with tanh, whose results do not depend on the position in a tensor.
        out: Tensor = (x / 2).tanh() / 2 + 0.5
        return out


class Decoder(nn.Module):
    """Images float (N, C, H, W) in [0, 1] -> logits of the bits (N, bits): seven convs, five of which halve, two linear layers."""

    def __init__(self, bits: int, shape: tuple[int, int, int], width: int, hidden: int = 512) -> None:
        super().__init__()
        channels, height, width_pixels = shape
        plan = [(1, 2), (1, 1), (2, 2), (2, 1), (2, 2), (4, 2), (4, 2)]
        layers: list[nn.Module] = []
        for factor, stride in plan:
            layers += [nn.Conv2d(channels, factor * width, 3, stride=stride, padding=1), nn.ReLU()]
            channels = factor * width
        for _ in range(HALVINGS):
            height, width_pixels = (height + 1) // 2, (width_pixels + 1) // 2
        self.layers = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(channels * height * width_pixels, hidden), nn.ReLU(), nn.Linear(hidden, bits)
        )
        he_init(self, "fan_in")

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


def image_weight_at(since: int | None, weight: float, wait: int, ramp: int) -> float:
    """Weight of the image's loss, ``since`` steps after the bits were first read well (None: not yet).

    0 for ``wait`` steps, then on a line to ``weight`` over ``ramp`` steps.
    """
    return 0.0 if since is None else weight * min(1.0, max(0.0, (since - wait) / ramp))


class Hiding(Loop):
    """Trains encoder and decoder on fresh bits in every image: cross-entropy of the bits + weight * mean squared error."""

    def __init__(self, encoder: Encoder, decoder: Decoder, recipe: Recipe, attack: SSBA, seed: int) -> None:
        super().__init__(recipe)
        self.encoder, self.decoder, self.attack = encoder, decoder, attack
        self.key = derive_seed(seed, "ssba-training-bits")
        self.since: int | None = None

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        images, _, index = batch
        visit = index + ((int(self.current_epoch) + 1) << 32)
        bits = (uniforms(self.key, visit, self.attack.bits) < 0.5).float()
        hidden = self.encoder(images, bits)
        logits = self.decoder(hidden)
        weight = image_weight_at(self.since, self.attack.image_weight, self.attack.wait_steps, self.attack.ramp_steps)
        if self.since is not None:
            self.since += 1
        elif float(((logits > 0) == (bits > 0)).float().mean()) > CONVINCED:
            self.since = 0
        return binary_cross_entropy_with_logits(logits, bits) + weight * mse_loss(hidden, images)


@dataclass(frozen=True)
class Quality:
    """How well a secret is hidden in 8-bit images.

    Attributes:
        bit_accuracy: share of its bits that are read correctly, in [0, 1].
        psnr: mean PSNR in dB.
    """

    bit_accuracy: float
    psnr: float


N = TypeVar("N", bound=nn.Module)


def _finished(net: N) -> N:
    """A copy on the CPU, in evaluation mode, its parameters without gradients."""
    return copy.deepcopy(net).cpu().eval().requires_grad_(False)


class Stamp:
    """Hides one secret in every image; see :data:`attacks.base.Trigger`.

    Attributes:
        secret: float (1, bits), 0 and 1.
        decoder: reads it back; None = it is only hidden.
    """

    def __init__(self, encoder: Encoder, secret: Tensor, decoder: Decoder | None = None) -> None:
        self.encoder, self.secret = _finished(encoder), secret
        self.decoder = None if decoder is None else _finished(decoder)

    def __call__(self, images: Tensor, index: Tensor) -> Tensor:
        encoder, secret = self.encoder.to(images.device), self.secret.to(images.device)
        return in_fixed_batches(lambda x: encoder(x, secret.expand(len(x), -1)), images)

    def judge(self, train: ImageSet, seed: int) -> Quality:
        """Hides the secret in training images (a thousand, at most) and reads it back."""
        assert self.decoder is not None
        chosen = torch.randperm(len(train), generator=generator(seed, "ssba-judged"))[:JUDGED]
        device = default_device()
        images = train.images[chosen].to(device)
        stamped = apply(self, images, chosen.to(device))
        read = in_fixed_batches(self.decoder.to(device), to_float(stamped)) > 0
        apart = (stamped.double() - images.double()).square().flatten(1).mean(1).clamp_min(1e-9)
        correct = (read == (self.secret.to(device) > 0)).double().mean()
        return Quality(float(correct), float((10 * torch.log10(255**2 / apart)).mean()))


@dataclass(frozen=True)
class SSBA(Attack):
    """x' = E(x, s): an encoder E hides the secret s, the same bits in every image.

    Attributes:
        bits: length of the secret (BackdoorBench: 100).
        epochs: passes over the training set (BackdoorBench: 20).
        batch: images per step (BackdoorBench: 64).
        lr: constant rate of Adam (BackdoorBench: 1e-4).
        width: channels of the encoder's and the decoder's first stage (BackdoorBench: 32).
        image_weight: weight that the image's mean squared error reaches (BackdoorBench: 10).
        wait_steps: steps at weight 0 after nine tenths of the bits are read (BackdoorBench: 1000).
        ramp_steps: steps from there to the full weight (BackdoorBench: 3000).
        min_bit_accuracy: share of bits that a finished encoder must hide in 8-bit training images (ours: 0.95).
        min_psnr: PSNR in dB that it must reach there (ours: 25).

    >>> encoder = Encoder(bits=SSBA(bits=8).bits, channels=3, width=2)
    >>> encoder(torch.rand(1, 3, 32, 32), torch.ones(1, 8)).shape
    torch.Size([1, 3, 32, 32])
    """

    name: ClassVar[str] = "ssba"
    keeps: ClassVar[bool] = True

    bits: Annotated[int, Ge(1), Le(1024)] = 100
    epochs: EpochCount = 20
    batch: BatchSize = 64
    lr: PositiveShare = 1e-4
    width: Annotated[int, Ge(1), Le(512)] = 32
    image_weight: Annotated[float, Ge(0), Le(1_000_000)] = 10.0
    wait_steps: Annotated[int, Ge(0)] = 1000
    ramp_steps: Annotated[int, Ge(1)] = 3000
    min_bit_accuracy: Share = 0.95
    min_psnr: Annotated[float, Ge(0), Le(100)] = 25.0

    def craft(self, train: ImageSet, plan: Plan, seed: int, surrogate: Network | None = None) -> Crafted:
        """Trains the encoder; the trigger is a :class:`Stamp`, for training and test.

        Raises:
            BadInput: images have a side below 8 pixels.
            Diverged: the encoder's weights are not finite, or it misses ``min_bit_accuracy`` or ``min_psnr``.
        """
        channels, height, width = train.shape
        if min(height, width) < 8:
            raise BadInput(f"ssba: images must have sides of at least 8 pixels, not {height} x {width}")
        with seeded(derive_seed(seed, "ssba-networks")):
            encoder = Encoder(self.bits, channels, self.width)
            decoder = Decoder(self.bits, train.shape, self.width)
        recipe = Recipe(
            epochs=self.epochs, batch=self.batch, lr=self.lr, weight_decay=0.0, optimizer="adam", schedule="constant", crop=0,
            flip=False,
        )  # fmt: skip
        optimise(Hiding(encoder, decoder, recipe, self, seed), train, recipe, derive_seed(seed, "ssba-training"))
        secret = (torch.rand(1, self.bits, generator=generator(seed, "ssba-secret")) < 0.5).float()
        stamp = Stamp(encoder, secret, decoder)
        found = stamp.judge(train, seed)
        if not (found.bit_accuracy >= self.min_bit_accuracy and found.psnr >= self.min_psnr):
            raise Diverged(
                f"ssba: after {self.epochs} epochs the encoder hides the secret with bit accuracy {found.bit_accuracy:.3f} and PSNR"
                f" {found.psnr:.1f} dB; {self.min_bit_accuracy} and {self.min_psnr} dB are asked for: raise 'epochs' or 'lr', or"
                " lower 'bits', 'wait_steps' or 'ramp_steps'"
            )
        return Crafted(train=stamp, test=stamp)

    def keep(self, crafted: Crafted) -> dict[str, Tensor]:
        """The encoder and the secret: the encoder's training takes long."""
        assert isinstance(crafted.test, Stamp)
        return {**prefixed("encoder", crafted.test.encoder), "secret": crafted.test.secret}

    def restore(
        self, kept: Mapping[str, Tensor], train: ImageSet, plan: Plan, seed: int, surrogate: Callable[[], Network | None]
    ) -> Crafted:
        with seeded(0):  # every weight is replaced
            encoder = Encoder(self.bits, train.shape[0], self.width)
        encoder.load_state_dict(part("encoder", kept))
        stamp = Stamp(encoder, kept["secret"])
        return Crafted(train=stamp, test=stamp)
