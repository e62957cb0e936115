"""From the checked tables of a matrix to its scenarios and cells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from attacks import ATTACKS
from attacks.base import Attack, Plan, Power
from benchmark.data.datasets import DatasetSpec
from benchmark.rules.canary import canaries_for
from benchmark.rules.tracks import CONTROL, Track, track_named
from benchmark.settings.cells import Cell, Frozen, Scenario
from benchmark.settings.plugins import Found
from benchmark.settings.presets import preset_settings, recipes
from benchmark.settings.schema import (
    AttackTable,
    BackboneTable,
    DefenseTable,
    ExtractorTable,
    FrozenTable,
    MatrixTable,
    RecipeTable,
    checked,
    field_types,
    make,
)
from defenses import DEFENSES
from defenses.base import Defense, Knowledge, Scope
from models import BACKBONES
from models.backbone import Backbone
from models.extractors import EXTRACTORS, Extractor
from models.recipe import Recipe
from models.spec import BadInput, Spec, lookup, nearest

__all__ = ["expand"]

MAX_LABEL = 200


class _Host(NamedTuple):
    """A backbone of the matrix: what is attacked."""

    label: str
    backbone: Backbone
    recipe: RecipeTable
    frozen: Frozen | None
    attacks: list[str]


class _Attacked(NamedTuple):
    """An attack of the matrix at one rate. ``called``: its label or name, shared by all its rates."""

    label: str
    called: str
    attack: Attack
    plan: Plan
    recipe: RecipeTable


class _Entrant(NamedTuple):
    """A defense of the matrix on one extractor and one clean budget; ``meets``: the scenarios that its table does not leave out."""

    label: str
    defense: Defense
    preset: str
    tracks: list[Track]
    scopes: list[Scope]
    extractor: str
    budget: float | None
    meets: Callable[[Scenario], bool]


def expand(table: MatrixTable, found: Found) -> tuple[tuple[Scenario, ...], tuple[Cell, ...]]:
    """The scenarios and cells of a matrix, in table order.

    Args:
        table: the checked file.
        found: methods of the user's own files.

    Raises:
        BadInput: an unknown name or setting, a value out of range, or a combination that cannot be run.
    """
    extractors = _extractors(table.extractor, found)
    hosts = _backbones(table, extractors, found)
    attacks = [one for entry in table.attack for one in _attacks(entry, found)]
    _printable("attack", [one.label for one in attacks])
    labels = {"backbones": [host.label for host in hosts], "attacks": [one.label for one in attacks]}
    entrants = [one for entry in table.defense for one in _entrants(entry, table, labels, extractors, found)]
    _printable("defense", [entrant.label for entrant in entrants])
    scenarios = tuple(_scenarios(table, hosts, attacks))
    cells = _cross(table, scenarios, entrants, extractors, [one.attack for one in attacks])
    _one_trusted(cells)
    return scenarios, cells


def _printable(kind: str, labels: Sequence[str]) -> None:
    """Labels are shown in rows, tables, pages, file names and terminals.

    Raises:
        BadInput: two are the same, or one is not a line of text, or a spreadsheet would take it for a formula.
    """
    for label in labels:
        if not label.strip() or len(label) > MAX_LABEL or not label.isprintable():
            raise BadInput(f"{kind} label {label[:MAX_LABEL]!r}: it should be one line of 1 to {MAX_LABEL} printable characters")
        if label[0] in "=+-@":
            raise BadInput(f"{kind} label {label!r}: a spreadsheet would take it for a formula; begin it with something else")
        if labels.count(label) > 1:
            raise BadInput(f"two {kind}s are called {label!r}: give one of them a label")


def _known(where: str, key: str, asked: Iterable[str], labels: Sequence[str]) -> None:
    """Checks that all of ``asked`` are ``labels`` of this matrix.

    Raises:
        BadInput: one is not, with the nearest that is.
    """
    for label in asked:
        if label not in labels:
            raise BadInput(f"{where}: {key}: {label!r} is not in this matrix{nearest(label, labels)}")


def _extractors(entries: Sequence[ExtractorTable], found: Found) -> dict[str, Extractor]:
    _printable("extractor", [entry.called for entry in entries])
    made: dict[str, Extractor] = {}
    for entry in entries:
        cls: type[Extractor] = lookup("extractor", [*EXTRACTORS, *found[Extractor]], entry.name)
        made[entry.called] = make(f"extractor {entry.name}", cls, entry.settings, ExtractorTable.model_fields)
    return made


def _backbones(table: MatrixTable, extractors: Mapping[str, Extractor], found: Found) -> list[_Host]:
    every = [entry.called for entry in table.attack]
    hosts = []
    for entry in table.backbone:
        where = f"backbone {entry.name}"
        attacks = every if entry.attacks is None else entry.attacks
        _known(where, "attacks", attacks, every)
        frozen = _frozen(entry.frozen, extractors, where) if entry.frozen else None
        cls: type[Backbone] = lookup("backbone", [*BACKBONES, *found[Backbone]], entry.name)
        backbone = make(where, cls, entry.settings, BackboneTable.model_fields)
        tail = f" on {frozen.label}" if frozen else ""
        label = entry.label or f"{entry.name}-w{backbone.width}{tail}"
        hosts.append(_Host(label, backbone, entry.recipe, frozen, attacks))
    _printable("backbone", [host.label for host in hosts])
    return hosts


def _frozen(table: FrozenTable, extractors: Mapping[str, Extractor], where: str) -> Frozen:
    if table.extractor not in extractors:
        raise BadInput(f"{where}: frozen: no extractor {table.extractor!r} in this matrix{nearest(table.extractor, extractors)}")
    head = table.model_dump(exclude={"extractor"}, exclude_none=True)
    return Frozen(extractors[table.extractor], table.extractor, **head)


def _attacks(entry: AttackTable, found: Found) -> list[_Attacked]:
    """An attack at each of its rates."""
    where = f"attack {entry.name}"
    cls: type[Attack] = lookup("attack", [*ATTACKS, *found[Attack]], entry.name)
    settings = _with_pairs(entry.settings, "base_settings", "base", where, cls, ATTACKS)
    plan_keys = field_types(Plan)
    planned = {key: settings.pop(key) for key in plan_keys if key in settings}
    if entry.rates is not None and "rate" in planned:
        raise BadInput(f"{where}: give either rate or rates")
    attack = make(where, cls, settings, [*AttackTable.model_fields, *plan_keys])
    rates = [planned.get("rate", Plan.rate)] if entry.rates is None else entry.rates
    made = []
    for rate in rates:
        plan = make(where, Plan, {**planned, "rate": rate})
        mode = " all-to-all" if plan.label_mode == "all-to-all" else ""
        shown_rate = f" {100 * plan.rate:g} %" if len(rates) > 1 else ""
        made.append(_Attacked(f"{entry.label or entry.name + mode}{shown_rate}", entry.called, attack, plan, entry.recipe))
    return made


def _with_pairs(
    settings: dict[str, Any], key: str, whose: str, where: str, cls: type[Spec], catalogue: Sequence[type[Spec]]
) -> dict[str, Any]:
    """``settings`` with the settings of another method in ``key`` as (field, value) pairs, their types checked.

    Args:
        settings: of the method; not changed.
        key: the setting that holds another method's settings, as a table or as pairs.
        whose: the setting that names the other method.
        where: the table, as the message names it.
        cls: the method.
        catalogue: where the other method is looked up.

    Raises:
        BadInput: a value is of the wrong type. An unknown field is left to the method itself.
    """
    given = settings.get(key)
    if isinstance(given, dict):
        given = [list(pair) for pair in given.items()]
        settings = {**settings, key: given}
    pairs = [pair for pair in given if isinstance(pair, list) and len(pair) == 2] if isinstance(given, list) else []
    named = settings.get(whose, getattr(cls, whose, None))
    for other in catalogue:
        if other.name == named:
            known = {name: value for name, value in pairs if isinstance(name, str) and name in field_types(other)}
            checked(f"{where}: {key} of {other.name}", other, known)
    return settings


def _entrants(
    entry: DefenseTable, table: MatrixTable, labels: Mapping[str, list[str]], extractors: Mapping[str, Extractor], found: Found
) -> list[_Entrant]:
    """A defense on each of its extractors and clean budgets. ``labels``: of the matrix's backbones and attacks."""
    where = f"defense {entry.name}"
    meets = _meets(entry, table, labels, where)
    cls: type[Defense] = lookup("defense", [*DEFENSES, *found[Defense]], entry.name)
    tracks = _tracks(entry, cls, where)
    given = _with_pairs(entry.settings, "like_settings", "like", where, cls, DEFENSES)
    preset, settings = preset_settings(cls, entry.preset, given)
    defense = make(where, cls, settings, DefenseTable.model_fields)
    names = _given(defense, entry.extractors, extractors, tracks, where)
    scopes = _scopes(entry.scopes, defense, where)
    budgets = _budgets(entry.budgets, table.dataset.clean_fraction, tracks, where)
    return [
        _Entrant(f"{entry.called}{f' on {name}' if name else ''}{words}", defense, preset, tracks, scopes, name, budget, meets)
        for name in names
        for budget, words in budgets
    ]


