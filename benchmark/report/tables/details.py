"""The other tables: every attack, attack validity, isolated sets, selection gaps, missing cells, cost, paired tests, published
figures. Each function gives Markdown; an empty text means that there is nothing to show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import pandas as pd

from benchmark.analysis import intervals, published, stats
from benchmark.report.tables.boards import entry_name
from benchmark.report.text import (
    DASH,
    Cell,
    Column,
    Line,
    Table,
    csv_text,
    entry,
    markdown,
    percent_text,
    signed_percent,
    with_deviation,
)
from benchmark.report.words import distinct, probability_text, scenario_words, target_words

__all__ = [
    "Found", "attacks_markdown", "cost_markdown", "detectors_markdown", "gaps_markdown", "paired_markdown", "problems_markdown",
    "protocols_markdown", "published_csv", "published_markdown", "validity_markdown",
]  # fmt: skip

_ENTRY = (Column.words("Defense"), Column.words("Scope"))
_SCENARIO = tuple(map(Column.words, ("Dataset", "Backbone", "Attack")))
_IMPLANTED = Column("Implanted", lambda line: "yes" if line["implanted"] else Cell("no", strong=True), left=True)


def _spread(values: Sequence[float] | pd.Series) -> str:
    """Mean and sample deviation over seeds, in percent."""
    found = [float(value) for value in values]
    return with_deviation(sum(found) / len(found) if found else math.nan, intervals.spread(found))


def _share(text: float) -> str:
    return DASH if math.isnan(text) else f"{100 * text:g} %"


# -- by attack -----------------------------------------------------------------------------------------------------------------


def _attacked(mine: pd.DataFrame) -> str:
    """ACC / ASR / RA of an entry under one attack, or why there are none."""
    good = mine[mine["status"] == "ok"]
    if mine.empty:
        return "not run"
    if good.empty:
        return distinct((f"{line['status']}: {line['reason']}" for _, line in mine.iterrows()), "; ")
    text = " / ".join(_spread(good[name]) for name in ("acc", "asr", "ra"))
    return text if len(good) == len(mine) else f"{text} ({len(good)} of {len(mine)} seeds)"


def attacks_markdown(rows: pd.DataFrame, track: str, selection: str) -> str:
    """Defense x attack, one section per dataset and backbone, over all seeds, implanted or not."""
    table = stats.field(rows, track)
    table = table[table["selection"] == selection]
    states = {tuple(line[stats.SCENARIO]): scenario_words(line) for _, line in stats.scenarios(rows).iterrows()}
    parts = []
    for place, here in table.groupby(["dataset", "backbone"], sort=False):
        attacks = list(dict.fromkeys(here["attack"]))
        below = [state if (state := states.get((*place, attack), "")) != "implanted" else "" for attack in attacks]
        columns = [Column(Cell(attack, below=state), itemgetter(number)) for number, (attack, state) in
                   enumerate(zip(attacks, below, strict=True))]  # fmt: skip
        lines: list[dict[Any, Any]] = []
        for (defense, scope), mine in here.groupby(stats.ENTRY, sort=False):
            control = " (control)" if mine["role"].iloc[0] == "control" else ""
            cells = [_attacked(mine[mine["attack"] == attack]) for attack in attacks]
            lines.append({"defense": f"{defense}{control}", "scope": scope, **dict(enumerate(cells))})
        head = ", ".join(map(markdown, place))
        parts.append(f"## {head}\n\n{Table([*_ENTRY, *columns], [('', lines)]).markdown()}")
    return "\n".join(parts)


def protocols_markdown(rows: pd.DataFrame, track: str, selection: str) -> str:
    """Frozen and recraft, per entry and scenario; empty where no trigger needs the attacked model."""
    table = stats.field(rows, track)
    table = table[(table["selection"] == selection) & (table["status"] == "ok") & table["asr_recraft"].notna()]
    gate = stats.scenarios(rows).set_index(stats.SCENARIO)["implanted"].to_dict()
    shares = {"ACC": "acc", "ASR, frozen": "asr", "RA, frozen": "ra", "ASR, recraft": "asr_recraft", "RA, recraft": "ra_recraft"}
    lines = [
        {**mine.iloc[0][[*stats.ENTRY, *stats.SCENARIO]], "implanted": gate.get(tuple(mine.iloc[0][stats.SCENARIO]), False),
         **{name: _spread(mine[name]) for name in shares.values()}}
        for _, mine in table.groupby([*stats.ENTRY, *stats.SCENARIO], sort=False)
    ]  # fmt: skip
    columns = [*_ENTRY, *_SCENARIO, _IMPLANTED, *(Column(head, name=name) for head, name in shares.items())]
    return Table(columns, [("", lines)]).markdown() if lines else ""


# -- did the attacks work? -----------------------------------------------------------------------------------------------------


def _gate_parts(gate: str) -> tuple[str, str]:
    """The recorded words of the gate, split into whether the attack worked and how it compares with the literature."""
    shown_as = {"literature": "", "nearest reference": "not judged; nearest: ", "no literature reference": "no reference: "}
    for name, shown in shown_as.items():
        own, mark, literature = gate.partition(f"; {name}: ")
        if mark:
            return own, shown + literature
    return gate, ""


def _by_seed(seeds: Iterable[int], words: Iterable[str]) -> str:
    """Once where all seeds agree, otherwise seed by seed; a dash for nothing."""
    words = list(words)
    if len(set(words)) <= 1:
        return next(iter(words), "") or DASH
    return "; ".join(f"seed {seed}: {text}" for seed, text in zip(seeds, words, strict=True))


def _validity(rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """A line per scenario: its means, and the undefended models' figures seed by seed."""
    attacked = rows[rows["attack"] != stats.NO_ATTACK]
    worlds = attacked.groupby(stats.WORLD, sort=False).first().reset_index().sort_values("seed", kind="stable")
    undefended = attacked[attacked["defense"] == stats.UNDEFENDED]
    for _, line in stats.scenarios(rows).iterrows():
        mine, notes = ((table[stats.SCENARIO] == line[stats.SCENARIO]).all(axis=1) for table in (worlds, undefended))
        seeds, noted = worlds[mine], undefended[notes].drop_duplicates("seed")
        own, literature = zip(*map(_gate_parts, seeds["gate"]), strict=True)
        figures = ("acc_benign", "acc_undefended", "asr_undefended", "ra_undefended")
        yield {
            **line, "verdict": Cell(scenario_words(line), strong=True), "nominal": _share(seeds["rate"].iloc[0]),
            "realised": distinct(DASH if math.isnan(rate) else f"{100 * rate:.2f} %" for rate in seeds["realised_rate"]),
            "labels": target_words(seeds.iloc[0]), "each": ", ".join(map(str, seeds["seed"])),
            **{name: ", ".join(percent_text(float(value)) for value in seeds[name]) for name in figures},
            "gate": _by_seed(seeds["seed"], own), "literature": _by_seed(seeds["seed"], literature),
            "notes": _by_seed(noted["seed"], noted["note"]),
        }  # fmt: skip


