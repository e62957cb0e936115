"""The leaderboard page: figures by hand and from the leaderboards, hostile names, nothing loaded, a second run."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import shutil
import tomllib
from functools import cache
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.console import Console

from benchmark.analysis import stats
from benchmark.present import draw_page
from benchmark.report import page, page_data, words
from benchmark.report.tables import boards
from benchmark.report.text import plain, slug
from benchmark.rules.selection import NOTHING_TO_VALIDATE_ON
from benchmark.storage.rows import Curve, Key, Row, Timing, frame, read, write

ROOT = Path(__file__).parents[3]
ASSETS = ROOT / "benchmark" / "report" / "assets"
DASH, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
HOSTILE = '</script><script>hacked()</script><!--<img src=x onerror="hacked()"> & "q" \'s\' {{data}} \x1b[31m\n\u2028\u202e'
RA = {"good": 0.7, "weak": 0.2, "none": 0.0, "random": 0.1}
WORLDS = [("net", "badnets", 0.0), ("net", "wanet", 0.05), ("other", "badnets", 0.11), ("other", "dud", -0.02)]
"""(backbone, attack, what it adds to RA); "dud" does not implant."""


def row(backbone: str, attack: str, seed: int, defense: str, ra: float = 0.0, **more: object) -> Row:
    settings: dict[str, object] = {
        "matrix": "m", "dataset": "digits", "backbone": backbone, "attack": attack, "rate": 0.1, "seed": seed,
        "track": "model+clean", "scope": "whole", "defense": defense, "cell": f"{backbone}{attack}{seed}{defense}", "target": 0,
        "label_mode": "all-to-one", "realised_rate": 0.0994, "control": defense in ("none", "random"), "selection": "validation",
        "status": "ok", "acc": 0.9, "asr": round(0.9 - ra, 6), "ra": ra, "der": 0.5, "acc_undefended": 0.95,
        "asr_undefended": 0.03 if attack == "dud" else 1.0, "ra_undefended": 0.0, "acc_benign": 0.96, "asr_benign": 0.01,
        "implanted": attack != "dud", "pruned": 10, "units": 100, "cost_epochs": 0.125,
        "gate": "implanted" if attack != "dud" else "not implanted: ASR 3.0 < 50", "used": "model + clean", "clean_images": 40,
        "preset": "cpu", "dial": 0.5,
    }  # fmt: skip
    return Row(**{**settings, **more})  # type: ignore[arg-type]


def field(seeds: int = 2, **more: object) -> list[Row]:
    """Four entries in four scenarios, three of them implanted, under every selection."""
    return [
        row(backbone, attack, seed, name, round(ra + add + 0.013 * seed, 6), selection=selection,
            acc=round(0.9 - 0.1 * ra - 0.003 * seed, 6), **more)
        for (backbone, attack, add), (name, ra), seed, selection in product(WORLDS, RA.items(), range(seeds), stats.SELECTIONS)
    ]  # fmt: skip


def key(line: Row) -> dict[str, Any]:
    return {name: getattr(line, name) for name in Key.__dataclass_fields__}


def dials(rows: list[Row]) -> list[Curve]:
    return [
        Curve(**key(line), dial_name="share pruned", dial=step / 4, is_default=step == 2, strength=step, pruned=step,
              acc=0.95 - 0.1 * step / 4, asr=max(0.0, line.asr - 0.1 * step), ra=line.ra, val_acc=0.9)
        for line in rows if line.selection == "validation" and line.defense in ("good", "weak") for step in (3, 0, 1, 2, 4)
    ]  # fmt: skip


def clocks(rows: list[Row]) -> list[Timing]:
    once = {line.cell: line for line in rows}.values()
    return [Timing(**key(line), seconds=2.0, peak_mib=512.0, victim_seconds=8.0) for line in once]


def frames(rows: list[Row]) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    curves = dials(rows)
    return frame(rows), frame(curves) if curves else pd.DataFrame(columns=[*Curve.__dataclass_fields__]), frame(clocks(rows))


def made(rows: list[Row], **more: Any) -> dict[str, Any]:
    """The page's contents with the words in their places: lines carry names instead of numbers, and facts as dicts."""
    found = json.loads(json.dumps(page_data.contents(*frames(rows), "title", **more)))
    words = found["words"]

    def told(numbers: list[int]) -> dict[str, str]:
        return {words[name]: words[text] for name, text in zip(numbers[::2], numbers[1::2], strict=True)}

    for line in [*found["means"], *found["places"]]:
        line["entry"] = words[found["entries"][line["e"]]["name"]]
        line["facts"] = told(line["facts"])
        line["missing"] = words[line["missing"]]
        if "p" in line:
            line["place"] = tuple(words[found["scenarios"][line["p"]][name]] for name in "dba")
    for cell in found["cells"]:
        cell["facts"] = told(cell["facts"])
        for own in cell["by"].values():
            own["facts"] = told(own["facts"])
    return found  # type: ignore[no-any-return]


