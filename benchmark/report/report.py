"""Rows -> the page people read first, ``results/<matrix>/README.md``, and the finding on the project's front page.

Every figure and sentence is computed; the pages themselves are ``templates/report.md`` and ``templates/front.md``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmark.analysis import rank_tests, stats
from benchmark.report import words
from benchmark.report.tables.boards import given_table, leaderboard_markdown, overview_table
from benchmark.report.tables.details import problems_markdown, validity_markdown
from benchmark.report.text import entry, markdown, slug
from benchmark.rules.metrics import IMPLANTED_ASR
from benchmark.rules.selection import NOTHING_TO_VALIDATE_ON
from benchmark.settings.provenance import STALE_WORDS, matrix_of, stale
from benchmark.storage.files import write_block, write_text

__all__ = ["finding", "plain_words", "summary", "write_front", "write_report"]

_TEMPLATES = Path(__file__).parent / "templates"
_FIGURES = {
    "heatmap-ra": "Robust accuracy by attack and defense", "heatmap-asr": "Attack success rate by attack and defense",
    "scatter": "Accuracy against attack success, from the undefended model", "dials": "Along the dial",
    "detectors": "Isolated sets: precision and recall",
    "ranks": "Average ranks, and which differences are not significant", "published": "Published figures beside ours",
    "cost": "Cost",
}  # fmt: skip
"""Figures of one track, in order."""
_OTHERS = {
    "attack-validity": "did the attacks work?", "selection-gap": "what choosing with the test set is worth",
    "published": "published figures beside ours, and how the protocols differ", "cost": "seconds, memory and epochs",
    "missing": "refused and failed cells",
}  # fmt: skip
"""Tables that do not belong to one track."""


def rendered(template: str, **context: Any) -> str:
    """A Markdown template of ``templates/`` with its values put in; runs of blank lines become one."""
    import jinja2  # slow to load, and only pages need it

    loader = jinja2.FileSystemLoader(_TEMPLATES)
    environment = jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["md"] = markdown
    return re.sub(r"\n{3,}", "\n\n", environment.get_template(template).render(**context)).strip("\n") + "\n"


# -- sentences -----------------------------------------------------------------------------------------------------------------


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _figure(line: pd.Series) -> str:
    """RA in percent with its interval."""
    bounds = "" if math.isnan(line["ra_low"]) else f" [{100 * line['ra_low']:.1f}, {100 * line['ra_high']:.1f}]"
    return _percent(line["ra"]) + bounds


def _entries(lines: pd.DataFrame, between: str = ", ") -> str:
    return between.join(markdown(entry(line)) for _, line in lines.iterrows())


def _with_figures(lines: pd.DataFrame) -> str:
    return ", ".join(f"{markdown(entry(line))} {_figure(line)}" for _, line in lines.iterrows())


def _idle(board: pd.DataFrame) -> pd.Series:
    """Which entries of a leaderboard changed no model in any finished cell."""
    return board["no_change"] >= board["cells_ok"]


def _partial(board: pd.DataFrame) -> pd.Series:
    """Which entries were run in some of the implanted scenarios only: their means are not comparable with the others'."""
    return board["scenarios_run"] < board["scenarios"]


def _elsewhere(partial: pd.DataFrame) -> str:
    """Which entries are not compared, and on how many scenarios each was run; empty where there is none."""
    parts = [f"on {run} of {every} scenarios {_entries(mine)}" for (run, every), mine in
             partial.groupby(["scenarios_run", "scenarios"], sort=False)]  # fmt: skip
    return f"Not compared here, since run on fewer scenarios: {'; '.join(parts)}." if parts else ""


def _controls(board: pd.DataFrame) -> pd.DataFrame:
    return board[(board["role"] == "control") & board["ra"].notna()]


