"""The whole pipeline on a tiny matrix: the same rows, bit for bit, however they come about."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console

from benchmark.rules.selection import NOTHING_TO_VALIDATE_ON, Selection
from benchmark.run.local import Failure, Stage, run_stages
from benchmark.run.session import Outcome, parse_only, run_matrix
from benchmark.settings.cells import Matrix
from benchmark.settings.load import load_matrix
from benchmark.storage.files import held
from benchmark.storage.rows import Curve, Row, read
from models.spec import BadInput, digest

ROOT = Path(__file__).resolve().parents[3]
TINY = """
title = "tiny"
plugins = ["odd.py"]
seeds = [0]
[dataset]
source = "digits"
clean_fraction = 0.2
train_limit = 200
test_limit = 60
[recipe]
epochs = 2
batch = 32
lr = 0.05
crop = 1
flip = false
[[backbone]]
name = "vgg11-bn"
width = 2
hidden = 8
[[attack]]
name = "badnets"
[[attack]]
name = "sig"
rate = 0.05
[[defense]]
name = "none"
[[defense]]
name = "clp"
tracks = ["model", "model+clean"]
scopes = ["head", "whole"]
[[defense]]
name = "fine-tuning"
tracks = ["model+clean"]
epochs = 1
[[defense]]
name = "greedy"
tracks = ["model"]
[[defense]]
name = "greedy"
label = "undeclared"
tracks = ["model+clean"]
declare = false
[[defense]]
name = "broken"
tracks = ["model"]
"""
ODD = '''
"""Defenses that misbehave."""
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar
from defenses.base import Candidate, DefenderView, Defense, Knowledge

@dataclass(frozen=True)
class Greedy(Defense):
    """Reaches for the clean budget, declared or not."""
    name: ClassVar[str] = "greedy"
    declare: bool = True

    @property
    def needs(self) -> Knowledge:
        return Knowledge.MODEL | (Knowledge.CLEAN if self.declare else Knowledge.NONE)

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        len(view.clean)
        yield Candidate(view.model)

@dataclass(frozen=True)
class Broken(Defense):
    """Raises."""
    name: ClassVar[str] = "broken"

    @property
    def needs(self) -> Knowledge:
        return Knowledge.MODEL

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        raise RuntimeError("no luck")
        yield
'''


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    folder = tmp_path_factory.mktemp("matrix")
    (folder / "odd.py").write_text(ODD)
    (folder / "tiny.toml").write_text(TINY)
    return load_matrix(folder / "tiny.toml")


def go(matrix: Matrix, folder: Path, **options: object) -> Outcome:
    console = Console(file=io.StringIO())
    return run_matrix(matrix, results=folder / "results", cache=folder / "cache", console=console, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def once(matrix: Matrix, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference: one process, matrix order."""
    folder = tmp_path_factory.mktemp("once")
    go(matrix, folder, processes=1)
    return folder


def rows_of(folder: Path) -> pd.DataFrame:
    return read(folder / "results" / "tiny" / "rows.csv", Row)


def content(folder: Path) -> tuple[bytes, ...]:
    return tuple((folder / "results" / "tiny" / name).read_bytes() for name in ("rows.csv", "curves.csv", "manifest.json"))


def test_every_cell_has_a_row_per_selection_in_matrix_order(matrix: Matrix, once: Path) -> None:
    rows = rows_of(once)
    rules = [how.value for how in Selection if how is not Selection.CANARY]  # this matrix plants none
    assert list(rows["selection"]) == rules * len(matrix.cells)
    assert list(rows["defense"][:: len(rules)]) == [cell.defense_label for cell in matrix.cells]
    done = rows[rows["status"] == "ok"]
    assert done[["acc", "asr", "ra", "cost_epochs", "acc_benign", "asr_undefended"]].notna().all(axis=None)
    assert (done["asr"] + done["ra"] <= 1 + 1e-9).all()
    undefended = rows[rows["defense"] == "none"]
    assert (undefended["acc"] == undefended["acc_undefended"]).all()
    # Every victim is compared with its twin.
    measured = ["asr_benign", "effect", "acc_loss", "acc_loss_se"]
    assert rows[measured].notna().all(axis=None)
    assert np.allclose(rows["effect"], rows["asr_undefended"] - rows["asr_benign"], atol=1e-6)
    assert np.allclose(rows["acc_loss"], rows["acc_benign"] - rows["acc_undefended"], atol=1e-6)


