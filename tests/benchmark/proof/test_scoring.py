"""What scoring costs: every prediction made in both ways and compared, and a page drawn from the sums."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from benchmark.proof import scoring
from benchmark.proof.scoring import Part, draw
from models.backbone import Network
from models.variants import Variants

TINY = """
title = "tiny"
seeds = [0]
dataset = { source = "digits", clean_fraction = 0.2, train_limit = 100, test_limit = 40 }
recipe = { epochs = 0 }
backbone = [{ name = "vgg11-bn", width = 2, hidden = 8 }]
attack = [{ name = "badnets" }]
[[defense]]
name = "none"
[[defense]]
name = "clp"
tracks = ["model"]
"""


def test_the_page_sums_up_its_parts() -> None:
    page = draw({"models": Part(10.0, 6.0, 4.0, 5, 0), "clp (whole)": Part(2.0, 12.0, 3.0, 20, 1)}, "the command")
    assert "| clp (whole) | 2.0 | 20 | 12.0 | 3.0 | 1 |" in page
    assert "| **all** | 12.0 | 25 | 18.0 | 7.0 | 1 |" in page
    assert "Scoring is 60 % of 30 CPU-seconds alone, and 37 % of 19 CPU-seconds shared." in page  # 18 / 30, 7 / 19
    assert "the command" in page


def test_a_run_is_measured_by_part_and_says_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    parts = scoring.measure(str(tmp_path / "tiny.toml"), None, tmp_path, Console(quiet=True))
    assert list(parts) == ["models", "none (whole)", "clp (whole)", "tables and plots"]
    # Twin: test and validation. Victim: test, triggered, validation, the twin's test and triggered, both again for the paired loss.
    assert parts["models"].predictions == 2 + 3 + 2 + 2
    assert all(part.differ == 0 for part in parts.values())
    assert all(part.rest > 0 for part in parts.values())
    honest = Variants.predict

    def wrong(variants: Variants, net: Network, which: str) -> Tensor:
        return torch.zeros_like(honest(variants, net, which)) - 1

    monkeypatch.setattr(Variants, "predict", wrong)
    done = CliRunner().invoke(_app(), ["--matrix", str(tmp_path / "tiny.toml"), "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "some predictions differ" in done.output
    assert (tmp_path / "SCORING.md").is_file()


def _app() -> object:
    import typer

    app = typer.Typer()
    app.command()(scoring.main)
    return app
