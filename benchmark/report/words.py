"""What tables, report and page say in words: the glossary, and sentences computed from rows. All plain text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import pandas as pd

from benchmark.analysis import rank_tests, stats
from benchmark.report.text import DASH, Line, percent_text, plain
from benchmark.rules.metrics import ADVERSARIAL_ASR, COSTS_POINTS, COSTS_SHARE, IMPLANTED_ASR, IMPLANTED_EFFECT
from benchmark.rules.selection import LEAKY_TOLERANCE, TAU
from benchmark.rules.tracks import TRACKS

__all__ = [
    "GATE_WORDS", "GIVEN_NOTES", "GLOSSARY", "NOTHING", "SELECTION_WORDS", "caption", "defined", "distinct", "gate_words",
    "mark_words", "paired_words", "probability_text", "rank_words", "resolution_words", "scenario_words", "setting_words",
    "state_words", "target_words", "track_words", "units_text",
]  # fmt: skip

NOTHING = "No attack was implanted, so no defense can be ranked."
SELECTION_WORDS = {
    "validation": "validation (the published default; where it loses more than "
    f"{100 * TAU:g} points on held-out clean images, the nearest weaker setting that does not, first along the dial, then over the "
    "knob; if there is none, the untouched model)",
    "default": "default (the setting that the authors publish)",
    "strongest": f"strongest (the strongest candidate that loses at most {100 * TAU:g} points on held-out clean images; if there "
    "is none, the untouched model)",
    "canary": "canary (the candidate that best removes backdoors which the benchmark planted in copies of the model with the "
    f"defender's clean images, among those that lose at most {100 * TAU:g} points)",
    "oracle": "oracle (the highest RA on the test set: an upper bound for every rule; never ranked)",
    "leaky": f"leaky (the lowest ASR on the test set within {100 * LEAKY_TOLERANCE:g} % of relative test ACC, as a public "
    "leaderboard chooses; never ranked)",
}
"""How a candidate is chosen along a defense's dial, by the name of the rule."""
GATE_WORDS = (
    f"a scenario is implanted when, averaged over its seeds, its ASR is at least {100 * IMPLANTED_ASR:g} % and at least "
    f"{100 * IMPLANTED_EFFECT:g} points above the ASR of the benign twin on the same triggered images (the effect). It is "
    f"adversarial, and no backdoor, when the twin's ASR is above {100 * ADVERSARIAL_ASR:g} %. It costs ACC when the lower "
    f"end of the 95 % interval of its loss of accuracy against the twin is above {100 * COSTS_POINTS:g} points and above "
    f"{100 * COSTS_SHARE:g} % of the twin's ACC; it is still ranked"
)
"""The attack-validity gate, as a sentence without its first capital and its full stop."""
GIVEN_NOTES = (
    "What each entry used, recorded while it ran. Model: edited (the attacked model is deployed, changed), replaced (another "
    "network is deployed: newly trained, or put on an extractor), unchanged. Clean labelled images: the whole budget with its "
    "validation part; the benchmark's own validation on them is not counted. Training images: of the attacker's training set, as "
    "published, with labels (some known clean: the track vouches for a few of every class), or without the poison, which only a "
    "control can know. Controls training: it trains a network from initial weights itself. Preset: the schedule (paper: the "
    "method's own), then settings of the matrix. Cost: mean over finished cells, implanted or not; of which extractor: the part "
    "spent on training its extractor. A range is the least and the largest value over cells."
)
GLOSSARY = {
    "ACC": "accuracy on clean test images.",
    "ASR": "share of triggered test images, without those of the target class, that are classified as the target.",
    "RA": "share of the same images that are given their true class; ASR + RA is at most 100 %. Rankings use RA: a broken model "
    "has a low ASR for free, but not a high RA.",
    "DER": "(max(0, drop of ASR) - max(0, drop of ACC) + 1) / 2; printed because papers print it, never ranked on.",
    "dACC, dASR": "percentage points against the undefended model of the same scenario and seed.",
    "Cost": "standard-epoch equivalents; 1 = forward and backward over the training set.",
    "Attack-validity gate": f"{GATE_WORDS}. Only implanted scenarios enter a mean or a rank; the others are shown, marked.",
    "Marks": "no change: no weight of the chosen model differs from the attacked model's. Kept untouched: no candidate was within "
    "the tolerance, so the attacked model is deployed as it is. Mechanism failed: what the defense took for poisoned is no more "
    "poisoned than the training set. Run on n of m scenarios: a mean over fewer scenarios than those that are implanted.",
    "Intervals": "seeds are averaged inside a scenario, then scenarios; brackets are 95 % percentile bootstrap intervals that "
    "resample seeds within scenarios, and there are none where a scenario has one seed. With few seeds they are rough and too "
    "narrow. They say nothing about other attacks or data.",
    "Rank": "mean over implanted scenarios of the rank by RA inside the track; a refused or failed cell takes the last place and "
    "enters no mean. An entry that was run on fewer scenarios than others of its track has no rank. Controls and choices with "
    "hindsight (oracle, leaky) are never ranked; tracks are never mixed.",
    "Cells": "finished cells of implanted scenarios. Means over fewer cells than another line's cannot be compared with it; ranks "
    "can.",
}
"""Term -> its meaning, as a sentence without its first capital."""


