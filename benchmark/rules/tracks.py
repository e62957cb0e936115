"""Tracks: what a defender is granted. Ranks are within a track."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from defenses.base import DefenderView, Defense, Knowledge, Scope
from models.backbone import Network
from models.extractors import Extractor
from models.recipe import Recipe
from models.spec import BadInput, nearest

__all__ = ["CONTROL", "TRACKS", "Track", "track_named", "view_for"]


@dataclass(frozen=True)
class Track:
    """A threat model: its name, what it grants, and a title for tables."""

    name: str
    grants: Knowledge
    title: str

    def spec(self) -> dict[str, Any]:
        return {"name": self.name, "grants": self.grants.words}


TRACKS: tuple[Track, ...] = (
    Track("model", Knowledge.MODEL, "the model, no data"),
    Track("model+clean", Knowledge.MODEL | Knowledge.CLEAN, "the model and a small clean labelled budget"),
    Track("model+train", Knowledge.MODEL | Knowledge.TRAIN, "the model and the poisoned training set, nothing trusted"),
    Track("train", Knowledge.TRAIN, "the poisoned training set alone"),
    Track("train+seeds", Knowledge.TRAIN | Knowledge.SEEDS, "the poisoned training set, ten samples a class known to be clean"),
    Track("train+clean", Knowledge.TRAIN | Knowledge.CLEAN, "the poisoned training set and a small clean labelled budget"),
    Track("train+extractor", Knowledge.TRAIN | Knowledge.EXTRACTOR, "the poisoned training set and a trusted extractor"),
    Track("clean+extractor", Knowledge.CLEAN | Knowledge.EXTRACTOR, "a small clean labelled budget and a trusted extractor"),
)
CONTROL = Track("control", ~Knowledge.NONE, "controls: granted what no defender has, never ranked")


def track_named(name: str) -> Track:
    """Raises BadInput, with the nearest right name, when there is no such track."""
    for track in (*TRACKS, CONTROL):
        if track.name == name:
            return track
    raise BadInput(f"unknown track {name!r}{nearest(name, [track.name for track in TRACKS])}")


def view_for(
    granted: Knowledge,
    defense: Defense,
    scope: Scope,
    sources: Mapping[Knowledge, Callable[[], object]],
    *,
    fresh: Callable[[int], Network],
    num_classes: int,
    seed: int,
    recipe: Recipe,
    built: Callable[[Extractor], Network] | None = None,
) -> DefenderView:
    """The view of ``defense`` under ``granted``: it holds no reference to anything else.

    Args:
        granted: what the track and the cell grant.
        defense: the method; its declared needs are checked by the view.
        scope: what it may edit.
        sources: how to get each kind of knowledge; those that are not granted are dropped here.
        fresh: a new network of the victim's architecture, by seed.
        num_classes: of the data.
        seed: of the defense's draws.
        recipe: the victim's.
        built: gives an extractor that was trained on the poisoned set before; None = the defense trains it.
    """
    reachable = {what: source for what, source in sources.items() if what in granted}
    return DefenderView(
        granted=granted,
        declared=defense.needs,
        sources=reachable,
        fresh=fresh,
        num_classes=num_classes,
        seed=seed,
        scope=scope,
        recipe=recipe,
        built=built,
    )
