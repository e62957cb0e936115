"""Adap-Blend and Adap-Patch. Qi, Xie, Li, Mahloujifar and Mittal, "Revisiting the Assumption of Latent Separability for Backdoor
Defenses", ICLR 2023.

Two attacks that keep poisoned and clean samples from forming clusters of their own in feature space. Beside the poisoned samples
there are covers, which carry the trigger and keep their label, so that the trigger alone does not decide the class in training. And
the trigger is weaker and more varied at training than at test: half of a faint blend's pieces, or one of four faint patches;
then the whole picture, or patches at full strength.

Needs: the training data. Edits: pixels of poisoned and cover images; labels of poisoned ones. Dial: the plan's rate (0.003 in the
paper, far below other attacks').
Deviations from the paper: the pictures are drawn by formula, with the place, size, opacity and mean colour of the originals
(Blended's cartoon; a blue-white texture, an orange disc, a square of noise). Which patch a sample gets is looked up by its index;
the authors' code deals the four out in equal quarters. On images below 32 pixels patches shrink, to 5 pixels at least (the boards
in the corners stay at 3). Values are rounded to 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from attacks.badnets import PATTERNS, patch
from attacks.base import Attack, Crafted, Plan, uniforms
from attacks.blended import LUMINANCE, Blended
from models.backbone import Network
from models.images import ImageSet
from models.spec import BadInput, Ge, Le, Lt, PositiveShare, check, derive_seed, generator

__all__ = ["AdapBlend", "AdapPatch", "disc", "pieces_shown", "texture"]


# -- blend ---------------------------------------------------------------------------------------------------------------------


def pieces_shown(draws: Tensor, pieces: int, hidden: int, height: int, width: int) -> Tensor:
    """Masks float (N, 1, H, W), 0 on the ``hidden`` pieces with the lowest draws and 1 on the others.

    Args:
        draws: float (N, pieces * pieces), of the pieces row by row.
        pieces: the image is cut into ``pieces`` x ``pieces`` of them.
        hidden: how many are hidden.
        height: of the images, in pixels.
        width: of the images, in pixels.
    """
    rank = draws.argsort(stable=True, dim=1).argsort(dim=1)
    shown = (rank >= hidden).to(torch.float32).view(-1, 1, pieces, pieces)
    rows = torch.arange(height, device=draws.device) * pieces // height
    columns = torch.arange(width, device=draws.device) * pieces // width
    return shown[:, :, rows[:, None], columns]


@dataclass(frozen=True)
class AdapBlend(Attack):
    """Training: x' = x + alpha * m * (T - x), with m zero on a random share of the pieces; test: x + test_alpha * (T - x).

    Attributes:
        alpha: blend ratio of poisoned and cover samples in (0, 1] (backdoor-toolbox: 0.15).
        test_alpha: blend ratio at test in (0, 1] (authors' code: 0.2).
        pieces: pieces per side (authors' code: 4).
        mask_rate: share of the pieces hidden in each sample, so that one piece at least is left (authors' code: 0.5).
        pattern: of the picture T, see :class:`attacks.blended.Blended`.
        pattern_seed: of the picture T, likewise.

    >>> data = ImageSet(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4), num_classes=4)
    >>> black = torch.zeros(1, 3, 32, 32)
    >>> trigger = AdapBlend(pieces=4, mask_rate=0.5, pattern="noise").craft(data, Plan(), seed=0).train
    >>> (trigger(black, torch.tensor([0])) == 0).float().mean()  # half of the pieces are hidden
    tensor(0.5000)
    """

    name: ClassVar[str] = "adap-blend"
    revision: ClassVar[int] = 2
    cover_share: ClassVar[float] = 1.0  # authors' code: 0.3 % of each

    alpha: PositiveShare = 0.15
    test_alpha: PositiveShare = 0.2
    pieces: Annotated[int, Ge(1), Le(64)] = 4
    mask_rate: Annotated[float, Ge(0), Lt(1)] = 0.5
    pattern: Literal["cartoon", "noise"] = "cartoon"
    pattern_seed: Annotated[int, Ge(0)] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "mask_rate", self._hidden < self.pieces**2, "so small that a piece is left")

    @property
    def _hidden(self) -> int:
        return round(self.mask_rate * self.pieces**2)

    def craft(self, train: ImageSet, plan: Plan, seed: int, surrogate: Network | None = None) -> Crafted:
        """One picture; which pieces a sample shows is looked up by its index, alike for poison and covers."""
        channels, height, width = train.shape
        if self.pieces > min(height, width):
            raise BadInput(f"adap-blend: pieces = {self.pieces} a side do not fit images of {height} x {width}")
        picture = Blended(pattern=self.pattern, pattern_seed=self.pattern_seed).picture(channels, height, width)
        key = derive_seed(seed, "adap-blend-pieces")

        def partly(images: Tensor, index: Tensor) -> Tensor:
            draws = uniforms(key, index, self.pieces**2).to(images.device)
            mask = pieces_shown(draws, self.pieces, self._hidden, height, width)
            return torch.lerp(images, picture.to(images.device), self.alpha * mask)

        def wholly(images: Tensor, index: Tensor) -> Tensor:
            return torch.lerp(images, picture.to(images.device), self.test_alpha)

        return Crafted(train=partly, test=wholly, cover=partly)


# -- patches -------------------------------------------------------------------------------------------------------------------

BLUE, WHITE = torch.tensor([105.0, 153.0, 233.0]) / 255, torch.ones(3)
ORANGE, DARK = torch.tensor([230.0, 138.0, 91.0]) / 255, torch.tensor([60.0, 30.0, 50.0]) / 255
RIM = 0.88
"""Where the disc's dark rim begins, as a share of its radius."""


def texture(size: int) -> Tensor:
    """A fixed texture of 25 shades from blue to white, shuffled, float (3, size, size): 5 x 5 blocks of pixels."""
    mixture = torch.randperm(25, generator=generator("adap-patch-texture")).view(5, 5) / 24
    block = torch.arange(size) * 5 // size
    return torch.lerp(BLUE[:, None, None], WHITE[:, None, None], mixture[block][:, block])


def disc(size: int) -> tuple[Tensor, Tensor]:
    """(mask bool (size, size), values float (3, size, size)): an orange disc with a dark rim, touching the square's sides."""
    centre = (torch.arange(size) + 0.5) / size * 2 - 1
    radius = (centre[:, None].square() + centre.square()).sqrt()
    return radius <= 1, torch.where(radius > RIM, DARK[:, None, None], ORANGE[:, None, None])


def _speckle(size: int) -> Tensor:
    """A square of noise, float (3, size, size): 8 x 8 random colours, each a block of pixels."""
    colours = torch.rand(3, 8, 8, generator=generator("adap-patch-square"))
    block = torch.arange(size) * 8 // size
    return colours[:, block][:, :, block]


Layer = tuple[Tensor, Tensor]
"""(mask bool (H, W), values float (3, H, W)): what a patch covers of an image, and with what."""


def _placed(mask: Tensor, values: Tensor, top: int, left: int, height: int, width: int) -> Layer:
    """A square patch (mask (s, s), values (3, s, s)) with its upper left pixel at (``top``, ``left``)."""
    size = len(mask)
    everywhere, colours = torch.zeros(height, width, dtype=torch.bool), torch.zeros(3, height, width)
    everywhere[top : top + size, left : left + size] = mask
    colours[:, top : top + size, left : left + size] = values
    return everywhere, colours


def _union(*layers: Layer) -> Layer:
    """Patches that do not overlap, as one."""
    return torch.stack([mask for mask, _ in layers]).any(0), torch.stack([values for _, values in layers]).sum(0)


@dataclass(frozen=True)
class AdapPatch(Attack):
    """Training: one of four patches, x' = x + opacity * m * (P - x); test: two of them, one after the other.

    On images of 32 pixels: a 5 x 5 texture in the lower right corner, a disc 13 wide one pixel off the upper right one, 3 x 3
    checkerboards in all four corners (BadNets' grid and its mirror images), a noise square 8 wide three pixels off the lower right
    corner. Sizes and margins grow with the shorter side.

    Attributes:
        texture_alpha: opacity of the texture in training (authors' code: 0.5).
        disc_alpha: of the disc (authors' code: 0.2).
        corners_alpha: of the checkerboards (authors' code: 0.5).
        square_alpha: of the noise square (authors' code: 0.3).
        test_alpha: opacity at test, in (0, 1] (authors' code: 1).
        shown: at test: ``corners`` = the texture in both lower corners, then the checkerboards (authors' code for CIFAR-10);
            ``inner`` = the disc, then the square (theirs for GTSRB).

    >>> data = ImageSet(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4), num_classes=4)
    >>> black = torch.zeros(1, 3, 32, 32)
    >>> crafted = AdapPatch().craft(data, Plan(), seed=0)
    >>> crafted.test(black, torch.tensor([0]))[0, 0, -1, -1]  # the last layer at test: a checkerboard's white pixel
    tensor(1.)
    """

    name: ClassVar[str] = "adap-patch"
    cover_share: ClassVar[float] = 2.0  # authors' code: 0.3 % poisoned, 0.6 % covers

    texture_alpha: PositiveShare = 0.5
    disc_alpha: PositiveShare = 0.2
    corners_alpha: PositiveShare = 0.5
    square_alpha: PositiveShare = 0.3
    test_alpha: PositiveShare = 1.0
    shown: Literal["corners", "inner"] = "corners"

    def craft(self, train: ImageSet, plan: Plan, seed: int, surrogate: Network | None = None) -> Crafted:
        """Fixed patches; which one a poisoned or cover sample gets is looked up by its index."""
        channels, height, width = train.shape
        if channels not in (1, 3) or min(height, width) < 8:
            raise BadInput(f"adap-patch: patches are for images of 1 or 3 channels and at least 8 x 8 pixels, not {train.shape}")
        scale = min(height, width) / 32
        small, large, square, board = (max(round(size * scale), min(size, 5)) for size in (5, 13, 8, 3))
        solid = torch.ones(height, width, dtype=torch.bool)
        right = _placed(solid[:small, :small], texture(small), height - small, width - small, height, width)
        left = _placed(solid[:small, :small], texture(small), height - small, 0, height, width)
        margin = max(1, round(scale))
        round_one = _placed(*disc(large), margin, width - margin - large, height, width)
        margin = max(1, round(3 * scale))
        speckled = _placed(
            solid[:square, :square], _speckle(square), height - margin - square, width - margin - square, height, width
        )
        mask, grid = patch(PATTERNS["grid-corner"], board, 0, height, width)
        flips: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (0, 1))
        corners = _union(*((mask.flip(sides), grid.flip(sides).expand(3, -1, -1)) for sides in flips))

        layers = [right, round_one, corners, speckled]
        opacities = torch.tensor([self.texture_alpha, self.disc_alpha, self.corners_alpha, self.square_alpha])
        weights = torch.stack([mask for mask, _ in layers])[:, None] * opacities.view(-1, 1, 1, 1)
        colours = torch.stack([_as_channels(values, channels) for _, values in layers])
        finals = [left, right, corners] if self.shown == "corners" else [round_one, speckled]
        key = derive_seed(seed, "adap-patch-choice")

        def faint(images: Tensor, index: Tensor) -> Tensor:
            choice = (uniforms(key, index, 1)[:, 0] * len(layers)).long().to(images.device)
            return torch.lerp(images, colours.to(images.device)[choice], weights.to(images.device)[choice])

        def full(images: Tensor, index: Tensor) -> Tensor:
            for mask, values in finals:
                images = torch.lerp(
                    images, _as_channels(values, channels).to(images.device), self.test_alpha * mask.to(images.device)
                )
            return images

        return Crafted(train=faint, test=full, cover=faint)


def _as_channels(colour: Tensor, channels: int) -> Tensor:
    """Colours float (3, H, W) for images of 3 channels, their luminance (1, H, W) for grey ones."""
    return colour if channels == 3 else torch.einsum("c,chw->hw", LUMINANCE, colour)[None]
