"""Rows -> tables: leaderboards, what each defender was given, per-attack details, samples singled out, attack validity, selection
gaps, missing cells, cost, paired tests, published figures.

Markdown for reading, LaTeX (booktabs) for papers, CSV (shares in [0, 1], unrounded) for everything else. A second run writes the
same bytes. Seconds depend on the machine, so they stand in ``cost.md`` and ``cost.csv`` alone. Names come from settings files and
are treated as hostile: they can break no cell, carry no markup and start no formula.
"""

from __future__ import annotations

import csv
import io
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from benchmark.analysis import intervals, published, rank_tests, stats
from benchmark.rules.metrics import ADVERSARIAL_ASR, COSTS_POINTS, COSTS_SHARE, IMPLANTED_ASR, IMPLANTED_EFFECT
from benchmark.rules.selection import LEAKY_TOLERANCE, TAU
from benchmark.rules.tracks import TRACKS
from benchmark.storage.files import write_text

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "GATE_WORDS", "GIVEN_NOTES", "NOTHING", "SELECTION_WORDS", "bracketed", "console_leaderboard", "csv_text", "gate_words",
    "given_markdown",
    "given_words", "latex", "latex_table", "leaderboard_markdown", "mark_words", "markdown", "number_text", "paired_words",
    "percent_text",
    "pipe_table", "plain", "problems_markdown", "rank_words", "resolution_words", "scenario_words", "setting_words", "slug",
    "track_words", "validity_markdown",
    "write_tables",
]  # fmt: skip

NOTHING = "No attack was implanted under the attack-validity gate, so there is nothing to rank a defense on."
SELECTION_WORDS = {
    "validation": "validation (the published default, stepped back along the dial, then over the settings of the knob, until it "
    f"loses at most {100 * TAU:g} points on held-out clean images; at worst the untouched model)",
    "default": "default (the setting the method's authors publish)",
    "strongest": f"strongest (the strongest candidate that loses at most {100 * TAU:g} points on held-out clean images; at worst "
    "the untouched model)",
    "canary": "canary (the setting that best removes backdoors which the benchmark planted in copies of the model with the "
    f"defender's clean images, within {100 * TAU:g} points)",
    "oracle": "oracle (highest test RA: an upper bound for every rule; never ranked)",
    "leaky": f"leaky (lowest test ASR within {100 * LEAKY_TOLERANCE:g} % relative test ACC, as a public board chooses; never "
    "ranked)",
}
GATE_WORDS = (
    f"a scenario is implanted when, on the mean over its seeds, the ASR is at least {100 * IMPLANTED_ASR:g} % and at least "
    f"{100 * IMPLANTED_EFFECT:g} points above the ASR of the benign twin on the same triggered images (the effect). It is "
    f"adversarial, and no backdoor, when the twin's ASR is above {100 * ADVERSARIAL_ASR:g} %. It costs ACC when the lower "
    f"end of the 95 % interval of its loss of accuracy against the twin is above {100 * COSTS_POINTS:g} points and above "
    f"{100 * COSTS_SHARE:g} % of the twin's ACC; it stays ranked"
)
"""The attack-validity gate, as a sentence without its first capital and its full stop."""
_NOTES = (
    "ACC: accuracy on clean test images. ASR: share of triggered test images, target class excluded, classified as the target. "
    "RA: share of the same images given their true class, so ASR + RA is at most 100. DER: (max(0, drop of ASR) - max(0, drop "
    "of ACC) + 1) / 2. dACC, dASR: percentage points against the undefended model. Brackets: 95 % bootstrap intervals over "
    "seeds within scenarios; without brackets there was one seed. Cost: standard-epoch equivalents (1 = forward and backward "
    "over the training set). Rank: mean over implanted scenarios of the rank by RA, the last place where a cell is missing. "
    "Marks: in how many cells no weight was changed, the untouched model was kept, or a detector found no more poison than "
    "chance. Cells: finished cells of implanted scenarios; means over fewer cells than another line's do not compare with it, "
    "ranks do. Poisoned samples replace clean ones."
)
_MISSING = "\N{EN DASH}"

# -- text ----------------------------------------------------------------------------------------------------------------------


def plain(value: object) -> str:
    """One line of printable text: control, formatting and private characters become spaces, runs of spaces one."""
    kept = "".join(" " if unicodedata.category(letter) in {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"} else letter for letter in str(value))
    return " ".join(kept.split())


def markdown(value: object) -> str:
    """Text for a Markdown table cell: no pipe, tag, link, code or emphasis survives."""
    text = plain(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~$])", r"\\\1", text)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "\N{EN DASH}": "--",    "±": r"$\pm$",
}  # fmt: skip


def latex(value: object) -> str:
    """Text for LaTeX, every special character spelt out."""
    return "".join(_LATEX.get(letter, letter) for letter in plain(value))


def _csv_cell(value: object) -> str:
    """Numbers as in rows.csv; text that a spreadsheet would read as a formula is quoted with an apostrophe."""
    if isinstance(value, float):
        return "" if math.isnan(value) else (f"{value:.6f}".rstrip("0").rstrip(".") if "." in f"{value:.6f}" else str(value))
    if isinstance(value, str):
        text = plain(value)
        return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
    return str(value)


def csv_text(table: pd.DataFrame) -> str:
    """A table as CSV."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.columns)
    for row in table.itertuples(index=False, name=None):
        writer.writerow([_csv_cell(value) for value in row])
    return out.getvalue()


def slug(text: str) -> str:
    """A file name's part: letters, digits and single dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"


def percent_text(value: float, *, signed: bool = False) -> str:
    """A share as percent with one decimal."""
    if math.isnan(value):
        return _MISSING
    text = f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"
    return text.replace("-0.0", "0.0").replace("+0.0", "0.0") if text in ("-0.0", "+0.0") else text


def bracketed(line: pd.Series, name: str, *, signed: bool = False, small: Callable[[str], str] = str) -> str:
    mean, low, high = (float(line[column]) for column in (name, f"{name}_low", f"{name}_high"))
    text = percent_text(mean, signed=signed)
    if math.isnan(low):
        return text
    return f"{text} {small(f'[{percent_text(low, signed=signed)}, {percent_text(high, signed=signed)}]')}"