def _against_controls(best: pd.Series, controls: pd.DataFrame) -> Iterator[str]:
    """How the interval of the best entry lies to those of the controls."""
    if len(controls) and (math.isnan(best["ra_low"]) or bool(controls["ra_low"].isna().any())):
        yield f"Controls: {_with_figures(controls)}. At least one scenario has a single seed, so no interval separates them."
        return
    above, below = best["ra_low"] > controls["ra_high"], best["ra_high"] < controls["ra_low"]
    for relation, mask in (("lies above that of", above), ("overlaps that of", ~above & ~below), ("lies below that of", below)):
        if mask.any():
            yield f"Its interval {relation} {_with_figures(controls[mask])}."


def summary(rows: pd.DataFrame, track: str) -> str:
    """The leaderboard of a track in sentences that claim no more than its intervals: the entry of the best average rank, its RA,
    and how its interval lies to those of the controls. Markdown."""
    board = stats.leaderboard(rows, track, stats.headline(rows, track))
    if board.empty:
        return words.NOTHING
    ranked = board[(board["place"] > 0) & (board["cells_ok"] > 0)]
    if ranked.empty:
        return "No competing defense finished a cell on an implanted scenario."
    idle = _idle(ranked)
    ranked = ranked[~idle]
    if ranked.empty:
        return "No entry changed a model, so none is called best."
    leaders = ranked[ranked["place"] == ranked["place"].min()]
    best = leaders.iloc[0]
    tied = f", tied with {_entries(leaders.iloc[1:], ' and ')}" if len(leaders) > 1 else ""
    of = f"{best['scenarios_ok']} of {int(stats.scenarios(rows)['implanted'].sum())} implanted scenarios"
    among = " of those that changed a model" if idle.any() else ""
    marks, higher = words.mark_words(best), ranked[(ranked["ra"] > best["ra"]) & (ranked["place"] > best["place"])]
    incomplete = ranked[ranked["cells_ok"] < ranked["cells"]]
    return " ".join([
        f"Best average rank by RA{among}: **{markdown(entry(best))}**{tied}, with RA {_figure(best)} over {of}.",
        *[f"Marks: {marks}."] * bool(marks),
        *[f"A higher mean RA, with a worse average rank: {_with_figures(higher)}."] * bool(len(higher)),
        *_against_controls(best, _controls(board)),
        *[f"Incomplete (a missing scenario counts as last place): {_entries(incomplete)}."] * bool(len(incomplete)),
        *filter(None, [_elsewhere(board[(board["role"] == "defense") & (board["place"] == 0)])]),
    ])  # fmt: skip


def _below_the_gate(ranked: pd.DataFrame, active: pd.DataFrame) -> str:
    """Which entries take the mean ASR below the line at which an attack counts."""
    below = active[active["asr"] < IMPLANTED_ASR].sort_values("ra", ascending=False, kind="stable")
    named = "; ".join(
        f"{markdown(entry(line))} leaves ASR {_percent(line['asr'])} at ACC {_percent(line['acc'])}" for _, line in below.iterrows()
    )
    verb = "takes" if len(below) == 1 else "take"
    count = f"{len(below)} of {len(ranked)} entries {verb}" if named else "No entry takes"
    return f"{count} the mean ASR below {100 * IMPLANTED_ASR:g} %" + (f": {named}." if named else ".")


def _matched(control: pd.Series, ranked: pd.DataFrame) -> str:
    """ "No defense matches the training-from-scratch control (RA 78.8 %)."; an entry that changed no model matches nothing."""
    active = ranked[~_idle(ranked)]
    reached = active[active["ra"] >= control["ra"]]
    who = _entries(reached, " and ") if len(reached) <= 3 else f"{len(reached)} of {len(ranked)} entries"
    verb = "match" if len(reached) > 1 else "matches"
    return f"{who or 'No defense'} {verb} the *{markdown(control['defense'])}* control (RA {_percent(control['ra'])})."


def _telling(board: pd.DataFrame) -> pd.DataFrame:
    """The best control, and what the clean budget gives without the model."""
    controls = _controls(board).sort_values("ra", ascending=False, kind="stable")
    scratch = controls[controls["defense"].str.startswith(stats.SCRATCH)]
    return pd.concat([controls.iloc[:1], scratch.iloc[:1]]).drop_duplicates(stats.ENTRY)