def test_refusals_and_failures_have_their_reason_and_do_not_stop_others(once: Path) -> None:
    rows = rows_of(once).set_index(["defense", "selection"]).sort_index()
    greedy = rows.loc[("greedy", "default")].iloc[0]
    assert greedy["status"] == "refused"
    assert "withholds clean" in greedy["reason"]
    undeclared = rows.loc[("undeclared", "default")].iloc[0]
    assert undeclared["status"] == "refused"
    assert "declares only model" in undeclared["reason"]
    broken = rows.loc[("broken", "default")].iloc[0]
    assert broken["status"] == "failed"
    assert "RuntimeError: no luck" in broken["reason"]
    no_data = rows.loc[("clp", "validation")]
    assert set(no_data["status"]) == {"ok", "refused"}
    assert NOTHING_TO_VALIDATE_ON in no_data[no_data["status"] == "refused"]["reason"].iloc[0]


def test_curves_hold_every_candidate(once: Path) -> None:
    curves = read(once / "results" / "tiny" / "curves.csv", Curve)
    clp = curves[(curves["defense"] == "clp") & (curves["attack"] == "badnets") & (curves["scope"] == "whole")]
    assert len(clp) == 2 * 9
    untouched = clp[clp["kept"]]
    assert len(untouched) == 2, "the untouched model is a candidate of every post-training defense"
    rows = rows_of(once).drop_duplicates("cell").set_index("cell")
    assert (untouched["acc"].to_numpy() == rows.loc[untouched["cell"], "acc_undefended"].to_numpy()).all()
    assert clp.groupby("cell")["is_default"].sum().eq(1).all()


def test_again_computes_nothing_and_touches_no_file(matrix: Matrix, once: Path) -> None:
    folder = once / "results" / "tiny"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    outcome = go(matrix, once, processes=1)
    assert not outcome.changed
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.slow
def test_two_processes_shuffled_give_the_same_bytes(matrix: Matrix, once: Path, tmp_path: Path) -> None:
    def backwards(stages: list[Stage]) -> list[Stage]:
        return stages[::-1]

    go(matrix, tmp_path, processes=2, order=backwards)
    assert content(tmp_path) == content(once)


@pytest.mark.slow
def test_kill_nine_in_mid_run_then_the_same_command(matrix: Matrix, once: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmark", "run", "-m", str(matrix.path), "--processes", "2", "--no-wandb",
               "--results", str(tmp_path / "results"), "--cache", str(tmp_path / "cache")]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    store = tmp_path / "cache" / "store"
    deadline = time.monotonic() + 400  # a machine may be busy with other things
    while time.monotonic() < deadline and process.poll() is None and len(list(store.rglob("entry.json"))) < 4:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    stood = len(list(store.rglob("entry.json")))
    assert stood >= 4
    assert not (tmp_path / "results" / "tiny" / "rows.csv").exists()
    go(matrix, tmp_path, processes=1)
    assert content(tmp_path) == content(once)


SHARING = """
import sys
from pathlib import Path
from rich.console import Console
from benchmark.settings.load import load_matrix
from benchmark.run.session import run_matrix
from benchmark.storage.store import Store

matrix, folder = Path(sys.argv[1]), Path(sys.argv[2])
write = Store.write

def counted(self, stage, key, *rest):
    write(self, stage, key, *rest)
    with (folder / "computed.txt").open("a") as log:
        log.write(f"{stage} {key}\\n")

Store.write = counted
run_matrix(load_matrix(matrix), results=folder / "results", cache=folder / "cache", console=Console(), processes=1)
"""


