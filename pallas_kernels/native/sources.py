"""The C++ sources of this package. This module imports the standard library alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
HEADERS = Path(__file__).parent  # of all kernels; others lie beside their source

# Name of a library -> its source. The slowest to compile come first.
SOURCES = {
    "ragged_attention": _PACKAGE / "ragged_attention" / "cpu" / "kernel.cc",
    "matmul": _PACKAGE / "matmul" / "cpu.cc",
    "grouped_matmul": _PACKAGE / "grouped_matmul" / "cpu.cc",
    "norm": _PACKAGE / "norm" / "cpu.cc",
    "draw": _PACKAGE / "draw" / "cpu.cc",
    "recurrence": _PACKAGE / "recurrence" / "cpu.cc",
    "rotary": _PACKAGE / "rotary" / "cpu.cc",
    "unfilled": _PACKAGE / "unfilled" / "cpu.cc",
}


def contents(source: Path) -> bytes:
    """A source with all headers that it can include."""
    headers = sorted({*source.parent.glob("*.h"), *HEADERS.glob("*.h")})
    return b"\0".join(path.read_bytes() for path in (source, *headers))


def digest() -> str:
    """Digest of `SOURCES` and their headers."""
    parts = (contents(source) for source in SOURCES.values())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()
