"""Plain English: expressions that readers had to decode are banned where people read.

``python tests/test_words.py`` lists every place.
"""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("models", "attacks", "defenses", "benchmark")
BANNED = {
    r"singl(?:es?|ed|ing) out": "isolates; its isolated set",
    r"(?:leaves?|left|leaving) behind": "exports; the exported poisoned set",
    r"(?:tell|tells|told|telling)(?: \w+){0,3} apart": "significantly different; distinguishes",
    r"stands(?! (?:for|out|still))": "is cached; is in; is",
    r"(?:already|still) stand": "is cached",
    r"stand (?:beside|side by side|in|on|above|below|here|there)": "are beside; are in",
    r"is at it": "locked by another process",
    r"running: none": "say what runs",
    r"by none": "no defense matches",
    r"said": "reported; named; written",
    r"told": "given; reported; notified",
    r"(?:typed|written|counted|kept) by hand": "written; computed",
    r"of the house|walls": "layers; contracts",
    r"met (?:what|with|by|on|in|undefended)": "given; run on",
    r"(?:un)?borne out": "confirmed",
    r"mend(?:s|ed)?": "repairs; corrects",
    r"goes (?:before|without)": "has priority",
    r"as it was (?:before|left)": "unchanged",
}
"""Regular expressions of whole words, and what to write instead."""


def words_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of what people read of a file: of Python sources the comments and strings, of any other file every line."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, " ".join(node.value.split())


def pages() -> Iterator[Path]:
    """Everything written for people: sources, settings, templates, documentation, committed reports and tables."""
    for package in PACKAGES:
        yield from sorted(path for path in (ROOT / package).rglob("*") if path.suffix in (".py", ".toml", ".md", ".j2", ".html"))
    yield from sorted((ROOT / "results").rglob("*.md"))
    yield from (ROOT / "README.md", ROOT / "Makefile", ROOT / "CITATION.cff", ROOT / ".github" / "CONTRIBUTING.md")


@functools.cache
def read() -> list[tuple[str, int, str]]:
    """(file, line, text) of everything; read once."""
    return [(path.relative_to(ROOT).as_posix(), line, text) for path in pages() for line, text in words_of(path)]


def found(pattern: str) -> list[str]:
    """``file:line: text`` of every place."""
    whole = re.compile(rf"(?<![\w-])(?:{pattern})(?![\w-])", re.IGNORECASE)
    return [
        f"{file}:{line}: ...{text[max(0, at.start() - 50) : at.end() + 50]}..."
        for file, line, text in read()
        for at in whole.finditer(text)
    ]


@pytest.mark.parametrize("pattern", BANNED)
def test_no_page_says_this_any_more(pattern: str) -> None:
    hits = found(pattern)
    assert not hits, "\n".join([f"write instead: {BANNED[pattern]}", *hits[:20]])


if __name__ == "__main__":
    import sys

    for hits in map(found, BANNED):
        sys.stdout.write("".join(f"{hit}\n" for hit in hits))