def sharing(matrix: Matrix, folder: Path) -> subprocess.Popen[str]:
    """A run in a process of its own, which notes in ``computed.txt`` every stage that it computes."""
    command = [sys.executable, "-c", SHARING, str(matrix.path), str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def told(process: subprocess.Popen[str]) -> str:
    said = process.communicate(timeout=600)[0]
    assert process.returncode == 0, said
    return said


def computed(folder: Path) -> list[str]:
    return sorted((folder / "computed.txt").read_text().splitlines())


def entries(folder: Path) -> list[str]:
    stored = (folder / "cache" / "store").glob("*/??/*/entry.json")
    return sorted(f"{path.parents[2].name} {path.parent.name}" for path in stored)


@pytest.mark.slow
def test_two_runs_at_once_share_the_work(matrix: Matrix, once: Path, tmp_path: Path) -> None:
    for attempt in range(3):  # on a busy machine one may begin when the other has ended, and that shows nothing
        folder = tmp_path / str(attempt)
        folder.mkdir()
        said = [told(process) for process in [sharing(matrix, folder), sharing(matrix, folder)]]
        assert computed(folder) == entries(folder) == entries(once), "each stage once"
        assert content(folder) == content(once)
        if any("another process is computing" in text for text in said):
            return
    pytest.fail("they never met, so this shows nothing")


@pytest.mark.slow
def test_of_two_runs_one_is_killed_and_the_other_finishes(matrix: Matrix, once: Path, tmp_path: Path) -> None:
    killed, left = sharing(matrix, tmp_path), sharing(matrix, tmp_path)
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and killed.poll() is None and len(entries(tmp_path)) < 3:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL, "it was not in mid-run"
    told(left)
    done = computed(tmp_path)
    assert len(set(done)) == len(done)
    assert len(entries(tmp_path)) - 1 <= len(done) <= len(entries(tmp_path))  # it may have died before it noted its last one
    assert content(tmp_path) == content(once)


def test_rows_are_merged_under_a_lock(matrix: Matrix, once: Path, tmp_path: Path) -> None:
    """Two slices, both collected before either writes: without the lock around reading and writing, one would win."""
    shutil.copytree(once, tmp_path / "run")
    folder = tmp_path / "run" / "results" / "tiny"
    for name in ("rows.csv", "curves.csv", "timings.csv"):
        (folder / name).unlink()
    slices = [{"processes": 1, "only": f"attack={attack},defense=none|clp"} for attack in ("badnets", "sig")]
    threads = [threading.Thread(target=go, args=(matrix, tmp_path / "run"), kwargs=one) for one in slices]
    with held(tmp_path / "run" / "cache" / "store" / "locks" / f"results-{digest(str(folder.resolve()))}"):
        for thread in threads:
            thread.start()
        time.sleep(1)
        assert not (folder / "rows.csv").exists()
    for thread in threads:
        thread.join(120)
    assert set(rows_of(tmp_path / "run")["attack"]) == {"badnets", "sig"}


def test_a_flipped_byte_in_the_store_is_named_and_recomputed(matrix: Matrix, once: Path) -> None:
    expected = content(once)
    entry = sorted((once / "cache" / "store" / "defended").rglob("entry.json"))[0]
    raw = bytearray(entry.read_bytes())
    raw[100] ^= 1
    entry.write_bytes(raw)
    out = io.StringIO()
    console = Console(file=out, width=200)
    run_matrix(matrix, results=once / "results", cache=once / "cache", console=console, processes=1)
    assert "damaged store entry defended/" in out.getvalue()
    assert content(once) == expected


def test_a_flipped_byte_in_a_models_weights_is_named_and_it_is_trained_again(matrix: Matrix, once: Path, tmp_path: Path) -> None:
    """Weights are read by those who defend, in a worker or not, and nobody else."""
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)
    for weights in (tmp_path / "cache" / "store" / "victim").rglob("tensors.safetensors"):
        raw = bytearray(weights.read_bytes())
        raw[-1] ^= 1
        weights.write_bytes(raw)
    shutil.rmtree(tmp_path / "cache" / "store" / "defended")
    out = io.StringIO()
    console = Console(file=out, width=200)
    run_matrix(matrix, results=tmp_path / "results", cache=tmp_path / "cache", console=console, processes=1)
    assert out.getvalue().count("damaged store entry victim/") == 3, "the benign one too: victims are compared with it"
    assert content(tmp_path) == content(once)


def test_a_slice_restores_what_was_changed_in_other_cells_rows(matrix: Matrix, once: Path, tmp_path: Path) -> None:
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)
    written = tmp_path / "results" / "tiny" / "rows.csv"
    table = pd.read_csv(written, dtype=str, keep_default_na=False)
    other = table.index[(read(written, Row)["attack"] == "badnets") & (table["status"] == "ok")][0]
    table.loc[other, "acc"] = "0.5"
    table.to_csv(written, index=False, lineterminator="\n")
    assert content(tmp_path) != content(once)
    go(matrix, tmp_path, processes=1, only="attack=sig")
    assert content(tmp_path) == content(once)
    # Nobody can tell where it is not stored: the row stays as it is.
    table.to_csv(written, index=False, lineterminator="\n")
    shutil.rmtree(tmp_path / "cache" / "store" / "defended")
    go(matrix, tmp_path, processes=1, only="attack=sig")
    assert rows_of(tmp_path)["acc"][other] == 0.5


def test_slices_merge_into_one_file(matrix: Matrix, once: Path, tmp_path: Path) -> None:
    go(matrix, tmp_path, processes=1, only="attack=sig")
    assert set(rows_of(tmp_path)["attack"]) == {"sig"}
    go(matrix, tmp_path, processes=1, only="attack=badnets,defense=none")
    go(matrix, tmp_path, processes=1, only="attack=badnets")
    assert content(tmp_path) == content(once)