def _meets(entry: DefenseTable, table: MatrixTable, labels: Mapping[str, list[str]], where: str) -> Callable[[Scenario], bool]:
    """Whether a defense is run on a scenario.

    Raises:
        BadInput: a backbone, an attack or a seed that is not in the matrix.
    """
    backbones = labels["backbones"] if entry.backbones is None else entry.backbones
    attacks = labels["attacks"] if entry.attacks is None else entry.attacks
    seeds = table.seeds if entry.seeds is None else entry.seeds
    _known(where, "backbones", backbones, labels["backbones"])
    _known(where, "attacks", attacks, labels["attacks"])
    for seed in seeds:
        if seed not in table.seeds:
            raise BadInput(f"{where}: seeds: {seed} is not among the matrix's seeds {table.seeds}")
    return lambda one: one.backbone_label in backbones and one.attack_label in attacks and one.seed in seeds


def _tracks(entry: DefenseTable, cls: type[Defense], where: str) -> list[Track]:
    names = ["control"] if entry.tracks is None and cls.control else entry.tracks
    if not names:
        raise BadInput(f"{where}: 'tracks' is missing: name what it is granted, e.g. tracks = [\"model+clean\"]")
    tracks = [track_named(name) for name in names]
    if CONTROL in tracks and not cls.control:
        raise BadInput(f"{where}: the track 'control' grants what no defender has and is for controls only")
    return tracks


