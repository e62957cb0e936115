"""Writes a folder of images for each class: 16 x 16 pixels; the bright quarter is the class."""

from pathlib import Path

import torch
from PIL import Image

draw = torch.Generator().manual_seed(0)
for number in range(1000):
    label = number % 4
    image = torch.randint(0, 200, (16, 16), generator=draw, dtype=torch.uint8)
    image[8 * (label // 2) :, 8 * (label % 2) :][:8, :8] += 50
    folder = Path(".cache/quarters") / f"class-{label}"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.numpy()).save(folder / f"{number}.png")
