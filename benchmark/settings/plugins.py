"""Python files of a user's own that a matrix names, and the methods they define."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from attacks.base import Attack
from defenses.base import Defense
from models.backbone import Backbone
from models.extractors import Extractor
from models.spec import BadInput

__all__ = ["Found", "load_plugins"]

Found = dict[type, list[type]]
"""The methods that plug-ins define, by their base class."""


def load_plugins(path: Path, files: Sequence[str], note: Callable[[str], None]) -> tuple[tuple[tuple[str, str], ...], Found]:
    """Runs the files a matrix names and collects the methods they define.

    Args:
        path: the matrix file; the plug-ins are beside it or below.
        files: their paths, relative to the folder of the matrix.
        note: called with one line before each file runs.

    Returns:
        The name and sha256 (hex) of every file, and the methods.

    Raises:
        BadInput: a file is elsewhere, missing, or not Python.
    """
    found: Found = {Backbone: [], Attack: [], Defense: [], Extractor: []}
    loaded = []
    for name in files:
        file = path.parent / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BadInput(f"plugins: {name!r}: a plug-in lies beside the matrix that names it, or below; copy it there")
        if not file.is_file():
            raise BadInput(f"plugins: {name}: no such file beside the matrix")
        hashed = hashlib.sha256(file.read_bytes()).hexdigest()
        loaded.append((name, hashed))
        note(f"plug-in {name} (sha256 {hashed[:12]}) is code and runs with all your rights, because {path} names it")
        module = _module(f"levelfield_plugin_{hashed[:12]}", file, name)
        for entry in vars(module).values():
            for base, entries in found.items():
                if isinstance(entry, type) and issubclass(entry, base) and entry.__module__ == module.__name__:
                    entries.append(entry)
    return tuple(loaded), found


def _module(module_name: str, file: Path, name: str) -> ModuleType:
    """The file as a module, run once per content."""
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise BadInput(f"plugins: {name}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[module_name]  # so that a later load does not find half a module
        if isinstance(error, SyntaxError):
            raise BadInput(f"plugins: {name}: not Python: {error}") from error
        raise
    return module
