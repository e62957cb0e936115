"""`show-my-model` on checkpoints of torchvision and timm: the cleaned file is the given one with other values."""

from __future__ import annotations

import importlib.util
import io
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models

from benchmark.run.own_model import defend_checkpoint
from models.spec import BadInput, generator

MATRIX = """
title = "two defenses"
seeds = [0]
dataset = { source = "digits", clean_fraction = 0.3, test_limit = 20 }
recipe = { epochs = 0 }
[[backbone]]
name = "resnet8"
width = 1
[[attack]]
name = "badnets"
[[defense]]
name = "none"
[[defense]]
name = "clp"
tracks = ["model"]
grid = [0.5]
u = 0.5
[[defense]]
name = "fine-tuning"
tracks = ["model+clean"]
epochs = 1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 32 x 32 in colour, of three classes, and a matrix."""
    place = tmp_path_factory.mktemp("own")
    source = generator("own-foreign")
    for number in range(120):
        path = place / "images" / f"class-{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = torch.randint(0, 180, (32, 32, 3), generator=source, dtype=torch.uint8)
        image[..., number % 3] += 70
        Image.fromarray(np.asarray(image)).save(path)
    (place / "two.toml").write_text(MATRIX)
    return place


def run(folder: Path, checkpoint: Path, backbone: str, out: io.StringIO | None = None, **more: str) -> Path:
    images, matrix = f"folder:{folder / 'images'}", str(folder / "two.toml")
    console = Console(file=out or io.StringIO(), width=200)
    return defend_checkpoint(
        checkpoint, backbone, images, None, matrix, results=folder / "r", cache=folder / "c", console=console, **more
    )


def small_resnet(classes: int = 3) -> nn.Module:
    """torchvision's ResNet-18 as people change it for images of 32 x 32."""
    net = models.resnet18(num_classes=classes)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return net


@pytest.mark.slow
def test_the_cleaned_file_loads_into_torchvisions_own_module(folder: Path) -> None:
    torch.default_generator.manual_seed(0)
    net, out = small_resnet(), io.StringIO()
    torch.save({"state_dict": {f"module.{name}": value for name, value in net.state_dict().items()}}, folder / "mine.pth")
    found = run(folder, folder / "mine.pth", "torchvision:resnet18", out, normalised="imagenet")
    assert "the file's first conv is 3x3" in out.getvalue()
    lines = (found / "defenses.csv").read_text().splitlines()
    assert [line.split(",")[-2] for line in lines[1:]] == ["ok"] * 3, lines
    cleaned, before = load_file(found / "clp-whole.safetensors"), net.state_dict()
    small_resnet().load_state_dict(cleaned, strict=True)
    pruned = cleaned["bn1.weight"] == 0
    assert pruned.any(), "CLP pruned nothing"
    assert torch.equal(cleaned["bn1.weight"][~pruned], before["bn1.weight"][~pruned])
    assert torch.equal(cleaned["fc.weight"], before["fc.weight"])
    tuned = load_file(found / "fine-tuning-whole.safetensors")
    small_resnet().load_state_dict(tuned, strict=True)
    assert not torch.equal(tuned["fc.weight"], before["fc.weight"])


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="needs timm")
def test_a_folder_of_timms_names_its_architecture_and_normalisation(folder: Path) -> None:
    from timm import create_model

    place = folder / "hub"
    place.mkdir()
    net = create_model("resnet10t", num_classes=3)
    save_file(net.state_dict(), place / "model.safetensors")
    config = {"architecture": "resnet10t", "num_classes": 3, "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}}
    (place / "config.json").write_text(json.dumps(config))
    found = run(folder, place, "")
    create_model("resnet10t", num_classes=3).load_state_dict(load_file(found / "clp-whole.safetensors"), strict=True)
    (place / "config.json").write_text(json.dumps({"architectures": ["ResNetForImageClassification"]}))
    with pytest.raises(BadInput, match=r"config\.json: no configuration of timm's"):
        run(folder, place, "")


def test_what_does_not_fit_is_named_as_the_file_names_it(folder: Path) -> None:
    def refused(state: dict[str, torch.Tensor], backbone: str = "torchvision:resnet18", **more: str) -> str:
        torch.save(state, folder / "odd.pth")
        with pytest.raises(BadInput) as found:
            run(folder, folder / "odd.pth", backbone, **more)
        assert not (folder / "r" / "my-model" / "odd").exists()
        return str(found.value)

    state = dict(models.resnet18(num_classes=3).state_dict())
    lacking = {name: value for name, value in state.items() if name != "layer1.0.bn1.weight"}
    assert "odd.pth: tensor 'layer1.0.bn1.weight' 64 is missing" in refused(lacking)
    assert "odd.pth: tensor 'fc.weight' is 9 x 512, but the network's is 3 x 512" in refused(
        state | {"fc.weight": torch.zeros(9, 512), "fc.bias": torch.zeros(9)}
    )
    assert "tensor 'extra' 1 is not in the network" in refused(state | {"extra": torch.zeros(1)})
    assert "did you mean 'resnet18'" in refused(state, "torchvision:resnet-18")
    assert "unknown normalisation 'image-net'; did you mean 'imagenet'?" in refused(state, normalised="image-net")
    assert "name its architecture with --backbone" in refused(state, "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, but its files are there
        torch.jit.save(torch.jit.trace(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.zeros(1, 3, 8, 8)), folder / "traced.pt")
    with pytest.raises(BadInput, match=r"traced\.pt: refused: an exported module"):
        run(folder, folder / "traced.pt", "torchvision:resnet18")
