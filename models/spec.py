"""What a settings file can name: a method *is* its settings.

A :class:`Spec` is a frozen dataclass with a ``name`` and a ``revision``. Its canonical JSON form keys the store and seeds every
draw, so two runs with the same settings are the same run, whoever executes them.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

__all__ = ["BadInput", "Spec", "canonical", "check", "derive_seed", "digest", "generator", "lookup", "nearest", "uniforms"]


class BadInput(ValueError):
    """Something a person wrote or supplied is wrong. The message names the value, where it stands and the nearest right one.

    The command line prints the message alone (no traceback) and exits with status 2.
    """


def _plain(value: Any) -> Any:
    """``value`` as JSON knows it: enums by name, tuples as lists, specs by their own form."""
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
    raise TypeError(f"{value!r} cannot stand in a spec: use numbers, strings, enums, tuples and other specs")


class Spec:
    """Base of everything nameable: subclasses are frozen dataclasses with a class-level ``name``.

    ``revision`` is raised whenever the numbers a method produces change; it is part of every store key, so stale results are
    recomputed rather than trusted.
    """

    name: ClassVar[str]
    revision: ClassVar[int] = 1

    def spec(self) -> dict[str, Any]:
        """Name, revision and every field, as plain JSON values."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {"name": self.name, "revision": self.revision, **{f.name: _plain(getattr(self, f.name)) for f in fields}}


def check(owner: Spec, field: str, good: bool, rule: str) -> None:
    """Range check for ``__post_init__``.

    Raises:
        BadInput: naming the method, the field, the value and the rule, when ``good`` is false.
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
    """A seed in [0, 2**63) from settings and a purpose: adding or reordering cells never changes anybody's draw."""
    return int(digest(*parts)[:16], 16) >> 1


def generator(*parts: Any) -> torch.Generator:
    """A CPU generator seeded by :func:`derive_seed`. Draws are made on the CPU so that every device sees the same ones."""
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
