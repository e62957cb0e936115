"""The fault harness: it counts what is lost, sees what is wrong, and every fault leaves the rows as they are."""

from __future__ import annotations

import io
import re
import signal
from pathlib import Path

import pytest
from rich.console import Console

from benchmark.proof import harness, torture
from benchmark.proof.faults import HEADER, Difference, Outcome, compare, csv_text, draw, merged, read_outcomes
from benchmark.proof.harness import Draws, Moment, Torture
from benchmark.proof.processes import ROOT
from benchmark.proof.strikes import FAULTS
from benchmark.settings.load import find_matrix, load_matrix
from models.spec import BadInput

# -- counting ------------------------------------------------------------------------------------------------------------------


def write(folder: Path, rows: list[str], curves: list[str], timings: list[str]) -> Path:
    """Three files of lines without commas' worth of detail: ``cell,selection,value`` and ``cell,value``."""
    folder.mkdir(parents=True)
    (folder / "rows.csv").write_text("".join(f"{line}\n" for line in ["cell,selection,acc", *rows]))
    (folder / "curves.csv").write_text("".join(f"{line}\n" for line in ["cell,acc", *curves]))
    (folder / "timings.csv").write_text("".join(f"{line}\n" for line in ["cell,seconds", *timings]))
    return folder


ROWS = ["a,default,1", "a,oracle,2", "b,default,3"]
CURVES = ["a,1", "a,1", "a,2", "b,3"]
TIMINGS = ["a,0.1", "b,0.2"]


@pytest.mark.parametrize(
    ("rows", "curves", "timings", "expected"),
    [
        (ROWS, CURVES, TIMINGS, Difference()),
        (ROWS, CURVES, ["a,9", "b,8"], Difference()),  # seconds are never the same twice
        (ROWS[1:], CURVES, TIMINGS, Difference(lost=1)),
        ([*ROWS, ROWS[0]], CURVES, TIMINGS, Difference(doubled=1)),
        ([*ROWS, "c,default,1"], CURVES, TIMINGS, Difference(doubled=1)),
        (["a,default,9", *ROWS[1:]], CURVES, TIMINGS, Difference(changed=1)),
        (ROWS, [*CURVES, "a,2"], TIMINGS, Difference(doubled=1)),
        (ROWS, CURVES[:-1], TIMINGS, Difference(lost=1)),
        (ROWS, ["a,1", "a,5", "a,2", "b,3"], TIMINGS, Difference(changed=1)),
        (ROWS, CURVES, TIMINGS[1:], Difference(lost=1)),
        (ROWS[::-1], CURVES, TIMINGS, Difference(changed=1)),  # the same lines, other bytes
        ([], [], [], Difference(lost=9)),
    ],
)
def test_what_is_counted(tmp_path: Path, rows: list[str], curves: list[str], timings: list[str], expected: Difference) -> None:
    right = write(tmp_path / "right", ROWS, CURVES, TIMINGS)
    mine = write(tmp_path / "mine", rows, curves, timings)
    assert compare(right, mine) == expected
    part = compare(right, mine, part=True)
    assert (part.lost, part.doubled) == (0, expected.doubled)


def test_files_that_are_not_there_have_lost_every_line(tmp_path: Path) -> None:
    right = write(tmp_path / "right", ROWS, CURVES, TIMINGS)
    assert compare(right, tmp_path / "none") == Difference(lost=9)
    assert compare(right, tmp_path / "none", part=True) == Difference()


