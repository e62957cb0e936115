"""Writing files so that they are whole or absent: see :mod:`models.files`, where weights need it too."""

from __future__ import annotations

from models.files import write_bytes, write_text

__all__ = ["write_bytes", "write_text"]
