"""Rows -> the page people read first: ``results/<matrix>/README.md``. Every figure and sentence is computed; nothing is typed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from benchmark.analysis import stats
from benchmark.report.boards import given_table, leaderboard_markdown
from benchmark.report.details import problems_markdown, validity_markdown
from benchmark.report.text import markdown, slug
from benchmark.report.words import (
    GATE_WORDS,
    GIVEN_NOTES,
    NOTHING,
    SELECTION_WORDS,
    gate_words,
    mark_words,
    paired_words,
    rank_words,
    resolution_words,
    setting_words,
    track_words,
)  # fmt: skip
from benchmark.rules.metrics import IMPLANTED_ASR
from benchmark.rules.selection import NOTHING_TO_VALIDATE_ON
from benchmark.settings.provenance import STALE_WORDS, matrix_of, stale
from benchmark.storage.files import write_text

__all__ = ["headline", "plain_words", "summary", "write_headline", "write_plain_words", "write_report"]

_MISSING = "\N{EN DASH}"
BEGIN, END = "<!-- headline:begin -->", "<!-- headline:end -->"

BOARD = ("leaderboard", "The leaderboard at a glance")
_FIGURES = (
    ("attacks", "The undefended models: did the attacks work?"),
    ("triggers", "Triggers: clean, triggered, difference"),
    ("selection-gap", "What choosing with the test set is worth"),
)
_TRACK_FIGURES = (
    ("heatmap-ra", "Robust accuracy by attack and defense"),
    ("heatmap-asr", "Attack success rate by attack and defense"),
    ("scatter", "Accuracy against attack success, from the undefended model"),
    ("dials", "Along the dial"),
    ("detectors", "Training samples taken for poisoned: precision and recall"),
    ("ranks", "Average ranks, and what no test tells apart"),
    ("published", "Published figures beside ours"),
    ("cost", "Cost"),
)


def _figure(value: pd.Series) -> str:
    """RA in percent with its interval."""
    mean = f"{100 * value['ra']:.1f} %"
    return mean if math.isnan(value["ra_low"]) else f"{mean} [{100 * value['ra_low']:.1f}, {100 * value['ra_high']:.1f}]"


def _entry(line: pd.Series) -> str:
    return f"{markdown(line['defense'])} ({markdown(line['scope'])})"


def _with_figures(lines: pd.DataFrame) -> str:
    return ", ".join(f"{_entry(line)} {_figure(line)}" for _, line in lines.iterrows())


def summary(rows: pd.DataFrame, track: str) -> str:
    """What the leaderboard of a track says under the selection it is judged by, in sentences that claim no more than its intervals.

    Names the entry of the best average rank, its RA, and how its interval lies to those of the controls.
    """
    board = stats.leaderboard(rows, track, stats.headline(rows, track))
    if board.empty:
        return NOTHING
    ranked = board[(board["place"] > 0) & (board["cells_ok"] > 0)]
    if ranked.empty:
        return "No competing defense finished a cell on an implanted scenario."
    idle = _idle(ranked)
    ranked = ranked[~idle]
    if ranked.empty:
        return "No entry changed a model, so none is called best."
    leaders = ranked[ranked["place"] == ranked["place"].min()]
    best = leaders.iloc[0]
    tied = f", tied with {' and '.join(_entry(line) for _, line in leaders.iloc[1:].iterrows())}" if len(leaders) > 1 else ""
    of = f"{best['scenarios_ok']} of {int(stats.scenarios(rows)['implanted'].sum())} implanted scenarios"
    without = " of those that changed a model" if idle.any() else ""
    said = [f"Best average rank by RA{without}: **{_entry(best)}**{tied}, with RA {_figure(best)} over {of}."]
    marks = mark_words(best)
    if marks:
        said.append(f"Marks: {marks} cells.")
    higher = ranked[(ranked["ra"] > best["ra"]) & (ranked["place"] > best["place"])]
    if len(higher):
        said.append(f"A higher mean RA, with a worse average rank: {_with_figures(higher)}.")
    controls = board[(board["role"] == "control") & board["ra"].notna()]
    if len(controls) and (math.isnan(best["ra_low"]) or bool(controls["ra_low"].isna().any())):
        said.append(f"Controls: {_with_figures(controls)}. At least one scenario has a single seed, so no interval separates them.")
    else:
        above, below = best["ra_low"] > controls["ra_high"], best["ra_high"] < controls["ra_low"]
        for words, mask in (("lies above that of", above), ("overlaps that of", ~above & ~below), ("lies below that of", below)):
            if mask.any():
                said.append(f"Its interval {words} {_with_figures(controls[mask])}.")
    incomplete = ranked[ranked["cells_ok"] < ranked["cells"]]
    if len(incomplete):
        said.append(
            f"Incomplete (a missing scenario counts as last place): {', '.join(_entry(line) for _, line in incomplete.iterrows())}."
        )
    return " ".join(said)


def _idle(board: pd.DataFrame) -> pd.Series:
    """Which entries of a leaderboard changed no model in any finished cell."""
    return board["no_change"] >= board["cells_ok"]


def plain_words(rows: pd.DataFrame) -> str:
    """What worked and what did not, a line per track: who takes ASR below the gate's line, who matches which control, what was
    singled out, who changed nothing. Counts and means over implanted scenarios, nothing else; Markdown."""
    lines = []
    for track in stats.tracks(rows):
        board = stats.leaderboard(rows, track, stats.headline(rows, track))
        ranked = board[(board["role"] == "defense") & (board["cells_ok"] > 0)] if len(board) else board
        if not len(ranked):
            lines.append(f"- **{markdown(track)}**: {NOTHING if board.empty else 'No competing defense finished a cell.'}\n")
            continue
        idle, active = ranked[_idle(ranked)], ranked[~_idle(ranked)]
        below = active[active["asr"] < IMPLANTED_ASR].sort_values("asr", kind="stable")
        named = "; ".join(
            f"{_entry(line)} leaves ASR {100 * line['asr']:.1f} % at ACC {100 * line['acc']:.1f} %" for _, line in below.iterrows()
        )
        verb = "takes" if len(below) == 1 else "take"
        count = f"{len(below)} of {len(ranked)} entries {verb}" if len(below) else "No entry takes"
        said = [f"{count} the mean ASR below {100 * IMPLANTED_ASR:g} %" + (f": {named}." if named else ".")]
        controls = board[(board["role"] == "control") & board["ra"].notna()].sort_values("ra", ascending=False, kind="stable")
        # The best control, and what the clean budget gives without the model.
        scratch = controls[controls["defense"].str.startswith("training-from-scratch")]
        telling = pd.concat([controls.iloc[:1], scratch.iloc[:1]]).drop_duplicates(["defense", "scope"])
        for _, line in telling.iterrows():
            reached = active[active["ra"] >= line["ra"]]
            who = ", ".join(_entry(other) for _, other in reached.iterrows()) if 0 < len(reached) <= 3 else ""
            verb = "match" if len(reached) > 1 else "matches"
            count = "No defense" if reached.empty else who or f"{len(reached)} of {len(ranked)} entries"
            said.append(f"{count} {verb} the control {markdown(line['defense'])} (RA {100 * line['ra']:.1f} %).")
        if len(idle):
            said.append(f"No model was changed in any cell by {', '.join(_entry(line) for _, line in idle.iterrows())}.")
        told = stats.detectors(rows, track)
        told = told[told["implanted"].astype(bool) & (told["role"] == "defense")] if len(told) else told
        for (defense, scope), mine in told.groupby(stats.ENTRY, sort=False) if len(told) else ():
            own = ranked[(ranked["defense"] == defense) & (ranked["scope"] == scope)]
            failed = f"; mechanism failed in {own['mechanism_failed'].iloc[0]} of {own['cells_ok'].iloc[0]} cells" if (
                len(own) and own["mechanism_failed"].iloc[0]
            ) else ""
            said.append(
                f"Isolated set of {markdown(defense)} ({markdown(scope)}): precision {100 * mine['precision'].mean():.0f} % "
                f"(base rate {100 * mine['base_rate'].mean():.0f} %), recall {100 * mine['recall'].mean():.0f} %{failed}."
            )
        lines.append(f"- **{markdown(track)}**: {' '.join(said)}\n")
    return "".join(lines)


def headline(rows: pd.DataFrame, folder: str) -> str:
    """The front page's words and, folded, its table: every entry of every track, with what choices on the test set would report.

    ``folder``: of the results, for the links.
    """

    def share(line: pd.Series, name: str, *, signed: bool = False) -> str:
        value = float(line[name])
        return _MISSING if math.isnan(value) else f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"

    columns = ["track", "defense", "scope", "ACC", "ASR", "RA", "dACC", "RA, oracle", "ASR, leaky", "marks"]
    lines = [f"| {' | '.join(columns)} |\n|{' :-- |' * 3}{' --: |' * 6} :-- |\n"]
    said = []
    shown: set[tuple[str, str]] = set()
    for track, judged, board in stats.judged_boards(rows):
        if board.empty:
            return f"{NOTHING}\n"
        for _, line in board.iterrows():
            entry = (str(line["defense"]), str(line["scope"]))
            competes = line["role"] == "defense"
            if not competes and entry in shown:
                continue
            shown.add(entry)
            place = markdown(track) if competes else "*(reference)*" if line["role"] == "reference" else "*(control)*"
            figures = [*(share(line, name) for name in ("acc", "asr", "ra")), share(line, "d_acc", signed=True)]
            hindsight = [share(line, "ra_oracle"), share(line, "asr_leaky")]
            cells = [place, markdown(entry[0]), markdown(entry[1]), *figures, *hindsight, markdown(mark_words(line))]
            lines.append(f"| {' | '.join(cells)} |\n")
        said.append(f"- **{markdown(track)}**, {judged} selection: {summary(rows, track)}\n")
    about = (
        f"Percent, means over implanted scenarios ({gate_words(rows)}). RA, oracle: the model of highest test RA; ASR, leaky: of "
        f"the model of lowest test ASR, as a public board chooses; neither is ranked.{resolution_words(rows)} Intervals and the "
        f"rest: [{folder}]({folder}/README.md)."
    )
    return "".join([
        "In plain words:\n\n", plain_words(rows), "\n<details><summary>The figures</summary>\n\n", *lines, "\n", about,
        "\n\n</details>\n\n<details><summary>Best ranks and intervals</summary>\n\n", *said, "\n</details>\n",
    ])  # fmt: skip


def _between(page: Path, begin: str, end: str, content: str) -> bool:
    """Puts content between the markers of a page that has them; True when the page changed."""
    if not page.is_file():
        return False
    text = page.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        return False
    before, rest = text.split(begin, 1)
    return write_text(page, f"{before}{begin}\n{content}{end}{rest.split(end, 1)[1]}")


def write_headline(readme: Path, rows: pd.DataFrame, folder: str) -> bool:
    """Puts :func:`headline`, below its picture, between the markers of a page that has them; True when the page changed."""
    return _between(readme, BEGIN, END, _glance(readme, folder) + headline(rows, folder))


def _glance(readme: Path, folder: str) -> str:
    """The picture of a matrix's leaderboard, if one was drawn, as a link to its report."""
    picture, words = f"{folder}/plots/{BOARD[0]}.png", f"{BOARD[1]}: {Path(folder).name}"
    return f"[![{words}]({picture})]({folder}/README.md)\n\n" if (readme.parent / picture).is_file() else ""