@cache
def standard(seeds: int = 2) -> dict[str, Any]:
    """:func:`made` of :func:`field`; not to be changed."""
    return made(field(seeds))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of :func:`field`."""
    return written(field(), tmp_path_factory.mktemp("page"))


def written(rows: list[Row], folder: Path, title: str = "tiny") -> str:
    path = page.write_page(folder, *frames(rows), title)
    assert path == folder / "leaderboard.html"
    return path.read_text(encoding="utf-8")


class Reader(HTMLParser):
    """What a browser makes of the page: its elements with their attributes, and the text of each."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None], str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self.found.append(("/", {}, ""))  # what follows is text of no element we ask for

    def handle_data(self, data: str) -> None:
        if self.found:
            tag, attributes, text = self.found[-1]
            self.found[-1] = (tag, attributes, text + data)

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attributes, text) for name, attributes, text in self.found if name == tag]


def embedded(text: str) -> dict[str, Any]:
    (data,) = [inside for attributes, inside in Reader(text).all("script") if attributes.get("id") == "data"]
    return json.loads(data)  # type: ignore[no-any-return]


# -- figures -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", stats.SELECTIONS)
@pytest.mark.parametrize("seeds", [1, 3])
def test_means_are_the_leaderboards(selection: str, seeds: int) -> None:
    rows = field(seeds)
    lines = [line for line in standard(seeds)["means"] if line["s"] == selection]
    board = stats.leaderboard(frame(rows), "model+clean", selection)
    assert [line["entry"].removesuffix(" (undefended)") for line in lines] == list(board["defense"])
    for line, (_, wanted) in zip(lines, board.iterrows(), strict=True):
        for name in ("acc", "asr", "ra", "d_acc"):
            assert line[name][0] == pytest.approx(wanted[name], abs=1e-6)
        assert line["place"] == wanted["place"]
        assert (line["rank"] is None) == math.isnan(wanted["rank"])
        assert (line["ok"], line["of"]) == (wanted["cells_ok"], wanted["cells"]) == (3 * seeds, 3 * seeds)
        assert line["role"] == wanted["role"]
    # The texts are those of the table that people read.
    table = boards.leaderboard_markdown(board, "model+clean")
    for line in lines:
        shown = " | ".join(" ".join(part for part in line[name][1:] if part) for name in ("acc", "asr", "ra"))
        assert f"| {line['entry']} | whole | {shown} | " in table
        assert f" | {line['cost'][1]} |  | {line['rank'][1] if line['rank'] else DASH} | {3 * seeds} / {3 * seeds} |" in table
    assert all(line["rank"] is None and line["place"] == 0 for line in lines if selection in stats.HINDSIGHT or line["role"] !=
    "defense")