def _isolated(rows: pd.DataFrame, track: str, ranked: pd.DataFrame) -> Iterator[str]:
    """Precision and recall of what each defense took for poisoned, over implanted scenarios."""
    found = stats.detectors(rows, track)
    if not len(found):
        return
    found = found[found["implanted"].astype(bool) & (found["role"] == "defense")]
    for (defense, scope), mine in found.groupby(stats.ENTRY, sort=False):
        own = ranked[(ranked["defense"] == defense) & (ranked["scope"] == scope) & (ranked["mechanism_failed"] > 0)]
        failed = "".join(
            f"; mechanism failed in {line['mechanism_failed']} of {line['cells_ok']} cells" for _, line in own.iterrows()
        )
        yield (
            f"Isolated set of {markdown(defense)} ({markdown(scope)}): precision {100 * mine['precision'].mean():.0f} % "
            f"(base rate {100 * mine['base_rate'].mean():.0f} %), recall {100 * mine['recall'].mean():.0f} %{failed}."
        )


def plain_words(rows: pd.DataFrame) -> str:
    """What worked and what did not, a line per track: which entries take ASR below the gate's line, which match a control, which
    changed nothing, and what was isolated. Counts and means over implanted scenarios; Markdown."""
    lines = []
    for track in stats.tracks(rows):
        board = stats.leaderboard(rows, track, stats.headline(rows, track))
        ran = board[(board["role"] == "defense") & (board["cells_ok"] > 0)] if len(board) else board
        sentences = [words.NOTHING if board.empty else "No competing defense finished a cell."]
        ranked, partial = (ran[~_partial(ran)], ran[_partial(ran)]) if len(ran) else (ran, ran)
        if len(ranked):
            idle = ranked[_idle(ranked)]
            sentences = [
                _below_the_gate(ranked, ranked[~_idle(ranked)]),
                *(_matched(line, ranked) for _, line in _telling(board).iterrows()),
                *[f"No model was changed in any cell by {_entries(idle)}."] * bool(len(idle)),
                *_isolated(rows, track, ranked),
            ]
        if len(partial):
            sentences = [*(sentences if len(ranked) else _isolated(rows, track, partial)), _elsewhere(partial)]
        lines.append(f"- **{markdown(track)}**: {' '.join(sentences)}\n")
    return "".join(lines)


# -- the front page ------------------------------------------------------------------------------------------------------------


def _lowered(ranked: pd.DataFrame) -> str:
    """Which entries of all tracks take the mean ASR below the line at which an attack counts."""
    below = ranked[(ranked["asr"] < IMPLANTED_ASR) & ~_idle(ranked)].sort_values("ra", ascending=False, kind="stable")
    figures = [", ".join(f"{name.upper()} {_percent(line[name])}" for name in ("acc", "asr", "ra")) for _, line in below.iterrows()]
    names = [f"{markdown(name)} ({words})" for name, words in zip(below["defense"], figures, strict=True)]
    more = [f"{len(names) - 4} more"] * (len(names) > 4)
    *first, last = dict.fromkeys(map(markdown, below["track"])) or [""]
    where = f"s {', '.join(first)} and {last}" if first else f" {last}"
    return (
        f"{len(below) or 'None'} of {len(ranked)} entries (a defense and its scope) {'take' if len(below) > 1 else 'takes'} the "
        f"mean attack success rate (ASR) below {100 * IMPLANTED_ASR:g} %"
        + (f": {', '.join(names[:4] + more)}, in the track{where}." if names else ".")
    )


