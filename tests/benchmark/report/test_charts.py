"""Figures: they exist, show something, mark what is missing, and come out the same twice."""

from __future__ import annotations

import warnings
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from benchmark.analysis.intervals import Interval
from benchmark.report import boards, render, style
from benchmark.report import charts as plots
from benchmark.report.figures import DotPanel, Dots, Gallery, Lines, Mark, Panel, Series
from benchmark.rules.selection import NOTHING_TO_VALIDATE_ON
from benchmark.storage.rows import Curve, Row, Timing, frame
from models.spec import BadInput

KEY = ("matrix", "dataset", "backbone", "attack", "rate", "seed", "track", "scope", "defense", "cell")


def row(attack: str, seed: int, defense: str, ra: float = 0.0, **more: object) -> Row:
    settings: dict[str, object] = {
        "matrix": "m", "dataset": "digits", "backbone": "net", "attack": attack, "rate": 0.1, "seed": seed, "track": "model+clean",
        "scope": "whole", "defense": defense, "cell": f"{attack}{seed}{defense}", "target": 0, "label_mode": "all-to-one",
        "realised_rate": 0.1, "control": defense in ("none", "random"), "selection": "validation", "status": "ok", "acc": 0.9,
        "asr": 0.95 - ra, "ra": ra, "der": 0.5, "acc_undefended": 0.95, "asr_undefended": 1.0, "ra_undefended": 0.0,
        "acc_benign": 0.96, "asr_benign": 0.02, "implanted": True, "gate": "implanted", "pruned": 10, "units": 100, "cost_epochs":
        0.125,
    }  # fmt: skip
    return Row(**{**settings, **more})  # type: ignore[arg-type]


def world(**more: object) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    rows, curves, timings = [], [], []
    for defense, ra in (("dial $_{1}", 0.5), ("none", 0.0), ("random", 0.1)):
        for attack, live in (("badnets", True), ("a_rather_long_attack_name_indeed", False)):
            for seed in (0, 1):
                failed = (
                    {"status": "failed", "reason": "why", "acc": np.nan}
                    if (defense, attack, seed) == ("dial $_{1}", "badnets", 1)
                    else {}
                )
                for place, selection in enumerate(("validation", "default", "oracle", "leaky")):
                    dial = {"dial": 0.5 + 0.1 * place} if defense.startswith("dial") else {}
                    settings = {"selection": selection, "asr_undefended": 1.0 if live else 0.3, **dial, **failed, **more}
                    rows.append(row(attack, seed, defense, ra + 0.1 * place * bool(dial), **settings))
                key = {name: getattr(rows[-1], name) for name in KEY}
                timings.append(Timing(**key, seconds=10.0 ** (1 + len(defense) % 3), peak_mib=100.0, victim_seconds=5.0))
                if defense.startswith("dial") and not failed:
                    curves += [
                        Curve(
                            **key,
                            dial_name="share",
                            dial=at,
                            is_default=at == 0.5,
                            strength=at,
                            pruned=0,
                            acc=0.9,
                            asr=0.9 - at / 2,
                            ra=at / 2,
                            val_acc=0.9,
                        )
                        for at in (0.0, 0.5, 1.0)
                    ]
    return frame(rows), frame(curves), frame(timings)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("figures")
    return folder, plots.write_plots(*world(), folder, "tiny")


def test_every_figure_is_written_and_shows_something(drawn):
    _, written = drawn
    names = {path.name for path in written}
    stems = {
        "leaderboard",
        "attacks",
        "selection-gap",
        *(f"{kind}-model-clean" for kind in ("heatmap-asr", "heatmap-ra", "scatter", "dials", "cost")),
    }
    assert names == {f"{stem}{suffix}" for stem in stems for suffix in (".png", ".svg")}
    for path in written:
        if path.suffix == ".png":
            pixels = np.asarray(Image.open(path).convert("L"), dtype=np.float64)
            assert pixels.std() > 10, path
            assert pixels.shape[1] >= 800
            edge = np.concatenate([pixels[:4].ravel(), pixels[-4:].ravel(), pixels[:, :4].ravel(), pixels[:, -4:].ravel()])
            assert edge.min() == 255, f"{path}: something is cut off at the edge"


