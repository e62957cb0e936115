"""A matrix: TOML -> checked settings -> cells. Every number of a run stands in such a file; no flag sets one.

A matrix names one data set, backbones, a recipe, attacks, seeds, extractors, and defenses with the tracks and scopes they enter.
Its cells are the product. A table's keys beside ``name`` are the fields of that method's dataclass (units and ranges stand there);
keys the benchmark itself reads are listed in the ``*Table`` classes below. A defense's table may also name its ``tracks``,
``scopes``, ``label``, ``preset``, ``extractors``, ``backbones`` (labels of those it meets; by default all), and ``budgets``: clean
budgets it is met with, as shares of the training set, on the same victims, each a part of what ``clean_fraction`` holds out.
``candidates`` at the top of the file bounds how many models a defense may offer a cell over all settings of its knob, the same for
every defense; ``canary = true`` adds the rule that chooses by planted canaries (:mod:`benchmark.rules.canary`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import math
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar, get_type_hints

from models.spec import BadInput, Spec, check, derive_seed, digest, lookup, nearest

try:
    from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
except ImportError as error:
    raise BadInput("pydantic is not installed here, and matrix files are checked by it: pip install pydantic") from error

from attacks import ATTACKS
from attacks.base import Attack, Plan, Power
from benchmark.data.datasets import DatasetSpec
from benchmark.rules.canary import Canary, canaries_for
from benchmark.rules.selection import TAU
from benchmark.rules.tracks import CONTROL, Track, track_named
from defenses import DEFENSES
from defenses.base import Defense, Knowledge, Scope
from defenses.controls import NoDefense
from models import BACKBONES
from models.backbone import Backbone
from models.extractors import EXTRACTORS, Extractor
from models.recipe import Recipe

__all__ = ["Cell", "Frozen", "Matrix", "Scenario", "find_matrix", "load_matrix", "matrix_names", "settings_hash"]

FOLDER = Path(__file__).parent / "matrices"
MAX_BYTES = 2**20
MAX_DEPTH = 16
MAX_DOTS = 200
"""In a line, between two marks: far more than any key's, and than any sentence's."""
MAX_WORDS = 500
"""Letters of a complaint: it may quote a value, and values may be as long as the file."""
MAX_LABEL = 200
CANDIDATES = 80
"""Models a defense may offer a cell, over all settings of its knob: ANP's twenty thresholds at four radii."""


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


@dataclass(frozen=True)
class Frozen(Spec):
    """How a victim on given features is trained: its head alone, with Adam at a constant rate on the embedded poisoned set.

    Attributes:
        extractor: whose features; its head is left out.
        label: the matrix's name of it.
        epochs, lr, batch: of the head (ours, those of the heads that Hölder pruning inspects).
    """

    name: ClassVar[str] = "frozen"

    extractor: Extractor
    label: str
    epochs: int = 50
    lr: float = 1e-3
    batch: int = 256

    def __post_init__(self) -> None:
        check(self, "epochs", 0 <= self.epochs <= 10_000, "between 0 and 10000")
        check(self, "lr", 0 <= self.lr <= 10, "between 0 and 10")
        check(self, "batch", 1 <= self.batch <= 65_536, "between 1 and 65536 samples")

    def spec(self) -> dict[str, Any]:
        return {key: value for key, value in super().spec().items() if key != "label"}


@dataclass(frozen=True)
class Scenario:
    """The attacked world; knows no defense. ``attack`` None = the benign twin; ``frozen`` None = trained end to end."""

    dataset: DatasetSpec
    clean_fraction: float
    backbone: Backbone
    backbone_label: str
    recipe: Recipe
    attack: Attack | None
    attack_label: str
    plan: Plan
    seed: int
    frozen: Frozen | None = None
    weights_seed: int | None = None
    """Of the initial weights and the batches alone, where they are not those of ``seed``."""

    def spec(self) -> dict[str, Any]:
        """What determines the trained victim: labels are left out."""
        return {
            **({"frozen": self.frozen.spec()} if self.frozen else {}),
            **({} if self.weights_seed is None else {"weights_seed": self.weights_seed}),
            "dataset": self.dataset.spec(),
            "clean_fraction": self.clean_fraction,
            "backbone": self.backbone.spec(),
            "recipe": self.recipe.spec(),
            "attack": self.attack.spec() if self.attack else None,
            "plan": self.plan.spec() if self.attack else None,
            "seed": self.seed,
        }

    def twin(self) -> Scenario:
        """The same world without the attack."""
        return dataclasses.replace(self, attack=None, attack_label="none")

    def surrogate(self) -> Scenario | None:
        """Where the attack's surrogate is trained; None for attacks that take none.

        It is the benign twin, or a network that the attacker trains end to end on the same images from a seed of its own.
        """
        if self.attack is None or not self.attack.needs_surrogate:
            return None
        own = self.attack.own_surrogate(self.backbone)
        if own is None:
            return self.twin()
        seed = derive_seed(self.seed, "surrogate")
        return dataclasses.replace(self.twin(), backbone=own, backbone_label=own.name, frozen=None, weights_seed=seed)


