"""How a matrix in blocks is stored."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pallas_kernels.matmul import BlockWeight


class BlockKind(NamedTuple):
    """How a matrix in blocks is stored in memory. Matrices of equal kinds, side by side, are one `BlockWeight`."""

    name: str
    bits: float
    """Bits of memory per weight, scales included."""
    size: int
    """Inputs of a block."""
    is_common: bool = False
    """Whether the matrices are stored in other kinds, and take this one to be of equal kinds."""
    is_float: bool = False
    """Whether the values are floats, which no other kind can hold."""


def common_kind(kinds: Collection[BlockKind | None]) -> BlockKind | None:
    """The kind that matrices of these kinds can all take without a change of their values; None: there is none.

    If they differ, as in GGUF files with types such as Q4_K_M, it has 8 bits, and a scale and an offset in float32.
    """
    known = [kind for kind in kinds if kind is not None]
    if not kinds or len(known) < len(kinds):
        return None
    if len(set(known)) == 1:
        return known[0]
    if any(kind.is_float for kind in known):
        return None
    size = min(kind.size for kind in known)
    return BlockKind(" and ".join(sorted(kind.name for kind in known)) + " as 8 bits", 8 + 64 / size, size, is_common=True)


def side_by_side(parts: Sequence[BlockWeight], kind: BlockKind) -> BlockWeight:
    """The columns of several matrices whose `common_kind` this is."""
    from pallas_kernels.matmul import concatenate, widen

    return concatenate([widen(part, kind.size) for part in parts] if kind.is_common else parts)
