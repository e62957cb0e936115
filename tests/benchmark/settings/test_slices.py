"""The order of slices: every cell once, the most telling first."""

from __future__ import annotations

import pytest

from benchmark.run.session import AXES, parse_only
from benchmark.settings.cells import Matrix
from benchmark.settings.load import find_matrix, load_matrix
from benchmark.settings.slices import FIRST, Slice, slices

POST = (
    "fine-tuning", "fine-pruning", "clp", "holder-pruning (pixel)", "holder-pruning (bound)",
    "holder-pruning (poisoned pairs)", "benign-salience", "random-pruning (as clp)", "pruning",
)  # fmt: skip


def taken(matrix: Matrix, only: str) -> set[int]:
    """Positions of the cells that a run with ``--only`` takes."""
    chosen = parse_only(matrix, only)
    return {
        position
        for position, cell in enumerate(matrix.cells)
        if all(AXES[axis](cell) in values for axis, values in chosen.items())
    }


def test_the_order_on_cifar10() -> None:
    matrix = load_matrix(find_matrix("cifar10-fast"))
    order = [part.only(matrix) for part in slices(matrix)]
    first = "attack=badnets|blended|wanet|sig|input-aware"  # in the matrix's order
    post = "|".join(POST)
    assert set(first.removeprefix("attack=").split("|")) == set(FIRST)
    assert order[:15] == [
        *(
            f"seed={seed},{first},defense={defenses}"
            for seed in (0, 1, 2)
            for defenses in ("none", post, "anp")
        ),
        *(f"seed={seed},{first},defense=abl" for seed in (0, 1, 2)),
        *(f"seed={seed},{first},defense=dbd" for seed in (0, 1, 2)),
    ]
    assert order[15].startswith("seed=0,attack=lf|bpp|trojannn|lc|ssba|")
    assert order[15].endswith(",defense=none")
    assert order[24].endswith("defense=training-from-scratch|perfect-filter")
    assert order[-1].startswith("seed=2,attack=badnets|blended|wanet|sig|lf|")
    assert order[-1].endswith("defense=hid without pruning")


@pytest.mark.parametrize("name", ["cifar10-fast", "smoke", "quick"])
def test_every_cell_is_in_one_slice_and_its_filter_takes_no_other(name: str) -> None:
    matrix = load_matrix(find_matrix(name))
    order = slices(matrix)
    assert sorted(position for part in order for position in part.cells) == list(range(len(matrix.cells)))
    assert all(taken(matrix, part.only(matrix)) == set(part.cells) for part in order)
    assert len({part.title for part in order}) == len(order)


def test_what_is_left_of_a_slice_is_a_smaller_filter() -> None:
    matrix = load_matrix(find_matrix("cifar10-fast"))
    whole = slices(matrix)[1]
    left = Slice(whole.title, tuple(position for position in whole.cells if matrix.cells[position].scenario.attack_label == "sig"))
    assert left.only(matrix) == f"seed=0,attack=sig,defense={'|'.join(POST)}"
    assert taken(matrix, left.only(matrix)) == set(left.cells)
