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
    value_bits: int = 8
    """Bits of a value, 4 or 8."""
    is_common: bool = False
    """Whether the matrices are stored in other kinds, and take this one to be of equal kinds."""
    is_float: bool = False
    """Whether the values are floats, which no other kind can hold."""
    has_offsets: bool = False
    """Whether blocks have an offset beside their scale."""
    scale_dtype: str = "float32"
    """Of scales and offsets."""
    of_outputs: bool = False
    """Of 8-bit floats: whether all blocks of an output have the same scale."""
    only_weights: bool = False
    """Whether the checkpoint says that activations stay as they are, where a kernel for these values would round them."""

    @property
    def is_float8(self) -> bool:
        """Whether the values are 8-bit floats."""
        return self.is_float and self.value_bits == 8


def common_kind(kinds: Collection[BlockKind | None]) -> BlockKind | None:
    """The kind that matrices of these kinds can all take without a change of their values; None: there is none.

    If they differ, as in GGUF files with types such as Q4_K_M, it has the bits of the widest values, and scales and offsets
    in float32.
    """
    known = [kind for kind in kinds if kind is not None]
    if not kinds or len(known) < len(kinds):
        return None
    if len(set(known)) == 1:
        return known[0]
    if any(kind.is_float for kind in known):
        return None
    size, bits = min(kind.size for kind in known), max(kind.value_bits for kind in known)
    name = f"{' and '.join(sorted(kind.name for kind in known))} as {bits} bits"
    return BlockKind(name, bits + 64 / size, size, bits, is_common=True, has_offsets=True)


def side_by_side(parts: Sequence[BlockWeight], kind: BlockKind) -> BlockWeight:
    """The columns of several matrices whose `common_kind` this is."""
    from pallas_kernels.matmul import concatenate, widen

    return concatenate([widen(part, kind.size, kind.value_bits) for part in parts] if kind.is_common else parts)
