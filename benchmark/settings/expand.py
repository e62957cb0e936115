"""From checked tables to scenarios and cells: the product of what a matrix names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from attacks import ATTACKS
from attacks.base import Attack, Plan, Power
from benchmark.data.datasets import DatasetSpec
from benchmark.rules.canary import canaries_for
from benchmark.rules.tracks import CONTROL, Track, track_named
from benchmark.settings.cells import Cell, Frozen, Scenario
from benchmark.settings.plugins import Found
from benchmark.settings.presets import PUBLISHED, preset_settings, recipes
from benchmark.settings.schema import MatrixTable, checked, fields_of, make
from defenses import DEFENSES
from defenses.base import Defense, Knowledge, Scope
from models import BACKBONES
from models.backbone import Backbone
from models.extractors import EXTRACTORS, Extractor
from models.spec import BadInput, Spec, lookup, nearest
from models.training import Recipe

__all__ = ["expand"]

MAX_LABEL = 200


def _others(entry: dict[str, Any], key: str, whose: str, where: str, cls: type[Spec], catalogue: Sequence[type[Spec]]) -> None:
    """Settings of another method within a method's own: a table becomes (field, value) pairs, and their types are checked.

    Raises:
        BadInput: a value is of the wrong type. Whether there is such a field says the method itself.
    """
    given = entry.get(key)
    if isinstance(given, dict):
        entry[key] = given = [list(pair) for pair in given.items()]
    pairs = [pair for pair in given if isinstance(pair, list) and len(pair) == 2] if isinstance(given, list) else []
    named = entry.get(whose, getattr(cls, whose, None))
    for other in catalogue:
        if other.name == named:
            known = {name: value for name, value in pairs if isinstance(name, str) and name in fields_of(other)}
            checked(f"{where}: {key} of", other, known)


def _take(table: dict[str, Any], key: str, kind: type[Any], default: Any, where: str) -> Any:
    value = table.pop(key, default)
    if value is not default and not isinstance(value, kind):
        raise BadInput(f"{where}: {key} = {value!r} should be a {kind.__name__}")
    return value


def _named(kind: str, table: dict[str, Any], number: int) -> str:
    if not isinstance(table.get("name"), str):
        raise BadInput(f"{kind} number {number}: 'name' is missing")
    return str(table.pop("name"))


def _recipe(*tables: Mapping[str, Any]) -> Recipe:
    """The later table wins; ``preset`` stands for what ``recipes.toml`` has under that name, and the keys beside it win over it.

    Raises:
        BadInput: no such preset, or a table says something no recipe has.
    """
    merged: dict[str, Any] = {}
    for table in tables:
        own = dict(table)
        preset = _take(own, "preset", str, None, "recipe")
        if preset is not None and preset not in recipes():
            raise BadInput(f"recipe: no preset {preset!r}{nearest(preset, recipes())}")
        merged |= {**(recipes()[preset] if preset is not None else {}), **own}
    return make("recipe", Recipe, merged)


def _unique(kind: str, labels: Sequence[str]) -> None:
    """Labels stand in rows, tables, pages, file names and on terminals.

    Raises:
        BadInput: two are alike, or one is no line of text, or a spreadsheet would compute it.
    """
    for label in labels:
        if not label.strip() or len(label) > MAX_LABEL or not label.isprintable():
            raise BadInput(f"{kind} label {label[:MAX_LABEL]!r}: it should be one line of 1 to {MAX_LABEL} printable characters")
        if label[0] in "=+-@":
            raise BadInput(f"{kind} label {label!r}: a spreadsheet would take it for a formula; begin it with something else")
        if labels.count(label) > 1:
            raise BadInput(f"two {kind}s are called {label!r}: give one of them a label")


class _Entrant(NamedTuple):
    """A line of the defenses' list: what meets every scenario of its backbones, in each of its tracks and scopes."""

    label: str
    defense: Defense
    preset: str
    tracks: list[Track]
    scopes: list[Scope]
    extractor: str
    budget: float | None
    backbones: list[str]