@dataclass(frozen=True)
class Cell:
    """One meeting: a scenario, a defense, the track it enters and the scope it may edit."""

    scenario: Scenario
    defense: Defense
    defense_label: str
    track: Track
    scope: Scope
    preset: str
    tau: float
    extractor: Extractor | None = None
    extractor_label: str = ""
    budget: float | None = None
    """Share of the training images that the defender gets as its clean budget, out of those held out; None = all of them."""
    candidates: int = CANDIDATES
    """Models the defense may offer over all settings of its knob; the dial of the published setting is always whole."""
    canaries: tuple[Canary, ...] = ()
    """What the canary rule plants; empty = the matrix does without that rule."""

    @property
    def canaried(self) -> bool:
        """Whether the canary rule runs: the defense edits the model with nothing but the clean budget, and can be run on a copy."""
        both = Knowledge.MODEL | Knowledge.CLEAN
        edits = Knowledge.MODEL in self.defense.needs and not self.defense.needs & ~both
        return bool(self.canaries) and both in self.grants and edits and not isinstance(self.defense, NoDefense)

    @property
    def grants(self) -> Knowledge:
        """What the defender may hold: what the track gives, and an extractor trained on it, which is its own work."""
        return self.track.grants | (Knowledge.EXTRACTOR if self.extractor else Knowledge.NONE)

    @property
    def extractors(self) -> tuple[Extractor, ...]:
        """Every extractor the defense uses: the one it is given, and the one it trains for itself."""
        return tuple(one for one in (self.extractor, self.defense.extractor) if one is not None)

    def spec(self) -> dict[str, Any]:
        return {
            **({"extractor": self.extractor.spec()} if self.extractor else {}),
            **({"budget": self.budget} if self.budget is not None else {}),
            **({"candidates": self.candidates} if len(self.defense.knobs) > 1 else {}),
            **({"canaries": [canary.spec() for canary in self.canaries]} if self.canaried else {}),
            "scenario": self.scenario.spec(),
            "defense": self.defense.spec(),
            "track": self.track.spec(),
            "scope": self.scope.value,
            "tau": self.tau,
        }


@dataclass(frozen=True)
class Matrix:
    """A checked matrix. ``scenarios`` and ``cells`` are in table order; ``settings`` is the file's text."""

    name: str
    path: Path
    title: str
    about: str
    settings: str
    scenarios: tuple[Scenario, ...]
    cells: tuple[Cell, ...]
    plugins: tuple[tuple[str, str], ...]
    """(file name, sha256) of every plug-in file that was loaded."""


