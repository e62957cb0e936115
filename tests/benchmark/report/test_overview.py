"""The board over all matrices: figures by hand, rows where it says they are, hostile names, and the page in a browser."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmark.present import draw_exhibits
from benchmark.report.tables.overview import KEY, contents, overview, write_board
from benchmark.rules.selection import NOTHING_TO_VALIDATE_ON
from benchmark.storage.rows import Row, frame, read, write
from tests.benchmark.report.test_page import HOSTILE, clocks, dials, field, row


def blind(seed: int) -> list[Row]:
    """A track without clean images: only the published setting."""
    one = row("net", "badnets", seed, "clp", 0.3, selection="default", track="model", cell=f"clp{seed}")
    nothing = {"acc": math.nan, "asr": math.nan, "ra": math.nan, "status": "refused", "reason": NOTHING_TO_VALIDATE_ON}
    return [one, replace(one, selection="validation", **nothing)]  # type: ignore[arg-type]


def shown(page: Path) -> Any:
    """The data of a page."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(found)


def stored(folder: Path, rows: list[Row]) -> None:
    rows = [replace(one, matrix=folder.name) for one in rows]
    write(folder, rows, dials(rows), clocks(rows))


def test_seeds_are_averaged_and_nothing_else() -> None:
    lines = overview(frame([*field(), *blind(0), *blind(1)]))
    assert lines.groupby(KEY, sort=False).ngroups == len(lines) == 4 * 4 * 3 + 1
    one = lines[(lines["defense"] == "good") & (lines["attack"] == "wanet") & (lines["selection"] == "validation")].iloc[0]
    assert one["ra"] == pytest.approx((0.75 + 0.763) / 2)
    assert one["acc"] == pytest.approx((0.83 + 0.827) / 2)
    assert (one["seeds"], one["state"], one["control"], one["implanted"], one["judged"]) == (2, "", False, True, True)
    assert not lines[lines["attack"] == "dud"]["implanted"].any()
    assert lines[lines["control"]]["defense"].unique().tolist() == ["none", "random"]
    (clp,) = lines[lines["defense"] == "clp"].to_dict("records")
    assert (clp["selection"], clp["judged"], clp["ra"]) == ("default", True, 0.3)
    default = lines[(lines["defense"] == "good") & (lines["selection"] == "default")]
    assert not default["judged"].any()


def test_what_did_not_finish_is_named_and_enters_no_mean() -> None:
    rows = field()
    rows = [replace(one, status="failed", acc=math.nan, asr=math.nan, ra=math.nan, reason="diverged")
            if one.defense == "good" and one.seed == 1 else one for one in rows]  # fmt: skip
    lines = overview(frame(rows))
    one = lines[(lines["defense"] == "good") & (lines["attack"] == "wanet") & (lines["selection"] == "validation")].iloc[0]
    assert (one["ra"], one["seeds"], one["state"]) == (pytest.approx(0.75), 1, "failed")
    assert len(one["lines"]) == 2


def test_rows_are_where_the_board_says(tmp_path: Path) -> None:
    stored(tmp_path / "m", [*field(), *blind(0)])
    table = read(tmp_path / "m" / "rows.csv", Row)
    file, cells = ((tmp_path / "m" / f"{name}.csv").read_text().splitlines() for name in ("rows", "cells"))
    keys = {line["cell"]: line for line in csv.DictReader(cells)}
    for line in overview(table).to_dict("records"):
        for number in line["lines"]:
            found: dict[str, Any] = next(csv.DictReader([file[0], file[number - 1]]))
            assert found["selection"] == line["selection"]
            assert keys[found["cell"]]["defense"] == line["defense"]


def test_every_text_is_kept_once_and_none_can_leave_its_place(tmp_path: Path) -> None:
    stored(tmp_path / "m", [replace(one, defense=HOSTILE if one.defense == "weak" else one.defense) for one in field(1)])
    page = write_board(tmp_path).read_text()
    assert page.count("<script") == 3
    made = shown(tmp_path / "board.html")
    assert len(set(made["words"])) == len(made["words"])
    assert made["titles"] == {"m": "m"}
    assert write_board(tmp_path).read_text() == page
    texts = [dict(zip(made["texts"], (made["words"][at] for at in line[0]), strict=True)) for line in made["lines"]]
    assert {one["selection"] for one in texts} == {"validation", "default", "oracle"}
    assert contents([], {}) == {"words": [], "texts": made["texts"], "lines": [], "titles": {}}


def test_exhibits_and_board_are_drawn_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    stored(tmp_path / "m", field(1))
    draw_exhibits(tmp_path, Console(width=200))
    assert (tmp_path / "EXHIBITS.md").is_file()
    assert (tmp_path / "board.html").is_file()
    assert "board: " in capsys.readouterr().out


def test_the_page_filters_sorts_and_keeps_its_address(tmp_path: Path, browser: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    stored(tmp_path / "m", [*field(), *blind(0)])
    stored(tmp_path / "n", [replace(one, defense=HOSTILE if one.defense == "weak" else one.defense) for one in field(1)])

    def names() -> list[str]:
        return [one.text.split(",")[0] for one in browser.find_elements(By.CSS_SELECTOR, "#board tbody td.name")]

    def status() -> str:
        return str(browser.find_element(By.ID, "status").text)

    browser.get(write_board(tmp_path).as_uri())
    # Three implanted scenarios of four entries, and CLP, which is judged by its default.
    assert status() == "13 of 97 lines: m"
    assert names()[0] == "good"
    assert "clp" in names()
    browser.find_element(By.ID, "sort-asr").click()
    assert names()[0] == "good"
    browser.find_element(By.ID, "sort-asr").click()
    assert names()[0] == "none"
    Select(browser.find_element(By.ID, "filter-matrix")).select_by_value("")
    Select(browser.find_element(By.ID, "filter-attack")).select_by_value("wanet")
    assert status() == "8 of 97 lines"
    assert browser.execute_script("return window.hacked") is None
    address = browser.current_url
    browser.get("about:blank")
    browser.get(address)
    assert status() == "8 of 97 lines"
    browser.find_element(By.ID, "filter-name").send_keys("goo")
    assert names() == ["good", "good"]
    link = browser.find_element(By.CSS_SELECTOR, "#board td a")
    file, number = link.get_attribute("href").split("#L")
    assert file.endswith(("m/rows.csv", "n/rows.csv"))
    assert int(number) > 1
    browser.find_element(By.ID, "reset").click()
    assert status() == "13 of 97 lines: m"
    assert browser.get_log("browser") == []