def test_lines_by_scenario_by_hand() -> None:
    found = standard(3)
    lines = {(line["entry"], *line["place"]): line for line in found["places"] if line["s"] == "validation"}
    assert len(lines) == 16
    line = lines["good", "digits", "other", "badnets"]
    assert line["ra"] == [0.823, "82.3", "±1.3"]  # 0.81, 0.823, 0.836
    assert line["d_acc"] == [-0.123, "-12.3", "±0.3"]  # ACC 0.83, 0.827, 0.824 against 0.95
    assert (line["rank"], line["ok"], line["of"]) == ([1.0, "1"], 3, 3)
    assert lines["weak", "digits", "other", "badnets"]["rank"] == [2.0, "2"]
    assert lines["random", "digits", "other", "badnets"]["rank"] is None
    assert line["facts"]["Poisoning rate"] == "10 % nominal, 9.9 % realised"
    assert line["facts"]["Gate"] == "implanted"
    # Means of the leaderboard are the means of these over implanted scenarios, ranks too.
    for mean in found["means"]:
        mine = [one for one in found["places"] if (one["s"], one["e"]) == (mean["s"], mean["e"]) and one["place"][2] != "dud"]
        for name in ("acc", "asr", "ra", "d_acc"):
            assert np.mean([one[name][0] for one in mine]) == pytest.approx(mean[name][0], abs=2e-6)
        if mean["rank"]:
            assert np.mean([one["rank"][0] for one in mine]) == pytest.approx(mean["rank"][0])


def test_what_did_not_implant_is_shown_marked_and_in_no_mean() -> None:
    rows = [line for line in field(3) if not (line.attack == "wanet" and line.seed == 2)]
    # One seed of an implanted scenario fails the gate by itself: the scenario is judged on the mean, and the seed counts.
    rows += [row("net", "wanet", 2, name, 0.89, selection=how, implanted=False, asr_undefended=0.4, gate="not implanted")
             for name in RA for how in stats.SELECTIONS]  # fmt: skip
    rows += [row("net", "noise", seed, name, 0.5, selection=how, asr_benign=0.9) for seed in (0, 1, 2) for name in RA
             for how in stats.SELECTIONS]  # fmt: skip
    found = made(rows)
    gates = {found["words"][place["a"]]: place for place in found["scenarios"]}
    assert (gates["dud"]["implanted"], found["words"][gates["dud"]["state"]]) == (False, "not implanted (ASR 3.0, benign twin 1.0)")
    assert (gates["wanet"]["implanted"], found["words"][gates["wanet"]["state"]]) == (True, "implanted (ASR 80.0, benign twin 1.0)")
    assert (gates["noise"]["implanted"], found["words"][gates["noise"]["state"]]) == (
        False, "adversarial (ASR 100.0, benign twin 90.0)"
    )  # fmt: skip
    lines = {(line["entry"], line["place"][2]): line for line in found["places"] if line["s"] == "validation"}
    assert lines["good", "wanet"]["ra"][0] == pytest.approx((0.75 + 0.763 + 0.89) / 3, abs=1e-6)
    assert (lines["good", "wanet"]["of"], len(lines["good", "wanet"]["cells"])) == (3, 3)
    assert lines["good", "wanet"]["facts"]["Gate"] == "seed 0: implanted; seed 1: implanted; seed 2: not implanted"
    assert lines["good", "dud"]["ra"][0] == pytest.approx(0.693)
    assert lines["good", "dud"]["rank"] is None
    assert lines["good", "noise"]["rank"] is None
    board = stats.leaderboard(frame(rows), "model+clean", "validation").set_index("defense")
    mean = next(line for line in found["means"] if line["entry"] == "good" and line["s"] == "validation")
    assert mean["ra"][0] == pytest.approx(board.loc["good", "ra"], abs=1e-6)
    assert mean["of"] == 9


def test_refused_and_failed_cells_carry_their_reason() -> None:
    rows = [
        row(line.backbone, line.attack, line.seed, "weak", math.nan, selection=line.selection, acc=math.nan, asr=math.nan,
            der=math.nan, dial=math.nan, cost_epochs=math.nan, status="failed" if line.seed else "refused",
            reason="out of <memory>")
        if line.defense == "weak" and line.backbone == "net" else line
        for line in field()
    ]  # fmt: skip
    found = made(rows)
    mean = next(line for line in found["means"] if line["entry"] == "weak" and line["s"] == "validation")
    assert (mean["ok"], mean["of"], mean["missing"]) == (2, 6, "refused / failed")
    assert "failed in 2 of 6: out of <memory>" in mean["facts"]["Not in the means"]
    line = next(line for line in found["places"] if line["entry"] == "weak" and line["place"] == ("digits", "net", "wanet"))
    assert (line["acc"], line["cost"], line["ok"], line["of"]) == (None, None, 0, 2)
    own = found["cells"][line["cells"][0]]
    assert {**own["facts"], **own["by"]["validation"]["facts"]}["Not measured"] == "refused: out of <memory>"


