"""The tables of a matrix file as strict models, and one clear message for each mistake in one.

The benchmark reads the keys that the models list. Every other key of a backbone, attack, defense or extractor table is a field of
that method's own dataclass, and :func:`make` checks it against the field's type.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_type_hints

from models.spec import BadInput, Spec, nearest

try:
    from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
except ImportError as error:
    raise BadInput("pydantic is not installed here, and matrix files are checked by it: pip install pydantic") from error

from benchmark.rules.selection import TAU
from benchmark.settings.cells import CANDIDATES
from benchmark.settings.presets import PUBLISHED

__all__ = [
    "AttackTable", "BackboneTable", "DatasetTable", "DefenseTable", "ExtractorTable", "FrozenTable", "MatrixTable", "RecipeTable",
    "checked", "field_types", "make", "parse",
]  # fmt: skip

S = TypeVar("S", bound=Spec)


class _Table(BaseModel):
    """A table whose keys are all listed."""

    model_config = ConfigDict(extra="forbid", strict=True)


class _Open(_Table):
    """A table that also holds settings of a dataclass."""

    model_config = ConfigDict(extra="allow", strict=True)

    @property
    def settings(self) -> dict[str, Any]:
        """The keys that are not listed, in the order of the file."""
        return dict(self.model_extra or {})


class _Method(_Open):
    """An entry of ``[[backbone]]``, ``[[attack]]``, ``[[defense]]`` or ``[[extractor]]``."""

    name: str
    label: str | None = None

    @property
    def called(self) -> str:
        """The label, or the method's name where there is none."""
        return self.label or self.name


class DatasetTable(_Table):
    """``[dataset]``: ``clean_fraction`` of the training images is held out of the attacker's set as the clean budget."""

    source: str = "digits"
    clean_fraction: float = Field(default=0.05, gt=0, lt=1)
    train_limit: int | None = None
    test_limit: int | None = None
    size: int | None = None


class RecipeTable(_Open):
    """``[recipe]``, or the ``recipe`` of a backbone or an attack: fields of the recipe, over those of its ``preset``."""

    preset: str | None = None


class FrozenTable(_Table):
    """``frozen`` of a backbone: only its head is trained, on the features of ``extractor`` (a label of this matrix)."""

    extractor: str
    epochs: int | None = None
    lr: float | None = None
    batch: int | None = None


class BackboneTable(_Method):
    """``[[backbone]]``; ``attacks``: labels or names of the attacks it is trained under, None = all."""

    recipe: RecipeTable = RecipeTable()
    attacks: list[str] | None = None
    frozen: FrozenTable | None = None


class ExtractorTable(_Method):
    """``[[extractor]]``."""


class AttackTable(_Method):
    """``[[attack]]``, with the fields of its :class:`attacks.base.Plan` beside its own; ``rates``: one attack for each rate."""

    recipe: RecipeTable = RecipeTable()
    rates: list[float] | None = Field(default=None, min_length=1)


class DefenseTable(_Method):
    """``[[defense]]``.

    ``tracks`` may be left out by controls only. ``extractors``, ``backbones`` and ``attacks`` are labels of this matrix, ``seeds``
    are some of its seeds; None = no extractor, and all of the others.
    ``budgets`` are shares of the training set, None = the whole clean budget.
    """

    preset: str = PUBLISHED
    tracks: list[str] | None = None
    scopes: list[str] = ["whole"]
    extractors: list[str] | None = None
    backbones: list[str] | None = None
    attacks: list[str] | None = None
    seeds: list[int] | None = None
    budgets: list[float] | None = None


class MatrixTable(_Table):
    """The file's top level."""

    title: str
    about: str = ""
    seeds: list[int] = Field(min_length=1, max_length=1000)
    tau: float = Field(default=TAU, ge=0, le=1)
    candidates: int = Field(default=CANDIDATES, ge=1, le=10_000)
    curve_images: int | None = Field(default=None, ge=1)
    canary: bool = False
    plugins: list[str] = []
    dataset: DatasetTable = DatasetTable()
    recipe: RecipeTable = RecipeTable()
    backbone: list[BackboneTable] = Field(min_length=1)
    extractor: list[ExtractorTable] = []
    attack: list[AttackTable] = Field(min_length=1)
    defense: list[DefenseTable] = Field(min_length=1)