_VALIDITY = (
    *_SCENARIO,
    Column("Verdict", itemgetter("verdict"), left=True),
    Column.number("ASR", "asr", percent_text),
    Column.number("ASR, benign twin", "asr_benign", percent_text),
    Column.number("Effect", "effect", percent_text),
    Column.number("ACC, loss to the twin", "acc_loss", signed_percent),
    Column.number("at least", "acc_loss_low", signed_percent),
    *(Column(head, name=name) for head, name in {
        "Rate, nominal": "nominal", "Rate, realised": "realised", "Labels": "labels", "Seeds": "each",
        "ACC, benign twin": "acc_benign", "ACC, by seed": "acc_undefended", "ASR, by seed": "asr_undefended",
        "RA, by seed": "ra_undefended", "Gate, by seed": "gate", "Against the literature": "literature", "Notes": "notes",
    }.items()),
)  # fmt: skip


def validity_markdown(rows: pd.DataFrame) -> str:
    """One line per scenario: means over seeds, the verdict on them, then the undefended models' figures seed by seed."""
    return Table(_VALIDITY, [("", list(_validity(rows)))]).markdown()


# -- isolated sets -------------------------------------------------------------------------------------------------------------


def _detected(name: str) -> Column:
    """Precision, recall or AUROC with the deviation over seeds, and of how many seeds where some have none."""

    def cell(line: Line) -> str:
        if not line["cells_ok"]:
            return DASH
        seeds, cells = int(line[f"{name}_seeds"]), int(line["cells"])
        text = with_deviation(float(line[name]), float(line[f"{name}_sd"]))
        return f"{text} ({seeds} of {cells} seeds)" if 0 < seeds < cells else text

    return Column("AUROC" if name == "auroc" else name.capitalize(), cell)


