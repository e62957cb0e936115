"""The exhibits: one per question that reviewers of pruning defenses asked, answered from stored rows, touching no model.

Each reads one matrix's rows. :data:`EXHIBITS` is the catalogue, in the order of the page; :func:`write_exhibits` writes
``results/EXHIBITS.md`` and, below ``results/exhibits``, a table (Markdown, LaTeX, CSV) and a figure for each. An exhibit whose
matrix has not been run says so, and how to run it. A second run writes the same bytes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from benchmark.analysis.stats import headline, tracks
from benchmark.report.exhibits import answers_axes, answers_boards, answers_training
from benchmark.report.exhibits.evidence import Column, Missing, Shown, Source
from benchmark.report.render import draw
from benchmark.report.style import looks
from benchmark.report.text import bracketed, csv_text, latex, latex_table, markdown, number_text, percent_text, pipe_table, plain
from benchmark.report.words import gate_words, setting_words
from benchmark.settings.load import load_matrix
from benchmark.settings.provenance import STALE_WORDS, stale
from benchmark.storage.files import write_text
from benchmark.storage.rows import Curve, Row, Timing, read
from models.spec import BadInput

__all__ = ["EXHIBITS", "Exhibit", "caption", "command", "source_of", "table_latex", "table_markdown", "write_exhibits"]


@dataclass(frozen=True)
class Exhibit:
    """A question, the matrix whose rows answer it, and how.

    Attributes:
        name: file name and anchor. title: two or three words. question: as a reviewer would ask it.
        matrix: a shipped matrix. show: rows -> what the page shows; raises :class:`benchmark.report.exhibits.evidence.Missing`.
    """

    name: str
    title: str
    question: str
    matrix: str
    show: Callable[[Source], Shown]


EXHIBITS: tuple[Exhibit, ...] = (
    Exhibit("benign", "Benign accuracy", "Why do benign accuracies differ between tables, and what is the poisoning rate?", "quick",
            answers_boards.benign),
    Exhibit("robust-accuracy", "Robust accuracy", "What is robust accuracy?", "quick", answers_boards.robust),
    Exhibit("replaced", "Poison replaces", "Is the poisoned training set D' larger than the clean set D?", "quick",
            answers_boards.replaced),
    Exhibit("validity", "Attack validity", "Are the attacks as strong as in the literature?", "quick", answers_boards.validity),
    Exhibit("validity-cifar10", "Attack validity on CIFAR-10 images", "And on CIFAR-10 images?", "cifar10-small",
            answers_boards.validity),
    Exhibit("attacks", "Newer attacks", "What about newer attacks?", "attacks", answers_boards.validity),
    Exhibit("rate", "Poisoning rate", "From which poisoning rate on is there an attack, and does the rate change what defenses do?",
            "rate", answers_axes.rate),
    Exhibit("performance", "Accuracy kept", "Do defenses remove backdoors without compromising performance?", "quick",
            answers_boards.performance),
    Exhibit("performance-cifar10", "Accuracy kept on CIFAR-10 images", "And on CIFAR-10 images?", "cifar10-small",
            answers_boards.performance),
    Exhibit("selection", "Selection", "Why is a baseline weaker here than in its paper: how was its threshold chosen?", "selection",
            answers_axes.selection),
    Exhibit("canary", "Canaries", "Can a defender choose the setting without seeing the attack, by planting a backdoor of its own?",
            "quick", answers_axes.canary),
    Exhibit("threshold", "Threshold", "How much hangs on the threshold, which a person may have read off a density by eye?",
            "threshold", answers_axes.threshold),
    Exhibit("alpha", "Alpha", "Does the exponent alpha matter, or is it the Lipschitz quotient (alpha = 1) in other words?",
            "alpha", answers_axes.alpha),
    Exhibit("scope", "Scope", "Were baselines limited to the head too, and how fast are they then?", "scope", answers_axes.scope),
    Exhibit("pruned", "Units pruned", "How many neurons were pruned, and which semi-supervised method was used?", "quick",
            answers_boards.pruned),
    Exhibit("budget", "Clean budget", "How many clean images does a defense need, and what are they worth without it?", "budget",
            answers_axes.budget),
    Exhibit("extractor", "Extractor", "A clean extractor is an extra tool: what comes from it, and what from the defense?",
            "extractor", answers_axes.extractor),
    Exhibit("controls", "Plain classifiers", "Does a nearest-mean classifier on the extractor make the head pointless?", "quick",
            answers_boards.controls),
    Exhibit("detectors", "Samples singled out", "Do defenses that split the training set find the poison?", "quick",
            answers_boards.detectors),
    Exhibit("adaptive", "Adaptive attackers", "What does an attacker do who knows the defense?", "adaptive", answers_axes.adaptive),
    Exhibit("natural", "Natural backdoors", "What do defenses do to a clean model, which has backdoors by nature?", "natural",
            answers_axes.natural),
    Exhibit("size", "Larger images", "What about larger images and more classes?", "size", answers_boards.size),
    Exhibit("recipe", "Recipe", "Is a short recipe a fair stand-in for the literature's hundred epochs?", "recipe",
            answers_training.training),
    Exhibit("recipe-small", "Recipe, small", "And for a narrow network on few images, where a hundred epochs can be had on a CPU?",
            "recipe-small", answers_training.training),
    Exhibit("precision", "Precision", "Does the arithmetic that makes training fast change what comes out?", "precision",
            answers_training.training),
    Exhibit("precision-small", "Precision, small", "And for a narrow network, on a CPU?", "precision-small",
            answers_training.training),
    Exhibit("significance", "Significance", "Are differences significant?", "quick", answers_boards.significance),
)  # fmt: skip
"""Every exhibit, in the order of the page."""


def command(exhibit: Exhibit) -> str:
    """What makes the rows an exhibit reads."""
    return "make benchmark" if exhibit.matrix == "quick" else f"make benchmark MATRIX={exhibit.matrix}"


def source_of(folder: Path) -> Source | None:
    """A matrix's stored results, or None where it was not run.

    Raises:
        BadInput: a file is there but is not what it should be.
    """
    if not (folder / "rows.csv").is_file():
        return None
    manifest = folder / "manifest.json"
    try:
        told = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    except ValueError as error:
        raise BadInput(f"{manifest}: cannot be read: {error}") from error
    rows, curves, timings = (
        read(folder / "rows.csv", Row), read(folder / "curves.csv", Curve), read(folder / "timings.csv", Timing)
    )  # fmt: skip
    return Source(folder.name, rows, curves, timings, load_matrix(folder / "matrix.toml"), told)


# -- tables --------------------------------------------------------------------------------------------------------------------

_MISSING = "\N{EN DASH}"


def _shown(line: pd.Series, column: Column, escape: Callable[[object], str], small: Callable[[str], str]) -> str:
    value = line[column.name]
    if column.kind == "text":
        return escape(value)
    if column.kind in ("interval", "difference"):
        return bracketed(line, column.name, signed=column.kind == "difference", small=small)
    found = float(value)
    if math.isnan(found):
        return _MISSING
    if column.kind in ("share", "points"):
        return percent_text(found, signed=column.kind == "points")
    return f"{found:.0f}" if column.kind == "count" else number_text(found)


def _filled(shown: Shown) -> tuple[Column, ...]:
    """The columns in which something stands, text first."""

    def says(column: Column) -> bool:
        values = shown.frame[column.name]
        return bool((values != "").any() if column.kind == "text" else values.notna().any())

    return tuple(sorted(filter(says, shown.columns), key=lambda column: column.kind != "text"))


def table_markdown(shown: Shown) -> str:
    """An exhibit's table; percent, differences in percentage points."""
    columns = _filled(shown)
    lines = [[_shown(line, column, markdown, str) for column in columns] for _, line in shown.frame.iterrows()]
    texts = sum(column.kind == "text" for column in columns)
    return pipe_table([markdown(column.head) for column in columns], lines, left=max(texts, 1))


