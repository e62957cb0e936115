"""The tables of a matrix file, checked strictly, and one clear message for each mistake in one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

from models.spec import BadInput, Spec, nearest

try:
    from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
except ImportError as error:
    raise BadInput("pydantic is not installed here, and matrix files are checked by it: pip install pydantic") from error

from benchmark.rules.selection import TAU
from benchmark.settings.cells import CANDIDATES

__all__ = ["DatasetTable", "MatrixTable", "checked", "fields_of", "make", "parsed"]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class DatasetTable(_Table):
    """``[dataset]``: ``clean_fraction`` of the training images is held out of the attacker's set as the clean budget."""

    source: str = "digits"
    clean_fraction: float = Field(default=0.05, gt=0, lt=1)
    train_limit: int | None = None
    test_limit: int | None = None
    size: int | None = None


class MatrixTable(_Table):
    """The file's top level. Method tables stay open here and are checked against their own dataclass."""

    title: str
    about: str = ""
    seeds: list[int] = Field(min_length=1, max_length=1000)
    tau: float = Field(default=TAU, ge=0, le=1)
    candidates: int = Field(default=CANDIDATES, ge=1, le=10_000)
    canary: bool = False
    plugins: list[str] = []
    dataset: DatasetTable = DatasetTable()
    recipe: dict[str, Any] = {}
    backbone: list[dict[str, Any]] = Field(min_length=1)
    extractor: list[dict[str, Any]] = []
    attack: list[dict[str, Any]] = Field(min_length=1)
    defense: list[dict[str, Any]] = Field(min_length=1)


def parsed(raw: dict[str, Any]) -> MatrixTable:
    """The checked tables of a matrix file.

    Raises:
        BadInput: an unknown key, a missing one, a wrong type or a number out of range.
    """
    try:
        return MatrixTable.model_validate(raw)
    except ValidationError as error:
        raise BadInput(_first(error, MatrixTable)) from error


def _first(error: ValidationError, model: type[BaseModel]) -> str:
    """The first complaint of pydantic, as one line that names the place, the value and the nearest right key."""
    # A misspelt key is also a missing one: the misspelling is what the person wants to hear about.
    problem = next((p for p in error.errors() if p["type"] == "extra_forbidden"), error.errors()[0])
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        owner = DatasetTable if problem["loc"][0] == "dataset" and len(problem["loc"]) > 1 else model
        return f"unknown key {place!r}{nearest(str(problem['loc'][-1]), owner.model_fields)}"
    given = "" if problem["type"] == "missing" else f" (got {problem['input']!r})"
    return f"{place}: {problem['msg'].lower()}{given}"


S = TypeVar("S", bound=Spec)


def fields_of(cls: type[Spec]) -> dict[str, Any]:
    """A method's settings and their types."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]


def make(kind: str, cls: type[S], settings: Mapping[str, Any]) -> S:
    """An instance of a method's dataclass from a table; unknown keys and wrong types are named."""
    return cls(**checked(kind, cls, settings))


def checked(kind: str, cls: type[Spec], settings: Mapping[str, Any]) -> dict[str, Any]:
    fields = fields_of(cls)
    values = {}
    for key, value in settings.items():
        if key not in fields:
            raise BadInput(f"{kind} {cls.name}: unknown key {key!r}{nearest(key, fields)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise BadInput(f"{kind} {cls.name}: {key} = {value!r} is not a finite number")
        try:
            # Strict, so that "3" is not 3; a TOML list may become a tuple, which strictness would refuse.
            values[key] = TypeAdapter(fields[key]).validate_python(value, strict=not isinstance(value, list))
        except ValidationError as error:
            raise BadInput(f"{kind} {cls.name}: {key} = {value!r}: {error.errors()[0]['msg'].lower()}") from error
    return values
