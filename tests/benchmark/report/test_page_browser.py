"""The leaderboard page as people meet it: in a headless Chromium, with mouse, keyboard, a phone's width and a dark screen.

Skipped, with the reason, where there is no browser.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmark.analysis import stats
from benchmark.report import page
from benchmark.storage.rows import Curve, Key, Row, Timing, frame

pytest.importorskip("selenium.webdriver", reason="selenium is not installed (it comes with the extra 'dev')")
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

HOSTILE = 'b</script><img src=x onerror="window.hacked = true">\u202e'
RA = {"good": 0.4, HOSTILE: 0.7, "weak": 0.2, "none": 0.0, "random": 0.9}
SHOWN = 'b</script><img src=x onerror="window.hacked = true">'
OTHER = "other-bn-w8 on features from clean images, with labels"
WORLDS = [("net", "badnets"), ("net", "wanet"), (OTHER, "badnets"), (OTHER, "dud")]
"""(backbone, attack): "dud" does not implant."""


def rows() -> list[Row]:
    """Two tracks; the second has no clean images to validate on."""
    found = []
    for (backbone, attack), (name, ra), seed, how in product(WORLDS, RA.items(), range(2), stats.SELECTIONS):
        control, ra = name in ("none", "random"), round(ra + 0.02 * seed, 6)
        found.append(Row(
            matrix="m", dataset="digits", backbone=backbone, attack=attack, rate=0.1, seed=seed, track="model+clean", scope="whole",
            defense=name, cell=f"{backbone}{attack}{seed}{name}", target=0, label_mode="all-to-one", realised_rate=0.1,
            control=control, selection=how, status="ok", acc=round(0.95 - 0.1 * ra, 6), asr=round(0.99 - ra, 6), ra=ra,
            der=0.5, acc_undefended=0.95, asr_undefended=0.03 if attack == "dud" else 1.0, ra_undefended=0.0,
            acc_benign=0.96, asr_benign=0.01, implanted=attack != "dud",
            gate="the gate's words",
            dial=0.5, pruned=3, units=100, cost_epochs=0.5, used="model + clean", clean_images=40, preset="cpu", note="a note",
        ))  # fmt: skip
        if name == "good":
            line = {**vars(found[-1]), "track": "train", "defense": "abl", "cell": f"{backbone}{attack}{seed}abl", "used": "train"}
            missing = {"status": "refused", "reason": "no clean images"} if how in ("validation", "strongest", "canary") else {}
            found.append(Row(**{**line, **missing}))
    return found


def draw_trigger(folder: Path, attack: str) -> None:
    """A picture as :func:`benchmark.report.charts.trigger_pictures` writes it."""
    about = PngInfo()
    about.add_itxt("Title", attack)
    about.add_itxt("Description", "difference x 1")
    path = folder / "plots" / "triggers" / f"{attack}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (16, 24), 90).save(path, pnginfo=about)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, table = tmp_path_factory.mktemp("results"), rows()
    once = {line.cell: line for line in table}.values()
    keys = [{name: getattr(line, name) for name in Key.__dataclass_fields__} for line in once]
    curves = [Curve(**key, dial_name="share pruned", dial=step / 4, is_default=step == 2, strength=step, pruned=step,
                    acc=0.9 - step / 10, asr=0.8 - step / 8, ra=step / 10, val_acc=0.9)
              for key in keys if key["defense"] in ("good", "weak") for step in range(5)]  # fmt: skip
    timings = [Timing(**key, seconds=1.0, peak_mib=9.0, victim_seconds=2.0) for key in keys]
    for name in ("badnets", "wanet"):
        draw_trigger(folder, name)
    return page.write_page(folder, frame(table), frame(curves), frame(timings), "Tiny & <small>").as_uri()


@pytest.fixture
def tab(browser: Any, address: str) -> Iterator[Any]:
    """The page, fresh; afterwards its console must be empty and nothing may have been loaded or run that is not its own."""
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "light"}]})
    browser.get_log("browser")
    browser.get(address)
    yield browser
    assert browser.get_log("browser") == []
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    assert browser.execute_script("return window.hacked") is None


def names(tab: Any, track: int = 0) -> list[list[str]]:
    """The defenses of a track's table as they stand, block by block."""
    return tab.execute_script(  # type: ignore[no-any-return]
        "return [...document.querySelectorAll(`#track-${arguments[0]}`)].flatMap((head) => [...head.closest('section')"
        ".querySelectorAll('.boards > tbody')].map((block) => [...block.querySelectorAll('tr.line button.toggle span')]"
        ".map((name) => name.textContent)))", track,
    )  # fmt: skip


