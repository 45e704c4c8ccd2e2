"""How a matrix in blocks is stored."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple


class BlockKind(NamedTuple):
    """How a matrix in blocks is stored in memory. Matrices of equal kinds, side by side, are one `BlockWeight`."""

    name: str
    bits: float
    """Bits of memory per weight, scales included."""
    size: int
    """Inputs of a block."""
    is_common: bool = False
    """Whether the matrices are stored in other kinds, and take this one to be of equal kinds."""


def common_kind(kinds: Collection[BlockKind | None]) -> BlockKind | None:
    """The kind that matrices of these kinds can all take without a change of their values; None: one is not in blocks.

    If they differ, as in GGUF files with types such as Q4_K_M, it has 8 bits, and a scale and an offset in float32.
    """
    known = [kind for kind in kinds if kind is not None]
    if not kinds or len(known) < len(kinds):
        return None
    if len(set(known)) == 1:
        return known[0]
    size = min(kind.size for kind in known)
    return BlockKind(" and ".join(sorted(kind.name for kind in known)) + " as 8 bits", 8 + 64 / size, size, is_common=True)
