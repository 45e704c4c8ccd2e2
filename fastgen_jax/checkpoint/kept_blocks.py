"""Weights that stay in the blocks of a checkpoint, in the form that the native CPU kernels pack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastgen_jax.checkpoint.base import HoldsBlocks
from fastgen_jax.checkpoint.block_kind import BlockKind, side_by_side
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.weight_spec import Kind, WeightSpec

if TYPE_CHECKING:
    from pallas_kernels.grouped_matmul import BlockGroups
    from pallas_kernels.matmul import BlockWeight


def read_kept(
    checkpoint: HoldsBlocks, spec: WeightSpec, source: Source, names: Sequence[str], kind: BlockKind
) -> BlockWeight | BlockGroups:
    """A weight (of one layer) in blocks of this kind; `names` are its tensors, as in `source`.

    The matrices of experts are not read before they are packed, one by one.
    """
    from pallas_kernels.grouped_matmul import BlockGroups

    order = None if source.rearrange is None else source.rearrange(np.arange(spec.shape[-1]))

    def matrix(some: Sequence[str], entry: int | None = None) -> BlockWeight:
        whole = side_by_side([checkpoint.read_blocks(name, entry) for name in some], kind)
        return whole if order is None else whole.columns(order)

    if spec.kind is Kind.MATRIX:
        return matrix(names)
    experts, inputs, outputs = spec.shape
    pieces = len(names) // experts

    def expert(number: int) -> BlockWeight:
        return matrix(names[number * pieces :][:pieces]) if source.stacked else matrix(names, number)

    return BlockGroups(shape=(experts, inputs, outputs), read=expert)
