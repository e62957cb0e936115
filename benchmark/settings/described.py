"""A scenario from its spec: the inverse of :meth:`benchmark.settings.cells.Scenario.spec`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from attacks import ATTACKS
from attacks.base import Plan
from benchmark.data.datasets import DatasetSpec
from benchmark.settings.cells import Scenario
from benchmark.settings.schema import field_types, make
from models import BACKBONES
from models.recipe import Recipe
from models.spec import BadInput, Spec, canonical, lookup

__all__ = ["scenario_of"]

S = TypeVar("S", bound=Spec)


def scenario_of(spec: Mapping[str, Any], backbone_label: str, attack_label: str) -> Scenario:
    """The scenario that ``spec`` describes, of methods of the catalogues, trained end to end.

    Raises:
        BadInput: it is not the spec of one, or one of its methods has another revision or other settings here.
    """
    try:
        attack = spec["attack"]
        scenario = Scenario(
            dataset=_made("data set", [DatasetSpec], spec["dataset"]),
            clean_fraction=float(spec["clean_fraction"]),
            backbone=_made("backbone", BACKBONES, spec["backbone"]),
            backbone_label=backbone_label,
            recipe=_made("recipe", [Recipe], spec["recipe"]),
            attack=None if attack is None else _made("attack", ATTACKS, attack),
            attack_label=attack_label,
            plan=Plan() if attack is None else _made("plan", [Plan], spec["plan"]),
            seed=int(spec["seed"]),
            weights_seed=spec.get("weights_seed"),
        )
        for part, own in scenario.spec().items():
            if canonical(own) != canonical(spec[part]):
                raise BadInput(f"{part}: {_differs(own, spec[part])}")
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"not the settings of a victim: {type(error).__name__}: {error}") from error
    if unknown := sorted(set(spec) - set(scenario.spec())):
        raise BadInput(f"{unknown[0]!r} is not a setting of a victim that is trained end to end")
    return scenario


def _made(kind: str, catalogue: Sequence[type[S]], spec: Mapping[str, Any]) -> S:
    cls = lookup(kind, catalogue, spec["name"])
    known, where = field_types(cls), kind if kind == cls.name else f"{kind} {cls.name}"
    return make(where, cls, {name: value for name, value in spec.items() if name in known})


def _differs(own: Any, there: Any) -> str:
    """The first difference between two specs, in words."""
    if not (isinstance(own, dict) and isinstance(there, dict)):
        return f"{there!r} there, {own!r} here"
    name = next(name for name in sorted(own.keys() | there.keys()) if own.get(name) != there.get(name))
    return f"{name} = {there.get(name)!r} there, {own.get(name)!r} here; it was made with another version of the method"