def test_the_board_by_hand():
    def entry(defense: str, ra: tuple[float, float], track: str = "model+clean", oracle: float = 0.9, **more: object) -> list[Row]:
        found = []
        for seed, value in enumerate(ra):
            for selection, reached in (("validation", value), ("default", value), ("oracle", oracle), ("leaky", oracle)):
                found.append(row("badnets", seed, defense, reached, **{"track": track, "selection": selection, **more}))
        return found

    off = {"status": "refused", "reason": "no", "acc": np.nan}
    rows = frame([
        *entry("weak", (0.1, 0.3)), *entry("strong", (0.5, 0.7), oracle=0.8),
        *entry("never", (np.nan, np.nan), oracle=np.nan, **off), *entry("none", (0.0, 0.0)), *entry("random", (0.1, 0.1)),
        *entry("clever", (0.4, 0.4), "model"), *entry("none", (0.0, 0.0), "model"), *entry("random", (0.2, 0.2), "model"),
    ])  # fmt: skip
    (one, mine), (two, other), (three, rest) = boards._boards(rows)
    assert [one, two] == ["model+clean, chosen by validation", "model, chosen by default"]
    assert "not competing" in three
    assert list(mine["defense"]) == ["strong", "weak", "never"]
    assert list(other["defense"]) == ["clever"]
    assert list(rest["defense"]) == ["none", "random"], "once, though they stand in both tracks"
    assert list(mine["ra"][:2]) == pytest.approx([0.6, 0.2])
    assert list(mine["asr"][:2]) == pytest.approx([0.35, 0.75])
    assert list(mine["asr_oracle"][:2]) == pytest.approx([0.15, 0.05])
    assert list(mine["ra_oracle"][:2]) == pytest.approx([0.8, 0.9])
    figure = boards.leaderboard(rows)
    assert isinstance(figure, Dots)
    assert [text for panel in figure.panels for text in panel.letters.values()] == ["refused everywhere"]
    assert boards.leaderboard(rows[rows["defense"].isin(["none", "random"])]) is None
    assert boards.leaderboard(rows.assign(asr_undefended=0.3)) is None
    idle = rows.assign(mark=["no change" if name == "weak" else "" for name in rows["defense"]])
    assert boards.leaderboard(idle).panels[0].names == ("strong", "weak: no change", "never")


def test_second_run_writes_the_same_bytes_and_touches_nothing(drawn):
    folder, written = drawn
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in written}
    assert plots.write_plots(*world(), folder, "tiny", processes=2) == written
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in written} == before


def test_no_date_and_no_version_inside(drawn):
    for path in drawn[1]:
        content = path.read_bytes()
        assert b"<dc:date>" not in content
        assert b"Software" not in content[:400]
        assert mpl.__version__.encode() not in content[:2000]
        assert path.suffix != ".svg" or b"<!--" not in content


def test_a_png_has_at_most_128_colours_and_keeps_those_of_single_markers(drawn):
    for path in drawn[1]:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert picture.mode == "P"
                assert len(picture.getcolors()) <= 128
    board = Image.open(next(path for path in drawn[1] if path.name == "leaderboard.png")).convert("RGB")
    found = {colour for _, colour in board.getcolors(4096)}
    assert {mpl.colors.to_hex(np.array(colour) / 255).upper() for colour in found} >= set(style.METRIC_COLOURS.values())


def test_drawing_leaves_no_setting_and_no_figure_behind(drawn):
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []
    assert mpl.rcParams["text.parse_math"] is True


def words(figure: Dots | Lines) -> list[str]:
    return [text for text, _ in figure.key]


def test_heat_map_cells_by_hand_and_marks():
    rows, _, _ = world()
    figure = boards.heatmap(rows, "model+clean", "ra")
    (panel,) = figure.panels
    # rows of the panel: undefended, the dial, random; columns in matrix order
    assert panel.texts.T.ravel().tolist() == ["0", "50*", "10", "0", "50", "10"]
    assert panel.dead == (1,)
    assert np.isnan(panel.values[:, 1]).all()
    assert panel.values[:, 0] == pytest.approx([0, 50, 10])
    assert words(figure) == ["attack not implanted or adversarial: not counted", "* = some seeds missing"]
    assert panel.names == ("undefended", "dial $_{1}", "random")
    with render.style():
        axes = render.sheet(figure, "t").axes[0]
        assert {tick.get_rotation() for tick in (*axes.get_yticklabels(), *axes.get_xticklabels())} == {0.0}
        assert [text.get_text() for text in axes.texts] == ["0", "50*", "10", "0", "50", "10"]