def figures(tab: Any, column: str, track: int = 0) -> list[str]:
    return tab.execute_script(  # type: ignore[no-any-return]
        "return [...document.getElementById(`track-${arguments[0]}`).closest('section')"
        ".querySelectorAll(`tr.line > td.${arguments[1]}`)].map((cell) => cell.firstChild?.textContent ?? '')", track, column,
    )  # fmt: skip


def choose(tab: Any, name: str, words: str) -> None:
    Select(tab.find_element(By.ID, f"filter-{name}")).select_by_visible_text(words)


def status(tab: Any) -> str:
    return str(tab.find_element(By.ID, "status").text)


def test_first_sight(tab: Any) -> None:
    assert tab.title == "Tiny & <small>: leaderboard"
    assert names(tab) == [[SHOWN, "good", "weak"], ["none (undefended)", "random"]]
    assert names(tab, 1) == [["abl"], ["none (undefended)", "random"]]
    assert figures(tab, "ra") == ["71.0", "41.0", "21.0", "1.0", "91.0"]
    assert figures(tab, "place") == ["1", "2", "3", "", ""]
    assert "3 of 4 scenarios implanted" in status(tab)
    headings = [head.text for head in tab.find_elements(By.CSS_SELECTOR, "#boards h2")]
    assert headings[0].startswith("Track: model+clean (")
    assert headings[1].startswith("Track: train (")
    # The plane of a track has a mark for each of its lines.
    assert len(tab.find_elements(By.CSS_SELECTOR, "[aria-labelledby=track-0] .plane .mark")) == 5


def test_sorting_by_mouse_and_keyboard_stays_inside_a_track_and_below_it_the_controls(tab: Any) -> None:
    tab.find_element(By.ID, "sort-0-ra").click()
    assert figures(tab, "ra") == ["71.0", "41.0", "21.0", "91.0", "1.0"]
    head = "document.getElementById('sort-0-ra').closest('th').getAttribute('aria-sort')"
    assert tab.execute_script(f"return {head}") == "descending"
    assert tab.switch_to.active_element.get_attribute("id") == "sort-0-ra"
    tab.switch_to.active_element.send_keys(Keys.ENTER)
    assert tab.execute_script(f"return {head}") == "ascending"
    assert figures(tab, "ra") == ["21.0", "41.0", "71.0", "1.0", "91.0"]
    tab.switch_to.active_element.send_keys(Keys.SPACE)
    assert tab.execute_script(f"return {head}") == "none"
    assert figures(tab, "ra")[0] == "71.0"
    tab.find_element(By.ID, "sort-0-name").click()
    assert names(tab) == [[SHOWN, "good", "weak"], ["none (undefended)", "random"]]
    tab.find_element(By.ID, "sort-0-asr").click()
    assert figures(tab, "asr") == ["28.0", "58.0", "78.0", "8.0", "98.0"]


def test_a_row_opens_by_enter_space_and_click(tab: Any) -> None:
    toggle = next(button for button in tab.find_elements(By.CSS_SELECTOR, "button.toggle") if button.text == "good")
    assert toggle.get_attribute("aria-expanded") == "false"
    toggle.send_keys(Keys.ENTER)
    assert toggle.get_attribute("aria-expanded") == "true"
    detail = tab.find_element(By.ID, toggle.get_attribute("aria-controls"))
    for words in ("Preset\ncpu", "Model\nedited", "Clean labelled images\n40", "Note\na note", "3 of 4 scenarios implanted",
                  "Along the dial"):  # fmt: skip
        assert words in detail.text
    assert len(detail.find_elements(By.CSS_SELECTOR, ".panels svg")) == 3  # a dial per implanted scenario
    assert len(detail.find_elements(By.CSS_SELECTOR, ".panels svg .path")) == 3 * 3 * 2  # three metrics, two seeds
    pictures = detail.find_elements(By.CSS_SELECTOR, "img")
    assert len(pictures) == 2
    assert all(tab.execute_script("return arguments[0].naturalWidth", picture) > 10 for picture in pictures)
    toggle.send_keys(Keys.SPACE)
    assert toggle.get_attribute("aria-expanded") == "false"
    assert tab.find_elements(By.CSS_SELECTOR, "tr.unfold") == []
    tab.find_element(By.CSS_SELECTOR, "tr.line td.ra").click()
    assert len(tab.find_elements(By.CSS_SELECTOR, "tr.unfold")) == 1
    # It stays open when the table is sorted.
    tab.find_element(By.ID, "sort-0-ra").click()
    assert len(tab.find_elements(By.CSS_SELECTOR, "tr.unfold")) == 1