_CLOSED: dict[str, type[_Table]] = {"dataset": DatasetTable, "frozen": FrozenTable}
"""Tables below the top level that hold listed keys only."""


def parse(raw: dict[str, Any]) -> MatrixTable:
    """The checked tables of a matrix file.

    Raises:
        BadInput: an unknown or missing key, a wrong type or a number out of range; names the table, the value and the nearest right
            key.
    """
    try:
        return MatrixTable.model_validate(raw)
    except ValidationError as error:
        raise BadInput(_first(error, raw)) from error


def _first(error: ValidationError, raw: dict[str, Any]) -> str:
    """The first mistake that pydantic found, in one line."""
    # A misspelt key is often a missing one as well, and its spelling is what is wrong.
    problem = next((p for p in error.errors() if p["type"] == "extra_forbidden"), error.errors()[0])
    parts: list[str] = []
    for part in problem["loc"]:
        if isinstance(part, int):
            parts[-1] += f" number {part + 1}"
        else:
            parts.append(part)
    if len(parts) > 1 and isinstance(problem["loc"][1], int):
        kind, number = str(problem["loc"][0]), problem["loc"][1]
        name = raw[kind][number].get("name")
        parts[0] = f"{kind} {name}" if isinstance(name, str) else parts[0]
    place, key = "".join(f"{part}: " for part in parts[:-1]), parts[-1]
    if problem["type"] == "extra_forbidden":
        owner = _CLOSED.get(str(problem["loc"][-2]), MatrixTable) if len(parts) > 1 else MatrixTable
        return f"{place}unknown key {key!r}{nearest(key, owner.model_fields)}"
    if problem["type"] == "missing":
        return f"{place}{key!r} is missing"
    return f"{place}{key} = {problem['input']!r} {_rule(problem)}"


def _rule(problem: Mapping[str, Any]) -> str:
    """What a value should be, in pydantic's words: ``should be a number``."""
    if problem["type"] == "model_type":
        return "should be a table"
    before, should, rest = str(problem["msg"]).partition("should ")
    return f"{should}{rest}".replace(" valid ", " ") if should else f"is wrong: {before.lower()}"


def field_types(cls: type[Spec]) -> dict[str, Any]:
    """The settings of a method and their types."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]


def make(where: str, cls: type[S], settings: Mapping[str, Any], beside: Iterable[str] = ()) -> S:
    """An instance of a method's dataclass from the settings of its table.

    Args:
        where: the table, as the message names it, e.g. ``attack sig``.
        cls: the method.
        settings: its fields, as in the file.
        beside: the table's other keys, which a misspelt one may have meant.

    Raises:
        BadInput: an unknown key, a wrong type, a number that is not finite or out of range.
    """
    return cls(**checked(where, cls, settings, beside))


def checked(where: str, cls: type[Spec], settings: Mapping[str, Any], beside: Iterable[str] = ()) -> dict[str, Any]:
    """``settings`` with the types of the fields of ``cls``. Arguments and errors as in :func:`make`."""
    fields = field_types(cls)
    values = {}
    for key, value in settings.items():
        if key not in fields:
            raise BadInput(f"{where}: unknown key {key!r}{nearest(key, [*fields, *beside])}")
        if isinstance(value, float) and not math.isfinite(value):
            raise BadInput(f"{where}: {key} = {value!r} is not a finite number")
        try:
            # Strict, so that "3" is not 3. A TOML list may become a tuple, which strictness would refuse.
            values[key] = TypeAdapter(fields[key]).validate_python(value, strict=not isinstance(value, list))
        except ValidationError as error:
            raise BadInput(f"{where}: {key} = {value!r} {_rule(error.errors()[0])}") from error
    return values