def test_heat_map_letters_for_what_is_missing():
    rows, _, _ = world()
    rows = rows[~((rows["defense"] == "random") & (rows["attack"] == "badnets"))]
    rows.loc[rows["defense"].str.startswith("dial"), "status"] = "refused"
    figure = boards.heatmap(rows, "model+clean", "asr")
    assert figure.panels[0].texts[:, 0].tolist() == ["95", "R", "n"]
    assert words(figure)[1:] == ["R = refused", "n = not run"]


def test_all_seeds_are_drawn_and_no_row_without_an_attack():
    rows = frame([*(row("badnets", seed, "good", 0.1 * seed, implanted=seed > 0) for seed in range(3)), row("none", 0, "good")])
    assert sorted(boards.attacked_of(rows)["seed"]) == [0, 1, 2]


def test_costly_attacks_are_starred_and_the_twin_is_drawn():
    rows = frame([row("dear", seed, "none", acc_undefended=0.85, asr_benign=0.1) for seed in (0, 1)] + [row("cheap", 0, "none")])
    (panel,) = boards.undefended(rows).panels
    assert panel.names == ("dear*", "cheap")
    series = dict(panel.series)
    assert [[part.mean for part in series[name]] for name in ("acc_benign", "asr_benign")] == [
        pytest.approx([0.96, 0.96]), pytest.approx([0.1, 0.02])
    ]  # fmt: skip
    assert panel.points["acc"] == ((0.85, 0.85), (0.95,))


def test_dial_mean_interpolates_on_the_common_range():
    first = pd.DataFrame({"dial": [0.0, 1.0], "ra": [0.0, 1.0]})
    second = pd.DataFrame({"dial": [0.5, 1.5], "ra": [0.5, 0.5]})
    grid, mean = boards._dial_mean([first, second], "ra")
    assert grid.tolist() == [0.5, 1.0]
    assert mean == pytest.approx([0.5, 0.75])


def test_axes_of_shares_are_honest():
    rows, _, _ = world()
    with render.style():
        low, high = render.sheet(boards.scatter(rows.assign(acc=0.45), "model+clean"), "t").axes[0].get_ylim()
        assert low <= 0
        assert high >= 100
        assert boards.scatter(rows, "model+clean").panels[0].ylabel == "ACC in % (from 80 %)"
        bars = render.sheet(boards.undefended(rows), "t").axes[0].containers
        assert {bar.get_x() for container in bars for bar in container} == {0}


def test_no_attack_is_lost_where_there_are_many():
    rows = frame([row(f"attack {number}", 0, "none") for number in range(16)])
    (panel,) = boards.undefended(rows).panels
    assert panel.title == "digits, net"
    assert panel.names == tuple(f"attack {number}" for number in range(16))


def test_a_matrix_without_dials_timings_or_implanted_attacks(tmp_path):
    rows, curves, timings = world(asr_undefended=0.3, dial=float("nan"))
    names = {path.name for path in plots.write_plots(rows, curves.iloc[:0], timings.iloc[:0], tmp_path, "tiny")}
    assert "attacks.png" in names
    assert "heatmap-ra-model-clean.png" in names
    assert not any(name.startswith(("dials", "selection-gap", "cost")) for name in names)


def isolating() -> list[Row]:
    """Two defenses, two attacks (one not implanted), two seeds; letters for what is missing."""
    told = {"selection": "default", "track": "train", "train_images": 200, "isolated": 20}
    rows = [row("badnets", seed, "abl", precision=0.6 + 0.2 * seed, recall=0.3, **told) for seed in (0, 1)]
    rows += [row("wanet", seed, "abl", recall=0.0, asr_undefended=0.3, **{**told, "isolated": 0}) for seed in (0, 1)]
    rows += [row("badnets", seed, "dbd", status="failed", reason="why", **told) for seed in (0, 1)]
    return [*rows, row("wanet", 0, "dbd", precision=0.1, recall=1.0, asr_undefended=0.3, **told)]


def test_detectors_by_hand():
    figure = plots._detectors(frame(isolating()), "train")
    assert isinstance(figure, Dots)
    (panel,) = figure.panels
    means = {(label, row): round(part.mean, 3) for label, parts in panel.series for row, part in enumerate(parts)
             if not np.isnan(part.mean)}  # fmt: skip
    assert means == {
        ("abl: precision", 0): 0.7, ("abl: recall", 0): 0.3, ("abl: recall", 1): 0.0, ("dbd: precision", 1): 0.1,
        ("dbd: recall", 1): 1.0, ("base", 0): 0.1, ("base", 1): 0.1,
    }  # fmt: skip
    assert sorted(panel.points["abl: precision"][0]) == pytest.approx([0.6, 0.8])
    assert panel.letters == {("dbd: precision", 0): "F", ("dbd: recall", 0): "F", ("abl: precision", 1): "0"}
    assert panel.hatched == (1,)
    assert [figure.marks[name].hollow for name in ("abl: precision", "abl: recall")] == [False, True]
    assert words(figure)[-3:] == ["attack not implanted", "F = failed", "0 = nothing isolated"]
    with render.style():
        page = render.sheet(figure, "t")
        assert sorted(text.get_text() for text in page.axes[0].texts if text.get_text()) == ["0", "F", "F"]
        assert [text.get_text() for text in page.legends[0].get_texts()][:2] == ["abl", "dbd"]