def test_a_cell_says_once_what_all_its_selections_share() -> None:
    told = {"note": "a note", "asr_recraft": 0.25, "ra_recraft": 0.5}
    rows = [row("net", "badnets", 0, "good", 0.1 * place, selection=how, dial=place / 4, **told)
            for place, how in enumerate(stats.SELECTIONS)]  # fmt: skip
    (cell,) = made(rows)["cells"]
    assert cell["facts"] == {
        "Preset": "cpu", "Pruned / units": "10 / 100", "DER": "50.0",
        "ASR / RA, trigger computed again": "25.0 / 50.0", "Used of what it was granted": "model + clean",
        "Clean labelled images": "40", "Undefended ACC / ASR / RA": "95.0 / 100.0 / 0.0", "ACC of the benign twin": "96.0",
        "ASR of the benign twin": "1.0",
        "Poisoning rate": "10 % nominal, 9.9 % realised", "Labels": "all-to-one, target 0", "Note": "a note", "Gate": "implanted",
        "Seconds; peak memory": "2 s; 512 MiB, on the machine that ran it", "Cell": "netbadnets0good",
    }  # fmt: skip
    assert {how: own["facts"]["dASR"] for how, own in cell["by"].items()} == {
        how: f"-{10 * place}.0 points" for place, how in enumerate(stats.SELECTIONS, 1)
    }  # fmt: skip
    assert [cell["by"][how]["ra"][1] for how in stats.SELECTIONS] == ["0.0", "10.0", "20.0", "30.0", "40.0", "50.0"]
    assert [cell["by"][how]["dial"] for how in stats.SELECTIONS] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
    assert cell["by"]["validation"]["facts"]["Dial"] == "share pruned: 0"


