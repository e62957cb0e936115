"""Settings: every method is a dataclass of its settings.

A :class:`Spec` is a frozen dataclass with a ``name`` and a ``revision``. Its canonical JSON form keys the store and seeds every
draw, so runs with the same settings give the same results.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import hashlib
import json
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

__all__ = [
    "BadInput", "BatchSize", "EpochCount", "Ge", "Gt", "Le", "LearningRate", "Lt", "PositiveShare", "Share", "Spec", "canonical",
    "check", "derive_seed", "digest", "generator", "lookup", "nearest", "uniforms",
]  # fmt: skip


class BadInput(ValueError):
    """A setting or a file given by the user is wrong. The message names the value, its place and the nearest right one.

    The command line prints the message alone (no traceback) and exits with status 2.
    """


def _plain(value: Any) -> Any:
    """``value`` as JSON: enums by name, tuples as lists, specs by their own form."""
    if isinstance(value, Spec):
        return value.spec()
    if isinstance(value, enum.Enum):
        return value.name.lower()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{value!r} cannot be part of a spec: use numbers, strings, enums, tuples and other specs")


class Bound(NamedTuple):
    """A limit of a setting's range, given with its type: ``lr: Annotated[float, Gt(0), Le(1)] = 0.1``."""

    words: str
    holds: Callable[[Any, Any], bool]
    limit: float


Ge = functools.partial(Bound, "at least", operator.ge)
Gt = functools.partial(Bound, "more than", operator.gt)
Le = functools.partial(Bound, "at most", operator.le)
Lt = functools.partial(Bound, "less than", operator.lt)

Share = Annotated[float, Ge(0), Le(1)]
PositiveShare = Annotated[float, Gt(0), Le(1)]
LearningRate = Annotated[float, Ge(0), Le(10)]
EpochCount = Annotated[int, Ge(0), Le(10_000)]
BatchSize = Annotated[int, Ge(2), Le(65_536)]


class Spec:
    """Base of everything nameable: subclasses are frozen dataclasses with a class-level ``name``.

    A setting's type gives its range: one of a ``Literal``'s values, or within the bounds of an ``Annotated``. Subclasses that check
    more do so in ``__post_init__``, after the base's.

    ``revision`` is raised whenever the numbers a method produces change; it is part of every store key, so stale results are
    recomputed rather than trusted.

    Raises:
        BadInput: a setting is out of range.
    """

    name: ClassVar[str]
    revision: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for field, hint in _settings(type(self)).items():  # type: ignore[arg-type]  # a class is hashable
            rule = _broken(hint, getattr(self, field))
            check(self, field, rule is None, str(rule))

    def spec(self) -> dict[str, Any]:
        """Name, revision and every field, as plain JSON values."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {"name": self.name, "revision": self.revision, **{f.name: _plain(getattr(self, f.name)) for f in fields}}


@functools.cache
def _settings(cls: type[Spec]) -> dict[str, Any]:
    """A class's settings and their types, with bounds."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]


def _broken(hint: Any, value: Any) -> str | None:
    """What the type ``hint`` wants ``value`` to be; None where it is within its range."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal and value not in parts:
        *others, last = map(repr, parts)
        return f"{', '.join(others)} or {last}" if others else last
    if origin is Annotated:
        bounds = [part for part in parts if isinstance(part, Bound)]
        if not all(bound.holds(value, bound.limit) for bound in bounds):
            return " and ".join(f"{bound.words} {bound.limit:,}" for bound in bounds)
    if origin in (Union, UnionType) and value is not None:
        rule = next((rule for part in parts if (rule := _broken(part, value))), None)
        return rule and f"{rule}, or left out"
    if origin is tuple:
        rule = next((rule for item in value if (rule := _broken(parts[0], item))), None)
        return rule and f"numbers, each {rule}"
    return None


def check(owner: Spec, field: str, good: bool, rule: str) -> None:
    """A check for ``__post_init__`` that a type cannot express.

    Args:
        owner: whose setting it is.
        field: the setting's name.
        good: whether its value is allowed.
        rule: what it must be, in words.

    Raises:
        BadInput: ``good`` is false; the message names the method, the setting, its value and the rule.
    """
    if not good:
        raise BadInput(f"{owner.name}: {field} = {getattr(owner, field)!r} is out of range; it must be {rule}")


def canonical(value: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, no NaN. Equal values give equal text."""
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(*parts: Any) -> str:
    """sha256 (hex) of the canonical JSON of ``parts``."""
    return hashlib.sha256(canonical(list(parts)).encode()).hexdigest()


def derive_seed(*parts: Any) -> int:
    """A seed in [0, 2**63) from settings and a purpose; it does not depend on the other cells of a run or their order."""
    return int(digest(*parts)[:16], 16) >> 1


def generator(*parts: Any) -> torch.Generator:
    """A CPU generator seeded by :func:`derive_seed`. Draws are made on the CPU, so they are the same on every device."""
    source = torch.Generator()
    source.manual_seed(derive_seed(*parts))
    return source


def _mix(state: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64: products wrap as unsigned ones do, and the masks make the shifts logical."""
    state = (state ^ ((state >> 30) & 0x3FFFFFFFF)) * (0xBF58476D1CE4E5B9 - 2**64)
    state = (state ^ ((state >> 27) & 0x1FFFFFFFFF)) * (0x94D049BB133111EB - 2**64)
    return state ^ ((state >> 31) & 0x1FFFFFFFF)


def uniforms(key: int, index: Tensor, count: int) -> Tensor:
    """``count`` uniforms in [0, 1) per sample, float32 (N, count), looked up rather than drawn.

    The value depends on (key, index, position) alone: not on the batch, its order, the device or the number of workers, and no
    table as large as the data set is kept. SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) used as a counter-based generator; the
    upper 24 bits, so that every device holds the same floats.

    Args:
        key: in [0, 2**63), as :func:`derive_seed` gives it.
        index: int64 (N,), which samples.
    """
    position = torch.arange(count, device=index.device) * (0x9E3779B97F4A7C15 - 2**64)
    bits = _mix(_mix(index + key)[:, None] + position)
    return ((bits >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def nearest(wrong: str, right: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` when something close exists, otherwise the list of what exists."""
    names = list(right)
    close = difflib.get_close_matches(wrong.lower(), names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(names) or 'none'}"


S = TypeVar("S", bound=Spec)


def lookup(kind: str, catalogue: Sequence[type[S]], name: str) -> type[S]:
    """The class of that name in a catalogue (an ordered tuple whose order is the table order).

    Raises:
        BadInput: unknown name, with the nearest right one.
    """
    for entry in catalogue:
        if entry.name == name:
            return entry
    raise BadInput(f"unknown {kind} {name!r}{nearest(name, [entry.name for entry in catalogue])}")
