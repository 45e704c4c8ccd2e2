"""What is static about a kernel of `hopper.py`, and the pieces of its work."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.matmul.hopper_support import FLOAT8, INT4, Tiles
from pallas_kernels.pallas_types import Ref

WARPGROUPS = 2  # that compute


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """The static properties of a kernel."""

    tiles: Tiles
    rows_in: int  # rows of x that are read for a tile; the others are left unchanged
    blocks: int  # thread blocks
    depth: int  # inputs per step
    num_inputs: int  # K
    num_columns: int  # N
    of_outputs: bool  # a scale for each column
    in_blocks: bool  # and for each step
    size: int | None  # inputs that share a scale, of int4
    dtype: np.dtype  # of the operands of products
    stored: np.dtype  # `dtype`, that of 8-bit floats, int8, or uint8 for int4
    interpreted: bool  # runs in the Pallas interpreter, which lacks some constructs

    @property
    def converted(self) -> bool:
        return self.stored != self.dtype

    @property
    def is_float8(self) -> bool:
        """Whether the weights are 8-bit floats [G, N, K]."""
        return self.stored == FLOAT8

    @property
    def is_int4(self) -> bool:
        return self.stored == INT4

    def factors_of(self, refs: dict[str, Ref]) -> list[str]:
        """Which of the operands are copied for each step, beside rows and weights."""
        return [name for name in ("scales", "offsets") if name in refs] if self.is_int4 else []

    @property
    def stored_rows(self) -> int:
        """Rows of the weights that hold the inputs of a step."""
        return self.depth // 2 if self.is_int4 else self.depth

    @property
    def factor_rows(self) -> int:
        """How many scales of an output a step has, if they are copied for each."""
        assert self.size is not None, "only int4 has such scales"
        return max(1, self.depth // self.size)

    def factor_row(self, step: jax.Array) -> jax.Array:
        """The first of them."""
        assert self.size is not None, "only int4 has such scales"
        return step * self.factor_rows if self.size <= self.depth else lax.div(step, jnp.int32(self.size // self.depth))

    @property
    def steps(self) -> int:
        return self.num_inputs // self.depth

    @property
    def steps_per_split(self) -> int:
        return -(-self.steps // self.tiles.splits)

    @property
    def items_per_tile(self) -> int:
        return -(-self.num_columns // (WARPGROUPS * self.tiles.columns)) * self.tiles.splits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """Some columns and inputs of one tile."""

    matrix: jax.Array
    row: jax.Array
    granules: jax.Array
    column: jax.Array  # the first of the block
    split: jax.Array
    first_step: jax.Array
    num_steps: jax.Array