def test_counting_against_a_slow_twin(tmp_path: Path) -> None:
    """Lines of one key are told apart by their number; the twin strikes them off one by one."""
    source = Draws("twin")
    for number in range(40):
        kinds = [[f"{'ab'[source.whole(0, 1)]},{'xy'[source.whole(0, 1)]},{source.whole(0, 1)}" for _ in range(5)] for _ in "12"]
        right, mine = (write(tmp_path / f"{number}-{name}", lines, [], []) for name, lines in zip(("r", "m"), kinds, strict=True))
        lost = doubled = changed = 0
        for key in {line.rpartition(",")[0] for lines in kinds for line in lines}:
            mine_of, theirs = ([line for line in lines if line.rpartition(",")[0] == key] for lines in kinds)
            while mine_of or theirs:
                if not theirs:
                    lost += 1
                elif not mine_of:
                    doubled += 1
                elif mine_of[0] != theirs[0]:
                    changed += 1
                mine_of, theirs = mine_of[1:], theirs[1:]
        if not lost + doubled + changed:
            changed = int(kinds[0] != kinds[1])
        assert compare(right, mine) == Difference(lost, doubled, changed)


# -- the page ------------------------------------------------------------------------------------------------------------------


def outcome(fault: str = "Ctrl-C", number: int = 0, **odd: object) -> Outcome:
    values = {"executor": "local", "kills": 2, "lost": 0, "doubled": 0, "changed": 0, "note": "status 130", "command": "torture"}
    return Outcome(fault=fault, round=number, **values | odd)  # type: ignore[arg-type]


def test_outcomes_of_several_invocations_are_merged(tmp_path: Path) -> None:
    old = [outcome(number=1), outcome(), outcome(executor="ray", command="torture --executor ray")]
    path = tmp_path / "faults.csv"
    path.write_text(csv_text(old))
    assert read_outcomes(path) == old
    together = merged(read_outcomes(path), [outcome(lost=1), outcome("kill -9 of a worker")], list(FAULTS))
    assert [(one.fault, one.executor, one.round, one.lost) for one in together] == [
        ("kill -9 of a worker", "local", 0, 0), ("Ctrl-C", "local", 0, 1), ("Ctrl-C", "local", 1, 0), ("Ctrl-C", "ray", 0, 0),
    ]  # fmt: skip
    assert merged(together, together, list(FAULTS)) == together
    assert read_outcomes(tmp_path / "none.csv") == []


@pytest.mark.parametrize("text", ["a,b\n1,2\n", csv_text([outcome()]).replace(",2,", ",two,"), "executor\nlocal,more\n"])
def test_a_file_of_somebody_elses_is_named_with_its_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "faults.csv").write_text(text)
    with pytest.raises(BadInput, match=r"faults\.csv, line 2"):
        read_outcomes(tmp_path / "faults.csv")


def test_the_page_is_drawn_from_outcomes_alone() -> None:
    evil = "<script>|x\x1b[2J"
    page = draw([outcome(kills=3), outcome(number=1, lost=4, note=evil), outcome(executor="ray", changed=5, kills=7)])
    assert "**In 3 run-throughs, disturbed 12 times (0 of them by kill -9): 4 rows lost, 0 doubled, 5 changed.**" in page
    assert "disturbed 11 times (9 of them by kill -9)" in draw([outcome("kill -9 of a worker", kills=9), outcome(kills=2)])
    assert re.search(r"^\| Ctrl-C \| local \| 2 \| 5 \| 4 \| 0 \| 0 \|", page, re.MULTILINE)
    assert re.search(r"^\| Ctrl-C \| ray \| 1 \| 7 \| 0 \| 0 \| 5 \|", page, re.MULTILINE)
    assert "<script>" not in page
    assert "\x1b" not in page
    assert page.count("\ntorture\n") == 1
    widths = {line.replace(r"\|", "").count("|") for line in page.splitlines() if line.startswith("|")}
    assert widths == {len(HEADER) + 1}


def test_what_is_committed_is_what_is_drawn() -> None:
    folder = ROOT / "results" / "proof"
    outcomes = read_outcomes(folder / "faults.csv")
    assert outcomes
    assert (folder / "FAULTS.md").read_text() == draw(merged([], outcomes, list(FAULTS)))
    assert {one.fault for one in outcomes} <= set(FAULTS)


# -- its own parts -------------------------------------------------------------------------------------------------------------