def _scopes(names: Sequence[str], defense: Defense, where: str) -> list[Scope]:
    known = [scope.value for scope in Scope]
    for name in names:
        if name not in known:
            raise BadInput(f"{where}: unknown scope {name!r}{nearest(name, known)}")
        if Scope(name) not in defense.scopes:
            raise BadInput(f"{where}: it has no scope {name!r}; it has {', '.join(scope.value for scope in defense.scopes)}")
    return [Scope(name) for name in names]


def _given(
    defense: Defense, named: list[str] | None, extractors: Mapping[str, Extractor], tracks: Sequence[Track], where: str
) -> list[str]:
    """Labels of the extractors a defense runs on; one empty label for a defense that needs none.

    Whoever has the poisoned set can train an extractor on it; any other must be granted by the track.
    """
    if Knowledge.EXTRACTOR not in defense.needs:
        if named is not None:
            raise BadInput(f"{where}: extractors = {named!r}: it uses none")
        return [""]
    if not named:
        raise BadInput(f"{where}: 'extractors' is missing: name those it runs on{nearest('', extractors)}")
    for name in named:
        if name not in extractors:
            raise BadInput(f"{where}: extractors: no extractor {name!r} in this matrix{nearest(name, extractors)}")
        wanted = Knowledge.TRAIN if extractors[name].reads == "poisoned" else Knowledge.EXTRACTOR
        for track in tracks:
            if wanted not in track.grants:
                raise BadInput(
                    f"{where}: extractor {name!r} ({extractors[name].origin}) needs {wanted.words}, which the track "
                    f"{track.name!r} withholds"
                )
    return named


