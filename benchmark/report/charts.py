"""Every figure of a matrix, as files; isolated samples, ranks and published values; the trigger gallery."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmark.analysis import published, rank_tests, stats
from benchmark.analysis.intervals import Interval
from benchmark.report import boards
from benchmark.report.boards import HATCH, LETTER_KEY, LETTERS, METRICS, cells_of, names_of, only, places_of, rows_at
from benchmark.report.figures import DotPanel, Dots, Figure, Gallery, Key, Mark
from benchmark.report.render import Picture, draw, draw_all
from benchmark.report.style import MARKERS, Look, looks, wrapped
from benchmark.report.text import plain, slug
from benchmark.storage.files import write_bytes
from models.spec import BadInput

__all__ = ["trigger_gallery", "trigger_pictures", "trigger_sheet", "write_plots"]


# -- isolated samples ----------------------------------------------------------------------------------------------------------


def _isolation_letters(line: pd.Series | None) -> tuple[str, str]:
    """What is written in place of precision and of recall where they cannot be drawn; empty where they can."""
    if line is None or line["cells_ok"] == 0:
        letter = "n" if line is None else LETTERS.get(str(line["missing"]).split(" / ")[0], "?")
        return letter, letter
    return "" if line["precision_seeds"] else "0", "" if line["recall_seeds"] else "?"


def _detectors(rows: pd.DataFrame, track: str) -> Figure | None:
    """Precision (filled) and recall (hollow) of the samples each entry isolated, by attack, one panel per dataset and backbone.

    None when no entry isolates anything.
    """
    found = stats.detectors(rows, track)
    if found.empty:
        return None
    style, names, order = looks(rows), names_of(rows), stats.entries(found)
    cells = cells_of(rows_at(stats.field(rows, track), selection="default", status="ok"))
    lines = {(*line[stats.SCENARIO], *line[stats.ENTRY]): line for _, line in found.iterrows()}
    attacks = [name for (name,) in places_of(found, "attack")]
    row = 0.34 * len(order) + 0.1
    marks = {f"{names[entry]}: {part}": Mark(*style[entry], size=7.5, hollow=part == "recall", words=names[entry])
             for entry in order for part in ("precision", "recall")}  # fmt: skip
    marks["base"] = Mark("#111111", "|", 68 * row, lane=0.0, words="base rate: precision of a random choice")
    panels, used = [], set()
    for place in places_of(found, "dataset", "backbone"):
        points: dict[str, tuple[tuple[float, ...], ...]] = {}
        letters: dict[tuple[str, int], str] = {}
        for entry in order:
            for number, part in enumerate(("precision", "recall")):
                name, values = f"{names[entry]}: {part}", []
                for at, attack in enumerate(attacks):
                    key = (*place, attack, *entry)
                    letter = _isolation_letters(lines.get(key))[number]
                    if letter:
                        letters[name, at] = letter
                    values.append(() if letter else tuple(cells[key][part].dropna()))
                points[name] = tuple(values)
        here = [next((lines[key] for entry in order if (key := (*place, attack, *entry)) in lines), None) for attack in attacks]
        means = {name: tuple(only(float(np.mean(one)) if one else math.nan) for one in values) for name, values in points.items()}
        base = tuple(only(math.nan if line is None else float(line["base_rate"])) for line in here)
        dead = tuple(at for at, line in enumerate(here) if line is not None and not line["implanted"])
        used |= set(letters.values())
        called = tuple(wrapped(plain(name), 18, 3) for name in attacks)
        series = (*means.items(), ("base", base))
        panels.append(DotPanel(", ".join(place), "precision and recall in %", called, series, points=points, letters=letters,
                               hatched=dead))  # fmt: skip
    extra: Key = (("filled: precision", Mark("#444444", "o")), ("hollow: recall", Mark("#444444", "o", hollow=True)),
                  ("one seed", Mark("#444444", "o", 3)), *((("attack not implanted", HATCH),) * any(one.hatched for one in panels)),
                  *((text, None) for letter, text in LETTER_KEY.items() if letter in used))  # fmt: skip
    note = "Large marks: means over all seeds, implanted or not; default selection."
    return Dots(tuple(panels), note, min(len(panels), 2), marks, 3.6, row, extra)


# -- average ranks -------------------------------------------------------------------------------------------------------------


def _ranks(rows: pd.DataFrame, track: str) -> Figure | None:
    """Average ranks by RA, best first; bars join entries that do not differ significantly, as in Demsar's critical-difference
    diagram (JMLR 7, 2006). None where :func:`benchmark.analysis.rank_tests.significance` is."""
    test = rank_tests.significance(rows, track, stats.headline(rows, track))
    if test is None:
        return None
    names, style, order = names_of(rows), looks(rows), list(test.ranks)
    panel = DotPanel("", "average rank by RA (1 = best)", tuple(wrapped(names[entry], 34, 1) for entry in order),
                     (("rank", tuple(only(test.ranks[entry]) for entry in order)),), unit=1, limits=(0.8, len(order) + 0.6),
                     looks=tuple(style[entry] for entry in order),
                     joined=tuple(tuple(order.index(entry) for entry in clique) for clique in test.cliques))  # fmt: skip
    verdict = "" if test.friedman < rank_tests.LEVEL else ", not significant"
    incomplete = ", ".join(names[entry] for entry in test.incomplete)
    note = (
        f"{test.blocks} implanted scenarios, {stats.headline(rows, track)} selection; Friedman p = {test.friedman:.2g}{verdict}. "
        "Bars at the right join entries between which Holm-adjusted Wilcoxon signed-rank tests find no difference at 5 %; dots on "
        "a bar are its members." + f" Left out, a scenario being missing: {incomplete}." * bool(incomplete)
    )
    return Dots((panel,), note, marks={"rank": Mark("", lane=0.0, printed=True)}, row=0.27)


# -- published beside measured -------------------------------------------------------------------------------------------------

_LEAKY = "here: chosen on the test ASR, as there"
_OURS = {
    "here: mean over seeds": Mark("", size=6.5, lane=0.15),
    "here: one seed": Mark("", marker="o", size=3.5, lane=0.38),
    _LEAKY: Mark("", size=9, hollow=True, lane=0.15),
}


def _published_words(group: Sequence[published.Comparison]) -> str:
    """Whether a scenario follows the literature's protocol, and at which rates its figures were published."""
    every = [figure.rate for one in group for figure in one.printed]
    rates = " and ".join(f"{100 * rate:g}" for rate in sorted({rate for rate in every if not math.isnan(rate)}))
    unknown = " (a source states no rate)" * any(map(math.isnan, every))
    at = f"published at {rates} % poison{unknown}" if rates else "published rate not stated"
    protocol = "the literature's protocol" if group[0].same_protocol else "OTHER PROTOCOL than the literature's"
    return f"{protocol}; {at}" + "; attack not implanted here" * (not group[0].implanted)