def test_detectors_are_drawn_only_where_something_is_isolated(tmp_path):
    curves, timings = (table.iloc[:0] for table in world()[1:])
    written = plots.write_plots(frame(isolating()), curves, timings, tmp_path, "tiny")
    mine = [path for path in written if path.name.startswith("detectors")]
    assert [path.name for path in mine] == ["detectors-train.png", "detectors-train.svg"]
    before = [path.read_bytes() for path in mine]
    plots.write_plots(frame(isolating()), curves, timings, tmp_path, "tiny")
    assert [path.read_bytes() for path in mine] == before


def test_dials_name_only_the_selections_a_track_is_shown_under():
    rows, curves, _ = world()
    blind = (rows["selection"] == "validation") & rows["defense"].str.startswith("dial")
    rows.loc[blind, ["status", "reason"]] = ["refused", NOTHING_TO_VALIDATE_ON]
    assert words(boards.dials(rows, curves, "model+clean"))[-2:] == ["default", "oracle"]


@pytest.mark.parametrize("columns", [1, 3, 4])
@pytest.mark.parametrize("name", ["x", "nearest-class-mean on poisoned, no labels", "n" * 60])
def test_legends_titles_and_notes_stay_within_the_page(columns, name):
    key = tuple((text, Mark(marker="o")) for text in [name, "short", *[name] * 14])
    line = Series("", (0.0, 1.0), (half(), half()), mark=Mark(stroke="-"))
    panel = Panel(name[:30].replace("n" * 30, "n" * 20), "x", "y", (line,))
    with render.style():
        page = render.sheet(Lines((panel,) * columns, columns, "A note. " * 60, key), "title " * 20)
        width, height = page.bbox.width, page.bbox.height
        boxes = [one.get_window_extent() for one in (*page.legends, *page.texts)]
        boxes += [axes.get_tightbbox() for axes in page.axes]
    assert all(box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height for box in boxes)
    assert not any(one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[:place])


def half() -> Interval:
    return Interval(0.5, 0.4, 0.6)


def test_words_that_the_neighbour_has_are_written_once():
    panel = DotPanel("", "RA in %", ("one", "two"), (("ra", (half(),) * 2),))
    with render.style():
        page = render.sheet(Dots((panel, panel, panel, panel), "", 2), "t")
    assert [axes.get_xlabel() for axes in page.axes] == ["", "", "RA in %", "RA in %"]
    assert [axes.yaxis.get_tick_params()["labelleft"] for axes in page.axes] == [True, False, True, False]


def test_long_names_of_controls_are_told_apart_in_the_scatter_legend():
    long = [f"nearest-class-mean on {which}, {labels} labels" for which in ("clean", "poisoned") for labels in ("no", "with")]
    rows = frame([row("badnets", 0, name, 0.3, control=name != "good") for name in ("good", "none", *long)]
                 + [row("wanet", 0, "good", 0.3, asr_undefended=0.3)])  # fmt: skip
    with render.style():
        page = render.sheet(boards.scatter(rows, "model+clean"), "t")
    legend = [text.get_text() for text in page.legends[0].get_texts()]
    assert legend == ["undefended", "good", *long, "attack not implanted or adversarial: not counted"]
    assert {text.get_text() for axes in page.axes for text in axes.texts} == {""}  # arrows; nothing is written over the points


def test_looks_are_distinct_and_keep_their_place():
    rows = frame([row("a", 0, f"d{number}") for number in range(60)] + [row("a", 0, "none"), row("a", 0, "random")])
    found = style.looks(rows)
    assert len(set(found.values())) == len(found)
    assert found["none", "whole"] == style.Look("#000000", "*")
    assert style.looks(rows.iloc[:5]) == {entry: found[entry] for entry in list(found)[:5]}