def number_text(value: float) -> str:
    """At most three significant digits, no exponent, no trailing zeros: 0.0312, 1.25, 48, 4800."""
    if math.isnan(value):
        return _MISSING
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    digits = max(0, min(6, 2 - math.floor(math.log10(abs(value)))))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def pipe_table(header: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table of cells that are already escaped; the first ``left`` columns are aligned left, the others right."""
    rule = [":--" if column < left else "--:" for column in range(len(header))]
    return "".join(f"| {' | '.join(line)} |\n" for line in [header, rule, *lines])


# -- what was run, in words ----------------------------------------------------------------------------------------------------


def _listed(values: pd.Series) -> str:
    return ", ".join(plain(value) for value in dict.fromkeys(values))


def setting_words(rows: pd.DataFrame) -> dict[str, str]:
    """Datasets, backbones, attacks with their rates, target and seeds of a table, as plain text."""
    attacked = rows[rows["attack"] != stats.NO_ATTACK]
    rates = attacked.groupby("attack", sort=False)["rate"].unique()
    attacks = [f"{plain(name)} ({', '.join(f'{100 * rate:g} %' for rate in sorted(found))})" for name, found in rates.items()]
    targets = [f"{mode}, target {target}" if mode == "all-to-one" else str(mode)
               for mode, target in dict.fromkeys(zip(attacked["label_mode"], attacked["target"], strict=True))]  # fmt: skip
    return {
        "dataset": _listed(rows["dataset"]), "backbone": _listed(rows["backbone"]),
        "attack (poisoning rate)": ", ".join(attacks) or "none",
        "labels": plain("; ".join(targets)) or _MISSING, "seed": ", ".join(map(str, sorted(set(rows["seed"])))),
    }  # fmt: skip


def gate_words(rows: pd.DataFrame) -> str:
    """How many scenarios count: "5 of 8 scenarios implanted (1 of them costs ACC), 1 adversarial, 2 not implanted"."""
    found = stats.scenarios(rows)
    implanted, adversarial = found["implanted"].astype(bool), found["adversarial"].astype(bool)
    costly = int((implanted & found["costs_acc"].astype(bool)).sum())
    parts = [
        f"{int(implanted.sum())} of {len(found)} scenarios implanted"
        + (f" ({costly} of them {'costs' if costly == 1 else 'cost'} ACC)" if costly else "")
    ]
    parts += [f"{int(adversarial.sum())} adversarial"] * bool(adversarial.any())
    failed = int((~implanted & ~adversarial).sum())
    return ", ".join([*parts, *([f"{failed} not implanted"] if failed else [])])


def resolution_words(rows: pd.DataFrame) -> str:
    """A sentence where the validation part is too small to tell the tolerated loss from none; else nothing."""
    images = stats.validation_images(rows)
    enough, error = stats.resolves(images)
    if enough or not images:
        return ""
    return (
        f" The validation part holds {images} images, too few to tell a loss of {100 * TAU:g} points from none: with one answer "
        f"in ten changed, the standard error of the loss is {100 * error:.1f} points."
    )


def track_words(track: str) -> str:
    """A track's name and what it grants: "model+clean (the model and a small clean labelled budget)"."""
    titles = {known.name: known.title for known in TRACKS}
    return f"{plain(track)} ({titles[track]})" if track in titles else plain(track)


def _caption(rows: pd.DataFrame, title: str, track: str, selection: str) -> str:
    said = "; ".join(f"{name}: {words}" for name, words in setting_words(rows).items())
    chosen = SELECTION_WORDS.get(selection, plain(selection))
    return f"{plain(title)}. Track: {track_words(track)}; selection: {chosen}; {said}; {gate_words(rows)}.{resolution_words(rows)}"


# -- leaderboards --------------------------------------------------------------------------------------------------------------

_SHARES = (("ACC", "acc", False), ("ASR", "asr", False), ("RA", "ra", False), ("DER", "der", False), ("dACC", "d_acc", True),
           ("dASR", "d_asr", True))  # fmt: skip
_HEADER = ["#", "Defense", "Scope", *(label for label, _, _ in _SHARES), "Pruned / units", "Cost", "Marks", "Rank", "Cells"]


def _name(line: pd.Series, track: str) -> str:
    """A control lent by another track says which, since it was granted something else."""
    if line["role"] == "reference":
        return f"{line['defense']} (undefended)"
    lent = line["role"] == "control" and line["source"] not in (track, "control")
    return f"{line['defense']} (granted: {line['source']})" if lent else str(line["defense"])


def _units(line: pd.Series) -> str:
    pruned, units = float(line["pruned"]), float(line["units"])
    return _MISSING if math.isnan(units) or units == 0 else f"{_tidy(pruned)} / {_tidy(units)}"


def mark_words(line: pd.Series) -> str:
    """In how many of an entry's finished cells nothing was changed, the model was kept, or a detector failed; else nothing.

    A model that was kept is one that was not changed, so cells that fell back are counted apart.
    """
    cells = int(line["cells_ok"])
    counts = {
        "no change": int(line["no_change"]) - int(line["kept"]), "kept untouched": int(line["kept"]),
        "mechanism failed": int(line["mechanism_failed"]),
    }  # fmt: skip
    return ", ".join(f"{words} in {count} of {cells}" for words, count in counts.items() if count > 0)


def _tidy(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _board_lines(board: pd.DataFrame, track: str, escape: Callable[[object], str], small: Callable[[str], str]) -> list[list[str]]:
    lines = []
    for _, line in board.iterrows():
        place = str(line["place"]) if line["place"] else ""
        start = [place, escape(_name(line, track)), escape(line["scope"])]
        cells = f"{line['cells_ok']} / {line['cells']}"
        rank = _MISSING if math.isnan(line["rank"]) else f"{line['rank']:.2f}"
        if line["cells_ok"] == 0:
            lines.append([*start, escape(line["missing"]), *[_MISSING] * 7, "", rank, cells])
            continue
        shares = [bracketed(line, name, signed=signed, small=small) for _, name, signed in _SHARES]
        marks = escape(mark_words(line))
        lines.append([*start, *shares, _units(line), number_text(float(line["cost_epochs"])), marks, rank, cells])
    return lines


def leaderboard_markdown(board: pd.DataFrame, track: str) -> str:
    """A leaderboard as a Markdown table: competing defenses by rank, then reference and controls, then why cells are missing."""
    if board.empty:
        return f"{NOTHING}\n"
    competing = board["role"] == "defense"
    lines = _board_lines(board[competing], track, markdown, str)
    rest = _board_lines(board[~competing], track, markdown, str)
    if rest:
        lines += [["", "**Reference and controls, not ranked**", *[""] * (len(_HEADER) - 2)], *rest]
    text = pipe_table(_HEADER, lines, left=3)
    missing = [f"- {markdown(line['defense'])} ({markdown(line['scope'])}): {markdown(line['reasons'])}\n"
               for _, line in board.iterrows() if line["reasons"]]  # fmt: skip
    return text + (f"\nNot in the means:\n\n{''.join(missing)}" if missing else "")


def _leaderboard_latex(board: pd.DataFrame, track: str, caption: str, label: str) -> str:
    body: list[str] = []
    for competing in (True, False):
        block = board[(board["role"] == "defense") == competing]
        lines = _board_lines(block, track, latex, lambda text: rf"{{\scriptsize {text}}}")
        if lines and body:
            body.append(r"\midrule")
        body += [" & ".join(cell.replace(_MISSING, "--") for cell in line) + r" \\" for line in lines]
    notes = _NOTES + " The lower block holds the reference and the controls, which are not ranked."
    return latex_table(_HEADER, "rll" + "r" * (len(_HEADER) - 3), body, f"{caption} {notes}", label)


def latex_table(header: Sequence[str], columns: str, body: Sequence[str], caption: str, label: str) -> str:
    """A floating booktabs table as wide as the text; ``body`` is LaTeX already, ``caption`` and ``header`` are not."""
    return "\n".join([
        r"% needs \usepackage{booktabs,graphicx}", r"\begin{table}", r"\centering", rf"\caption{{{latex(caption)}}}",
        rf"\label{{tab:{label}}}", r"\resizebox{\linewidth}{!}{%",
        rf"\begin{{tabular}}{{{columns}}}", r"\toprule",
        " & ".join(latex(name) for name in header) + r" \\", r"\midrule", *body, r"\bottomrule",
        r"\end{tabular}}", r"\end{table}", "",
    ])  # fmt: skip


def _leaderboard_csv(board: pd.DataFrame, rows: pd.DataFrame, track: str, selection: str) -> str:
    found = stats.scenarios(rows)
    head = pd.DataFrame({
        "track": track, "selection": selection, "ranked": ["yes" if place else "no" for place in board.get("place", [])],
        "scenarios_implanted": int(found["implanted"].sum()), "scenarios": len(found),
    })  # fmt: skip
    return csv_text(pd.concat([head, board], axis=1))


# -- what the defender was given -----------------------------------------------------------------------------------------------

GIVEN_NOTES = (
    "What each entry took, as recorded while it ran. Model: edited (the attacked model is deployed, changed), replaced (another "
    "network is deployed: trained anew, or put on an extractor), unchanged. Clean labelled images: all of the budget, its "
    "validation part included; that the benchmark itself validates on them is not counted. Training images: of the attacker's "
    "training set, as published, labels included (some known clean: the track vouches for a few of every class), or without the "
    "poison, which only a control can tell. Controls training: it "
    "trains a network from initial weights itself. Preset: the schedule (paper: the method's own), then settings of the matrix. "
    "Cost: standard-epoch equivalents, mean over finished cells, implanted or not; of which extractor: the part that training its "
    "extractor took. A range runs from the least to the most over cells."
)
_GIVEN_HEADER = [
    "Defense", "Scope", "Model", "Clean labelled images", "Training images", "Extractor", "Controls training", "Preset", "Cost",
    "Of which extractor",
]  # fmt: skip
_GIVEN_LEFT = 8
_NONE = "none"


def _range(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g}{_MISSING}{high:g}"


def _any(words: Sequence[str]) -> str:
    """Distinct words of an entry's cells; one, as a rule."""
    return " or ".join(dict.fromkeys(words))


def _model_words(line: pd.Series) -> str:
    if line["role"] == "reference":
        return "unchanged"
    if any(line["trained_anew"]):
        return "replaced" if all(line["trained_anew"]) else "edited or replaced"
    taken = [used.split(" + ") for used in line["used"]]
    return _any(["edited" if "model" in words else "replaced" if "extractor" in words else "not used" for words in taken])


def _training_words(line: pd.Series) -> str:
    """Which training images, without their number: as published (perhaps with a few vouched for), without the poison, none."""
    taken = [set(used.split(" + ")) for used in line["used"]]
    published = ["as published, some known clean" if "seeds" in words else "as published" for words in taken]
    return _any([
        "without the poison" if "roles" in words else text if "train" in words else _NONE
        for words, text in zip(taken, published, strict=True)
    ])  # fmt: skip


def given_words(line: pd.Series) -> dict[str, str]:
    """The texts of a line of :func:`benchmark.analysis.stats.given`, from ``model`` to ``preset``."""
    if line["cells_ok"] == 0:
        nothing = dict.fromkeys(("clean_images", "training_images", "extractor", "controls_training", "preset"), _MISSING)
        return {"model": str(line["missing"]), **nothing}
    which, count = _training_words(line), _range(line["train_images_min"], line["train_images_max"])
    images = which if which == _NONE else f"{which} (of {count})" if which == "without the poison" else f"{count} {which}"
    return {
        "model": _model_words(line),
        "clean_images": _range(line["clean_images_min"], line["clean_images_max"]) if line["clean_images_max"] else _NONE,
        "training_images": images,
        "extractor": _any([text or _NONE for text in line["extractor"]]),
        "controls_training": _any(["yes" if anew else "no" for anew in line["trained_anew"]]),
        "preset": _any([text or _MISSING for text in line["preset"]]),
    }


def _given_lines(table: pd.DataFrame, track: str, escape: Callable[[object], str]) -> list[list[str]]:
    return [
        [*map(escape, (_name(line, track), line["scope"], *given_words(line).values())),
         *(number_text(float(line[name])) for name in ("cost_epochs", "extractor_epochs"))]
        for _, line in table.iterrows()
    ]  # fmt: skip


def given_markdown(rows: pd.DataFrame, track: str) -> str:
    """What the defender was given, one line per entry of the track's field, under the selection that the track is judged by."""
    table = stats.given(rows, track, stats.headline(rows, track))
    competing = table["role"] == "defense"
    lines = _given_lines(table[competing], track, markdown)
    rest = _given_lines(table[~competing], track, markdown)
    if rest:
        lines += [["**Reference and controls**", *[""] * (len(_GIVEN_HEADER) - 1)], *rest]
    return pipe_table(_GIVEN_HEADER, lines, left=_GIVEN_LEFT)


def _given_latex(rows: pd.DataFrame, track: str, caption: str, label: str) -> str:
    table = stats.given(rows, track, stats.headline(rows, track))
    body: list[str] = []
    for competing in (True, False):
        lines = _given_lines(table[(table["role"] == "defense") == competing], track, latex)
        if lines and body:
            body.append(r"\midrule")
        body += [" & ".join(cell.replace(_MISSING, "--") for cell in line) + r" \\" for line in lines]
    columns = "l" * _GIVEN_LEFT + "r" * (len(_GIVEN_HEADER) - _GIVEN_LEFT)
    return latex_table(_GIVEN_HEADER, columns, body, f"{caption} {GIVEN_NOTES}", label)


def _given_csv(rows: pd.DataFrame, track: str) -> str:
    """The same with numbers apart from words; what an unfinished entry took is empty."""
    selection = stats.headline(rows, track)
    lines = []
    for _, line in stats.given(rows, track, selection).iterrows():
        done = line["cells_ok"] > 0
        words = given_words(line) if done else {}
        images = {f"{name}_images_{end}": line[f"{name}_images_{end}"] if done else "" for name in ("clean", "train")
                  for end in ("min", "max")}  # fmt: skip
        lines.append({
            "track": track, "selection": selection, **{name: line[name] for name in ("role", "defense", "scope", "source")},
            "used": _any(line["used"]), "model": words.get("model", ""), **images,
            "training_images": _training_words(line) if done else "", "extractor": _any(line["extractor"]),
            "controls_training": words.get("controls_training", ""), "preset": _any(line["preset"]),
            **{name: line[name] for name in ("cost_epochs", "extractor_epochs", "cells_ok", "cells", "missing")},
        })  # fmt: skip
    return csv_text(pd.DataFrame(lines))


# -- samples singled out -------------------------------------------------------------------------------------------------------

_DETECTOR_NOTES = (
    "Training samples that an entry took for poisoned, under the default selection (which samples are isolated does not depend on "
    "the selection). Precision: share of them that are poisoned. Recall: share of the poisoned samples that are among them. "
    "Percent, mean ± sample standard deviation over all seeds, implanted or not. Base rate: share of the training set that is "
    "poisoned, which is the precision of a random choice. Precision is undefined where nothing is isolated; such seeds are not in "
    "its mean."
)


def _detector_share(line: pd.Series, name: str) -> str:
    deviation, seeds = float(line[f"{name}_sd"]), int(line[f"{name}_seeds"])
    text = percent_text(float(line[name])) + ("" if math.isnan(deviation) else f"±{100 * deviation:.1f}")
    return f"{text} ({seeds} of {line['cells']} seeds)" if 0 < seeds < line["cells"] else text


def _detectors(found: pd.DataFrame, track: str) -> str:
    """:func:`benchmark.analysis.stats.detectors` as a Markdown table."""
    header = ["Defense", "Scope", "Dataset", "Backbone", "Attack", "Implanted", "Isolated", "Of training set", "Precision",
              "Recall", "Base rate"]  # fmt: skip
    lines = []
    for _, line in found.iterrows():
        names = [_name(line, track) + (" (control)" if line["role"] == "control" else ""), line["scope"]]
        start = [*map(markdown, [*names, *line[stats.SCENARIO]])]
        start[-1] += "<br>" + stats.EXPORTED if line["exported"] else ""
        start.append("yes" if line["implanted"] else "**no**")
        base = percent_text(float(line["base_rate"]))
        if line["cells_ok"] == 0:
            lines.append([*start, markdown(line["missing"]), *[_MISSING] * 3, base])
            continue
        share = [percent_text(float(line["isolated_share"])), *(_detector_share(line, name) for name in ("precision", "recall"))]
        count = _MISSING if math.isnan(line["isolated"]) else _tidy(float(line["isolated"]))
        lines.append([*start, count, *share, base])
    exported = (
        f"\nAttacks marked *{stats.EXPORTED}* control the training; what the defense reads is the poisoned set they leave, and "
        "their base rate is the share that the training of the attacked model met.\n"
        if found["exported"].any()
        else ""
    )
    return pipe_table(header, lines, left=6) + exported


# -- the other tables ----------------------------------------------------------------------------------------------------------


def _spread(values: pd.Series) -> str:
    deviation = intervals.spread(list(values))
    return percent_text(float(values.mean())) + ("" if math.isnan(deviation) else f"±{100 * deviation:.1f}")


def _detail_cell(mine: pd.DataFrame) -> str:
    if mine.empty:
        return "not run"
    good = mine[mine["status"] == "ok"]
    if good.empty:
        return markdown(
            "; ".join(f"{status}: {reason}" for status, reason in dict.fromkeys(zip(mine["status"], mine["reason"], strict=True)))
        )
    text = " / ".join(_spread(good[name]) for name in ("acc", "asr", "ra"))
    return text if len(good) == len(mine) else f"{text} ({len(good)} of {len(mine)} seeds)"


def _detail(rows: pd.DataFrame, track: str, selection: str) -> str:
    """Defense x attack, one section per dataset and backbone, over all seeds, implanted or not."""
    table = stats.field(rows, track)
    table = table[table["selection"] == selection]
    gate = {tuple(line[stats.SCENARIO]): line for _, line in stats.scenarios(rows).iterrows()}
    parts = []
    for dataset, backbone in dict.fromkeys(zip(table["dataset"], table["backbone"], strict=True)):
        here = table[(table["dataset"] == dataset) & (table["backbone"] == backbone)]
        attacks = list(dict.fromkeys(here["attack"]))
        header = ["Defense", "Scope"]
        for attack in attacks:
            scenario = gate.get((dataset, backbone, attack))
            header.append(markdown(attack) + ("" if scenario is None or scenario_words(scenario) == "implanted" else
                                              f"<br>{scenario_words(scenario)}"))  # fmt: skip
        lines = []
        for defense, scope in stats.entries(here):
            mine = here[(here["defense"] == defense) & (here["scope"] == scope)]
            name = markdown(defense) + (" (control)" if mine["role"].iloc[0] == "control" else "")
            lines.append([name, markdown(scope), *(_detail_cell(mine[mine["attack"] == attack]) for attack in attacks)])
        parts.append(f"## {markdown(dataset)}, {markdown(backbone)}\n\n{pipe_table(header, lines, left=2)}")
    return "\n".join(parts)


def scenario_words(line: pd.Series) -> str:
    """A line of :func:`benchmark.analysis.stats.scenarios` in words: "implanted", "implanted, costs ACC", "adversarial", "not implanted"."""
    if line["adversarial"]:
        return "adversarial"
    state = "implanted" if line["implanted"] else "not implanted"
    return f"{state}, costs ACC" if line["costs_acc"] else state


def _each(values: pd.Series) -> str:
    return ", ".join(percent_text(float(value)) for value in values)


def validity_markdown(rows: pd.DataFrame) -> str:
    """One line per scenario: means over seeds, the verdict on them, then the undefended models' figures seed by seed."""
    attacked = rows[rows["attack"] != stats.NO_ATTACK]
    worlds = attacked.groupby(stats.WORLD, sort=False).first().reset_index().sort_values("seed", kind="stable")
    header = ["Dataset", "Backbone", "Attack", "Verdict", "ASR", "ASR, benign twin", "Effect", "ACC, loss to the twin", "at least",
              "Rate, nominal", "Rate, realised", "Labels", "Seeds", "ACC, benign twin", "ACC, by seed", "ASR, by seed",
              "RA, by seed", "Gate, by seed", "Against the literature", "Notes"]  # fmt: skip
    lines = []
    undefended = attacked[attacked["defense"] == stats.UNDEFENDED]
    for _, line in stats.scenarios(rows).iterrows():
        mine = worlds[(worlds[stats.SCENARIO] == line[stats.SCENARIO]).all(axis=1)]
        parts = [_gate_parts(str(gate)) for gate in mine["gate"]]
        words = _by_seed(mine["seed"], [gate for gate, _ in parts])
        literature = _by_seed(mine["seed"], [text for _, text in parts])
        told = undefended[(undefended[stats.SCENARIO] == line[stats.SCENARIO]).all(axis=1)].drop_duplicates("seed")
        notes = _by_seed(told["seed"], list(told["note"])) if told["note"].astype(bool).any() else ""
        first = mine.iloc[0]
        labels = f"{first['label_mode']}, target {first['target']}" if first["label_mode"] == "all-to-one" else first["label_mode"]
        lines.append([
            *(markdown(line[name]) for name in stats.SCENARIO), f"**{scenario_words(line)}**",
            *(percent_text(float(line[name])) for name in ("asr", "asr_benign", "effect")),
            *(percent_text(float(line[name]), signed=True) for name in ("acc_loss", "acc_loss_low")), f"{100 * first['rate']:g} %",
            ", ".join(dict.fromkeys(_MISSING if math.isnan(rate) else f"{100 * rate:.2f} %" for rate in mine["realised_rate"])),
            markdown(labels),
            ", ".join(map(str, mine["seed"])), _each(mine["acc_benign"]), _each(mine["acc_undefended"]),
            _each(mine["asr_undefended"]), _each(mine["ra_undefended"]),
            markdown(words or _MISSING), markdown(literature or _MISSING), markdown(notes or _MISSING),
        ])  # fmt: skip
    return pipe_table(header, lines, left=4)


_PROTOCOL_NOTES = (
    "Percent: mean ± sample standard deviation over all seeds. Frozen: the triggered test set was crafted once, on the undefended "
    "model. Recraft: crafted again on the defended one, as an attacker who holds it can. Every other table shows *frozen*."
)


def _gate_parts(gate: str) -> tuple[str, str]:
    """The gate's words, split into whether the attack worked and how it compares with the literature."""
    shown_as = {"literature": "", "nearest reference": "not judged; nearest: ", "no literature reference": "no reference: "}
    for name, shown in shown_as.items():
        mark = f"; {name}: "
        if mark in gate:
            own, _, literature = gate.partition(mark)
            return own, shown + literature
    return gate, ""


def _by_seed(seeds: pd.Series, words: Sequence[str]) -> str:
    """Said once where all seeds agree, otherwise seed by seed."""
    if len(set(words)) <= 1:
        return next(iter(words), "")
    return "; ".join(f"seed {seed}: {text}" for seed, text in zip(seeds, words, strict=True))


def _protocols(rows: pd.DataFrame, track: str, selection: str) -> str:
    """Frozen and recraft, per entry and scenario; empty where no trigger needs the attacked model."""
    table = stats.field(rows, track)
    table = table[(table["selection"] == selection) & (table["status"] == "ok") & table["asr_recraft"].notna()]
    gate = {line[:3]: line[3] for line in stats.scenarios(rows)[[*stats.SCENARIO, "implanted"]].itertuples(index=False, name=None)}
    lines = []
    for place, mine in table.groupby([*stats.ENTRY, *stats.SCENARIO], sort=False):
        figures = [_spread(mine[name]) for name in ("acc", "asr", "ra", "asr_recraft", "ra_recraft")]
        worked = "yes" if gate.get(tuple(place[2:]), False) else "**no**"
        lines.append([*map(markdown, place), worked, *figures])
    header = ["Defense", "Scope", "Dataset", "Backbone", "Attack", "Implanted", "ACC", "ASR, frozen", "RA, frozen", "ASR, recraft",
              "RA, recraft"]  # fmt: skip
    return pipe_table(header, lines, left=6) if lines else ""


def _gap_table(rows: pd.DataFrame) -> str:
    present = stats.selections(rows)
    rules = [name for name in present if name not in stats.HINDSIGHT]
    header = ["Track", "Defense", "Scope", "Cells", *(f"ACC / ASR / RA, {name}" for name in present),
              *(f"RA gap, {name}" for name in rules), *(f"ASR leak, {name}" for name in rules)]  # fmt: skip
    lines, without = [], []
    for track in stats.tracks(rows):
        gaps = stats.selection_gaps(rows, track)
        for _, line in gaps.iterrows():
            triples = [
                " / ".join(percent_text(float(line.get(f"{metric}_{name}", math.nan))) for metric in ("acc", "asr", "ra"))
                for name in present
            ]
            gap = [bracketed(line, f"{kind}_{name}", signed=True) if f"{kind}_{name}" in line else _MISSING
                   for kind in ("gap", "leak") for name in rules]  # fmt: skip
            lines.append([markdown(track), markdown(line["defense"]), markdown(line["scope"]), str(line["cells"]), *triples, *gap])
        own = rows[rows["track"] == track]
        shown = set(zip(gaps["defense"], gaps["scope"], strict=True)) if len(gaps) else set()
        without += [f"{defense} ({scope})" for defense, scope in stats.entries(own) if (defense, scope) not in shown]
    text = (
        pipe_table(header, lines, left=3)
        if lines
        else "No defense with a dial finished an implanted scenario under every selection.\n"
    )
    if not without:
        return text
    names = markdown(", ".join(dict.fromkeys(without)))
    return f"{text}\nNo gap, or none to measure (no dial, no finished cell, or nothing to validate on): {names}.\n"


def problems_markdown(rows: pd.DataFrame) -> str:
    """Every refused and failed cell with its reason, or a sentence saying that there is none."""
    bad = stats.problems(rows)
    if bad.empty:
        return "No cell was refused and none failed.\n"
    header = ["Track", "Defense", "Scope", "Dataset", "Backbone", "Attack", "Seeds", "Status", "Reason"]
    columns = ["track", *stats.ENTRY, *stats.SCENARIO, "seeds", "status", "reason"]
    lines = [
        [markdown(value) or "no reason recorded" for value in line] for line in bad[columns].itertuples(index=False, name=None)
    ]
    return pipe_table(header, lines, left=len(header))


def _cost(rows: pd.DataFrame, timings: pd.DataFrame) -> str:
    table = stats.timing_summary(rows, timings)
    if table.empty:
        return "No finished cell has a timing.\n"
    header = [
        "Track",
        "Defense",
        "Scope",
        "Seconds, median",
        "Share of victim training",
        "Standard epochs, median",
        "Peak memory, MiB",
        "Cells",
    ]
    lines = [[
        markdown(line["track"]), markdown(line["defense"]), markdown(line["scope"]), number_text(float(line["seconds"])),
        _MISSING if math.isnan(line["share"]) else f"{100 * line['share']:.1f} %", number_text(float(line["cost_epochs"])),
        number_text(float(line["peak_mib"])), str(line["cells"]),
    ] for _, line in table.iterrows()]  # fmt: skip
    return pipe_table(header, lines, left=3)


# -- tests ---------------------------------------------------------------------------------------------------------------------


def _probability(p: float) -> str:
    return _MISSING if math.isnan(p) else f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


def rank_words(rows: pd.DataFrame, track: str, selection: str) -> str:
    """What the rank tests of a track say, or why there are none: one line of Markdown."""
    test = rank_tests.significance(rows, track, selection)
    if test is None:
        blocks = int(stats.scenarios(rows)["implanted"].sum())
        needed = f"at least {rank_tests.MIN_BLOCKS} implanted scenarios ({blocks} here) and three complete, differing defenses"
        return f"Rank tests and critical-difference diagram: not made; they need {needed}."
    apart = [f"{a[0]} ({a[1]}) and {b[0]} ({b[1]}), p = {p:.3g}" for a, b, p in test.pairs if p < rank_tests.LEVEL]
    pairs = "; ".join(apart) or "none"
    friedman = f"Friedman test on RA over {test.blocks} scenarios: p = {test.friedman:.3g}"
    omnibus = "" if test.friedman < rank_tests.LEVEL else " That is above 5 %, so no pair counts as different."
    left = ", ".join(f"{defense} ({scope})" for defense, scope in test.incomplete)
    without = f" Left out, because a scenario is missing: {markdown(left)}." if left else ""
    return f"{friedman}.{omnibus} Pairs that differ at 5 % (Wilcoxon, Holm): {markdown(pairs)}.{without}"


_PAIRED_NOTES = (
    "A pair: one attacked model (scenario and seed) of an implanted scenario that the defense and the control both met, under the "
    "selection the track is judged by. Difference: defense minus control in percentage points, mean over scenarios of means over "
    "seeds; above 0 the defense is ahead. p: two-sided Wilcoxon signed-rank test over the pairs. Holm p: adjusted for all "
    "comparisons of this table. A missing cell enters no pair, so compare the counts before the figures. A block: all pairs of "
    "one data set and seed. They share the clean budget and, on each backbone, the benign twin and the very network that the "
    "control trained, whatever the attack, so they are not independent of each other. Hence brackets resample whole blocks (95 % "
    "bootstrap; resampling the seeds of each scenario by themselves, as the other tables do, would treat them as independent), "
    "and the test is repeated over the blocks' means. The p over pairs treats pairs as independent: it says how consistently a "
    "direction holds over these attacked models, and is too small as evidence about other seeds. Neither speaks of other attacks "
    "or data."
)


def paired_words(table: pd.DataFrame) -> str:
    """What the number of pairs and blocks of :func:`benchmark.analysis.rank_tests.paired` can show, and what it cannot."""
    count, pairs, blocks = len(table), int(table["pairs"].max()), int(table["blocks"].max())
    least, least_blocks = rank_tests.least_p(pairs), rank_tests.least_p(blocks)
    adjusted = min(1.0, count * least)
    seen = "can" if adjusted < rank_tests.LEVEL else "cannot"
    shown = "can" if min(1.0, count * least_blocks) < rank_tests.LEVEL else "cannot"
    return (
        f"With {pairs} pairs the smallest p is {_probability(least)}, and {_probability(adjusted)} after Holm over {count} "
        f"comparisons: a difference {seen} reach 5 % over pairs. With {blocks} blocks the smallest p is "
        f"{_probability(least_blocks)}: over blocks a difference {shown} reach 5 %. One comparison needs {rank_tests.blocks_needed()} "
        f"blocks, {count} need {rank_tests.blocks_needed(count)}. Intervals from {blocks} blocks are rough, and too narrow when blocks "
        "are few. A large p is no evidence of equality."
    )


def _paired(table: pd.DataFrame) -> str:
    header = ["Defense", "Scope", "In", "Pairs", "Difference", "p", "Holm p", "Blocks", "p over blocks"]
    lines = [[
        markdown(line["defense"]), markdown(line["scope"]), str(line["metric"]).upper(), f"{line['pairs']} of {line['worlds']}",
        bracketed(line, "difference", signed=True), _probability(line["p"]), _probability(line["p_holm"]), str(line["blocks"]),
        _probability(line["p_blocks"]),
    ] for _, line in table.iterrows()]  # fmt: skip
    return pipe_table(header, lines, left=3)


def _paired_page(table: pd.DataFrame, rows: pd.DataFrame, track: str) -> str:
    if table.empty:
        return f"Not made: it takes implanted scenarios, competing defenses and the control {stats.SCRATCH}.\n"
    chosen = stats.headline(rows, track)
    about = f"Control: {markdown(table['control'].iloc[0])}. Selection: {markdown(SELECTION_WORDS.get(chosen, chosen))}."
    return f"{about} {gate_words(rows)}.\n\n{_paired(table)}\n{paired_words(table)}\n\n{_PAIRED_NOTES}\n"


# -- published beside measured -------------------------------------------------------------------------------------------------

_PUBLISHED_NOTES = (
    "Percent. Published: the least and the largest figure that the sources print for the same attack and method (one figure where "
    "one source does), at the same poisoning rate where somebody printed it, else at the next lower and higher one; on the same "
    "architecture where there is one, else on all. Here: mean ± sample standard deviation over all finished seeds, implanted or "
    "not. Defenses without a printed figure, entries that edit the head alone and victims on given features have no line. Nothing "
    "is judged by these figures: publications differ from each other by more than 10 points of ASR in half of the cells that two "
    "of them share, and by more than 50 in a quarter."
)


def _printed_band(figures: Sequence[published.Printed], metric: str) -> str:
    low, high = published.band(getattr(figure, metric) for figure in figures)
    return percent_text(low) if math.isnan(low) or low == high else f"{percent_text(low)}{_MISSING}{percent_text(high)}"


def _printed_where(figures: Sequence[published.Printed]) -> str:
    rates = sorted({figure.rate for figure in figures}, key=lambda rate: (math.isnan(rate), rate))
    shown = ["rate not stated" if math.isnan(rate) else f"{100 * rate:g} %" for rate in rates]
    return f"{', '.join(dict.fromkeys(figure.backbone for figure in figures))}; {', '.join(dict.fromkeys(shown))}"


def _published(found: Sequence[tuple[str, published.Comparison]]) -> str:
    """A section per scenario; ``found``: (track, comparison), in the order of the tracks."""
    header = ["Defense", "Track", "Published on", "Figures", "Chosen on", *(f"{name}, published" for name in ("ACC", "ASR", "RA")),
              *(f"{name}, here" for name in ("ACC", "ASR", "RA")), "Selection", "Preset"]  # fmt: skip
    parts = []
    for place in dict.fromkeys(one.place for _, one in found):
        lines, shown = [], set()
        for track, one in found:
            if one.place != place or one.entry in shown:
                continue
            shown.add(one.entry)
            here = [_spread(pd.Series([seed[metric] for seed in one.measured])) for metric in published.METRICS]
            reference = one.role == "reference"
            chosen = ", ".join(dict.fromkeys(figure.chosen_on for figure in one.printed if figure.chosen_on)) or _MISSING
            lines.append([
                markdown(one.entry[0]) + (" (undefended)" if reference else ""), "" if reference else markdown(track),
                markdown(_printed_where(one.printed)), str(len(one.printed)), chosen,
                *(_printed_band(one.printed, metric) for metric in published.METRICS), *here,
                _MISSING if reference else one.selection, _MISSING if reference else markdown(one.preset or _MISSING),
            ])  # fmt: skip
        first = next(one for _, one in found if one.place == place)
        marks = ["the literature's protocol" if first.same_protocol else "**other protocol**", f"{100 * first.rate:g} % poisoned"]
        marks += [] if first.implanted else ["attack not implanted"]
        parts.append(f"## {', '.join(map(markdown, place))}\n\n{'; '.join(marks)}\n\n{pipe_table(header, lines, left=5)}")
    return "\n".join(parts)


def _both_protocols(rows: pd.DataFrame, folder: Path) -> str:
    """The literature's protocol and this matrix's, side by side."""
    settings = published.settings_words(folder)
    done = rows[(rows["status"] == "ok") & ~rows["control"].astype(bool)]
    train, clean = int(done["train_images"].max()), int(done["clean_images"].max())
    sizes = f"; {train} training images" if train else ""
    here = {
        "data set": f"{_listed(rows['dataset'])}{sizes}" + (f" ({settings['dataset']})" if "dataset" in settings else ""),
        "network": _listed(rows["backbone"]) + " (w: width of the first stage; the literature's have 64, WRN-16-1 16)",
        "training": settings.get("recipe", "see matrix.toml"),
        "clean budget": f"{clean} images, held out of the attacker's training set, a fifth to validate on" if clean else _MISSING,
        "seeds": ", ".join(map(str, sorted(set(rows["seed"])))),
        "selection": "; ".join(f"{track}: {stats.headline(rows, track)}" for track in stats.tracks(rows)),
    }
    lines = [[name, markdown(words), markdown(here[name])] for name, words in published.PROTOCOL.items()]
    return pipe_table(["", "Published", "Here"], lines, left=3)


def _published_csv(found: Sequence[tuple[str, published.Comparison]]) -> str:
    """One line per printed figure, with what was measured beside it (means over seeds); shares in [0, 1]."""
    lines, shown = [], set()
    for track, one in found:
        if (one.place, one.entry) in shown:
            continue  # the undefended model, met in another track before
        shown.add((one.place, one.entry))
        means = {f"{metric}_here": float(pd.Series([seed[metric] for seed in one.measured]).mean()) for metric in published.METRICS}
        for figure in one.printed:
            lines.append({
                "track": track, **dict(zip(stats.SCENARIO, one.place, strict=True)), "rate": one.rate, "defense": one.entry[0],
                "scope": one.entry[1], "selection": one.selection, "seeds": len(one.measured), **means,
                "implanted": "yes" if one.implanted else "no", "protocol": "same" if one.same_protocol else "other",
                "backbone_published": figure.backbone, "rate_published": figure.rate,
                **{f"{metric}_published": getattr(figure, metric) for metric in published.METRICS},
                "chosen_on": figure.chosen_on, "source": figure.source,
            })  # fmt: skip
    return csv_text(pd.DataFrame(lines))


def write_tables(rows: pd.DataFrame, curves: pd.DataFrame, timings: pd.DataFrame, folder: Path, title: str) -> list[Path]:
    """Writes every table of a matrix below ``folder/tables`` and returns their paths, in reading order.

    Args:
        rows, curves, timings: as :func:`benchmark.storage.rows.read` returns them. ``curves`` is not tabulated: it is drawn.
        folder: the matrix's results folder. title: of the matrix, for captions.

    Raises:
        BadInput: the folder cannot be written.
    """
    place = folder / "tables"
    written: list[Path] = []

    def put(name: str, text: str) -> None:
        write_text(place / name, text)
        written.append(place / name)

    head = f"{markdown(title)}: "
    for track in stats.tracks(rows):
        for selection in stats.selections(rows, track):
            board, name = stats.leaderboard(rows, track, selection), f"{slug(track)}-{selection}"
            caption = _caption(rows, title, track, selection)
            tests = "" if board.empty or selection in stats.HINDSIGHT else f"\n{rank_words(rows, track, selection)}\n"
            note = f"{markdown(caption)}\n\n{markdown(_NOTES)}\n"
            put(
                f"leaderboard-{name}.md",
                f"# {head}leaderboard, {markdown(track)}, {selection}\n\n{leaderboard_markdown(board, track)}{tests}\n{note}",
            )
            put(f"leaderboard-{name}.csv", _leaderboard_csv(board, rows, track, selection))
            none = f"% {NOTHING}\n"
            put(
                f"leaderboard-{name}.tex", none if board.empty else _leaderboard_latex(board, track, caption, f"leaderboard-{name}")
            )
            detail = (
                f"# {head}every attack, {markdown(track)}, {selection}\n\nACC / ASR / RA in percent: mean ± sample standard "
                f"deviation over all seeds. Columns marked *not implanted* or *adversarial* are shown and never aggregated.\n\n"
                f"{_detail(rows, track, selection)}\n{note}"
            )
            put(f"attacks-{name}.md", detail)
            protocols = _protocols(rows, track, selection)
            if protocols:
                put(f"protocols-{name}.md", (
                    f"# {head}triggers that need the attacked model, {markdown(track)}, {selection}\n\n{_PROTOCOL_NOTES}\n\n"
                    f"{protocols}"
                ))  # fmt: skip
        quiet, judged = stats.stealthy(rows), stats.headline(rows, track)
        if 0 < stats.scenarios(quiet)["implanted"].sum() < stats.scenarios(rows)["implanted"].sum():
            board, name = stats.leaderboard(quiet, track, judged), f"{slug(track)}-{judged}-stealthy"
            caption = _caption(quiet, f"{plain(title)}, without attacks that cost ACC", track, judged)
            put(f"leaderboard-{name}.md", (
                f"# {head}leaderboard, {markdown(track)}, {judged}, stealthy attacks only\n\n{leaderboard_markdown(board, track)}\n"
                f"{markdown(caption)}\n\n{markdown(_NOTES)}\n"
            ))  # fmt: skip
            put(f"leaderboard-{name}.csv", _leaderboard_csv(board, quiet, track, judged))
        name = slug(track)
        caption = _caption(rows, f"{plain(title)}: what the defender was given", track, stats.headline(rows, track))
        put(f"given-{name}.md", (
            f"# {head}what the defender was given, {markdown(track)}\n\n{given_markdown(rows, track)}\n"
            f"{markdown(caption)}\n\n{markdown(GIVEN_NOTES)}\n"
        ))  # fmt: skip
        put(f"given-{name}.csv", _given_csv(rows, track))
        put(f"given-{name}.tex", _given_latex(rows, track, caption, f"given-{name}"))
        against = rank_tests.paired(rows, track)
        put(f"paired-{name}.md", f"# {head}paired tests, {markdown(track)}\n\n{_paired_page(against, rows, track)}")
        if len(against):
            put(f"paired-{name}.csv", csv_text(against.assign(track=track)[["track", *against.columns]]))
        singled = stats.detectors(rows, track)
        if len(singled):
            put(f"detectors-{name}.md", (
                f"# {head}samples singled out, {markdown(track)}\n\n{markdown(_DETECTOR_NOTES)}\n\n"
                f"{_detectors(singled, track)}\n{gate_words(rows)}.\n"
            ))  # fmt: skip
            put(f"detectors-{name}.csv", csv_text(singled.assign(track=track)[["track", *singled.columns]]))
    columns = [*stats.WORLD, "rate", "realised_rate", "label_mode", "target", "acc_benign", "asr_benign", "acc_undefended",
               "asr_undefended", "ra_undefended", "effect", "acc_loss", "acc_loss_se", "implanted", "gate"]  # fmt: skip
    victims = rows[rows["attack"] != stats.NO_ATTACK].drop_duplicates(stats.WORLD)
    put("attack-validity.csv", csv_text(victims[columns]))
    put("attack-validity.md", (
        f"# {head}did the attacks work?\n\nThe undefended models. Gate: {GATE_WORDS}. Only implanted scenarios enter a rank or a "
        f"mean. {gate_words(rows)}.\n\n{validity_markdown(rows)}"
    ))  # fmt: skip
    put("selection-gap.md", (
        f"# {head}what choosing with the test set is worth\n\nMeans over implanted scenarios. RA gap: RA of the oracle minus RA "
        "of the rule; no rule can have a gap below 0. ASR leak: ASR of the rule minus ASR under the leaky rule, which chooses by "
        f"the test ASR. 95 % bootstrap intervals, paired by attacked model.\n\n{_gap_table(rows)}"
    ))  # fmt: skip
    printed = [(track, one) for track in stats.tracks(rows) for one in published.comparisons(rows, track)]
    if printed:
        sources = dict.fromkeys(figure.source for _, one in printed for figure in one.printed)
        listed = "".join(f"- {markdown(source)}\n" for source in sources)
        put("published.md", (
            f"# {head}published beside measured\n\n{_PUBLISHED_NOTES}\n\n{_published(printed)}\n## The protocols\n\n"
            f"{_both_protocols(rows, folder)}\n## Sources\n\nOne line per figure: [published.csv](published.csv).\n\n{listed}"
        ))  # fmt: skip
        put("published.csv", _published_csv(printed))
    gaps = [found.assign(track=track)[["track", *found.columns]] for track in stats.tracks(rows)
            if len(found := stats.selection_gaps(rows, track))]  # fmt: skip
    if gaps:
        put("selection-gap.csv", csv_text(pd.concat(gaps)))
    put("missing.csv", csv_text(stats.problems(rows)))
    put("cost.csv", csv_text(stats.timing_summary(rows, timings)))
    put("missing.md", f"# {head}refused and failed cells\n\nNone of these enters a mean.\n\n{problems_markdown(rows)}")
    put("cost.md", (
        f"# {head}cost\n\nWall seconds and peak memory of the defense stage, as measured on the machine that ran it; standard "
        f"epochs do not depend on the machine (1 = forward and backward over the training set).\n\n{_cost(rows, timings)}"
    ))  # fmt: skip
    return written


def console_leaderboard(rows: pd.DataFrame) -> list[Table]:
    """One compact table per track under the selection it is judged by, for a terminal of 100 columns."""
    from rich.table import Table
    from rich.text import Text

    tables = []
    for track in stats.tracks(rows):
        table = Table(
            title=Text(f"{plain(track_words(track))}: {stats.headline(rows, track)} selection"),
            caption=Text(gate_words(rows)),
            title_justify="left",
            caption_justify="left",
        )
        board = stats.leaderboard(rows, track, stats.headline(rows, track))
        table.add_column("#", justify="right")
        table.add_column("defense", overflow="ellipsis", no_wrap=True, max_width=34)
        table.add_column("scope")
        for name in ("ACC", "ASR", "RA", "dACC", "cost"):
            table.add_column(name, justify="right", no_wrap=True)
        roles = list(board["role"]) if len(board) else []
        for position, (_, line) in enumerate(board.iterrows()):
            start = [str(line["place"]) if line["place"] else "", plain(_name(line, track)), plain(line["scope"])]
            if line["cells_ok"]:
                figures = [percent_text(float(line["acc"])), percent_text(float(line["asr"])), percent_text(float(line["ra"])),
                           percent_text(float(line["d_acc"]), signed=True), number_text(float(line["cost_epochs"]))]  # fmt: skip
            else:
                figures = [plain(line["missing"]), *[_MISSING] * 4]
            last_competing = roles[position] == "defense" and "defense" not in roles[position + 1 :]
            table.add_row(*(Text(text) for text in [*start, *figures]), end_section=last_competing)
        if board.empty:
            table.caption = Text(NOTHING)
        tables.append(table)
    return tables