def _isolated(line: Line) -> str:
    if not line["cells_ok"]:
        return str(line["missing"])
    return DASH if math.isnan(line["isolated"]) else f"{line['isolated']:.1f}".removesuffix(".0")


_DETECTORS = (
    Column("Defense", lambda line: entry_name(line) + (" (control)" if line["role"] == "control" else ""), left=True),
    Column.words("Scope"),
    *_SCENARIO[:2],
    Column("Attack", lambda line: Cell(line["attack"], below=stats.EXPORTED if line["exported"] else ""), left=True),
    _IMPLANTED,
    Column("Isolated", _isolated),
    Column("Of training set", lambda line: percent_text(float(line["isolated_share"])) if line["cells_ok"] else DASH),
    _detected("precision"),
    _detected("recall"),
    _detected("auroc"),
    Column.number("Base rate", "base_rate", percent_text),
)


def detectors_markdown(found: pd.DataFrame, track: str) -> str:
    """:func:`benchmark.analysis.stats.detectors` as a table."""
    exported = (
        f"\nAttacks marked *{stats.EXPORTED}* control the training: the defense was given the exported poisoned set, and the base "
        "rate is the share of poison during the training of the attacked model.\n"
    )
    return Table.of(_DETECTORS, found.assign(track=track)).markdown() + (exported if found["exported"].any() else "")


# -- selection, missing cells, cost, tests -------------------------------------------------------------------------------------


def gaps_markdown(rows: pd.DataFrame) -> str:
    """What choosing with the test set is worth: a line per track and entry with a dial."""
    present = stats.selections(rows)
    rules = [name for name in present if name not in stats.HINDSIGHT]

    def triple(name: str) -> Column:
        def cell(line: Line) -> str:
            return " / ".join(percent_text(float(line.get(f"{metric}_{name}", math.nan))) for metric in ("acc", "asr", "ra"))

        return Column(f"ACC / ASR / RA, {name}", cell)

    columns = [
        Column.words("Track"), *_ENTRY, Column("Cells", name="cells"), *map(triple, present),
        *(Column.interval(f"{head}, {name}", f"{kind}_{name}", signed=True)
          for head, kind in (("RA gap", "gap"), ("ASR leak", "leak")) for name in rules),
    ]  # fmt: skip
    lines, without = [], []
    for track in stats.tracks(rows):
        gaps = stats.selection_gaps(rows, track)
        lines += gaps.assign(track=track).to_dict("records")
        shown = {entry(line) for _, line in gaps.iterrows()}
        without += [f"{defense} ({scope})" for defense, scope in stats.entries(rows[rows["track"] == track])
                    if f"{defense} ({scope})" not in shown]  # fmt: skip
    none = "No defense with a dial finished an implanted scenario under every selection.\n"
    text = Table(columns, [("", lines)]).markdown() if lines else none
    if not without:
        return text
    return f"{text}\nNo gap to measure (no dial, no finished cell, or nothing to validate on): {markdown(distinct(without))}.\n"


def problems_markdown(rows: pd.DataFrame) -> str:
    """Every refused and failed cell with its reason, or a sentence that there is none."""
    bad = stats.problems(rows).replace("", "no reason recorded")
    columns = [*map(Column.words, ("Track", "Defense", "Scope", "Dataset", "Backbone", "Attack", "Seeds", "Status", "Reason"))]
    return "No cell was refused and none failed.\n" if bad.empty else Table.of(columns, bad).markdown()


_COST = (
    Column.words("Track"),
    *_ENTRY,
    Column.number("Seconds, median", "seconds"),
    Column("Share of victim training", lambda line: DASH if math.isnan(line["share"]) else f"{100 * line['share']:.1f} %"),
    Column.number("Standard epochs, median", "cost_epochs"),
    Column.number("Peak memory, MiB", "peak_mib"),
    Column("Cells", name="cells"),
)


def cost_markdown(rows: pd.DataFrame, timings: pd.DataFrame) -> str:
    """:func:`benchmark.analysis.stats.timing_summary` as a table."""
    table = stats.timing_summary(rows, timings)
    return "No finished cell has a timing.\n" if table.empty else Table.of(_COST, table).markdown()


_PAIRED = (
    *_ENTRY,
    Column("In", lambda line: str(line["metric"]).upper(), left=True),
    Column("Pairs", lambda line: f"{line['pairs']} of {line['worlds']}"),
    Column.interval("Difference", "difference", signed=True),
    Column("p", lambda line: probability_text(line["p"])),
    Column("Holm p", lambda line: probability_text(line["p_holm"])),
    Column("Blocks", name="blocks"),
    Column("p over blocks", lambda line: probability_text(line["p_blocks"])),
)


