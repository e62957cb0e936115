"""Results kept by table."""

import pandas as pd

from benchmark.analysis.memo import KEPT, remembered


def test_each_table_and_value_is_computed_once_and_every_caller_gets_a_copy() -> None:
    seen: list[tuple[int, str]] = []

    @remembered
    def board(rows: pd.DataFrame, name: str) -> pd.DataFrame:
        seen.append((len(rows), name))
        return rows.assign(name=name)

    one, two = pd.DataFrame({"a": [1]}), pd.DataFrame({"a": [1, 2]})
    first = board(one, "x")
    first["a"] = 99
    assert [board(one, "x").loc[0, "a"], board(one, "y").loc[0, "name"], len(board(two, "x"))] == [1, "y", 2]
    assert seen == [(1, "x"), (1, "y"), (2, "x")]


def test_old_tables_are_let_go() -> None:
    seen: list[int] = []

    @remembered
    def board(rows: pd.DataFrame) -> pd.DataFrame:
        seen.append(len(rows))
        return rows

    tables = [pd.DataFrame({"a": range(number)}) for number in range(KEPT + 1)]
    for table in (*tables, tables[0], tables[-1]):
        board(table)
    assert seen == [*range(KEPT + 1), 0]
