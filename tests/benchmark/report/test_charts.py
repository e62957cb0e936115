"""Figures: they exist, show something, mark what is missing, and come out the same twice."""

from __future__ import annotations

import warnings
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from benchmark.report.report import charts as plots
from benchmark.report.report import style
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
    (one, mine), (two, other), (three, rest) = plots._boards(rows)
    assert [one, two] == ["model+clean, chosen by validation", "model, chosen by default"]
    assert "not competing" in three
    assert list(mine["defense"]) == ["strong", "weak", "never"]
    assert list(other["defense"]) == ["clever"]
    assert list(rest["defense"]) == ["none", "random"], "once, though they stand in both tracks"
    assert list(mine["ra"][:2]) == pytest.approx([0.6, 0.2])
    assert list(mine["asr"][:2]) == pytest.approx([0.35, 0.75])
    assert list(mine["asr_oracle"][:2]) == pytest.approx([0.15, 0.05])
    assert list(mine["ra_oracle"][:2]) == pytest.approx([0.8, 0.9])
    with style.figures() as plt:
        figure = plots._leaderboard(plt, rows, "t")
        texts = [text.get_text() for axis in figure.axes for text in axis.texts]
        assert texts == ["refused everywhere"]
        assert plots._leaderboard(plt, rows[rows["defense"].isin(["none", "random"])], "t") is None
        assert plots._leaderboard(plt, rows.assign(asr_undefended=0.3), "t") is None
        idle = rows.assign(mark=["no change" if name == "weak" else "" for name in rows["defense"]])
        ticks = [tick.get_text() for tick in plots._leaderboard(plt, idle, "t").axes[0].get_yticklabels()]
        assert ticks == ["strong", "weak: no change", "never"]


def test_second_run_writes_the_same_bytes_and_touches_nothing(drawn):
    folder, written = drawn
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in written}
    assert plots.write_plots(*world(), folder, "tiny") == written
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in written} == before


def test_no_date_and_no_version_inside(drawn):
    for path in drawn[1]:
        content = path.read_bytes()
        assert b"<dc:date>" not in content
        assert b"Software" not in content[:400]
        assert mpl.__version__.encode() not in content[:2000]


def test_drawing_leaves_no_setting_and_no_figure_behind(drawn):
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []
    assert mpl.rcParams["text.parse_math"] is True


def texts(figure: mpl.figure.Figure) -> list[str]:
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def test_heat_map_cells_by_hand_and_marks():
    rows, _, _ = world()
    with style.figures() as plt:
        figure = plots._heatmap(plt, rows, "model+clean", "ra", "t")
        shown = texts(figure)
        legend = [text.get_text() for text in figure.legends[0].get_texts()]
        ticks = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
        assert {tick.get_rotation() for tick in (*figure.axes[0].get_yticklabels(), *figure.axes[0].get_xticklabels())} == {0.0}
    # rows of the panel: undefended, the dial, random; columns in matrix order
    assert shown == ["0", "50*", "10", "0", "50", "10"]
    assert legend == ["attack not implanted or adversarial: not counted", "* = some seeds missing"]
    assert ticks == ["undefended", "dial $_{1}", "random"]


def test_heat_map_letters_for_what_is_missing():
    rows, _, _ = world()
    rows = rows[~((rows["defense"] == "random") & (rows["attack"] == "badnets"))]
    rows.loc[rows["defense"].str.startswith("dial"), "status"] = "refused"
    with style.figures() as plt:
        figure = plots._heatmap(plt, rows, "model+clean", "asr", "t")
        assert texts(figure)[:3] == ["95", "R", "n"]
        assert [text.get_text() for text in figure.legends[0].get_texts()][1:] == ["R = refused", "n = not run"]


def test_all_seeds_are_drawn_and_no_row_without_an_attack():
    rows = frame([*(row("badnets", seed, "good", 0.1 * seed, implanted=seed > 0) for seed in range(3)), row("none", 0, "good")])
    assert sorted(plots._attacked(rows)["seed"]) == [0, 1, 2]


def test_costly_attacks_are_starred_and_the_twin_is_drawn():
    rows = frame([row("dear", seed, "none", acc_undefended=0.85, asr_benign=0.1) for seed in (0, 1)] + [row("cheap", 0, "none")])
    with style.figures() as plt:
        axis = plots._attacks(plt, rows, "t").axes[0]
        assert [tick.get_text() for tick in axis.get_xticklabels()] == ["dear*", "cheap"]
        levels = [tuple(np.round(line.get_ydata(), 6)) for line in axis.lines if line.get_linestyle() == "-"]
        assert levels == [(96, 96), (10, 10), (96, 96), (2, 2)]


def test_dial_mean_interpolates_on_the_common_range():
    first = pd.DataFrame({"dial": [0.0, 1.0], "ra": [0.0, 1.0]})
    second = pd.DataFrame({"dial": [0.5, 1.5], "ra": [0.5, 0.5]})
    grid, mean = plots._dial_mean([first, second], "ra")
    assert grid.tolist() == [0.5, 1.0]
    assert mean == pytest.approx([0.5, 0.75])