def test_label_names_the_scope_only_where_there_are_several():
    every = [("clp", "whole"), ("clp", "head"), ("anp", "whole")]
    assert [style.label(entry, every) for entry in every] == ["clp [whole]", "clp [head]", "anp"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("short", "short"),
        ("sig_clean_label", "sig_clean_\nlabel"),
        ("a_b_c_d_e_f_g_h_i_j_k_l_m_n", "a_b_c_d_e_\nf_g_h_i_j_\N{HORIZONTAL ELLIPSIS}"),
        ("averylongnamewithoutbreaks", "averylongn\N{HORIZONTAL ELLIPSIS}"),
    ],
)
def test_wrapped(text, expected):
    assert style.wrapped(text, 11) == expected


def gallery_item(channels: int, peak: int) -> tuple[str, np.ndarray, np.ndarray]:
    clean = np.full((2, channels, 8, 8), 100, dtype=np.uint8)
    triggered = clean.copy()
    triggered[:, :, -2:, -2:] += np.uint8(peak)
    return f"peak {peak}", clean, triggered


def test_gallery_states_its_amplification(tmp_path):
    written = plots.trigger_gallery([gallery_item(1, 3), gallery_item(1, 0)], tmp_path / "triggers.png")
    assert [path.relative_to(tmp_path).as_posix() for path in written] == [
        "triggers.png", "triggers.svg", "triggers/peak-3.png", "triggers/peak-0.png"
    ]  # fmt: skip
    before = [path.read_bytes() for path in written]
    assert [
        path.read_bytes() for path in plots.trigger_gallery([gallery_item(1, 3), gallery_item(1, 0)], tmp_path / "triggers")
    ] == before
    assert np.asarray(Image.open(written[0]).convert("L")).std() > 10
    with Image.open(written[0]) as picture:
        assert picture.mode == "RGB"


def test_a_trigger_picture_holds_the_pixels_and_says_what_it_shows(tmp_path):
    (path,) = plots.trigger_pictures([gallery_item(3, 60)], tmp_path)
    picture = Image.open(path)
    picture.load()
    assert picture.text == {"Title": "peak 60", "Description": "difference \N{MULTIPLICATION SIGN} 2"}
    scale = picture.width // 17
    assert picture.size == (17 * scale, 26 * scale)  # two images of 8 x 8, a gap of one; three rows, two gaps
    pixels = np.asarray(picture)[scale // 2 :: scale, scale // 2 :: scale, 0]
    assert (pixels[0, 0], pixels[7, 7], pixels[9 + 7, 7], pixels[18, 0], pixels[18 + 7, 7]) == (100, 100, 160, 0, 120)
    assert (pixels[:, 8] == 255).all()


def test_every_panel_of_a_gallery_has_its_caption():
    panels = tuple((name, "difference \N{MULTIPLICATION SIGN} 1", np.zeros((9, 6, 3), dtype=np.uint8)) for name in "abc")
    with render.style():
        page = render.sheet(Gallery(panels, 1, "", ("clean", "triggered", "difference"), 2, 1), "t")
    assert [[tick.get_text() for tick in axes.get_xticklabels()] for axes in page.axes] == [[panels[0][1]]] * 3


@pytest.mark.parametrize(("peak", "factor"), [(0, 100), (2, 100), (3, 50), (100, 2), (128, 1), (255, 1)])
def test_amplification_never_clips(peak, factor):
    assert plots._amplification(np.array([peak])) == factor


def test_mosaic_puts_images_side_by_side():
    images = np.stack([np.full((3, 2, 2), value, dtype=np.uint8) for value in (10, 20)])
    sheet = plots._mosaic(images, 1)
    assert sheet.shape == (3, 6, 3)
    assert sheet[0, :, 0].tolist() == [10, 10, 255, 20, 20, 255]
    assert (sheet[2] == 255).all()


@pytest.mark.parametrize("broken", ["empty", "channels", "float", "shape"])
def test_gallery_refuses_what_it_cannot_draw(broken, tmp_path):
    name, clean, triggered = gallery_item(2 if broken == "channels" else 3, 5)
    if broken == "float":
        clean = clean / 255
    if broken == "shape":
        triggered = triggered[:1]
    items = [] if broken == "empty" else [(name, clean, triggered)]
    with pytest.raises(BadInput):
        plots.trigger_gallery(items, tmp_path / "g")


def test_letters_the_font_lacks_do_not_warn(tmp_path):
    _, clean, triggered = gallery_item(3, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plots.trigger_gallery([("\u6f22\u5b57", clean, triggered)], tmp_path / "g")