def table_latex(shown: Shown, words: str, label: str) -> str:
    """An exhibit's table for a paper (booktabs)."""
    columns = _filled(shown)

    def small(text: str) -> str:
        return rf"{{\scriptsize {text}}}"

    body = [
        " & ".join(_shown(line, column, latex, small).replace(_MISSING, "--") for column in columns) + r" \\"
        for _, line in shown.frame.iterrows()
    ]
    kinds = "".join("l" if column.kind == "text" else "r" for column in columns)
    return latex_table([column.head for column in columns], kinds, body, words, label)


def _once(text: str) -> str:
    """Rates once, where the label of an attack says it already: "badnets 1 % (1 %)" is "badnets 1 %"."""
    return re.sub(r" ([0-9.]+ %) \(\1\)", r" \1", text)


def caption(exhibit: Exhibit, source: Source, shown: Shown) -> str:
    """What a table needs to stand alone: data, backbones, attacks and rates, seeds, selection, tracks, n implanted."""
    words = setting_words(source.rows)
    said = "; ".join(f"{name}: {_once(text)}" for name, text in words.items())
    chosen = "; ".join(f"{plain(track)}: {headline(source.rows, track)}" for track in tracks(source.rows))
    return (
        f"{exhibit.title}. Percent; {plain(shown.about)}. {said}; track and the selection it is judged by: {chosen}; "
        f"{gate_words(source.rows)}. Poisoned samples replace clean ones."
    )