def test_axes_of_shares_are_honest(drawn):
    rows, _, _ = world()
    with style.figures() as plt:
        figure = plots._scatter(plt, rows.assign(acc=0.45), "model+clean", "t")
        low, high = figure.axes[0].get_ylim()
        assert low <= 0
        assert high >= 100
        cropped = plots._scatter(plt, rows, "model+clean", "t")
        assert cropped.axes[0].get_ylabel() == "ACC in % (from 80 %)"
        bars = plots._attacks(plt, rows, "t")
        assert bars.axes[0].get_ylim()[0] == 0


def test_many_attacks_are_spread_over_panels_and_none_is_lost():
    rows = frame([row(f"attack {number}", 0, "none") for number in range(16)])
    with style.figures() as plt:
        panels = [axis for axis in plots._attacks(plt, rows, "t").axes if axis.get_title(loc="left")]
        titles = [axis.get_title(loc="left") for axis in panels]
        shown = [text.get_text().replace("\n", " ") for axis in panels for text in axis.get_xticklabels()]
    assert titles == ["digits, net (1 of 3)", "digits, net (2 of 3)", "digits, net (3 of 3)"]
    assert shown == [f"attack {number}" for number in range(16)]


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
    rows = frame(isolating())
    with style.figures() as plt:
        figure = plots._detectors(plt, rows, "train", "t")
        assert figure is not None
        axis = figure.axes[0]
        dots = [collection for collection in axis.collections if isinstance(collection, mpl.collections.PathCollection)]
        means = {(round(float(x), 3), tuple(np.round(dot.get_facecolor()[0][:3], 2))) for dot in dots
                 for x, _ in dot.get_offsets() if dot.get_sizes()[0] > 40}  # fmt: skip
        seeds = sorted(round(float(x), 3) for dot in dots for x, _ in dot.get_offsets() if dot.get_sizes()[0] < 40)
        filled = {entry: tuple(np.round(mpl.colors.to_rgb(look.colour), 2)) for entry, look in style.looks(rows).items()}
        assert means == {(70.0, filled["abl", "whole"]), (30.0, (1, 1, 1)), (0.0, (1, 1, 1)), (10.0, filled["dbd", "whole"]),
                         (100.0, (1, 1, 1))}  # fmt: skip
        assert seeds == [0.0, 0.0, 30.0, 30.0, 60.0, 80.0]  # a single seed is its mean
        assert texts(figure) == ["F", "F", "0"]
        bases = [line.get_xdata()[0] for line in axis.lines if line.get_linestyle() == "--"]
        assert bases == pytest.approx([10.0, 10.0])
        legend = [text.get_text() for text in figure.legends[0].get_texts()]
        assert legend[:2] == ["abl", "dbd"]
        assert legend[-3:] == ["attack not implanted", "F = failed", "0 = nothing isolated"]


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
    with style.figures() as plt:
        figure = plots._dials(plt, rows, curves, "model+clean", "t")
        assert [text.get_text() for text in figure.legends[0].get_texts()][-2:] == ["default", "oracle"]


@pytest.mark.parametrize("width", [7.0, 11.0, 13.5])
@pytest.mark.parametrize("name", ["x", "nearest-class-mean on poisoned, no labels", "n" * 60])
def test_legends_stay_within_the_figure(width, name):
    from matplotlib.lines import Line2D

    names = [name, "short", *[name] * 14]
    columns = plots._legend_columns(names, width)
    with style.figures() as plt:
        panels = style.Panels(plt, 1, 1, (width - 1, 1.0), (0, 0), (0.5, 0.5, 4.0, 0.5), "t", min_width=width)
        panels.legend([Line2D([], [], marker="o", label=text) for text in names], columns)
        box = panels.figure.legends[0].get_window_extent(panels.figure.canvas.get_renderer())
        assert box.x1 <= width * panels.figure.dpi


def test_long_names_of_controls_are_told_apart_in_the_scatter_legend():
    long = [f"nearest-class-mean on {which}, {labels} labels" for which in ("clean", "poisoned") for labels in ("no", "with")]
    rows = frame([row("badnets", 0, name, 0.3, control=name != "good") for name in ("good", "none", *long)]
                 + [row("wanet", 0, "good", 0.3, asr_undefended=0.3)])  # fmt: skip
    with style.figures() as plt:
        figure = plots._scatter(plt, rows, "model+clean", "t")
        legend = [text.get_text() for text in figure.legends[0].get_texts()]
        assert legend == ["undefended", "good", *long, "attack not implanted or adversarial: not counted"]
        assert texts(figure) == [""] * len(texts(figure))  # arrows; nothing is written over the points


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
    assert [path.name for path in written] == ["triggers.png", "triggers.svg"]
    before = [path.read_bytes() for path in written]
    assert [
        path.read_bytes() for path in plots.trigger_gallery([gallery_item(1, 3), gallery_item(1, 0)], tmp_path / "triggers")
    ] == before
    assert np.asarray(Image.open(written[0]).convert("L")).std() > 10


@pytest.mark.parametrize(("peak", "factor"), [(0, 100), (2, 100), (3, 50), (100, 2), (128, 1), (255, 1)])
def test_amplification_never_clips(peak, factor):
    assert plots._amplification(np.array([peak])) == factor


def test_mosaic_puts_images_side_by_side():
    images = np.stack([np.full((3, 2, 2), value, dtype=np.uint8) for value in (10, 20)])
    sheet = plots._mosaic(images, 1)
    assert sheet.shape == (2, 5, 3)
    assert sheet[0, :, 0].tolist() == [10, 10, 255, 20, 20]


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
