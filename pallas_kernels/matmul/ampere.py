"""Products of tiles of rows with matrices of a stack, on GPUs of compute capability 8.x (Ampere, Ada Lovelace).

As in `hopper.py`, the matrices are read where they are, and which of them a tile has is data. A thread block is one
warpgroup of four warps and computes 128 columns of a tile for some of the inputs. It copies (cp.async) the rows and weights
of later steps while it computes (mma) on those of one:

  copies in flight    | x1 w1, x2 w2, x3 w3 | x2 w2, x3 w3, x4 w4 | ...
  compute             | x0 w0               | x1 w1               | ...

Integers become the dtype of the activations in registers, on their way from shared memory to the tensor cores
(`ampere_operands`). Each warp has 32 columns and all rows, so that no weight is converted twice. The bytes of int4 hold the
first and the last inputs of a step.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.matmul import ampere_operands as operands
from pallas_kernels.matmul.ampere_operands import INPUTS
from pallas_kernels.matmul.ampere_support import COLUMNS, DEPTH, Tiles, modeled, tile_rows
from pallas_kernels.matmul.hopper_support import GRANULE, GRANULES, INT4, MATRIX, ROW, one_matrix, sum_of_splits
from pallas_kernels.matmul.int4 import INT4_ROWS, Int4Weight, size_of
from pallas_kernels.matmul.weights import Int8Weight
from pallas_kernels.pallas_types import Ref, Scratch

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

plgpu: Any = mosaic_gpu  # the oldest supported jax lacks some of its functions


def multiply(
    x: Float[Array, "T K"], w: Int8Weight | Int4Weight, *, tiles: Tiles | None = None, interpret: object = False
) -> Float[Array, "T N"]:
    """float32[T, N]: x times the matrix of `w` that its layer selects. If `tiles` is None, they are modeled."""
    assert w.layer is not None, "a stack without a selected layer is no matrix"
    num_rows = x.shape[0]
    if tiles is None:
        rows = tile_rows(num_rows)
        tiles = modeled(-(-num_rows // rows), (1, *w.shape), w.values.dtype, rows=rows)
    # Tiles are read whole.
    x, work = one_matrix(jnp.pad(x, ((0, -num_rows % tiles.rows), (0, 0))), tiles.rows)
    return sum_of_splits(multiply_tiles(x, w, work, w.layer, tiles=tiles, interpret=interpret))[:num_rows]


def multiply_tiles(
    x: Float[Array, "P K"],
    w: Float[Array, "G K N"] | Int8Weight | Int4Weight,
    work: Int[Array, "tiles columns"],
    first: Int[Array, ""],
    *,
    tiles: Tiles,
    interpret: object = False,
) -> Float[Array, "splits P N"]:
    """float32; see `hopper.multiply_tiles`. All rows of a tile are in x. `interpret` is passed to `plgpu.kernel`."""
    scaled = isinstance(w, Int8Weight | Int4Weight)
    values: jax.Array = w.values if scaled else w
    named = {"work": work, "first": first.reshape(1), "x": x, "w": values}
    if scaled:
        named["scales"] = w.scales
    if isinstance(w, Int4Weight) and w.offsets is not None:
        named["offsets"] = w.offsets
    num_inputs, num_columns = w.shape[-2:]
    spec = _Spec(
        tiles=tiles,
        num_tiles=work.shape[0] - 1,
        num_inputs=num_inputs,
        num_columns=num_columns,
        size=size_of(w),
        dtype=np.dtype(x.dtype),
        stored=np.dtype(values.dtype),
        interpreted=bool(interpret),
    )

    def kernel(*refs: Ref) -> None:
        _multiply(dict(zip([*named, "out"], refs, strict=True)), spec)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((tiles.splits, x.shape[0], num_columns), jnp.float32),
        grid=(spec.num_tiles * spec.items_of_tile,),
        grid_names=("block",),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret or None,
        kernel_name="multiply_tiles",
    )(*named.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Spec:
    """The static properties of a kernel."""

    tiles: Tiles
    num_tiles: int
    num_inputs: int
    num_columns: int
    size: int | None  # inputs that share a scale, of int4
    dtype: np.dtype  # of the operands of products
    stored: np.dtype  # `dtype`, int8, or uint8 for int4
    interpreted: bool  # runs in the Pallas interpreter, which lacks some constructs

    @property
    def converted(self) -> bool:
        return self.stored != self.dtype

    @property
    def is_int4(self) -> bool:
        return self.stored == INT4

    @property
    def stored_rows(self) -> int:
        """Rows of the weights that hold the inputs of a step."""
        return DEPTH // 2 if self.is_int4 else DEPTH

    @property
    def items_of_tile(self) -> int:
        return -(-self.num_columns // COLUMNS) * self.tiles.splits

    @property
    def steps(self) -> int:
        return self.num_inputs // DEPTH

    @property
    def steps_per_split(self) -> int:
        return -(-self.steps // self.tiles.splits)


def _multiply(refs: dict[str, Ref], spec: _Spec) -> None:
    tiles = spec.tiles
    size = spec.stored.itemsize
    # Rows of 16 inputs, which are loaded at the same time; of weights as many columns as fit into 128 bytes.
    x_tiled = plgpu.TilingTransform((GRANULE, INPUTS)), plgpu.SwizzleTransform(2 * INPUTS)
    w_tiled = plgpu.TilingTransform((GRANULE, 128 // size)), plgpu.SwizzleTransform(128)
    scratch: dict[str, Scratch] = {
        "x_buffer": plgpu.SMEM((tiles.stages, tiles.rows, DEPTH), spec.dtype, transforms=x_tiled),
        "w_buffer": plgpu.SMEM((tiles.stages, spec.stored_rows, COLUMNS), spec.stored, transforms=w_tiled),
    }
    if spec.interpreted:  # the interpreter has no cp.async, so each step has a barrier instead
        scratch["full"] = plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages)

    def body(*allocated: Ref) -> None:
        block = _Block(refs | dict(zip(scratch, allocated, strict=True)), spec)
        pl.when(block.has_work)(block.run)

    pl.run_scoped(body, *scratch.values(), collective_axes="warpgroup")


class _Block:
    """The work of one thread block."""

    def __init__(self, refs: dict[str, Ref], spec: _Spec) -> None:
        self.refs, self.spec = refs, spec
        # Blocks that run at the same time have the same columns and other rows, so that they read the same weights.
        block = lax.axis_index("block")
        part = lax.div(block, jnp.int32(spec.num_tiles))
        tile = block - part * spec.num_tiles
        column = lax.div(part, jnp.int32(spec.tiles.splits))
        self.split = part - column * spec.tiles.splits
        matrix, self.row, self.granules = (refs["work"][tile, number] for number in (MATRIX, ROW, GRANULES))
        self.matrix = refs["first"][0] + matrix
        self.has_work = tile < refs["work"][spec.num_tiles, 0]
        # The last columns begin earlier rather than be fewer. Another block stores those before `own_column`.
        self.column = jnp.minimum(column * COLUMNS, spec.num_columns - COLUMNS)
        self.own_column = column * COLUMNS - self.column
        self.first_step = self.split * spec.steps_per_split
        self.num_steps = jnp.minimum(spec.steps_per_split, spec.steps - self.first_step)
        self.columns = pl.ds(self.column, COLUMNS)

    def run(self) -> None:
        spec = self.spec
        for ahead in range(spec.tiles.stages - 1):
            pl.when(ahead < self.num_steps)(lambda ahead=ahead: self.fetch(jnp.int32(ahead)))
        start = jnp.zeros((spec.tiles.rows, COLUMNS), jnp.float32)
        start = start if spec.interpreted else plgpu.layout_cast(start, operands.sums(spec.dtype))
        state = start, self.factors(jnp.int32(0))
        self.store(lax.fori_loop(0, self.num_steps, self.step, state)[0])

    def step(self, i: jax.Array, state: tuple[jax.Array, list[jax.Array]]) -> tuple[jax.Array, list[jax.Array]]:
        sums, factors = state
        stages = self.spec.tiles.stages
        slot = lax.rem(i, jnp.int32(stages))
        self.await_step(slot, is_followed=i + (stages - 2) < self.num_steps)
        # Into the buffer that all warps have read: they have been waiting for one another.
        ahead = i + (stages - 1)
        pl.when(ahead < self.num_steps)(lambda: self.fetch(ahead))
        following = self.factors(jnp.minimum(i + 1, self.num_steps - 1))
        sums = self.add_product(sums, slot, factors)
        if self.spec.interpreted:
            plgpu.commit_smem()  # the interpreter copies by TMA, which needs a fence after plain reads; cp.async does not
        return sums, following

    # Copies. Each copy is a separate cp.async group, and groups complete in the order in which they were issued.

    def fetch(self, i: jax.Array) -> None:
        """Starts copying the rows and weights of step i."""
        spec, refs = self.spec, self.refs
        slot = lax.rem(i, jnp.int32(spec.tiles.stages))
        step = self.first_step + i
        x = refs["x"].at[pl.ds(self.row, spec.tiles.rows), pl.ds(step * DEPTH, DEPTH)]
        w = refs["w"].at[self.matrix, pl.ds(step * spec.stored_rows, spec.stored_rows), self.columns]
        for source, name in ((x, "x_buffer"), (w, "w_buffer")):
            target = refs[name].at[slot]
            if spec.interpreted:
                plgpu.copy_gmem_to_smem(source, target, refs["full"].at[slot])
            else:
                plgpu.copy_gmem_to_smem(source, target, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)

    def await_step(self, slot: jax.Array, *, is_followed: jax.Array) -> None:
        """Waits for the rows and weights in a buffer. Copies of later steps may still be in flight."""
        if self.spec.interpreted:
            plgpu.barrier_wait(self.refs["full"].at[slot])
            return
        following = 2 * (self.spec.tiles.stages - 2)  # the last steps also wait for later steps' copies
        lax.cond(is_followed, lambda: plgpu.wait_gmem_to_smem(following), lambda: plgpu.wait_gmem_to_smem(0))

    def factors(self, i: jax.Array) -> list[jax.Array]:
        """The scales, then the offsets, of int4 in step i, a vector for each half of its inputs that has its own."""
        spec = self.spec
        if spec.size is None:
            return []
        step = self.first_step + i
        if spec.size == INT4_ROWS:
            rows = [2 * step, 2 * step + 1]
        else:
            rows = [lax.div(step, jnp.int32(spec.size // DEPTH))]
        arrays = [self.refs[name] for name in ("scales", "offsets") if name in self.refs]
        return [self.load_columns(array.at[self.matrix, row], of_words=True) for array in arrays for row in rows]

    def load_columns(self, vector: Ref, *, of_words: bool) -> jax.Array:
        """Those of this block, as in `words` or `results`."""
        vector = vector.at[self.columns]
        if self.spec.interpreted:
            return vector[...]
        layout = operands.words() if of_words else operands.results(of_words=True)
        return plgpu.load(vector, layout=layout.reduce(0), optimized=False)

    # Products.

    def add_product(self, sums: jax.Array, slot: jax.Array, factors: list[jax.Array]) -> jax.Array:
        """`sums` and the products of the step whose operands are in a buffer."""
        spec = self.spec
        x, w = self.refs["x_buffer"].at[slot], self.refs["w_buffer"].at[slot]
        for first in range(0, spec.stored_rows, INPUTS):
            rows = w.at[pl.ds(first, INPUTS)]
            for place, right in enumerate(self.operands(rows, factors)):
                left = x.at[:, pl.ds(first + place * INT4_ROWS, INPUTS)]
                if spec.interpreted:
                    sums = sums + jnp.dot(left[...], right, preferred_element_type=jnp.float32)
                else:
                    sums = plgpu.mma(sums, plgpu.load(left, layout=operands.left(spec.dtype)), right)
        return sums

    def operands(self, rows: Ref, factors: list[jax.Array]) -> list[jax.Array]:
        """The weights of 16 stored rows, two operands of an mma if they are int4."""
        spec = self.spec
        if not spec.converted:
            return [rows[...] if spec.interpreted else plgpu.load(rows, layout=operands.right(spec.dtype))]
        numbers = rows[...] if spec.interpreted else plgpu.load(rows, layout=operands.words())
        if not spec.is_int4:
            return [numbers.astype(spec.dtype) if spec.interpreted else operands.int8_operand(numbers, spec.dtype)]
        wide = [factor.astype(jnp.float32) for factor in factors]
        scales, *offsets = (wide[i : i + self.factor_rows] for i in range(0, len(wide), self.factor_rows))
        halves = [(scales[i], offsets[0][i] if offsets else None) for i in (0, self.factor_rows - 1)]
        made = operands.int4_halves(numbers, halves, spec.dtype, interpreted=spec.interpreted)
        return made if spec.interpreted else [operands.float_operand(half) for half in made]

    @property
    def factor_rows(self) -> int:
        """How many scales of an output a step has."""
        return 2 if self.spec.size == INT4_ROWS else 1

    def store(self, result: jax.Array) -> None:
        spec, out = self.spec, self.refs["out"]
        if not spec.interpreted:
            result = operands.in_order(result, spec.dtype, of_words=spec.converted)
        if spec.converted and not spec.is_int4:
            scales = self.load_columns(self.refs["scales"].at[self.matrix], of_words=False)
            scales = lax.broadcast_in_dim(scales, result.shape, [1])
            result = result * (scales if spec.interpreted else plgpu.layout_cast(scales, operands.results(of_words=True)))
        for granule in range(spec.tiles.rows // GRANULE):

            @pl.when(granule < self.granules)
            def _(first: int = GRANULE * granule) -> None:
                target = out.at[self.split, pl.ds(self.row + first, GRANULE), self.columns]
                rows = result[first : first + GRANULE]
                operands.store_from(target, rows, self.own_column, of_words=spec.converted, interpreted=spec.interpreted)