def _printed_label(figure: published.Printed) -> str:
    return f"published, {figure.backbone}" + ", chosen on test data" * bool(figure.chosen_on)


def _published_panel(group: Sequence[published.Comparison], metric: str, marks: Sequence[str], names: tuple[str, ...],
                     shown: tuple[Look, ...]) -> DotPanel:  # fmt: skip
    """One metric of one scenario: published values with their range, ours below them."""
    bands = [published.band(getattr(figure, metric) for figure in one.printed) for one in group]
    means = tuple(only(float(np.mean([seed[metric] for seed in one.measured]))) for one in group)
    leaky = tuple(only(float(np.mean([seed[metric] for seed in one.leaky])) if one.leaky else math.nan) for one in group)
    series = ((marks[0], tuple(Interval(math.nan, *band) for band in bands)), ("here: mean over seeds", means),
              *(((_LEAKY, leaky),) * any(one.leaky for one in group)))  # fmt: skip
    points = {
        name: tuple(tuple(value for figure in one.printed if _printed_label(figure) == name
                          and not math.isnan(value := getattr(figure, metric))) for one in group) for name in marks[1:]
    }  # fmt: skip
    points["here: one seed"] = tuple(tuple(seed[metric] for seed in one.measured) * (len(one.measured) > 1) for one in group)
    letters = {(marks[0], row): "not published" for row, band in enumerate(bands) if math.isnan(band[0])}
    return DotPanel("", f"{METRICS[metric]} in %", names, series, points=points, letters=letters, looks=shown)