def test_an_interrupt_leaves_rows_of_what_is_cached_and_the_same_command_goes_on(
    matrix: Matrix, once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(stages: Sequence[Stage], *arguments: Any) -> list[Failure]:
        run_stages(stages[:5], *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("benchmark.run.session.run_stages", stopped)
        with pytest.raises(KeyboardInterrupt):
            go(matrix, tmp_path, processes=1)
        # Three victims, then two cells of the five.
        assert list(rows_of(tmp_path)["defense"].unique()) == ["none", "clp"]
        assert rows_of(tmp_path)["cell"].nunique() == 2
        assert set(rows_of(tmp_path)["status"]) == {"ok", "refused"}
        patched.setattr("benchmark.run.session.run_stages", lambda *arguments: stopped([], *arguments[1:]))
        with pytest.raises(KeyboardInterrupt):
            go(matrix, tmp_path / "nothing-yet", processes=1)
        assert not (tmp_path / "nothing-yet" / "results" / "tiny" / "rows.csv").exists()
    go(matrix, tmp_path, processes=1)
    assert content(tmp_path) == content(once)


def test_only_takes_several_values_and_labels_as_they_are(matrix: Matrix, tmp_path: Path) -> None:
    assert parse_only(matrix, "attack=sig, seed=0") == {"attack": ("sig",), "seed": ("0",)}
    assert parse_only(matrix, "attack=sig | badnets,defense=none|clp") == {"attack": ("sig", "badnets"), "defense": ("none", "clp")}
    assert parse_only(matrix, None) == parse_only(matrix, " , ") == {}
    (tmp_path / "odd.py").write_text(ODD)
    (tmp_path / "labels.toml").write_text(TINY.replace('label = "undeclared"', 'label = "a|b, c"'))
    labelled = load_matrix(tmp_path / "labels.toml")
    assert parse_only(labelled, "defense=a|b, c,seed=0") == {"defense": ("a|b, c",), "seed": ("0",)}


def test_several_values_run_and_merge(matrix: Matrix, once: Path, tmp_path: Path) -> None:
    go(matrix, tmp_path, processes=1, only="defense=none|clp")
    assert set(rows_of(tmp_path)["defense"]) == {"none", "clp"}
    go(matrix, tmp_path, processes=1, only="defense=fine-tuning|greedy|undeclared|broken")
    assert content(tmp_path) == content(once)


def test_only_names_the_nearest(matrix: Matrix) -> None:
    with pytest.raises(BadInput, match="did you mean 'sig'"):
        parse_only(matrix, "attack=badnets|sg")
    with pytest.raises(BadInput, match=r"names attack twice; write attack=badnets\|sig"):
        parse_only(matrix, "attack=badnets,attack=sig")
    with pytest.raises(BadInput, match="did you mean 'attack'"):
        parse_only(matrix, "atack=sig")
    with pytest.raises(BadInput, match="did you mean 'badnets'"):
        parse_only(matrix, "attack=badnet")


def test_manifest_names_data_settings_and_arithmetic(once: Path) -> None:
    manifest = json.loads((once / "results" / "tiny" / "manifest.json").read_text())
    assert manifest["arithmetic"]["threads"] == 1
    assert len(manifest["datasets"]["digits"]["fingerprint"]) == 64
    assert manifest["plugins"][0]["file"] == "odd.py"
    assert manifest["versions"]["torch"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has such arithmetic")
def test_bf16_on_a_cpu_is_announced_and_stands_in_the_manifest(
    matrix: Matrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmark.settings.cautions.has_bfloat16", lambda: False)
    ways = "".join(
        f'[[backbone]]\nname = "vgg11-bn"\nlabel = "{name}"\nwidth = 2\nhidden = 8\nrecipe = {{ precision = "{name}" }}\n'
        for name in ("tf32", "bf16")
    )
    (tmp_path / "odd.py").write_text(ODD)
    (tmp_path / "rounded.toml").write_text(TINY.replace("[[attack]]", ways + "[[attack]]", 1))
    rounded = load_matrix(tmp_path / "rounded.toml")

    def told(backbones: str) -> str:
        console = Console(file=io.StringIO(), width=200)
        only = f"attack=badnets,defense=none,backbone={backbones}"
        run_matrix(rounded, only=only, results=tmp_path / "results", cache=tmp_path / "cache", console=console, processes=1)
        return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]

    assert "bf16" not in told("vgg11-bn-w2|tf32")
    assert "bf16 takes 5 to 10 times as long" in told("bf16")
    manifest = json.loads((tmp_path / "results" / "rounded" / "manifest.json").read_text())
    assert manifest["arithmetic"]["precision"] == "float32, bf16", "tf32 is float32 here"

def test_results_folder_that_cannot_be_written(matrix: Matrix, tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file where a folder should be")
    with pytest.raises(BadInput, match="results"):
        go(matrix, tmp_path, processes=1)