def write_plain_words(readme: Path, rows: pd.DataFrame, folder: str) -> bool:
    """Puts :func:`plain_words`, below the leaderboard's picture, between a page's markers for the matrix of these rows.

    True when the page has them and changed. The markers are ``<!-- words:NAME:begin -->`` and ``<!-- words:NAME:end -->``.
    """
    name = Path(folder).name
    about = f"({gate_words(rows)}; [{folder}]({folder}/README.md))"
    old = f"{STALE_WORDS}\n\n" if stale(readme.parent / folder) else ""
    content = f"{_glance(readme, folder)}{old}{plain_words(rows)}\n{about}\n"
    return _between(readme, f"<!-- words:{name}:begin -->", f"<!-- words:{name}:end -->", content)


def _reading(rows: pd.DataFrame) -> str:
    seeds = rows.groupby(stats.SCENARIO, sort=False)["seed"].nunique()
    few = f"With {int(seeds.min())} seeds" if seeds.min() > 1 else "With one seed there is no interval at all, and with a few"
    return (
        "## How to read this\n\n"
        "- **ACC**: accuracy on the clean test images.\n"
        "- **ASR**: share of triggered test images, those of the target class left out, classified as the target.\n"
        "- **RA**: share of the same triggered images given their true class; ASR + RA is at most 100 %. Rankings use RA: a broken "
        "model has a low ASR for free, but not a high RA.\n"
        "- **DER**: (max(0, drop of ASR) - max(0, drop of ACC) + 1) / 2; printed, never ranked on.\n"
        "- **dACC, dASR**: percentage points against the undefended model of the same scenario and seed.\n"
        "- **Cost**: standard-epoch equivalents, 1 = forward and backward over the training set.\n"
        f"- **Attack-validity gate**: {GATE_WORDS}. Only implanted scenarios enter a mean or a rank; the others are shown, "
        "marked.\n"
        "- **Marks**: *no change*: no weight of the chosen model differs from the attacked one's. *kept untouched*: no candidate "
        "was within the tolerance, so the attacked model is deployed as it is. *mechanism failed*: what the defense took for "
        "poisoned is no more poisoned than the training set.\n"
        "- **Selection**: how one candidate was picked along a defense's dial. "
        + "; ".join(SELECTION_WORDS[name] for name in stats.selections(rows) if name in SELECTION_WORDS)
        + ". In a track that grants nothing to validate on to a defense that has a dial, everybody is judged by default.\n"
        f"- **What the defender was given**: {GIVEN_NOTES}\n"
        "- **Intervals**: seeds are averaged inside a scenario, then scenarios; brackets are 95 % percentile bootstrap intervals "
        f"that resample seeds within scenarios. {few} they are rough and rather too narrow, and they say nothing about other "
        "attacks or data.\n"
        "- **Rank**: mean over implanted scenarios of the rank by RA inside the track. Refused and failed cells share the last "
        "place and enter no mean. Controls are never ranked; tracks are never mixed.\n"
    )