def _published(rows: pd.DataFrame, track: str) -> Figure | None:
    """The literature's figures as bands, ours below each; a line of three panels (ACC, ASR, RA) per scenario.

    None where the literature has no figure of any defense of the track.
    """
    found = published.comparisons(rows, track)
    if not any(one.role == "defense" for one in found):
        return None
    style, names = looks(rows), names_of(rows)
    networks = list(dict.fromkeys(figure.backbone for one in found for figure in one.printed))
    marks = {"published: least to largest": Mark("#D3D3D3", kind="band", lane=-0.22)} | {
        _printed_label(figure): Mark("#444444", MARKERS[networks.index(figure.backbone) % len(MARKERS)], 4.5,
                                     bool(figure.chosen_on), lane=-0.22)
        for one in found for figure in sorted(one.printed, key=lambda figure: bool(figure.chosen_on))
    }  # fmt: skip
    panels = []
    for place in dict.fromkeys(one.place for one in found):
        group = [one for one in found if one.place == place]
        called, shown = tuple(wrapped(names[one.entry], 26, 1) for one in group), tuple(style[one.entry] for one in group)
        first, *others = (_published_panel(group, metric, list(marks), called, shown) for metric in published.METRICS)
        words, alarm = _published_words(group), not group[0].same_protocol
        panels += [replace(first, title=", ".join(place), subtitle=words, alarm=alarm), *others]
    ours = {name: mark for name, mark in _OURS.items() if name != _LEAKY or any(one.leaky for one in found)}
    other = "" if all(one.same_protocol for one in found) else (
        "Other protocol: recipe, network or data size differ as tables/published.md lists, so a point outside its band is no "
        "failure and one inside no success. "
    )  # fmt: skip
    note = (f"{other}Bands: all sources that print the attack and the method, on the same architecture where there is one. All "
            f"seeds, {stats.headline(rows, track)} selection. Nothing is judged by these figures.")  # fmt: skip
    return Dots(tuple(panels), note, 3, marks | ours, 2.75, 0.42)


# -- everything ----------------------------------------------------------------------------------------------------------------


def write_plots(
    rows: pd.DataFrame, curves: pd.DataFrame, timings: pd.DataFrame, folder: Path, title: str, processes: int = 1
) -> list[Path]:
    """Draws every figure of a matrix below ``folder/plots`` and returns the paths (PNG and SVG of each), in reading order.

    Figures that would be empty (no dial anywhere, no timing, nothing isolated) are not written.

    Args:
        rows, curves, timings: as :func:`benchmark.storage.rows.read` returns them.
        folder: the matrix's results folder.
        title: of the matrix, for the figures' titles.
        processes: that draw, see :func:`benchmark.report.render.draw_all`.

    Raises:
        BadInput: the folder cannot be written.
    """
    pictures: list[Picture] = []

    def put(name: str, figure: Figure | None, words: str) -> None:
        if figure is not None:
            pictures.append(Picture(figure, f"{plain(title)}: {words}", folder / "plots" / name))

    put("leaderboard", boards.leaderboard(rows), "leaderboard")
    put("attacks", boards.undefended(rows), "the undefended models")
    attacked = boards.attacked_of(rows)
    finished = (attacked["status"] == "ok").any()
    for track in stats.tracks(rows):
        words, tail = plain(track), slug(track)
        if len(attacked):
            put(f"heatmap-asr-{tail}", boards.heatmap(rows, track, "asr"), f"{words}, attack success rate")
            put(f"heatmap-ra-{tail}", boards.heatmap(rows, track, "ra"), f"{words}, robust accuracy")
        if finished:
            put(f"scatter-{tail}", boards.scatter(rows, track), f"{words}, what is kept and what is removed")
        if len(curves):
            put(f"dials-{tail}", boards.dials(rows, curves, track), f"{words}, along the dial")
        put(f"detectors-{tail}", _detectors(rows, track), f"{words}, training samples isolated as poisoned")
        put(f"cost-{tail}", boards.cost(rows, timings, track), f"{words}, cost")
        put(f"ranks-{tail}", _ranks(rows, track), f"{words}, average ranks")
        if finished:
            put(f"published-{tail}", _published(rows, track), f"{words}, published beside measured")
    put("selection-gap", boards.gaps_below_oracle(rows), "what choosing with the test set is worth")
    return draw_all(pictures, processes)


# -- triggers ------------------------------------------------------------------------------------------------------------------


