"""What a process computes with: the versions of the libraries, its arithmetic, and the project's own sources."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

__all__ = ["arithmetic", "cores", "has_bfloat16", "sources", "versions"]

VERSIONED = ("torch", "torchvision", "pytorch-lightning", "numpy", "scipy", "scikit-learn", "pandas", "safetensors")
PACKAGES = ("attacks", "benchmark", "defenses", "models")


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Version of Python and of every library that numbers depend on, by name; ``absent`` where one is not installed."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def arithmetic() -> dict[str, str]:
    """What rounds: rows repeat bit for bit where these agree. The processor is part of it, because the libraries of linear algebra
    choose their kernels by it: two processors with AVX512 gave different rows."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "processor": _processor(Path("/proc/cpuinfo")),
    }


def has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor multiplies bfloat16 numbers itself: AVX512-BF16 or AMX-BF16, or BF16 of ARM."""
    fields = _fields(cpuinfo)
    flags = {*fields.get("flags", "").split(), *fields.get("Features", "").split()}  # Features: ARM
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"})


def _fields(cpuinfo: Path) -> dict[str, str]:
    """What Linux reports of the first processor in ``cpuinfo``; nothing elsewhere."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _processor(cpuinfo: Path) -> str:
    """Vendor, family and model of the first processor as Linux reports them in ``cpuinfo``; elsewhere what Python knows."""
    fields = _fields(cpuinfo)
    names = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")  # the last two: ARM
    return " ".join(fields[name] for name in names if name in fields) or platform.processor() or "unknown"


def sources(*, loaded: bool = False) -> dict[str, str]:
    """sha256 (hex) of the project's source files and presets, by path relative to the project.

    Args:
        loaded: those alone that this process has imported by now, and the presets.
    """
    root = Path(__file__).parents[2]
    found = {path for package in PACKAGES for path in (root / package).rglob("*.py")}
    if loaded:
        found &= {Path(file) for module in tuple(sys.modules.values()) if (file := getattr(module, "__file__", None))}
    found |= set((root / "benchmark" / "settings").glob("*.toml"))  # presets and recipes; a matrix is compared by itself
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(found)}
