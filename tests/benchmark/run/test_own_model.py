"""What a checkpoint alone says of its network."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmark.run.own_model import _backbone
from models import BACKBONES
from models.backbone import Backbone


@pytest.mark.parametrize("cls", BACKBONES, ids=lambda cls: cls.name)
@pytest.mark.parametrize(("channels", "width", "hidden"), [(1, 1, 0), (3, 1, 4), (3, 2, 0), (1, 3, 0), (3, 8, 4)])
def test_width_and_head_are_read_from_the_weights_in_any_order(
    cls: type[Backbone], channels: int, width: int, hidden: int
) -> None:
    made = cls(width=width, hidden=hidden)
    state = made.build(10, (channels, 32, 32), [0.5] * channels, [0.25] * channels, 0).state_dict()
    for names in (sorted(state), sorted(state, reverse=True)):
        assert _backbone(cls.name, {name: state[name] for name in names}, Path("mine.safetensors")) == made