def matrix_names() -> list[str]:
    """The matrices that ship with the benchmark."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def find_matrix(name: str) -> Path:
    """A shipped matrix by name, or any ``.toml`` file by path.

    Raises:
        BadInput: no such matrix, with the nearest right name.
    """
    if name.endswith(".toml"):
        if Path(name).is_file():
            return Path(name)
        raise BadInput(f"{name}: no such matrix file{nearest(Path(name).stem, matrix_names())}")
    if name not in matrix_names():
        raise BadInput(f"unknown matrix {name!r}{nearest(name, matrix_names())}")
    return FOLDER / f"{name}.toml"


def load_matrix(path: Path, note: Callable[[str], None] = lambda line: None) -> Matrix:
    """Reads and checks a matrix file.

    Args:
        note: is told, in one line each, which plug-ins the file names, before they run.

    Raises:
        BadInput: not readable, not TOML, an unknown key or name, a wrong type or a number out of range; one line that names the
            file, the place, the value and the nearest right one.
    """
    if path.stem.startswith(".") or not path.stem.isprintable():  # it names the folder of results
        raise BadInput(f"{str(path)!r}: a matrix is called like its file, so {path.stem!r} cannot be one; rename the file")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BadInput(f"{path}: larger than {MAX_BYTES // 2**20} MiB; no settings file is")
        settings = path.read_text(encoding="utf-8")
        if _dotted(settings) > MAX_DOTS:
            raise BadInput(f"{path}: a key of more than {MAX_DOTS} parts; no setting is nested as deep")
        raw = tomllib.loads(settings)
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"{path}: cannot be read: {error}") from error
    except BadInput:
        raise
    except ValueError as error:  # tomllib's own, and Python's refusal to read numbers of thousands of digits
        raise BadInput(f"{path}: not TOML: {error}") from error
    _bounded(raw, path)
    try:
        table = MatrixTable.model_validate(raw)
    except ValidationError as error:
        raise BadInput(f"{path}: {_short(_first(error, MatrixTable))}") from error
    if len(set(table.seeds)) != len(table.seeds):
        raise BadInput(f"{path}: seeds {table.seeds} name one seed twice")
    plugins, found = _plugins(path, table.plugins, note)
    try:
        scenarios, cells = _expand(table, found)
    except BadInput as error:
        raise BadInput(f"{path}: {_short(str(error))}") from error
    return Matrix(path.stem, path, table.title, table.about, settings, scenarios, cells, plugins)


def _short(text: str) -> str:
    return text if len(text) <= MAX_WORDS else f"{text[:MAX_WORDS]} ..."


def _dotted(settings: str) -> int:
    """The most dots between two marks of a line, so at least its longest key's; tomllib's time grows with their square."""
    lines = (line for line in settings.splitlines() if not line.lstrip().startswith("#"))
    return max((piece.count(".") for line in lines for piece in re.split(r"[={},\[\]]", line)), default=0)


def _bounded(raw: dict[str, Any], path: Path) -> None:
    """Refuses what no setting is, before anything tries to print it.

    Raises:
        BadInput: tables or lists within each other deeper than any setting, or whole numbers beyond 64 bits.
    """
    left: list[tuple[str, Any, int]] = [("", raw, 0)]
    while left:
        place, value, depth = left.pop()
        if depth > MAX_DEPTH:
            raise BadInput(f"{path}: {_short(place.split('.')[0])!r} is nested more than {MAX_DEPTH} deep; no setting is")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise BadInput(f"{path}: {_short(place)!r} is a whole number of more than 64 bits")
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        left += [(f"{place}.{key}" if place else str(key), item, depth + 1) for key, item in items]


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


Found = dict[type, list[type]]


def _plugins(path: Path, files: Sequence[str], note: Callable[[str], None]) -> tuple[tuple[tuple[str, str], ...], Found]:
    """Loads the files a matrix names (code, run as code: ``note`` is told before) and collects the methods they define."""
    found: Found = {Backbone: [], Attack: [], Defense: [], Extractor: []}
    loaded = []
    for name in files:
        file = path.parent / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BadInput(f"{path}: plugins: {name!r}: a plug-in lies beside the matrix that names it, or below; copy it there")
        if not file.is_file():
            raise BadInput(f"{path}: plugins: {name}: no such file beside the matrix")
        hashed = hashlib.sha256(file.read_bytes()).hexdigest()
        loaded.append((name, hashed))
        note(f"plug-in {name} (sha256 {hashed[:12]}) is code and runs with all your rights, because {path} names it")
        module_name = f"levelfield_plugin_{hashed[:12]}"
        module = sys.modules.get(module_name)
        if module is None:
            spec = importlib.util.spec_from_file_location(module_name, file)
            if spec is None or spec.loader is None:
                raise BadInput(f"{path}: plugins: {name}: not a Python file")
            module = importlib.util.module_from_spec(spec)
            sys.modules[module_name] = module
            try:
                spec.loader.exec_module(module)
            except BaseException as error:
                del sys.modules[module_name]  # half of it must not pass for the whole the next time
                if isinstance(error, SyntaxError):
                    raise BadInput(f"{path}: plugins: {name}: not Python: {error}") from error
                raise
        for entry in vars(module).values():
            for base, entries in found.items():
                if isinstance(entry, type) and issubclass(entry, base) and entry.__module__ == module_name:
                    entries.append(entry)
    return tuple(loaded), found


S = TypeVar("S", bound=Spec)
PUBLISHED = "paper"
"""The preset of a method's defaults: the paper's numbers, its authors' code's, or, where its file says so, ours."""


def _fields(cls: type[Spec]) -> dict[str, Any]:
    """A method's settings and their types."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]