def test_curves_run_along_the_dial() -> None:
    found = standard()
    curves = [cell["curve"] for cell in found["cells"] if cell["curve"]]
    assert len(curves) == 16  # two entries with a dial, eight worlds
    assert found["words"][curves[0]["name"]] == "share pruned"
    assert [point[0] for point in curves[0]["points"]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [point[1] for point in curves[0]["points"]] == [0.95, 0.925, 0.9, 0.875, 0.85]


def test_settings_of_a_line() -> None:
    line = next(line for line in standard()["means"] if line["entry"] == "good" and line["s"] == "validation")
    told = line["facts"]
    assert told["Preset"] == "cpu"
    assert (told["Model"], told["Clean labelled images"], told["Training images"]) == ("edited", "40", "none")
    assert told["Gate"] == "3 of 4 scenarios implanted, 1 not implanted"
    assert told["Seconds, median; peak memory"] == "2 s; 512 MiB, on the machine that ran it"
    assert told["RA below the oracle's, validation"] == "0.0 [0.0, 0.0] points"
    assert "validation (the published default; where it loses more" in told["Selection"]


def test_tracks_stand_apart_and_say_how_they_are_judged() -> None:
    blind = [row("net", "badnets", seed, "abl", 0.5, track="train", selection=how, used="train",
                 **({"status": "refused", "reason": NOTHING_TO_VALIDATE_ON} if how in ("validation", "strongest", "canary") else
                 {}))
             for seed in (0, 1) for how in stats.SELECTIONS]  # fmt: skip
    found = made([*field(), *blind])
    assert [(found["words"][track["name"]], track["judged"]) for track in found["tracks"]] == [
        ("model+clean", "validation"), ("train", "default"),
    ]  # fmt: skip
    assert found["tracks"][1]["selections"] == ["default", "oracle", "leaky"]
    assert found["words"][found["tracks"][1]["why"]] == NOTHING_TO_VALIDATE_ON
    mine = [line for line in found["means"] if line["t"] == 1 and line["s"] == "default"]
    assert {(line["entry"], line["place"]) for line in mine} == {("abl", 1), ("none (undefended)", 0), ("random", 0)}
    assert next(line for line in mine if line["entry"] == "random")["facts"]["Measured in track"] == "model+clean"


def test_controls_alone_and_nothing_implanted_make_a_page(tmp_path: Path) -> None:
    alone = embedded(written([line for line in field(1) if line.control], tmp_path / "a"))
    assert {line["role"] for line in alone["means"]} == {"reference", "control"}
    undefended = embedded(written([line for line in field(1) if line.defense == "none"], tmp_path / "c"))
    assert undefended["tracks"] == undefended["means"] == undefended["places"] == []
    assert [place["undefended"]["asr"][1] for place in undefended["scenarios"]] == [*["100.0"] * 3, "3.0"]
    nothing = embedded(written(field(1, asr_undefended=0.3), tmp_path / "b"))
    assert nothing["means"] == []
    assert len(nothing["places"]) == 4 * 4 * len(stats.SELECTIONS)
    assert nothing["words"][nothing["nothing"]] == words.NOTHING


# -- safety --------------------------------------------------------------------------------------------------------------------


def test_hostile_names_are_inert(text: str, tmp_path: Path) -> None:
    rows = [
        row(line.backbone + HOSTILE, HOSTILE + line.attack, line.seed, line.defense if line.control else HOSTILE + line.defense,
            line.ra, selection=line.selection, dataset=HOSTILE, track=HOSTILE, preset=HOSTILE, note=HOSTILE, gate=HOSTILE)
        for line in field(1)
    ]  # fmt: skip
    hostile = written(rows, tmp_path, HOSTILE)
    # The same elements as with harmless names: nothing was opened, closed or commented out.
    assert [(tag, sorted(attributes)) for tag, attributes, _ in Reader(hostile).found] == [
        (tag, sorted(attributes)) for tag, attributes, _ in Reader(text).found
    ]
    data = re.search(r'id="data">(.*?)</script>', hostile, re.DOTALL)
    assert data
    assert not set("<>&\u2028\u2029\u202e\x1b\n") & set(data[1])
    found = json.loads(data[1])
    wanted = plain(HOSTILE)
    assert {found["words"][place["d"]] for place in found["scenarios"]} == {wanted}
    ((_, title),) = Reader(hostile).all("title")
    assert title == f"{wanted}: leaderboard"


def test_the_policy_allows_the_pages_own_scripts_and_no_load(text: str) -> None:
    reader = Reader(text)
    (policy,) = [attributes["content"] for attributes, _ in reader.all("meta") if "http-equiv" in attributes]
    assert policy
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    assert set(rules) == {"default-src", "img-src", "style-src", "script-src", "base-uri", "form-action"}

    def hashed(inside: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"

    code = [inside for attributes, inside in reader.all("script") if "type" not in attributes]
    assert rules["script-src"].split() == [hashed(inside) for inside in code]
    assert len(code) == 3
    assert rules["style-src"] == hashed(reader.all("style")[0][1])
    # Hashes alone decide: the policy stands above everything it governs, and nothing carries a handler or a style of its own.
    assert text.index("Content-Security-Policy") < text.index("<style>") < text.index("<script")
    assert not [name for _, attributes, _ in reader.found for name in attributes if name.startswith("on") or name == "style"]


def test_nothing_is_loaded_from_anywhere(text: str) -> None:
    assert "http://" not in text
    assert "https://" not in text
    assert "sourceMappingURL" not in text
    links = [attributes.get("href") or attributes.get("src") for _, attributes, _ in Reader(text).found]
    assert {link for link in links if link} == {
        "README.md", "rows.csv", "curves.csv", "timings.csv", "matrix.toml", "#boards", "data:,",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["page.js", "board.js", "elements.js"])
def test_the_script_writes_text_and_no_markup(name: str) -> None:
    script = (ASSETS / name).read_text()
    assert '"use strict"' in script
    for banned in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "fetch(", "import("):
        assert banned not in script
    # Figures come with their text: the script formats coordinates only.
    assert all("toFixed(1)" in line for line in script.splitlines() if "toFixed" in line)


def test_the_library_is_the_one_named() -> None:
    about = (ASSETS / "README.md").read_text()
    assert hashlib.sha256((ASSETS / "table-core.min.js").read_bytes()).hexdigest() in about
    assert "MIT License" in (ASSETS / "table-core.LICENSE").read_text()
    assert (ASSETS / "table-core.min.js").stat().st_size < 150_000


def test_a_wheel_carries_every_asset() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["benchmark.report"]
    package = ROOT / "benchmark" / "report"
    carried = {path for pattern in patterns for path in package.glob(pattern)}
    assert set(ASSETS.iterdir()) <= carried


# -- the file ------------------------------------------------------------------------------------------------------------------


def test_second_run_changes_no_byte(text: str, tmp_path: Path) -> None:
    (tmp_path / "leaderboard.html").write_text(text, encoding="utf-8")
    stamp = (tmp_path / "leaderboard.html").stat().st_mtime_ns
    assert written(field(), tmp_path) == text
    assert (tmp_path / "leaderboard.html").stat().st_mtime_ns == stamp


def test_the_verb_writes_what_the_frames_give(tmp_path: Path) -> None:
    rows = field(1)
    write(tmp_path, rows, dials(rows), clocks(rows))
    (tmp_path / "matrix.toml").write_text('title = "tiny"\nabout = "One sentence."\n')
    draw_page(tmp_path, Console(file=io.StringIO()))
    text = (tmp_path / "leaderboard.html").read_text(encoding="utf-8")
    found = embedded(text)
    assert found["words"][found["about"]] == "One sentence."
    assert text == page.write_page(tmp_path, *frames(rows), "tiny", about="One sentence.").read_text(encoding="utf-8")


def test_a_page_stays_small(tmp_path: Path) -> None:
    small, large = len(written(field(1), tmp_path)), len(written(field(6), tmp_path))
    per_cell = (large - small) / (5 * 16)
    assert small < 170_000
    assert 540 * per_cell + small < 3_000_000, "quick's 540 cells would not fit"


@pytest.mark.parametrize("name", ["attacks", "quick"])
def test_pages_of_committed_rows_are_small_and_report_their_rows(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    shutil.copytree(ROOT / "results" / name, folder, ignore=shutil.ignore_patterns("*.html", "*.svg", "tables"))
    draw_page(folder, Console(file=io.StringIO()))
    path = folder / "leaderboard.html"
    assert path.stat().st_size < 3_000_000
    found = embedded(path.read_text(encoding="utf-8"))
    rows = read(folder / "rows.csv", Row)
    assert len(found["cells"]) == rows["cell"].nunique()
    assert [found["words"][place["a"]] for place in found["scenarios"]] == [
        plain(attack) for _, _, attack in dict.fromkeys(rows[stats.SCENARIO].itertuples(index=False, name=None))
    ]


# -- pictures ------------------------------------------------------------------------------------------------------------------


def draw_trigger(folder: Path, attack: str) -> None:
    """A picture as :func:`benchmark.report.charts.trigger_pictures` writes it."""
    about = PngInfo()
    about.add_itxt("Title", attack)
    about.add_itxt("Description", f"difference {TIMES} 1")
    path = folder / "plots" / "triggers" / f"{slug(attack)}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (16, 24), 90).save(path, pnginfo=about)


def test_pictures_are_found_by_their_title(tmp_path: Path) -> None:
    odd = "an attack / with an odd name"
    for attack in ("badnets", odd, "elsewhere"):
        draw_trigger(tmp_path, attack)
    found = page.pictures(tmp_path / "plots" / "triggers", ["badnets", "wanet", odd])
    assert [one.attack for one in found] == ["badnets", odd]
    assert found[0].difference == f"difference {TIMES} 1"
    assert found[0].image == (tmp_path / "plots" / "triggers" / "badnets.png").read_bytes()
    assert page.pictures(tmp_path / "none", ["badnets"]) == []


def test_an_attack_at_another_rate_shows_the_same_trigger(tmp_path: Path) -> None:
    draw_trigger(tmp_path, "badnets")
    (tmp_path / "matrix.toml").write_text(
        '[[attack]]\nname = "badnets"\nrate = 0.1\n\n[[attack]]\nname = "badnets"\nlabel = "wanet"\nrate = 0.01\n\n'
        '[[attack]]\nname = "badnets"\nlabel = "dud"\nsize = 5\n'
    )
    found = embedded(written(field(1), tmp_path))
    assert {found["words"][place["a"]]: place["picture"] for place in found["scenarios"]} == {"badnets": 0, "wanet": 0, "dud": None}
    assert found["pictures"][0]["image"].startswith("data:image/png;base64,")