def _pairs(rows: pd.DataFrame, track: str) -> str:
    """How many entries paired tests tell apart from training from scratch, in each direction; what so few pairs can show."""
    found = stats.paired(rows, track)
    if found.empty:
        return f"Paired tests: not made; the matrix has no control {stats.SCRATCH}.\n"
    said = []
    for metric in ("ra", "acc"):
        mine = found[found["metric"] == metric]
        apart = mine["p_holm"] < stats.LEVEL
        ahead, behind = int((apart & (mine["difference"] > 0)).sum()), int((apart & (mine["difference"] < 0)).sum())
        said.append(f"in {metric.upper()}, {ahead} of {len(mine)} entries are better and {behind} worse")
    return (
        f"Compared with {markdown(found['control'].iloc[0])} on the same attacked models (5 %, after Holm; the pairs are not "
        f"independent of each other): {'; '.join(said)}. {paired_words(found)}\n"
    )


def _search_words(folder: Path) -> dict[str, str]:
    """How far the benchmark searched for every defense alike, as the matrix's copy in the folder says; empty where it cannot be
    read."""
    cells = matrix_of(folder).cells if (folder / "matrix.toml").is_file() else ()
    if not cells:
        return {}
    canaries = cells[0].canaries
    planted = f", canaries: {' and '.join(canary.name for canary in canaries)}" if canaries else ""
    return {"search": f"at most {cells[0].candidates} candidates a defense over all settings of its knob{planted}"}