def finding(rows: pd.DataFrame) -> list[str]:
    """A matrix in three sentences, over all tracks: which defenses lower ASR, whether they beat training from scratch on the clean
    budget, and what choosing with the test set would add. Markdown."""
    if not stats.tracks(rows):
        return ["No defense was run: the matrix shows its attacked models."]
    found = [board.assign(track=track) for track, _, board in stats.judged_boards(rows) if len(board)]
    if not found:
        return [words.NOTHING]
    boards = pd.concat(found, ignore_index=True)
    ran = boards[(boards["role"] == "defense") & (boards["cells_ok"] > 0)]
    if ran.empty:
        return ["No competing defense finished a cell on an implanted scenario."]
    ranked, partial = ran[~_partial(ran)], ran[_partial(ran)]
    if ranked.empty:
        return [_elsewhere(partial)]
    sentences = [_lowered(ranked), *(_matched(line, ranked) for _, line in _telling(boards).iloc[-1:].iterrows())]
    both = ranked.dropna(subset=["ra", "ra_oracle"])
    if len(both):
        sentences.append(
            "Choosing every setting on the test set would raise the mean robust accuracy (RA) of these entries from "
            f"{_percent(both['ra'].mean())} to {_percent(both['ra_oracle'].mean())}; no defender can choose so."
        )
    return [*sentences, *[_elsewhere(partial)] * bool(len(partial))]


def _about(rows: pd.DataFrame, folder: Path) -> str:
    """What a matrix is: data, sizes, seeds, how many scenarios count, and the versions it ran on."""
    manifest = folder / "manifest.json"
    versions = json.loads(manifest.read_text(encoding="utf-8")).get("versions", {}) if manifest.is_file() else {}
    ran, counts = words.setting_words(rows), {name: rows[rows[name] != "none"][name].nunique() for name in ("attack", "backbone")}
    sizes = ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for name, count in counts.items())
    made = [f"{name} {versions[name]}" for name in ("torch", "python") if name in versions]
    seeds = f"seed{'s' if ',' in ran['seed'] else ''} {ran['seed']}"
    return "; ".join([f"{ran['dataset']}, {sizes}", seeds, words.gate_words(rows), *[", ".join(made)] * bool(made)])


def write_front(readme: Path, rows: pd.DataFrame, folder: str, block: str, exhibit: str = "") -> bool:
    """Puts a matrix's picture, :func:`finding` and a line about the matrix between the markers ``<!-- block:begin -->`` and
    ``<!-- block:end -->`` of a page that has them; True when the page changed.

    Args:
        readme: the page. rows: of the matrix. folder: its results, as the page's links name it. block: name of the markers.
        exhibit: name of an exhibit of the matrix whose picture, where it was drawn, is shown beside it.
    """
    place, picture = readme.parent / folder, f"{folder}/plots/leaderboard.png"
    results, title = folder.rpartition("/")[0], exhibit.capitalize()
    beside = {"title": title, "picture": f"{results}/exhibits/{exhibit}.png", "link": f"{results}/EXHIBITS.md#{exhibit}"}
    drawn = bool(exhibit) and (readme.parent / beside["picture"]).is_file()

    def content() -> str:
        return rendered(
            "front.md", name=place.name, folder=folder, sentences=finding(rows), about=_about(rows, place),
            picture=picture if (readme.parent / picture).is_file() else "", exhibit=beside if drawn else None,
            stale=f" {STALE_WORDS}" if stale(place) else "",
        )  # fmt: skip

    return write_block(readme, block, content)


# -- the report ----------------------------------------------------------------------------------------------------------------


def _pairs(rows: pd.DataFrame, track: str) -> str:
    """How many entries differ significantly from training from scratch, in each direction; what so few pairs can show."""
    found = rank_tests.paired(rows, track)
    if found.empty:
        return f"No paired tests: the matrix has no control {stats.SCRATCH}.\n"
    counts = []
    for metric in ("ra", "acc"):
        mine = found[found["metric"] == metric]
        better = mine.loc[mine["p_holm"] < rank_tests.LEVEL, "difference"] > 0
        ahead, behind = int(better.sum()), int((~better).sum())
        counts.append(f"in {metric.upper()}, {ahead} of {len(mine)} entries are better and {behind} worse")
    return (
        f"Compared with {markdown(found['control'].iloc[0])} on the same attacked models (5 %, after Holm; the pairs are not "
        f"independent of each other): {'; '.join(counts)}. {words.paired_words(found)}\n"
    )