def defined(*terms: str) -> str:
    """The meaning of terms of the glossary, in one paragraph; by default of all."""
    return " ".join(f"{term}: {GLOSSARY[term]}" for term in terms or GLOSSARY)


def distinct(values: Iterable[object], between: str = ", ") -> str:
    """The distinct values as plain text, in order; those that are empty are left out."""
    return between.join(plain(value) for value in dict.fromkeys(values) if value != "")


# -- what was run --------------------------------------------------------------------------------------------------------------


def target_words(line: Line) -> str:
    """How an attack labels its samples: "all-to-one, target 0" or the name of the mode."""
    return f"{line['label_mode']}, target {line['target']}" if line["label_mode"] == "all-to-one" else str(line["label_mode"])


def setting_words(rows: pd.DataFrame) -> dict[str, str]:
    """Datasets, backbones, attacks with their rates, target and seeds of a table, as plain text."""
    attacked = rows[rows["attack"] != stats.NO_ATTACK]
    rates = attacked.groupby("attack", sort=False)["rate"].unique()
    attacks = [f"{plain(name)} ({', '.join(f'{100 * rate:g} %' for rate in sorted(found))})" for name, found in rates.items()]
    targets = attacked[["label_mode", "target"]].drop_duplicates().to_dict("records")
    return {
        "dataset": distinct(rows["dataset"]),
        "backbone": distinct(rows["backbone"]),
        "attack (poisoning rate)": ", ".join(attacks) or "none",
        "labels": distinct(map(target_words, targets), "; ") or DASH,
        "seed": ", ".join(map(str, sorted(set(rows["seed"])))),
    }


def gate_words(rows: pd.DataFrame) -> str:
    """How many scenarios count: "5 of 8 scenarios implanted (1 of them costs ACC), 1 adversarial, 2 not implanted"."""
    found = stats.scenarios(rows)
    implanted, adversarial = found["implanted"].astype(bool), found["adversarial"].astype(bool)
    costly, failed = int((implanted & found["costs_acc"].astype(bool)).sum()), int((~implanted & ~adversarial).sum())
    cost = f" ({costly} of them {'costs' if costly == 1 else 'cost'} ACC)" if costly else ""
    parts = [f"{int(implanted.sum())} of {len(found)} scenarios implanted{cost}"]
    parts += [f"{int(adversarial.sum())} adversarial"] * bool(adversarial.any()) + [f"{failed} not implanted"] * bool(failed)
    return ", ".join(parts)


def scenario_words(line: Line) -> str:
    """A line of :func:`benchmark.analysis.stats.scenarios`: "implanted", "implanted, costs ACC", "adversarial", "not implanted"."""
    if line["adversarial"]:
        return "adversarial"
    state = "implanted" if line["implanted"] else "not implanted"
    return f"{state}, costs ACC" if line["costs_acc"] else state


def state_words(line: Line) -> str:
    """A scenario's verdict with its figures: "implanted (ASR 99.0, benign twin 2.0)"."""
    twin = "" if math.isnan(line["asr_benign"]) else f", benign twin {percent_text(float(line['asr_benign']))}"
    return f"{scenario_words(line)} (ASR {percent_text(float(line['asr']))}{twin})"


def resolution_words(rows: pd.DataFrame) -> str:
    """A sentence where the validation part is too small to detect the tolerated loss; else nothing."""
    images = stats.validation_images(rows)
    enough, error = stats.resolves(images)
    if enough or not images:
        return ""
    return (
        f" The validation part holds {images} images, too few to detect a loss of {100 * TAU:g} points: with one answer in ten "
        f"changed, the standard error of the loss is {100 * error:.1f} points."
    )