def _links(names: Sequence[str], folder: str) -> str:
    return ", ".join(f"[{Path(name).suffix[1:]}]({folder}/{name})" for name in names)


def _picture(name: str, words: str, files: set[str]) -> str:
    if f"plots/{name}.png" not in files:
        return ""
    vector = f" ([SVG](plots/{name}.svg))" if f"plots/{name}.svg" in files else ""
    return f"**{words}**{vector}\n\n![{words}](plots/{name}.png)\n\n"


def write_report(
    folder: Path, rows: pd.DataFrame, title: str, *, files: Sequence[Path] | None = None, description: str = ""
) -> Path:  # fmt: skip
    """Writes ``folder/README.md`` and returns its path. No dates, no seconds: the same rows give the same bytes.

    Args:
        folder: the matrix's results folder. rows: as :func:`benchmark.storage.rows.read` returns them. title: of the matrix.
        files: what the tables and plots verbs wrote (paths below ``folder``); by default, what lies in ``tables`` and ``plots``.
        description: a sentence from the matrix file, printed below the title.

    Raises:
        BadInput: the file cannot be written.
    """
    found = files if files is not None else [*folder.glob("tables/*"), *folder.glob("plots/*")]
    have = {path.relative_to(folder).as_posix() for path in found}
    text = [f"# {markdown(title)}\n"]
    if description:
        text.append(f"{markdown(description)}\n")
    if (folder / "leaderboard.html").is_file():
        text.append("To sort, filter and open every line: [leaderboard.html](leaderboard.html), opened from disk in any browser.\n")
    if stale(folder):
        text.append(f"{STALE_WORDS}\n")
    text.append("Generated from [rows.csv](rows.csv); nothing on this page is typed by hand.\n\n## What was run\n")
    ran = {**setting_words(rows), "track": "; ".join(track_words(track) for track in stats.tracks(rows)) or "none",
           "defense": ", ".join(dict.fromkeys(rows.loc[~rows["control"].astype(bool), "defense"])) or "none",
           "control": ", ".join(dict.fromkeys(rows.loc[rows["control"].astype(bool), "defense"])) or "none",
           "gate": gate_words(rows), **_search_words(folder)}  # fmt: skip
    text.append("| | |\n| :-- | :-- |\n" + "".join(f"| {name} | {markdown(words)} |\n" for name, words in ran.items()))
    for name, words in _FIGURES[:2]:
        text.append(_picture(name, words, have))
    if stats.tracks(rows):
        text.append(_picture(*BOARD, have))
        text.append(f"## In plain words\n\n{plain_words(rows)}")
    else:
        text.append(f"## The attacked models\n\nOne figure per seed.\n\n{validity_markdown(rows)}")
    for track in stats.tracks(rows):
        tail = slug(track)
        text.append(f"## Track: {markdown(track_words(track))}\n\n{summary(rows, track)}\n")
        judged = stats.headline(rows, track)
        board = stats.leaderboard(rows, track, judged)
        if len(board):
            blind = ((rows["track"] == track) & (rows["reason"] == NOTHING_TO_VALIDATE_ON)).any()
            why = f" ({NOTHING_TO_VALIDATE_ON})" if blind and judged != "validation" else ""
            said = f"Selection: {judged}{why}; {gate_words(rows)}.{resolution_words(rows)}"
            text.append(f"{said}\n\n{leaderboard_markdown(board, track)}")
            stem = f"tables/leaderboard-{tail}-{judged}-stealthy"
            if f"{stem}.md" in have:
                quiet = stats.stealthy(rows)
                text.append(
                    f"**Stealthy attacks only** ({gate_words(quiet)}; attacks that cost ACC left out): {summary(quiet, track)} "
                    f"[md]({stem}.md), [csv]({stem}.csv)\n"
                )
            text.append(f"**Significance.** {markdown(rank_words(rows, track, judged))}\n\n{_pairs(rows, track)}")
        text.append(f"**What the defender was given**\n\n{given_table(rows, track).markdown()}")
        lines = []
        for selection in stats.selections(rows, track):
            for kind, words in (("leaderboard", "leaderboard"), ("attacks", "every attack"),
                                ("protocols", "triggers that need the attacked model, frozen and recraft")):  # fmt: skip
                stem = f"{kind}-{tail}-{selection}"
                present = [f"{stem}{end}" for end in (".md", ".csv", ".tex") if f"tables/{stem}{end}" in have]
                if present:
                    lines.append(f"- {words}, {selection}: {_links(present, 'tables')}\n")
        for kind, words in (("given", "what the defender was given"), ("paired", "paired tests, entry by entry")):
            present = [f"{kind}-{tail}{end}" for end in (".md", ".csv", ".tex") if f"tables/{kind}-{tail}{end}" in have]
            if present:
                lines.append(f"- {words}: {_links(present, 'tables')}\n")
        text.append("".join(lines))
        for name, words in _TRACK_FIGURES:
            text.append(_picture(f"{name}-{tail}", f"{words}, {markdown(track)}", have))
            if name == "detectors":
                present = [f"detectors-{tail}{end}" for end in (".md", ".csv") if f"tables/detectors-{tail}{end}" in have]
                text.append(f"Every figure of it: {_links(present, 'tables')}.\n" if present else "")
    text.append(_picture(*_FIGURES[2], have))
    others = [("attack-validity.md", "did the attacks work?"), ("selection-gap.md", "what choosing with the test set is worth"),
              ("published.md", "published figures beside ours, and how the protocols differ"),
              ("cost.md", "seconds, memory and epochs"), ("missing.md", "refused and failed cells")]  # fmt: skip
    links = "".join(f"- [{words}](tables/{name})\n" for name, words in others if f"tables/{name}" in have)
    if links:
        text.append(f"## More tables\n\n{links}")
    text.append(_reading(rows))
    text.append(f"## Refused and failed cells\n\n{problems_markdown(rows)}")
    path = folder / "README.md"
    write_text(path, "\n".join(part.rstrip("\n") + "\n" for part in text if part))
    return path