# -- the page ------------------------------------------------------------------------------------------------------------------

_INTRO = (
    "# Exhibits\n\n"
    "Questions that reviewers of pruning defenses asked, each answered from stored rows. Answers are computed by rule, for the "
    "claim or against it; *told apart* means that a 95 % bootstrap interval over seeds, of paired differences where two things are "
    "compared, "
    "leaves out 0. With three seeds such intervals are rough and rather too narrow, they speak of seeds alone, and many "
    "comparisons stand "
    "on one page: a single one at the edge of its interval is no finding. `make paper` redraws this page; the command below "
    "each exhibit makes its rows.\n"
)
_FOLDER = "exhibits"


def write_exhibits(results: Path) -> list[Path]:
    """Writes ``EXHIBITS.md`` and the folder ``exhibits`` below ``results``; returns every path written, the page last.

    Raises:
        BadInput: stored rows cannot be read, or a file cannot be written.
    """
    place = results / _FOLDER
    written: list[Path] = []
    index, parts = [], []
    sources: dict[str, Source | None] = {}
    for exhibit in EXHIBITS:
        if exhibit.matrix not in sources:
            sources[exhibit.matrix] = source_of(results / exhibit.matrix)
        source = sources[exhibit.matrix]
        head = f"## {exhibit.title}\n\n<a id=\"{exhibit.name}\"></a>\n\n**{exhibit.question}**\n\n"
        if source is None:
            index.append((exhibit, f"not run yet: `{command(exhibit)}`"))
            parts.append(f"{head}Not run yet: `{command(exhibit)}`\n")
            continue
        rows = f"[{exhibit.matrix}]({exhibit.matrix}/rows.csv)"
        try:
            shown = exhibit.show(source)
        except Missing as reason:
            words = f"The rows of {rows} cannot answer this: {markdown(reason)}."
            index.append((exhibit, words))
            parts.append(f"{head}{words}\n\nRows: `{command(exhibit)}`\n")
            continue
        text = caption(exhibit, source, shown)
        old = f"{STALE_WORDS}\n\n" if stale(results / exhibit.matrix) else ""
        stem = place / exhibit.name
        files = {".md": f"# {exhibit.title}\n\n{table_markdown(shown)}\n{markdown(text)}\n", ".csv": csv_text(shown.frame),
                 ".tex": table_latex(shown, text, f"exhibit-{exhibit.name}")}  # fmt: skip
        for suffix, content in files.items():
            write_text(stem.with_suffix(suffix), content)
            written.append(stem.with_suffix(suffix))
        picture = ""
        if shown.figure is not None:
            title = f"{exhibit.title}: {setting_words(source.rows)['dataset']}"
            written += draw(shown.figure, title, stem, looks(source.rows))
            picture = f"![{exhibit.title}]({_FOLDER}/{exhibit.name}.png)\n\n"
        links = ", ".join(f"[{words}]({_FOLDER}/{exhibit.name}.{words})" for words in
                          (*(suffix[1:] for suffix in files), *(("svg",) if picture else ())))  # fmt: skip
        parts.append(
            f"{head}{old}{shown.answer}\n\n{picture}<details><summary>Table</summary>\n\n{table_markdown(shown)}\n</details>\n\n"
            f"{markdown(text)}\n\nRows: {rows}, `{command(exhibit)}`. Files: {links}.\n"
        )
        index.append((exhibit, "answered"))
    contents = pipe_table(["Question", "Exhibit", "Rows"], [
        [exhibit.question, f"[{exhibit.title}](#{exhibit.name})", words if words != "answered" else f"`{exhibit.matrix}`"]
        for exhibit, words in index
    ], left=3)  # fmt: skip
    _only(place, written)
    page = results / "EXHIBITS.md"
    write_text(page, "\n".join([_INTRO, contents, *parts]))
    return [*written, page]


def _only(folder: Path, written: Sequence[Path]) -> None:
    """Removes the files of exhibits that are gone."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_file() and path not in written:
            path.unlink()