def track_words(track: str) -> str:
    """A track's name and what it grants: "model+clean (the model and a small clean labelled budget)"."""
    titles = {known.name: known.title for known in TRACKS}
    return f"{plain(track)} ({titles[track]})" if track in titles else plain(track)


def caption(rows: pd.DataFrame, title: str, track: str, selection: str) -> str:
    """What a table shows: title, track, selection, everything that was run, and how many scenarios count."""
    ran = "; ".join(f"{name}: {words}" for name, words in setting_words(rows).items())
    chosen = SELECTION_WORDS.get(selection, plain(selection))
    return f"{plain(title)}. Track: {track_words(track)}; selection: {chosen}; {ran}; {gate_words(rows)}.{resolution_words(rows)}"


# -- an entry's cells ----------------------------------------------------------------------------------------------------------


def mark_words(line: Line) -> str:
    """In how many of the scenarios an entry was run, where not in all; in how many of its finished cells nothing was changed, the
    model was kept, or a detector failed.

    A kept model is also an unchanged one; such cells are counted as kept only.
    """
    run, every = int(line["scenarios_run"]), int(line["scenarios"])
    cells = int(line["cells_ok"])
    counts = Counter({"no change": int(line["no_change"]) - int(line["kept"]), "kept untouched": int(line["kept"]),
                      "mechanism failed": int(line["mechanism_failed"])})  # fmt: skip
    marks = [f"{words} in {count} of {cells}" for words, count in counts.items() if count > 0]
    return ", ".join([f"run on {run} of {every} scenarios"] * (run < every) + marks)


def units_text(line: Line) -> str:
    """ "17.8 / 337.6": pruned units of all; empty where there are none to prune."""
    pruned, units = float(line["pruned"]), float(line["units"])
    return "" if math.isnan(units) or units == 0 else " / ".join(f"{value:.1f}".removesuffix(".0") for value in (pruned, units))


# -- tests ---------------------------------------------------------------------------------------------------------------------


def probability_text(p: float) -> str:
    """A p-value: three decimals, or an exponent below 0.001."""
    return DASH if math.isnan(p) else f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


def _entries(found: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{defense} ({scope})" for defense, scope in found)


def rank_words(rows: pd.DataFrame, track: str, selection: str) -> str:
    """The result of a track's rank tests, or why there are none."""
    test = rank_tests.significance(rows, track, selection)
    if test is None:
        blocks = int(stats.scenarios(rows)["implanted"].sum())
        return (
            f"No rank test and no critical-difference diagram: they need at least {rank_tests.MIN_BLOCKS} implanted scenarios "
            f"({blocks} here) and three complete, differing defenses."
        )
    apart = [f"{_entries([a])} and {_entries([b])}, p = {p:.3g}" for a, b, p in test.pairs if p < rank_tests.LEVEL]
    omnibus = "" if test.friedman < rank_tests.LEVEL else " That is above 5 %, so no pair counts as different."
    without = f" Left out, because a scenario is missing: {_entries(test.incomplete)}." if test.incomplete else ""
    return (
        f"Friedman test on RA over {test.blocks} scenarios: p = {test.friedman:.3g}.{omnibus} Pairs that differ at 5 % (Wilcoxon, "
        f"Holm): {'; '.join(apart) or 'none'}.{without}"
    )


def paired_words(table: pd.DataFrame) -> str:
    """Which differences so many pairs and blocks of :func:`benchmark.analysis.rank_tests.paired` can show."""
    count, pairs, blocks = len(table), int(table["pairs"].max()), int(table["blocks"].max())
    least, least_blocks = rank_tests.least_p(pairs), rank_tests.least_p(blocks)
    adjusted = min(1.0, count * least)
    over_pairs = "can" if adjusted < rank_tests.LEVEL else "cannot"
    over_blocks = "can" if min(1.0, count * least_blocks) < rank_tests.LEVEL else "cannot"
    return (
        f"With {pairs} pairs the smallest possible p is {probability_text(least)}, or {probability_text(adjusted)} after Holm over "
        f"{count} comparisons: a difference {over_pairs} be significant at 5 % over pairs. With {blocks} blocks the smallest "
        f"possible p is {probability_text(least_blocks)}: over blocks a difference {over_blocks} be significant at 5 %. One "
        f"comparison needs {rank_tests.blocks_needed()} blocks, {count} need {rank_tests.blocks_needed(count)}. Intervals from "
        f"{blocks} blocks are rough, and too narrow when blocks are few. A large p is no evidence of equality."
    )
