"""How a matrix in blocks is stored."""

from __future__ import annotations

from typing import NamedTuple


class BlockKind(NamedTuple):
    """How a matrix in blocks is stored in memory. Matrices of equal kinds, side by side, are one `BlockWeight`."""

    name: str
    bits: float
    """Bits of memory per weight, scales included."""
