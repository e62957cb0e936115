"""Images in memory and the one augmentation, against a by-hand twin that crops and flips image by image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from models.images import Batches, ImageSet, quantise, to_float
from models.spec import derive_seed, generator


def some_images(count: int = 23, shape: tuple[int, int, int] = (3, 8, 10), classes: int = 4) -> ImageSet:
    draw = generator("test-images", count, list(shape))
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=draw)
    return ImageSet(images, torch.randint(0, classes, (count,), generator=draw), classes)


def by_hand(data: ImageSet, seed: int, epoch: int, crop: int, flip: bool) -> tuple[np.ndarray, np.ndarray]:
    """The epoch's order and every sample's augmented image (uint8, by sample), with loops and slices alone."""
    draw = torch.Generator()
    draw.manual_seed(derive_seed(seed, "epoch", epoch))
    order = torch.randperm(len(data), generator=draw).numpy()
    corners = np.zeros((len(data), 2), dtype=int)
    if crop:
        corners = torch.randint(0, 2 * crop + 1, (len(data), 2), generator=draw).numpy()
    mirrored = np.zeros(len(data), dtype=int)
    if flip:
        mirrored = torch.randint(0, 2, (len(data),), generator=draw).numpy()
    done = np.empty_like(data.images.numpy())
    channels, height, width = data.shape
    for sample, image in enumerate(data.images.numpy()):
        padded = np.zeros((channels, height + 2 * crop, width + 2 * crop), dtype=np.uint8)
        padded[:, crop : crop + height, crop : crop + width] = image
        top, left = corners[sample]
        window = padded[:, top : top + height, left : left + width]
        done[sample] = window[:, :, ::-1] if mirrored[sample] else window
    return order, done


@pytest.mark.parametrize("shape", [(3, 8, 10), (1, 9, 8), (3, 16, 16)])
@pytest.mark.parametrize(("crop", "flip"), [(0, False), (2, False), (0, True), (3, True)])
def test_the_gather_is_crop_and_flip_image_by_image(shape: tuple[int, int, int], crop: int, flip: bool) -> None:
    data = some_images(shape=shape)
    batches = Batches(data, 5, 11, crop=crop, flip=flip)
    for epoch in range(3):
        order, expected = by_hand(data, 11, epoch, crop, flip)
        seen = []
        for images, labels, index in batches:
            assert images.dtype == torch.float32
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert np.array_equal(images.numpy(), expected[index.numpy()].astype(np.float32) / np.float32(255))
            assert torch.equal(labels, data.labels[index])
            seen.append(index)
        assert np.array_equal(torch.cat(seen).numpy(), order)


def test_the_test_would_notice_a_wrong_crop() -> None:
    data = some_images()
    _, moved = by_hand(data, 11, 0, 3, True)
    assert (moved != data.images.numpy()).any(axis=(1, 2, 3)).mean() > 0.8


def test_draws_are_keyed_by_seed_epoch_and_sample_not_by_batch() -> None:
    data = some_images()

    def epoch_of(batches: Batches) -> dict[int, Tensor]:
        return {int(i): image for images, _, index in batches for i, image in zip(index, images, strict=True)}

    small, large = Batches(data, 2, 5, crop=2, flip=True), Batches(data, 23, 5, crop=2, flip=True)
    for _ in range(2):
        one, two = epoch_of(small), epoch_of(large)
        assert all(torch.equal(one[i], two[i]) for i in one)
    again, other = Batches(data, 23, 5, crop=2, flip=True), Batches(data, 23, 6, crop=2, flip=True)
    first, second = epoch_of(again), epoch_of(again)
    assert any(not torch.equal(first[i], second[i]) for i in first)
    assert any(not torch.equal(first[i], image) for i, image in epoch_of(other).items())


@pytest.mark.parametrize(
    ("count", "batch", "drop_last", "sizes"),
    [
        (21, 5, False, [5, 5, 5, 5]),
        (22, 5, False, [5, 5, 5, 5, 2]),
        (22, 5, True, [5, 5, 5, 5]),
        (20, 5, False, [5, 5, 5, 5]),
        (3, 5, True, [3]),
        (1, 5, False, []),
    ],
)
def test_a_single_leftover_sample_is_dropped(count: int, batch: int, drop_last: bool, sizes: list[int]) -> None:
    batches = Batches(some_images(count), batch, 0, drop_last=drop_last)
    assert [len(index) for _, _, index in batches] == sizes
    assert len(batches) == len(sizes)


@pytest.mark.parametrize(("crop", "flip"), [(0, False), (2, True)])
def test_an_identity_hook_changes_nothing(crop: int, flip: bool) -> None:
    data = some_images()
    epochs: list[int] = []

    def look(images: Tensor, labels: Tensor, index: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        assert torch.equal(images, to_float(data.images[index]))
        epochs.append(epoch)
        return images, labels

    fast, slow = Batches(data, 5, 3, crop=crop, flip=flip), Batches(data, 5, 3, crop=crop, flip=flip, before_augment=look)
    for _ in range(2):
        for one, two in zip(fast, slow, strict=True):
            assert all(map(torch.equal, one, two))
            assert two[0].is_contiguous(memory_format=torch.channels_last)
    assert epochs == [0] * 5 + [1] * 5


def test_what_the_hook_returns_is_quantised_then_cropped() -> None:
    data = some_images(4, (1, 8, 8))

    def grey(images: Tensor, labels: Tensor, index: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        return torch.full_like(images, 0.5), labels + 1

    ((images, labels, index),) = Batches(data, 4, 0, crop=4, before_augment=grey)
    assert set(images.unique().tolist()) == {0.0, float(np.float32(128) / np.float32(255))}
    assert torch.equal(labels, data.labels[index] + 1)


def test_quantise_clips_and_rounds_to_what_a_file_can_hold() -> None:
    values = torch.tensor([-1.0, 0.0, 0.4 / 255, 0.6 / 255, 127.4 / 255, 1.0, 7.0])
    assert quantise(values).tolist() == [0, 0, 0, 1, 127, 255, 255]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(quantise(to_float(every)), every)


def test_an_image_set_refuses_other_types() -> None:
    good = some_images(3)
    with pytest.raises(TypeError, match="images must be uint8"):
        ImageSet(good.images.float(), good.labels, 4)
    with pytest.raises(TypeError, match=r"labels must be int64 \(3,\)"):
        ImageSet(good.images, good.labels[:2], 4)


def test_subset_and_fingerprint() -> None:
    data = some_images()
    part = data.subset(torch.tensor([2, 0]))
    assert torch.equal(part.images, data.images[[2, 0]])
    assert torch.equal(data.subset(data.labels == 1).labels, data.labels[data.labels == 1])
    assert part.shape == (3, 8, 10)
    assert data.fingerprint() == some_images().fingerprint()
    brighter = data.images.clone()
    brighter[0, 0, 0, 0] ^= 1
    changed = ImageSet(brighter, data.labels, 4)
    relabelled = ImageSet(data.images, (data.labels + 1) % 4, 4)
    assert len({data.fingerprint(), changed.fingerprint(), relabelled.fingerprint(), part.fingerprint()}) == 4