def _make(kind: str, cls: type[S], settings: Mapping[str, Any]) -> S:
    """An instance of a method's dataclass from a table; unknown keys and wrong types are named."""
    return cls(**_settings(kind, cls, settings))


def _settings(kind: str, cls: type[Spec], settings: Mapping[str, Any]) -> dict[str, Any]:
    fields = _fields(cls)
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
            known = {name: value for name, value in pairs if isinstance(name, str) and name in _fields(other)}
            _settings(f"{where}: {key} of", other, known)


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
    return _make("recipe", Recipe, merged)


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


def _expand(table: MatrixTable, found: Found) -> tuple[tuple[Scenario, ...], tuple[Cell, ...]]:
    dataset = _make("dataset", DatasetSpec, table.dataset.model_dump(exclude={"clean_fraction"}, exclude_none=True))
    extractors: dict[str, Extractor] = {}
    labels = []
    for number, entry in enumerate(map(dict, table.extractor), 1):
        name = _named("extractor", entry, number)
        label = _take(entry, "label", str, name, f"extractor {name}")
        extractors[label] = _make("extractor", lookup("extractor", [*EXTRACTORS, *found[Extractor]], name), entry)
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
        backbone: Backbone = _make("backbone", lookup("backbone", [*BACKBONES, *found[Backbone]], name), entry)
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
        known = {*_fields(cls), *plan_fields, "recipe", "label", "rates"}
        for key in entry:
            if key not in known:
                raise BadInput(f"attack {name}: unknown key {key!r}{nearest(key, sorted(known))}")
        attack = _make("attack", cls, entry)
        for rate in rates if rates is not None else [planned.get("rate", Plan.rate)]:
            plan = _make(f"attack {name}:", Plan, {**planned, "rate": rate})
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
        preset, entry = _preset(defense_cls, preset, entry)
        defense = _make("defense", defense_cls, entry)
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
    return Frozen(extractors[name], name, **_settings(f"{where}:", Frozen, table))


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


@functools.lru_cache(maxsize=1)
def presets() -> dict[str, dict[str, dict[str, Any]]]:
    """Shortened schedules by method and preset, as ``presets.toml`` has them."""
    return tomllib.loads((Path(__file__).parent / "presets.toml").read_text(encoding="utf-8"))


@functools.lru_cache(maxsize=1)
def recipes() -> dict[str, dict[str, Any]]:
    """Ways to train that have a name, as ``recipes.toml`` has them."""
    return tomllib.loads((Path(__file__).parent / "recipes.toml").read_text(encoding="utf-8"))


def _words(value: Any) -> str:
    """A setting for people: lists in brackets, the (field, value) pairs of another method's settings as such."""
    if isinstance(value, tuple):
        return f"[{', '.join(_words(item) for item in value)}]"
    if isinstance(value, list):
        return "=".join(map(_words, value))
    return str(value)


def _preset(defense: type[Defense], preset: str, given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A defense's settings under a preset, and the preset's name with what the matrix changes of it.

    Raises:
        BadInput: the method has no such preset.
    """
    known = presets().get(defense.name, {})
    if preset != PUBLISHED and preset not in known:
        raise BadInput(f"defense {defense.name}: no preset {preset!r}{nearest(preset, [PUBLISHED, *known])}")
    settings = {**known.get(preset, {}), **given}
    defaults = {f.name: f.default for f in dataclasses.fields(defense)}  # type: ignore[arg-type]
    own = {**defaults, **known.get(preset, {})}
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    changed = [f"{key}={_words(value)}" for key, value in plain.items() if own.get(key) != value]
    return (f"{preset}; {', '.join(changed)}" if changed else preset), settings


def settings_hash(matrix: Matrix) -> str:
    """sha256 over everything the cells say: the identity of a matrix's results."""
    return digest([cell.spec() for cell in matrix.cells])