def expand(table: MatrixTable, found: Found) -> tuple[tuple[Scenario, ...], tuple[Cell, ...]]:
    dataset = make("dataset", DatasetSpec, table.dataset.model_dump(exclude={"clean_fraction"}, exclude_none=True))
    extractors: dict[str, Extractor] = {}
    labels = []
    for number, entry in enumerate(map(dict, table.extractor), 1):
        name = _named("extractor", entry, number)
        label = _take(entry, "label", str, name, f"extractor {name}")
        extractors[label] = make("extractor", lookup("extractor", [*EXTRACTORS, *found[Extractor]], name), entry)
        labels.append(label)
    _unique("extractor", labels)
    attack_names = [str(entry.get("label") or entry.get("name")) for entry in table.attack]
    backbones = []
    for number, entry in enumerate(map(dict, table.backbone), 1):
        name = _named("backbone", entry, number)
        where = f"backbone {name}"
        recipe = _take(entry, "recipe", dict, {}, where)
        label = _take(entry, "label", str, None, where)
        met = _take(entry, "attacks", list, attack_names, where)
        for attack_name in met:
            if attack_name not in attack_names:
                raise BadInput(f"{where}: attacks: {attack_name!r} is not in this matrix{nearest(str(attack_name), attack_names)}")
        frozen = _frozen(_take(entry, "frozen", dict, None, where), extractors, where)
        backbone: Backbone = make("backbone", lookup("backbone", [*BACKBONES, *found[Backbone]], name), entry)
        tail = f" on {frozen.label}" if frozen else ""
        backbones.append((label or f"{name}-w{backbone.width}{tail}", backbone, recipe, frozen, met))
    _unique("backbone", [label for label, *_ in backbones])
    attacks = []
    plan_fields = {f.name for f in dataclasses.fields(Plan)}
    for number, entry in enumerate(map(dict, table.attack), 1):
        name = _named("attack", entry, number)
        cls: type[Attack] = lookup("attack", [*ATTACKS, *found[Attack]], name)
        recipe = _take(entry, "recipe", dict, {}, f"attack {name}")
        label = _take(entry, "label", str, None, f"attack {name}")
        rates = _take(entry, "rates", list, None, f"attack {name}")
        _others(entry, "base_settings", "base", f"attack {name}", cls, ATTACKS)
        planned = {key: entry.pop(key) for key in plan_fields & entry.keys()}
        if rates is not None and "rate" in planned:
            raise BadInput(f"attack {name}: give either rate or rates")
        known = {*fields_of(cls), *plan_fields, "recipe", "label", "rates"}
        for key in entry:
            if key not in known:
                raise BadInput(f"attack {name}: unknown key {key!r}{nearest(key, sorted(known))}")
        attack = make("attack", cls, entry)
        for rate in rates if rates is not None else [planned.get("rate", Plan.rate)]:
            plan = make(f"attack {name}:", Plan, {**planned, "rate": rate})
            mode = " all-to-all" if plan.label_mode == "all-to-all" else ""
            many = f" {100 * plan.rate:g} %" if rates is not None and len(rates) > 1 else ""
            attacks.append((f"{label or name + mode}{many}", attack, plan, recipe, label or name))
    _unique("attack", [label for label, *_ in attacks])
    defenses = []
    for number, entry in enumerate(map(dict, table.defense), 1):
        name = _named("defense", entry, number)
        where = f"defense {name}"
        label = _take(entry, "label", str, None, where)
        preset = _take(entry, "preset", str, PUBLISHED, where)
        named = _take(entry, "extractors", list, None, where)
        asked = _take(entry, "budgets", list, None, where)
        every = [known for known, *_ in backbones]
        hosts = _take(entry, "backbones", list, every, where)
        for host in hosts:
            if host not in every:
                raise BadInput(f"{where}: backbones: {host!r} is not in this matrix{nearest(str(host), every)}")
        defense_cls: type[Defense] = lookup("defense", [*DEFENSES, *found[Defense]], name)
        track_names = _take(entry, "tracks", list, ["control"] if defense_cls.control else None, where)
        scope_names = _take(entry, "scopes", list, ["whole"], where)
        if not track_names:
            raise BadInput(f"{where}: 'tracks' is missing: say what it is granted, e.g. tracks = [\"model+clean\"]")
        tracks = [track_named(str(track)) for track in track_names]
        if CONTROL in tracks and not defense_cls.control:
            raise BadInput(f"{where}: the track 'control' grants what no defender has and is for controls only")
        _others(entry, "like_settings", "like", where, defense_cls, DEFENSES)
        preset, entry = preset_settings(defense_cls, preset, entry)
        defense = make("defense", defense_cls, entry)
        given = _given(defense, named, extractors, tracks, where)
        scopes = []
        for scope in scope_names:
            if scope not in [s.value for s in Scope]:
                raise BadInput(f"{where}: unknown scope {scope!r}{nearest(str(scope), [s.value for s in Scope])}")
            if Scope(scope) not in defense.scopes:
                raise BadInput(f"{where}: it has no scope {scope!r}; it has {', '.join(s.value for s in defense.scopes)}")
            scopes.append(Scope(scope))
        budgets = _budgets(asked, table.dataset.clean_fraction, tracks, where)
        for extractor_name in given:
            shown = f"{label or name} on {extractor_name}" if extractor_name else label or name
            for budget, words in budgets:
                defenses.append(_Entrant(shown + words, defense, preset, tracks, scopes, extractor_name, budget, hosts))
    _unique("defense", [entrant.label for entrant in defenses])
    scenarios = []
    for backbone_label, backbone, backbone_recipe, frozen, met in backbones:
        for attack_label, attack, plan, attack_recipe, attack_name in attacks:
            if attack_name not in met:
                continue
            if frozen and attack.power is Power.TRAINING:
                raise BadInput(
                    f"backbone {backbone_label}: its features are given, so there is no training for {attack_label} to control: "
                    f'list the attacks it meets, e.g. attacks = ["badnets"]'
                )
            recipe = _recipe(table.recipe, backbone_recipe, attack_recipe)
            share = table.dataset.clean_fraction
            scenarios += [
                Scenario(dataset, share, backbone, backbone_label, recipe, attack, attack_label, plan, seed, frozen)
                for seed in table.seeds
            ]
    canaries = canaries_for(_attack_names(attack for _, attack, *_ in attacks)) if table.canary else ()
    cells = tuple(
        Cell(
            scenario, each.defense, each.label, track, scope, each.preset, table.tau,
            extractors.get(each.extractor), each.extractor, each.budget, table.candidates, canaries,
        )
        for scenario in scenarios
        for each in defenses
        if scenario.backbone_label in each.backbones
        for track in each.tracks
        for scope in each.scopes
    )  # fmt: skip
    return tuple(scenarios), _one_trusted(cells)