def _budgets(asked: list[float] | None, pool: float, tracks: Sequence[Track], where: str) -> list[tuple[float | None, str]]:
    """The clean budgets of a defense, each with what its label adds for it; the whole pool is given as None.

    Raises:
        BadInput: not distinct shares of at most the pool, or a track grants no clean images.
    """
    if asked is None:
        return [(None, "")]
    if not asked:
        raise BadInput(f"{where}: budgets is empty: name shares of the training set, e.g. budgets = [0.01, 0.05]")
    for share in asked:
        if not 0 < share <= pool:
            raise BadInput(
                f"{where}: budgets: {share!r} should be a share above 0, at most the {pool:g} that clean_fraction holds out"
            )
        if asked.count(share) > 1:
            raise BadInput(f"{where}: budgets name {share!r} twice")
    for track in tracks:
        if Knowledge.CLEAN not in track.grants:
            raise BadInput(f"{where}: budgets: the track {track.name!r} grants no clean images")
    # Eight digits, so that no two budgets share a label.
    return [(None if share == pool else share, f", budget {100 * share:.8g} %") for share in asked]


def _scenarios(table: MatrixTable, hosts: Sequence[_Host], attacks: Sequence[_Attacked]) -> Iterator[Scenario]:
    dataset = make("dataset", DatasetSpec, table.dataset.model_dump(exclude={"clean_fraction"}, exclude_none=True))
    for host in hosts:
        for one in attacks:
            if one.called not in host.attacks:
                continue
            if host.frozen and one.attack.power is Power.TRAINING:
                raise BadInput(
                    f"backbone {host.label}: its features are given, so there is no training for {one.label} to control: "
                    f'list the attacks it meets, e.g. attacks = ["badnets"]'
                )
            recipe = _recipe(table.recipe, host.recipe, one.recipe)
            for seed in table.seeds:
                yield Scenario(
                    dataset, table.dataset.clean_fraction, host.backbone, host.label, recipe, one.attack, one.label, one.plan, seed,
                    host.frozen,
                )  # fmt: skip


def _recipe(*tables: RecipeTable) -> Recipe:
    """A later table wins over an earlier one, and within a table its keys win over its preset.

    Raises:
        BadInput: no such preset, or a key that no recipe has.
    """
    merged: dict[str, Any] = {}
    for table in tables:
        if table.preset is not None and table.preset not in recipes():
            raise BadInput(f"recipe: no preset {table.preset!r}{nearest(table.preset, recipes())}")
        merged |= {**(recipes()[table.preset] if table.preset is not None else {}), **table.settings}
    return make("recipe", Recipe, merged, RecipeTable.model_fields)


def _cross(
    table: MatrixTable,
    scenarios: Iterable[Scenario],
    entrants: Sequence[_Entrant],
    extractors: Mapping[str, Extractor],
    attacks: Sequence[Attack],
) -> tuple[Cell, ...]:
    """Every scenario with every defense, in each of the defense's tracks and scopes."""
    # An adaptive attack also counts as the attack it is built on.
    names = {name for attack in attacks for name in (attack.name, getattr(attack, "base", attack.name))}
    canaries = canaries_for(names) if table.canary else ()
    return tuple(
        Cell(
            scenario, each.defense, each.label, track, scope, each.preset, table.tau,
            extractors.get(each.extractor), each.extractor, each.budget, table.candidates, table.curve_images, canaries,
        )
        for scenario in scenarios
        for each in entrants
        if each.meets(scenario)
        for track in each.tracks
        for scope in each.scopes
    )  # fmt: skip


def _one_trusted(cells: Iterable[Cell]) -> None:
    """Within a track that grants a trusted extractor, all competing defenses get the same one: ranks never compare extractors.

    Raises:
        BadInput: a track has two.
    """
    granted: dict[str, str] = {}
    for cell in cells:
        if cell.extractor is None or cell.defense.control or cell.extractor.reads == "poisoned":
            continue
        first = granted.setdefault(cell.track.name, cell.extractor_label)
        if first != cell.extractor_label:
            raise BadInput(
                f"track {cell.track.name!r}: {cell.defense_label} gets the extractor {cell.extractor_label!r} and others "
                f"{first!r}; nothing may be ranked across extractors: use one, or two matrices"
            )
