"""Files of a user's own that a matrix names, and the methods they define."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from attacks.base import Attack
from defenses.base import Defense
from models.backbone import Backbone
from models.extractors import Extractor
from models.spec import BadInput

__all__ = ["Found", "load_plugins"]

Found = dict[type, list[type]]


def load_plugins(path: Path, files: Sequence[str], note: Callable[[str], None]) -> tuple[tuple[tuple[str, str], ...], Found]:
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