def test_draws_repeat_and_differ_by_purpose() -> None:
    def some(*purpose: object) -> list[int]:
        source = Draws(*purpose)
        return [source.whole(1, 6) for _ in range(20)]

    assert some(0, "a", 1) == some(0, "a", 1) != some(0, "a", 2)
    assert set(some(0)) == {1, 2, 3, 4, 5, 6}
    assert 0 <= Draws(0).share() < 1


def test_kills_are_divided_and_other_faults_have_their_rounds() -> None:
    plan = {name: (strikes, rounds) for name, strikes, rounds in torture._plan(list(FAULTS), 100, 2)}
    assert set(plan) == set(FAULTS)
    assert sum(strikes for strikes, rounds in plan.values() if rounds < 0) == 100
    assert {rounds for _, rounds in plan.values()} == {-1, 2}
    assert list(torture._plan(["kill -9 of a worker"], 7, 2)) == [("kill -9 of a worker", 7, -1)]


def test_its_matrix_has_every_kind_of_stage() -> None:
    matrix = load_matrix(find_matrix("torture"))
    assert {cell.scenario.frozen is None for cell in matrix.cells} == {True, False}
    assert any(one.reads == "poisoned" for cell in matrix.cells for one in cell.extractors)
    assert any(cell.scenario.attack and cell.scenario.attack.poisons_batches for cell in matrix.cells)
    assert len({cell.defense_label for cell in matrix.cells}) > 4
    assert len({cell.scenario.seed for cell in matrix.cells}) == 2


def test_what_is_told_names_no_place(tmp_path: Path) -> None:
    tortured = Torture(Path("m.toml"), tmp_path)
    line = f"note: damaged store entry victim/0123456789ab (x): set aside in {tmp_path}/run/cache/damaged/0123456789ab-x1y2z3w4, so"
    assert tortured.plain(line) == "note: damaged store entry victim/# (x): set aside in #, so"
    assert tortured.plain("1; 2") == "1, 2"
    text = "Traceback (most recent call last):\n  File x\n    f()\nKeyError: 'a'\nnothing\nnote: a\nerror: \x1b[31mb\n"
    assert list(harness.telling(text)) == ["Traceback: KeyError: 'a'", "note: a", "error: b"]


# -- a command that does wrong -------------------------------------------------------------------------------------------------

WRONG = '''
"""Writes what it is told to, or waits to be killed first."""
import sys, time
from pathlib import Path

options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
cache, results = Path(options["--cache"]), Path(options["--results"]) / "m"
results.mkdir(parents=True, exist_ok=True)
(cache / "store" / "locks").mkdir(parents=True, exist_ok=True)
here = Path(__file__).parent
rows = ["a,default,1", "b,default,2"]
if (here / "reference").exists() and not (cache / "been-here").exists():
    (cache / "been-here").touch()
    (cache / "store" / "locks" / "victim-aa").touch()
    print("note: waiting", flush=True)
    time.sleep(3600)
if (here / "reference").exists():
    rows = {rows}
(here / "reference").touch()
(cache / "store" / "locks" / "victim-aa").unlink(missing_ok=True)
(results / "rows.csv").write_text("\\n".join(["cell,selection,acc", *rows, ""]))
for name in ("curves", "timings"):
    (results / f"{{name}}.csv").write_text("cell,x\\na,1\\nb,2\\n")
'''