def _track(rows: pd.DataFrame, track: str) -> dict[str, Any]:
    """What the template shows of a track."""
    judged = stats.headline(rows, track)
    board = stats.leaderboard(rows, track, judged)
    blind = ((rows["track"] == track) & (rows["reason"] == NOTHING_TO_VALIDATE_ON)).any()
    why, quiet = f" ({NOTHING_TO_VALIDATE_ON})" if blind and judged != "validation" else "", stats.stealthy(rows)
    fewer = 0 < stats.scenarios(quiet)["implanted"].sum() < stats.scenarios(rows)["implanted"].sum()
    return {
        "name": track, "slug": slug(track), "words": words.track_words(track), "summary": summary(rows, track), "judged": judged,
        "selection": f"{judged}{why}", "board": "" if board.empty else leaderboard_markdown(board, track),
        "stealthy": summary(quiet, track) if fewer else "", "stealthy_gate": words.gate_words(quiet),
        "ranks": words.rank_words(rows, track, judged), "pairs": _pairs(rows, track), "given": given_table(rows, track).markdown(),
        "selections": stats.selections(rows, track),
    }  # fmt: skip


def _ran(folder: Path, rows: pd.DataFrame) -> dict[str, str]:
    """What was run, and how far the benchmark searched for every defense alike (from the matrix's copy in the folder)."""
    control = rows["control"].astype(bool)
    ran = {
        **words.setting_words(rows), "track": "; ".join(map(words.track_words, stats.tracks(rows))) or "none",
        "defense": ", ".join(dict.fromkeys(rows.loc[~control, "defense"])) or "none",
        "control": ", ".join(dict.fromkeys(rows.loc[control, "defense"])) or "none", "gate": words.gate_words(rows),
    }  # fmt: skip
    cells = matrix_of(folder).cells if (folder / "matrix.toml").is_file() else ()
    if cells:
        planted = " and ".join(canary.name for canary in cells[0].canaries)
        ran["search"] = f"at most {cells[0].candidates} candidates a defense over all settings of its knob"
        ran["search"] += f", canaries: {planted}" if planted else ""
    return ran


def _glossary(rows: pd.DataFrame) -> dict[str, str]:
    """The terms of the report."""
    rules = "; ".join(words.SELECTION_WORDS[name] for name in stats.selections(rows) if name in words.SELECTION_WORDS)
    chosen = (
        f"how one candidate is chosen along a defense's dial. {rules}. In a track that grants nothing to validate on to a defense "
        "that has a dial, every entry is judged by default."
    )
    return {**words.GLOSSARY, "Selection": chosen, "What the defender was given": words.GIVEN_NOTES}


def write_report(
    folder: Path, rows: pd.DataFrame, title: str, *, files: Sequence[Path] | None = None, description: str = ""
) -> Path:  # fmt: skip
    """Writes ``folder/README.md`` and returns its path. No dates, no seconds: the same rows give the same bytes.

    Args:
        folder: the matrix's results folder. rows: as :func:`benchmark.storage.rows.read` returns them. title: of the matrix.
        files: what the tables and plots verbs wrote (paths below ``folder``); by default, what is in ``tables`` and ``plots``.
        description: a sentence from the matrix file, printed below the title.

    Raises:
        BadInput: the file cannot be written.
    """
    found = files if files is not None else [*folder.glob("tables/*"), *folder.glob("plots/*")]
    have, tracks = {path.relative_to(folder).as_posix() for path in found}, stats.tracks(rows)
    overview = overview_table(rows)

    def links(stem: str) -> str:
        return ", ".join(f"[{end}](tables/{stem}.{end})" for end in ("md", "csv", "tex") if f"tables/{stem}.{end}" in have)

    text = rendered(
        "report.md", title=title, about=description, stale=STALE_WORDS if stale(folder) else "", ran=_ran(folder, rows), files=have,
        links=links, tracks=[_track(rows, track) for track in tracks], plain_words=plain_words(rows),
        overview=overview.markdown() if overview.blocks else "", validity="" if tracks else validity_markdown(rows),
        gate=words.gate_words(rows), resolution=words.resolution_words(rows), figures=_FIGURES, others=_OTHERS,
        glossary=_glossary(rows), problems=problems_markdown(rows),
    )  # fmt: skip
    write_text(folder / "README.md", text)
    return folder / "README.md"