def paired_markdown(found: pd.DataFrame) -> str:
    """:func:`benchmark.analysis.rank_tests.paired` as a table."""
    return Table.of(_PAIRED, found).markdown()


# -- published beside measured -------------------------------------------------------------------------------------------------

Found = Sequence[tuple[str, published.Comparison]]
"""(track, comparison), in the order of the tracks."""


def _band(figures: Sequence[published.Printed], metric: str) -> str:
    low, high = published.band(getattr(figure, metric) for figure in figures)
    return percent_text(low) if math.isnan(low) or low == high else f"{percent_text(low)}{DASH}{percent_text(high)}"


def _printed_on(figures: Sequence[published.Printed]) -> str:
    """Architectures and poisoning rates of printed figures."""
    rates = sorted({figure.rate for figure in figures}, key=lambda rate: (math.isnan(rate), rate))
    shown = distinct("rate not stated" if math.isnan(rate) else f"{100 * rate:g} %" for rate in rates)
    return f"{distinct(figure.backbone for figure in figures)}; {shown}"


def _compared(track: str, one: published.Comparison) -> dict[str, str]:
    """A line of a scenario's section, by header."""
    reference = one.role == "reference"
    return {
        "Defense": one.entry[0] + (" (undefended)" if reference else ""), "Track": "" if reference else track,
        "Published on": _printed_on(one.printed), "Figures": str(len(one.printed)),
        "Chosen on": distinct(figure.chosen_on for figure in one.printed) or DASH,
        **{f"{name.upper()}, published": _band(one.printed, name) for name in published.METRICS},
        **{f"{name.upper()}, here": _spread([seed[name] for seed in one.measured]) for name in published.METRICS},
        "Selection": DASH if reference else one.selection, "Preset": DASH if reference else one.preset or DASH,
    }  # fmt: skip


def _once(found: Found) -> Found:
    """Each entry once per scenario: every track repeats the undefended model."""
    first: dict[object, tuple[str, published.Comparison]] = {}
    for track, one in found:
        first.setdefault((one.place, one.entry), (track, one))
    return [*first.values()]


def published_markdown(found: Found) -> str:
    """A section per scenario: what sources print beside what was measured here."""
    parts = []
    for place in dict.fromkeys(one.place for _, one in found):
        mine = [(track, one) for track, one in _once(found) if one.place == place]
        lines = [_compared(track, one) for track, one in mine]
        columns = [Column(head, left=position < 5, name=head) for position, head in enumerate(lines[0])]
        first = mine[0][1]
        marks = ["the literature's protocol" if first.same_protocol else "**other protocol**", f"{100 * first.rate:g} % poisoned"]
        marks += [] if first.implanted else ["attack not implanted"]
        head = ", ".join(map(markdown, place))
        parts.append(f"## {head}\n\n{'; '.join(marks)}\n\n{Table(columns, [('', lines)]).markdown()}")
    return "\n".join(parts)


def protocol_table(rows: pd.DataFrame, folder: Path) -> str:
    """The literature's protocol and this matrix's, side by side."""
    settings = published.settings_words(folder)
    done = rows[(rows["status"] == "ok") & ~rows["control"].astype(bool)]
    train, clean = int(done["train_images"].max()), int(done["clean_images"].max())
    here = {
        "data set": distinct(rows["dataset"]) + (f"; {train} training images" if train else "")
        + (f" ({settings['dataset']})" if "dataset" in settings else ""),
        "network": distinct(rows["backbone"]) + " (w: width of the first stage; the literature's have 64, WRN-16-1 16)",
        "training": settings.get("recipe", "see matrix.toml"),
        "clean budget": f"{clean} images, held out of the attacker's training set, a fifth to validate on" if clean else DASH,
        "seeds": ", ".join(map(str, sorted(set(rows["seed"])))),
        "selection": "; ".join(f"{track}: {stats.headline(rows, track)}" for track in stats.tracks(rows)),
    }  # fmt: skip
    lines = [{"": name, "Published": words, "Here": here[name]} for name, words in published.PROTOCOL.items()]
    return Table([Column(head, left=True, name=head) for head in lines[0]], [("", lines)]).markdown()


def published_csv(found: Found) -> str:
    """One line per printed figure, with what was measured beside it (means over seeds); shares in [0, 1]."""
    lines = []
    for track, one in _once(found):
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