def _attack_names(attacks: Iterable[Attack]) -> set[str]:
    """Names of attacks, and of those that adaptive ones are built on."""
    return {name for attack in attacks for name in (attack.name, getattr(attack, "base", attack.name))}


def _frozen(table: dict[str, Any] | None, extractors: Mapping[str, Extractor], where: str) -> Frozen | None:
    if table is None:
        return None
    name = table.pop("extractor", None)
    if not isinstance(name, str):
        raise BadInput(f"{where}: frozen: 'extractor' is missing: name one of this matrix's extractors")
    if name not in extractors:
        raise BadInput(f"{where}: frozen: no extractor {name!r} in this matrix{nearest(name, extractors)}")
    for key in ("label", "name"):
        if key in table:
            raise BadInput(f"{where}: frozen: unknown key {key!r}{nearest(key, ['extractor', 'epochs', 'lr', 'batch'])}")
    return Frozen(extractors[name], name, **checked(f"{where}:", Frozen, table))


def _given(
    defense: Defense, named: list[Any] | None, extractors: Mapping[str, Extractor], tracks: Sequence[Track], where: str
) -> list[str]:
    """Labels of the extractors a defense runs on; one empty label for a defense that needs none.

    An extractor trained on the poisoned set is within the means of whoever holds that set; any other must be granted.
    """
    if Knowledge.EXTRACTOR not in defense.needs:
        if named is not None:
            raise BadInput(f"{where}: extractors = {named!r}: it uses none")
        return [""]
    if not named:
        raise BadInput(f"{where}: 'extractors' is missing: say which it runs on{nearest('', extractors)}")
    for name in named:
        if not isinstance(name, str) or name not in extractors:
            raise BadInput(f"{where}: extractors: no extractor {name!r} in this matrix{nearest(str(name), extractors)}")
        wanted = Knowledge.TRAIN if extractors[name].reads == "poisoned" else Knowledge.EXTRACTOR
        for track in tracks:
            if wanted not in track.grants:
                raise BadInput(
                    f"{where}: extractor {name!r} ({extractors[name].origin}) needs {wanted.words}, which the track "
                    f"{track.name!r} withholds"
                )
    return [str(name) for name in named]


def _budgets(asked: list[Any] | None, pool: float, tracks: Sequence[Track], where: str) -> list[tuple[float | None, str]]:
    """The clean budgets a defense is met with, each with what its label says of it; the whole pool is no setting of its own.

    Raises:
        BadInput: not a list of distinct shares of at most the pool, or the track grants no clean images.
    """
    if asked is None:
        return [(None, "")]
    if not asked:
        raise BadInput(f"{where}: budgets is empty: name shares of the training set, e.g. budgets = [0.01, 0.05]")
    for share in asked:
        number = isinstance(share, (int, float)) and not isinstance(share, bool)
        if not (number and 0 < share <= pool):
            raise BadInput(
                f"{where}: budgets: {share!r} should be a share above 0, at most the {pool:g} that clean_fraction holds out"
            )
        if asked.count(share) > 1:
            raise BadInput(f"{where}: budgets name {share!r} twice")
    for track in tracks:
        if Knowledge.CLEAN not in track.grants:
            raise BadInput(f"{where}: budgets: the track {track.name!r} grants no clean images")
    # Eight digits, so that no two budgets share a label.
    return [(None if share == pool else float(share), f", budget {100 * share:.8g} %") for share in asked]


def _one_trusted(cells: tuple[Cell, ...]) -> tuple[Cell, ...]:
    """Within a track that grants a trusted extractor, everybody who competes gets the same one: nothing ranks across extractors.

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
    return cells