def _amplification(difference: np.ndarray) -> int:
    """The largest of 1, 2, 5, 10, 20, 50, 100 that keeps the difference within 255."""
    peak = int(difference.max(initial=0))
    return max((factor for factor in (1, 2, 5, 10, 20, 50, 100) if factor * peak <= 255), default=1)


def _mosaic(images: np.ndarray, gap: int) -> np.ndarray:
    """uint8 (k, C, H, W) side by side, each with ``gap`` white pixels to its right and below it: (H + gap, k * (W + gap), 3)."""
    colour = np.repeat(images, 3, axis=1) if images.shape[1] == 1 else images
    padded = np.pad(colour, ((0, 0), (0, 0), (0, gap), (0, gap)), constant_values=255)
    return np.concatenate(list(padded.transpose(0, 2, 3, 1)), axis=1)


_Item = tuple[str, np.ndarray, np.ndarray]


def trigger_sheet(item: _Item) -> tuple[np.ndarray, str]:
    """Clean above triggered above difference, (3 H + 2 gaps, k W + (k - 1) gaps, 3), and the words for the difference.

    Raises:
        BadInput: an item is empty, not uint8, of another shape than its twin, or has neither 1 nor 3 channels.
    """
    name, clean, triggered = item
    good = clean.dtype == triggered.dtype == np.uint8 and clean.ndim == 4 and clean.shape == triggered.shape and len(clean) > 0
    if not good or clean.shape[1] not in (1, 3):
        raise BadInput(f"gallery of {name!r}: both uint8 (k, 1 or 3, H, W), not {clean.dtype} {clean.shape} and {triggered.dtype} "
                       f"{triggered.shape}")  # fmt: skip
    gap = max(1, round(clean.shape[2] / 16))
    difference = np.abs(triggered.astype(np.int16) - clean.astype(np.int16))
    factor = _amplification(difference)
    strips = [_mosaic(part, gap) for part in (clean, triggered, (difference * factor).astype(np.uint8))]
    words = f"difference \N{MULTIPLICATION SIGN} {factor}" if difference.any() else "no difference"
    return np.concatenate(strips)[:-gap, :-gap], words


def trigger_pictures(items: Sequence[_Item], folder: Path) -> list[Path]:
    """Writes ``folder/<attack>.png`` for each attack: clean images above triggered ones above their amplified difference.

    Every pixel is a square of whole pixels. The file's text ``Title`` is the attack's label, ``Description`` the amplification.

    Args:
        items: (attack label, clean uint8 (k, C, H, W), triggered uint8 of the same shape), C = 1 or 3.

    Raises:
        BadInput: an item is not as above, or the folder cannot be written.
    """
    written = []
    for item in items:
        image, words = trigger_sheet(item)
        scale = max(1, 320 // image.shape[1])
        about, content = PngInfo(), io.BytesIO()
        about.add_itxt("Title", item[0])
        about.add_itxt("Description", words)
        Image.fromarray(image.repeat(scale, axis=0).repeat(scale, axis=1)).save(content, "PNG", optimize=True, pnginfo=about)
        written.append(folder / f"{slug(item[0])}.png")
        write_bytes(written[-1], content.getvalue())
    return written


def trigger_gallery(items: Sequence[_Item], path: Path) -> list[Path]:
    """Every trigger as pixels: clean, triggered, and the absolute difference times a factor printed beside it.

    Args:
        items: as of :func:`trigger_pictures`; every item the same shape.
        path: the figure without its suffix (a suffix is replaced); written as PNG and SVG, beside a folder of this name with the
            pictures of single attacks. Returns all paths, the figure's first.

    Raises:
        BadInput: an item is not as there, there is none, or a file cannot be written.
    """
    if not items:
        raise BadInput("a trigger gallery needs at least one attack")
    count = max(len(clean) for _, clean, _ in items)
    panels = tuple((plain(item[0]), words, image) for item in items for image, words in [trigger_sheet(item)])
    note = "Absolute difference between triggered and clean image, multiplied as stated; pixels as the victim sees them (8 bit)."
    columns = max(1, min(len(items), 12 // max(count, 1)))
    figure = Gallery(panels, columns, note, ("clean", "triggered", "difference"), 0.72 * count, 2.26)
    stem = path.with_suffix("")
    return [*draw(figure, "Triggers", stem, colours=None), *trigger_pictures(items, stem)]
