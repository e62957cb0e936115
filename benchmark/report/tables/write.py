"""Rows -> ``tables/`` of a matrix, as Markdown for reading, LaTeX (booktabs) for papers and CSV (shares in [0, 1], unrounded).

A second run writes the same bytes. Seconds depend on the machine; they are in ``cost.md`` and ``cost.csv`` only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from benchmark.analysis import published, rank_tests, stats
from benchmark.report import words
from benchmark.report.tables import boards, details
from benchmark.report.text import csv_text, markdown, plain, slug
from benchmark.storage.files import write_text

__all__ = ["write_tables"]

_NOTES = f"{words.defined()} Poisoned samples replace clean ones."
_PROTOCOL_NOTES = (
    "Percent: mean ± sample standard deviation over all seeds. Frozen: the triggered test set was made once, on the undefended "
    "model. Recraft: made again on the defended one, as an attacker who has it can. Every other table shows *frozen*."
)
_DETECTOR_NOTES = (
    "Training samples that an entry took for poisoned (its isolated set), under the default selection; the set does not depend on "
    "the selection. Precision: share of the set that is poisoned. Recall: share of the poisoned samples that are in the set. "
    "AUROC: of the order in which the entry suspects samples, or of the set itself where it gives no order; 50 is chance. "
    "Percent, mean ± sample standard deviation over all seeds, implanted or not. Base rate: share of the training set that is "
    "poisoned, which is the precision of a random choice. An empty set has no precision; such seeds are not in its mean."
)
_PAIRED_NOTES = (
    "A pair: one attacked model (scenario and seed) of an implanted scenario that both the defense and the control finished, under "
    "the selection the track is judged by. Difference: defense minus control in percentage points, mean over scenarios of means "
    "over seeds; above 0 the defense is better. p: two-sided Wilcoxon signed-rank test over the pairs. Holm p: adjusted for all "
    "comparisons of this table. A missing cell is in no pair, so compare the counts before the figures. A block: all pairs of "
    "one data set and seed. They share the clean budget and, on each backbone, the benign twin and the network that the control "
    "trained, whatever the attack, so they are not independent. Therefore brackets resample whole blocks (95 % bootstrap; "
    "resampling the seeds of each scenario separately, as the other tables do, would treat them as independent), and the test is "
    "repeated over the blocks' means. The p over pairs treats pairs as independent: it shows how consistent a direction is over "
    "these attacked models, and is too small as evidence about other seeds. Neither is evidence about other attacks or data."
)
_PUBLISHED_NOTES = (
    "Percent. Published: the lowest and the highest figure that the sources print for the same attack and method (one figure where "
    "one source does), at the same poisoning rate where there is one, else at the next lower and higher one; on the same "
    "architecture where there is one, else on all. Here: mean ± sample standard deviation over all finished seeds, implanted or "
    "not. Defenses without a printed figure, entries that edit the head alone and victims on given features have no line. Nothing "
    "is judged by these figures: publications differ from each other by more than 10 points of ASR in half of the cells that two "
    "of them share, and by more than 50 in a quarter."
)
_GAP_NOTES = (
    "Means over implanted scenarios. RA gap: RA of the oracle minus RA of the rule; it is never below 0. ASR leak: ASR of the rule "
    "minus ASR under the leaky rule, which chooses by the test ASR. 95 % bootstrap intervals, paired by attacked model."
)
_COST_NOTES = (
    "Wall seconds and peak memory of the defense stage on the machine that ran it; standard epochs do not depend on the machine "
    "(1 = forward and backward over the training set)."
)
_WITHOUT_PAIRS = f"There are none: they need implanted scenarios, competing defenses and the control {stats.SCRATCH}."
_VALIDITY = [*stats.WORLD, "rate", "realised_rate", "label_mode", "target", "acc_benign", "asr_benign", "acc_undefended",
             "asr_undefended", "ra_undefended", "effect", "acc_loss", "acc_loss_se", "implanted", "gate"]  # fmt: skip


@dataclass
class _Tables:
    """The tables of one matrix.

    Attributes:
        rows, curves, timings: as :func:`benchmark.storage.rows.read` returns them. folder: ``tables`` beside them.
        title: of the matrix. written: paths so far.
    """

    rows: pd.DataFrame
    timings: pd.DataFrame
    folder: Path
    title: str
    written: list[Path] = field(default_factory=list)

    def put(self, name: str, text: str) -> None:
        """Writes a file."""
        write_text(self.folder / name, text)
        self.written.append(self.folder / name)

    def page(self, name: str, title: str, *parts: str) -> None:
        """Writes a Markdown page of paragraphs and tables."""
        body = "\n\n".join(part.rstrip("\n") for part in parts if part)
        self.put(f"{name}.md", f"# {markdown(self.title)}: {markdown(title)}\n\n{body}\n")

    def leaderboard(self, rows: pd.DataFrame, track: str, selection: str, name: str, about: str) -> None:
        """The leaderboard of a track under a selection; ``about``: the end of its title."""
        board = stats.leaderboard(rows, track, selection)
        whole = rows is self.rows
        title = self.title if whole else f"{self.title}, without attacks that cost ACC"
        about_it = words.caption(rows, title, track, selection)
        tested = whole and len(board) and selection not in stats.HINDSIGHT
        tests = markdown(words.rank_words(rows, track, selection)) if tested else ""
        shown = boards.leaderboard_markdown(board, track)
        self.page(name, f"leaderboard, {track}, {about}", shown, tests, markdown(about_it), markdown(_NOTES))
        self.put(f"{name}.csv", boards.leaderboard_csv(board, rows, track, selection))
        if whole:
            notes = f"{about_it} {_NOTES} The lower block holds the reference and the controls, which are not ranked."
            table = f"% {words.NOTHING}\n" if board.empty else boards.leaderboard_table(board, track).latex(notes, name)
            self.put(f"{name}.tex", table)

    def selection(self, track: str, selection: str) -> None:
        """Everything about a track under one selection."""
        name, about = f"{slug(track)}-{selection}", f"{track}, {selection}"
        self.leaderboard(self.rows, track, selection, f"leaderboard-{name}", selection)
        intro = (
            "ACC / ASR / RA in percent: mean ± sample standard deviation over all seeds. Columns marked *not implanted* or "
            "*adversarial* are in no mean and no rank."
        )
        self.page(f"attacks-{name}", f"every attack, {about}", intro, details.attacks_markdown(self.rows, track, selection),
                  markdown(words.caption(self.rows, self.title, track, selection)), markdown(_NOTES))  # fmt: skip
        protocols = details.protocols_markdown(self.rows, track, selection)
        if protocols:
            self.page(f"protocols-{name}", f"triggers that need the attacked model, {about}", _PROTOCOL_NOTES, protocols)

    def track(self, track: str) -> None:
        """Everything about a track."""
        rows, judged, name = self.rows, stats.headline(self.rows, track), slug(track)
        for selection in stats.selections(rows, track):
            self.selection(track, selection)
        quiet = stats.stealthy(rows)
        if 0 < stats.scenarios(quiet)["implanted"].sum() < stats.scenarios(rows)["implanted"].sum():
            self.leaderboard(quiet, track, judged, f"leaderboard-{name}-{judged}-stealthy", f"{judged}, stealthy attacks only")
        about = words.caption(rows, f"{plain(self.title)}: what the defender was given", track, judged)
        table = boards.given_table(rows, track)
        self.page(f"given-{name}", f"what the defender was given, {track}", table.markdown(), markdown(about),
                  markdown(words.GIVEN_NOTES))  # fmt: skip
        self.put(f"given-{name}.csv", boards.given_csv(rows, track))
        self.put(f"given-{name}.tex", table.latex(f"{about} {words.GIVEN_NOTES}", f"given-{name}"))
        self.paired(track, judged)
        isolated = stats.detectors(rows, track)
        if len(isolated):
            self.page(f"detectors-{name}", f"isolated samples, {track}", markdown(_DETECTOR_NOTES),
                      details.detectors_markdown(isolated, track), f"{words.gate_words(rows)}.")  # fmt: skip
            self.put(f"detectors-{name}.csv", csv_text(isolated.assign(track=track)[["track", *isolated.columns]]))

    def paired(self, track: str, judged: str) -> None:
        """The paired tests of a track."""
        found, name, title = rank_tests.paired(self.rows, track), f"paired-{slug(track)}", f"paired tests, {track}"
        if found.empty:
            self.page(name, title, _WITHOUT_PAIRS)
            return
        selection = words.SELECTION_WORDS.get(judged, judged)
        about = f"Control: {found['control'].iloc[0]}. Selection: {selection}. {words.gate_words(self.rows)}."
        self.page(name, title, markdown(about), details.paired_markdown(found), words.paired_words(found), _PAIRED_NOTES)
        self.put(f"{name}.csv", csv_text(found.assign(track=track)[["track", *found.columns]]))

    def matrix(self) -> None:
        """What does not belong to one track."""
        rows = self.rows
        self.put("attack-validity.csv", csv_text(rows[rows["attack"] != stats.NO_ATTACK].drop_duplicates(stats.WORLD)[_VALIDITY]))
        gate = f"The undefended models. Gate: {words.GATE_WORDS}. Only implanted scenarios enter a rank or a mean."
        self.page("attack-validity", "did the attacks work?", f"{gate} {words.gate_words(rows)}.",
                  details.validity_markdown(rows))  # fmt: skip
        self.page("selection-gap", "what choosing with the test set is worth", _GAP_NOTES, details.gaps_markdown(rows))
        gaps = [found.assign(track=track)[["track", *found.columns]] for track in stats.tracks(rows)
                if len(found := stats.selection_gaps(rows, track))]  # fmt: skip
        if gaps:
            self.put("selection-gap.csv", csv_text(pd.concat(gaps)))
        self.put("missing.csv", csv_text(stats.problems(rows)))
        self.put("cost.csv", csv_text(stats.timing_summary(rows, self.timings)))
        self.page("missing", "refused and failed cells", "None of these enters a mean.", details.problems_markdown(rows))
        self.page("cost", "cost", _COST_NOTES, details.cost_markdown(rows, self.timings))

    def published(self) -> None:
        """Printed figures beside measured ones, where there are some."""
        found = [(track, one) for track in stats.tracks(self.rows) for one in published.comparisons(self.rows, track)]
        if not found:
            return
        sources = dict.fromkeys(figure.source for _, one in found for figure in one.printed)
        self.page(
            "published", "published beside measured", _PUBLISHED_NOTES, details.published_markdown(found), "## The protocols",
            details.protocol_table(self.rows, self.folder.parent), "## Sources",
            "One line per figure: [published.csv](published.csv).", "".join(f"- {markdown(source)}\n" for source in sources),
        )  # fmt: skip
        self.put("published.csv", details.published_csv(found))


def write_tables(rows: pd.DataFrame, curves: pd.DataFrame, timings: pd.DataFrame, folder: Path, title: str) -> list[Path]:
    """Writes every table of a matrix below ``folder/tables`` and returns their paths, in reading order.

    Args:
        rows, curves, timings: as :func:`benchmark.storage.rows.read` returns them. ``curves`` is not tabulated: it is drawn.
        folder: the matrix's results folder. title: of the matrix, for captions.

    Raises:
        BadInput: the folder cannot be written.
    """
    tables = _Tables(rows, timings, folder / "tables", title)
    for track in stats.tracks(rows):
        tables.track(track)
    tables.matrix()
    tables.published()
    return tables.written