def test_a_part_of_the_scenarios_shows_them_one_by_one_and_says_so(tab: Any) -> None:
    choose(tab, "backbone", OTHER)
    assert "Filtered to 1 of 3 implanted scenarios" in status(tab)
    assert "notice" in tab.find_element(By.ID, "status").get_attribute("class")
    blocks = names(tab)
    assert [len(block) for block in blocks] == [3, 2, 5]
    assert "did not implant" in tab.find_elements(By.CSS_SELECTOR, "[aria-labelledby=track-0] .group")[1].text
    assert "not implanted" in tab.find_element(By.CSS_SELECTOR, "tr.dead .badge").text
    # Deviations over seeds, never an interval.
    assert not [cell.text for cell in tab.find_elements(By.CSS_SELECTOR, "tr.line td .aside") if "[" in cell.text]
    choose(tab, "attack", "wanet")
    assert "No line of this track passes the filters." in tab.find_element(By.ID, "boards").text
    tab.find_element(By.ID, "reset").click()
    assert "3 of 4 scenarios implanted" in status(tab)
    # A filter that keeps all implanted scenarios leaves the means as they are.
    choose(tab, "dataset", "digits")
    assert "Filtered" not in status(tab)
    assert figures(tab, "ra")[0] == "71.0"


def test_filters_by_track_selection_role_name_and_view(tab: Any) -> None:
    choose(tab, "track", "train")
    assert [head.get_attribute("id") for head in tab.find_elements(By.CSS_SELECTOR, "#boards h2")] == ["track-1"]
    choose(tab, "selection", "validation")
    assert "This track has no validation selection" in tab.find_element(By.ID, "boards").text
    choose(tab, "selection", "oracle")
    assert figures(tab, "place", 1) == ["", "", ""]
    choose(tab, "track", "all")
    choose(tab, "selection", "as each track is judged")
    choose(tab, "role", "controls")
    assert names(tab) == [["none (undefended)", "random"]]
    choose(tab, "role", "all")
    tab.find_element(By.ID, "filter-name").send_keys("GOO")
    assert names(tab) == [["good"]]
    assert tab.switch_to.active_element.get_attribute("id") == "filter-name"
    tab.find_element(By.ID, "reset").click()
    choose(tab, "view", "Every attacked model")
    assert [len(block) for block in names(tab)] == [18, 12, 10]
    assert len(figures(tab, "seed")) == 40
    choose(tab, "attack", "badnets")
    assert [len(block) for block in names(tab)] == [12, 8]


def test_ticked_lines_are_drawn_alone(tab: Any) -> None:
    for name in (SHOWN, "weak"):
        tab.find_element(By.XPATH, f"//tr[.//button[@class='toggle']/span[text()={name!r}]]//input").send_keys(Keys.SPACE)
    marks = tab.find_elements(By.CSS_SELECTOR, "[aria-labelledby=track-0] .plane .mark title")
    assert [mark.get_attribute("textContent") for mark in marks] == [
        f"{SHOWN}, whole: ACC 87.9 %, ASR 28.0 %", "weak, whole: ACC 92.9 %, ASR 78.0 %",
    ]  # fmt: skip
    assert len(tab.find_elements(By.CSS_SELECTOR, "[aria-labelledby=track-1] .plane .mark")) == 3


def test_every_control_can_be_reached_by_keyboard_and_is_named(tab: Any) -> None:
    unnamed = tab.execute_script(
        "return [...document.querySelectorAll('button, select, input, a')]"
        ".filter((node) => node.tabIndex < 0 || !(node.textContent.trim() || node.getAttribute('aria-label')"
        " || node.closest('label')?.textContent.trim())).length"
    )
    assert unnamed == 0
    seen = set()
    for _ in range(18):
        tab.switch_to.active_element.send_keys(Keys.TAB)
        seen.add(tab.execute_script("return document.activeElement.id || document.activeElement.textContent"))
    assert {"filter-view", "filter-track", "filter-name", "theme", "reset"} <= seen
    width = tab.execute_script("return getComputedStyle(document.activeElement).outlineWidth")
    assert width == "3px"


