"""Named settings: presets of methods (``presets.toml``) and of training recipes (``recipes.toml``)."""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from pathlib import Path
from typing import Any

from defenses.base import Defense
from models.spec import BadInput, nearest

__all__ = ["PUBLISHED", "preset_settings", "presets", "recipes"]

PUBLISHED = "paper"
"""The preset of a method's defaults: the paper's numbers, its authors' code's, or, where its file says so, ours."""


@functools.lru_cache(maxsize=1)
def presets() -> dict[str, dict[str, dict[str, Any]]]:
    """Shortened schedules by method and preset, as ``presets.toml`` has them."""
    return tomllib.loads((Path(__file__).parent / "presets.toml").read_text(encoding="utf-8"))


@functools.lru_cache(maxsize=1)
def recipes() -> dict[str, dict[str, Any]]:
    """Training recipes by name, as ``recipes.toml`` has them."""
    return tomllib.loads((Path(__file__).parent / "recipes.toml").read_text(encoding="utf-8"))


def _words(value: Any) -> str:
    """A setting as text: lists in brackets, (field, value) pairs of another method's settings as ``field=value``."""
    if isinstance(value, tuple):
        return f"[{', '.join(_words(item) for item in value)}]"
    if isinstance(value, list):
        return "=".join(map(_words, value))
    return str(value)


def preset_settings(defense: type[Defense], preset: str, given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A defense's settings under a preset, with those that the matrix changes.

    Args:
        defense: the method.
        preset: a name that ``presets.toml`` has for it, or :data:`PUBLISHED`.
        given: the settings in the matrix; they win over the preset's.

    Returns:
        The preset's name with the changed settings, as rows record it (``cpu; epochs=7``), and all settings.

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