@pytest.fixture
def wrong(tmp_path: Path, request: pytest.FixtureRequest) -> Torture:
    (tmp_path / "program.py").write_text(WRONG.format(rows=request.param))
    (tmp_path / "work").mkdir()
    tortured = Torture(Path("m.toml"), tmp_path / "work", program=str(tmp_path / "program.py"), fresh=True)
    tortured.begin()
    tortured.seconds = 0.0
    return tortured


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ("rows", (0, 0, 0)), ("rows[:1]", (1, 0, 0)), ("rows + rows[:1]", (0, 1, 0)), ("[rows[0], 'b,default,3']", (0, 0, 1)),
        ("rows[::-1]", (0, 0, 1)),
    ],
    indirect=["wrong"],
)  # fmt: skip
def test_a_command_that_loses_doubles_or_changes_rows_is_found_out(
    wrong: Torture, expected: tuple[int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Torture, "moment", lambda self, draws: Moment("stage", 1, 0.0))
    console = Console(file=io.StringIO(), width=300)
    wrong.kept.rename(tmp_path / "aside")
    monkeypatch.setattr(wrong, "begin", lambda: (tmp_path / "aside").rename(wrong.kept))
    found = list(torture._all(wrong, ["kill -9 of all its processes"], 1, 0, "the command", tmp_path / "out", console))
    assert [(one.kills, one.lost, one.doubled, one.changed) for one in found] == [(1, *expected)]
    assert found[0].note == "note: waiting"
    assert read_outcomes(tmp_path / "out" / "faults.csv") == found
    assert f"{expected[0]} rows lost, {expected[1]} doubled, {expected[2]} changed" in (tmp_path / "out" / "FAULTS.md").read_text()


@pytest.mark.parametrize("wrong", ["rows"], indirect=True)
def test_a_command_that_does_not_finish_is_issued_again(wrong: Torture, monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = [2, 2, 0]
    monkeypatch.setattr(wrong, "issue", lambda arguments: None)
    monkeypatch.setattr(wrong, "end", lambda command: statuses.pop(0))
    assert wrong.finish() == 0
    assert statuses == []
    assert [note.startswith("undisturbed, it ended with status 2") for note in wrong.notes] == [True, True]


@pytest.mark.parametrize("wrong", ["rows"], indirect=True)
def test_a_command_that_hangs_is_killed_and_told_of(wrong: Torture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "LIMIT", 1.0)
    monkeypatch.setattr(harness, "ISSUES", 1)
    wrong.here.mkdir()
    assert wrong.finish() == -signal.SIGKILL
    assert "hung" in wrong.notes[0]


# -- the real one --------------------------------------------------------------------------------------------------------------

TINY = """
title = "tiny"
seeds = [0, 1]
dataset = { source = "digits", clean_fraction = 0.2, train_limit = 100, test_limit = 40 }
recipe = { epochs = 1 }
backbone = [{ name = "vgg11-bn", width = 2, hidden = 8 }]
[[attack]]
name = "badnets"
[[extractor]]
name = "supervised"
label = "clean, with labels"
[[defense]]
name = "none"
[[defense]]
name = "nearest-class-mean"
extractors = ["clean, with labels"]
[[defense]]
name = "clp"
tracks = ["model"]
"""
PLAIN = '''
"""The real command, which draws nothing: pictures cost more than all the rest."""
import benchmark.present
from benchmark.__main__ import main
benchmark.present.present = lambda *arguments, **options: None
if __name__ == "__main__":
    main()
'''


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Torture:
    folder = tmp_path_factory.mktemp("torture")
    (folder / "tiny.toml").write_text(TINY)
    (folder / "plain.py").write_text(PLAIN)
    tortured = Torture(folder / "tiny.toml", folder, processes=1, program=str(folder / "plain.py"))
    tortured.begin()
    tortured.seconds = 3.0
    return tortured


FEW = ("kill -9 of all its processes", "Ctrl-C", "flipped bits in store entries", "files of store entries deleted",
       "a flipped bit in the results, then a part of the matrix", "a training that diverges")  # fmt: skip
"""Faults of the test run. `make torture` has them all, many times."""


@pytest.mark.slow
@pytest.mark.parametrize("fault", FEW)
def test_nothing_is_lost(tiny: Torture, fault: str) -> None:
    one = torture.run_through(tiny, fault, 0, 2, "")
    assert (one.lost, one.doubled, one.changed) == (0, 0, 0), one.note
    assert "Traceback" not in one.note
    assert "hung" not in one.note
    assert "lived on" not in one.note
    assert "stayed behind" not in one.note
    assert str(tiny.work) not in one.note