def paper(tab: Any) -> str:
    return str(tab.execute_script("return getComputedStyle(document.body).backgroundColor"))


def test_dark_follows_the_system_and_the_switch(tab: Any) -> None:
    assert paper(tab) == "rgb(255, 255, 255)"
    tab.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]})
    dark = paper(tab)
    assert max(map(int, dark[4:-1].split(","))) < 50
    Select(tab.find_element(By.ID, "theme")).select_by_visible_text("light")
    assert paper(tab) == "rgb(255, 255, 255)"
    Select(tab.find_element(By.ID, "theme")).select_by_visible_text("dark")
    tab.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "light"}]})
    assert paper(tab) == dark
    # On paper it is light again.
    tab.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert paper(tab) == "rgb(255, 255, 255)"
    tab.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


@pytest.mark.parametrize("width", [1400, 390])
def test_it_fits_a_desk_and_a_phone(tab: Any, width: int, tmp_path: Path) -> None:
    tab.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    )
    choose(tab, "view", "By scenario")
    tab.find_elements(By.CSS_SELECTOR, "button.toggle")[0].send_keys(Keys.ENTER)
    assert tab.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    # Nothing is cut off: every cell and every panel of the opened row lies inside the window.
    outside = tab.execute_script(
        "return [...document.querySelectorAll('.boards td, .boards button, .facts dd, .panels svg')]"
        ".filter((node) => node.getBoundingClientRect().right > window.innerWidth + 1).length"
    )
    assert outside == 0
    apart = tab.execute_script(
        "const [table, plane] = ['.boards', '.plane'].map((name) => document.querySelector(name).getBoundingClientRect());"
        "return table.right <= plane.left || table.bottom <= plane.top"
    )
    assert apart, "the table runs into the plane"
    picture = Image.open(io.BytesIO(tab.get_screenshot_as_png())).convert("L")
    assert picture.width == width
    assert len(np.unique(np.asarray(picture))) > 50  # text and figures, no blank sheet
    rows_of_cells = tab.execute_script(
        "return new Set([...document.querySelector('tr.line').cells]"
        ".map((cell) => Math.round(cell.getBoundingClientRect().top))).size"
    )
    assert rows_of_cells == 1 if width > 600 else rows_of_cells > 2


def test_it_prints_without_its_controls(tab: Any) -> None:
    tab.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not tab.find_element(By.ID, "filters").is_displayed()
    assert tab.find_element(By.CSS_SELECTOR, "tr.line td.ra").is_displayed()
    tab.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_a_matrix_without_defenses_shows_its_attacked_models(tab: Any, address: str, tmp_path: Path) -> None:
    table = [line for line in rows() if line.defense == "none"]
    no_curves, no_timings = (pd.DataFrame(columns=[*kind.__dataclass_fields__]) for kind in (Curve, Timing))
    folder = Path(address.removeprefix("file://")).parent
    shutil.copytree(folder / "plots", tmp_path / "plots")
    tab.get(page.write_page(tmp_path, frame(table), no_curves, no_timings, "attacks").as_uri())
    assert "No defense was run in this matrix" in tab.find_element(By.ID, "boards").text
    scenarios = tab.find_element(By.ID, "scenarios")
    assert "not counted: not implanted (ASR 3.0, benign twin 1.0)" in scenarios.text
    assert len(scenarios.find_elements(By.CSS_SELECTOR, "img")) == 2
    assert tab.find_elements(By.ID, "filter-view") == []
    assert tab.find_element(By.ID, "theme").is_displayed()


def test_what_is_shown_is_the_leaderboard_and_reads_as_a_table(tab: Any) -> None:
    board = stats.leaderboard(frame(rows()), "model+clean", "validation")
    assert figures(tab, "acc") == [f"{100 * value:.1f}" for value in board["acc"]]
    roles = tab.execute_script(
        "return ['table', 'row', 'columnheader', 'cell'].map((role) => document.querySelectorAll(`.boards [role=${role}], "
        "[role=${role}].boards`).length > 0)"
    )
    assert roles == [True] * 4
