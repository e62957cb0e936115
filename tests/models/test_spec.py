"""Specs: one setting, one text, one seed; and errors that name the nearest right value."""

from __future__ import annotations

import enum
import hashlib
import json
import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import pytest
import torch

from models.spec import BadInput, Ge, Gt, Le, Lt, Share, Spec, canonical, check, derive_seed, digest, generator, lookup, nearest


class Colour(enum.Enum):
    DEEP_RED = 1


@dataclass(frozen=True)
class Inner(Spec):
    name: ClassVar[str] = "inner"
    share: float = 0.5


@dataclass(frozen=True)
class Outer(Spec):
    name: ClassVar[str] = "outer"
    revision: ClassVar[int] = 3
    colour: Colour = Colour.DEEP_RED
    sizes: tuple[int, ...] = (1, 2)
    inner: Inner = Inner()

    def __post_init__(self) -> None:
        check(self, "sizes", len(self.sizes) < 4, "at most three numbers")


@dataclass(frozen=True)
class Ranged(Spec):
    name: ClassVar[str] = "ranged"
    share: Share = 0.5
    rate: Annotated[float, Gt(0), Lt(10_000)] = 1.0
    count: Annotated[int, Ge(2), Le(65_536)] | None = None
    sizes: tuple[Annotated[int, Ge(1)], ...] = (1,)
    mode: Literal["one", "two", "three"] = "one"
    inner: Inner = Inner()


def test_a_spec_is_its_name_revision_and_fields() -> None:
    assert Outer().spec() == {
        "name": "outer",
        "revision": 3,
        "colour": "deep_red",
        "sizes": [1, 2],
        "inner": {"name": "inner", "revision": 1, "share": 0.5},
    }


def test_canonical_text_forgets_the_order_of_keys_and_the_kind_of_sequence() -> None:
    assert canonical({"b": (1, 2), "a": None}) == canonical({"a": None, "b": [1, 2]}) == '{"a":null,"b":[1,2]}'


def test_canonical_refuses_what_json_cannot_say() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical(float("nan"))
    with pytest.raises(TypeError, match="cannot be part of a spec"):
        canonical(torch.ones(1))


def test_digest_and_seed_by_hand() -> None:
    parts = [7, "purpose", {"a": 1}]
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    hexes = hashlib.sha256(text.encode()).hexdigest()
    assert digest(*parts) == hexes
    assert derive_seed(*parts) == int(hexes[:16], 16) // 2
    assert 0 <= derive_seed(*parts) < 2**63


def test_purposes_draw_independently_and_repeatably() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (torch.rand(4, generator=generator(1, purpose)) for purpose in ("a", "a", "b"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_value_out_of_range_is_named() -> None:
    with pytest.raises(BadInput, match=r"outer: sizes = \(1, 2, 3, 4\) is out of range; it must be at most three numbers"):
        Outer(sizes=(1, 2, 3, 4))


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("share", 1.01, "at least 0 and at most 1"),
        ("share", math.nan, "at least 0 and at most 1"),
        ("rate", 0, "more than 0 and less than 10,000"),
        ("rate", 10_000, "more than 0 and less than 10,000"),
        ("count", 1, "at least 2 and at most 65,536, or left out"),
        ("sizes", (3, 0), "numbers, each at least 1"),
        ("mode", "four", "'one', 'two' or 'three'"),
    ],
)
def test_a_setting_outside_the_range_of_its_type_is_named(field: str, value: Any, rule: str) -> None:
    with pytest.raises(BadInput, match=re.escape(f"ranged: {field} = {value!r} is out of range; it must be {rule}") + "$"):
        Ranged(**{field: value})


def test_the_ends_of_a_closed_range_belong_to_it() -> None:
    for given in ({"share": 0}, {"share": 1}, {"rate": 9_999.9}, {"count": 2}, {"count": None}, {"sizes": ()}, {"mode": "two"}):
        Ranged(**given)  # type: ignore[arg-type]


def test_lookup_finds_by_name_and_suggests_the_nearest() -> None:
    assert lookup("thing", (Inner, Outer), "outer") is Outer
    with pytest.raises(BadInput, match=r"unknown thing 'Oter'; did you mean 'outer'\?"):
        lookup("thing", (Inner, Outer), "Oter")
    with pytest.raises(BadInput, match="unknown thing 'zzz'; there are: inner, outer"):
        lookup("thing", (Inner, Outer), "zzz")
    assert nearest("x", []) == "; there are: none"
