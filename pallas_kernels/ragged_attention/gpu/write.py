"""One kernel that rotates a step's queries and keys, writes keys and values into both caches in place, and lays out the
queries for the attention kernels.

XLA launches four kernels for it: it has no scatter into two arrays, and its fusions have one shape of result. The caches are
passed as references, which makes the call's results take their place.

Every thread has two vectors of numbers that are rotated with each other, of a head of a token. The threads of a block have
consecutive ones of the same token:

    numbers of a head    | 0 ... P | P ... 2P | 2P ... D |
    thread t             | t       | t        |            rotated, the first P / V threads
    thread u             |         |          | u u      | kept

Pallas has no layout of registers for a head of fewer numbers than threads, nor for every width, so that each thread's loads
and stores are inlined Mosaic GPU. What is loaded, how it is computed and where it is stored is Pallas, also in the
interpreter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mosaic
from jax.experimental.pallas import mosaic_gpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector
from jax.typing import DTypeLike

from pallas_kernels.pallas_types import Layout, Ref
from pallas_kernels.ragged_attention.gpu.softmax_tile import KIND, LAYER, ROTATION, of_layer

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

plgpu: Any = mosaic_gpu  # the oldest supported jax lacks some of their functions
mgpu: Any = mosaic
THREADS, _LANES = 128, 32  # of a thread block, and of a warp
MOST_NUMBERS = 8  # of a vector: 16 bytes of 16-bit numbers
_INTERPRETED_BLOCKS = 4  # the interpreter is slow to start one, so that these do the work of all


def rotate_and_write(
    q: Float[Array, "T H D"],
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    rotation: tuple[Float[Array, "*R T P"], Float[Array, "*R T P"]],
    k_cache: Float[Array, "blocks K B D"],
    v_cache: Float[Array, "blocks K B D"],
    *,
    kv_slots: Int[Array, "*kinds T"],
    numbers: Int[Array, " numbers"],
    num_blocks: int,
    num_rows: int,
    dtype: DTypeLike,
    most_numbers: int = MOST_NUMBERS,
    interpret: object = False,
) -> tuple[Float[Array, "K rows D"], Float[Array, "blocks K B D"], Float[Array, "blocks K B D"]]:
    """The queries as [K, num_rows, D], and both caches with the keys and values of the step.

    Args:
      q, k, v: parts of one projection, which is read where it is if they are adjacent slices of it.
      rotation: cosines and sines f32[T, P] with P up to D / 2; see `rotary.rotate`.
      kv_slots: as for `ragged_attention`; what is outside of the layer's blocks is not written.
      numbers: of the layer; see `softmax_tile.LAYER`.
      num_blocks: of a layer.
      num_rows: at least T * G; later rows are zeros.
      dtype: of the queries.
      most_numbers: of a vector; the interpreter is faster with more.
      interpret: passed to `pl.kernel`.
    """
    num_tokens, num_heads, head_dim = q.shape
    # In this form XLA recognizes adjacent columns of one array and takes the array itself.
    columns = jnp.concatenate([x.reshape(num_tokens, 1, -1) for x in (q, k, v)], axis=2)
    spec = _Spec(
        num_tokens=num_tokens,
        num_heads=num_heads,
        num_kv_heads=k.shape[1],
        head_dim=head_dim,
        pairs=rotation[0].shape[-1],
        num_blocks=num_blocks,
        num_rows=num_rows,
        most_numbers=most_numbers,
        interpreted=bool(interpret),
    )
    qkv = columns.reshape(num_tokens, spec.all_heads, head_dim)
    names = ["slots", "numbers", "cos", "sin", "qkv", "keys", "values", "queries"]
    parts = -(-num_rows // spec.group) * spec.parts
    blocks = min(parts, _INTERPRETED_BLOCKS) if interpret else parts

    def kernel(*refs: Ref) -> None:
        named, block = dict(zip(names, refs, strict=True)), lax.axis_index("block")
        named |= {name: of_layer(named, name, ROTATION, 2) for name in ("cos", "sin")}
        named["slots"] = of_layer(named, "slots", KIND, 1)
        if blocks == parts:
            _write(named, spec, block)
        else:
            mine = lax.div(parts - block + (blocks - 1), jnp.int32(blocks))
            lax.fori_loop(0, mine, lambda i, _: _write(named, spec, block + i * blocks), None)

    call: Any = pl.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((spec.num_kv_heads, num_rows, head_dim), dtype)],
        mesh=plgpu.Mesh(grid=(blocks,), grid_names=("block",), kernel_name="rotate_and_write"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
        name="rotate_and_write",
    )

    @pl.run_state  # unlike references from `jax.new_ref`, its own have no effect that a `custom_jvp` would have to know
    def write(state: tuple[Ref, Ref, Ref]) -> None:
        queries, *caches = state
        (queries[...],) = call(kv_slots, numbers, *rotation, qkv, *caches)

    unused = jnp.zeros((spec.num_kv_heads, num_rows, head_dim), dtype)
    return write((unused, k_cache, v_cache))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Spec:
    """The static properties of a kernel."""

    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    pairs: int  # of a head that are rotated
    num_blocks: int  # of a layer
    num_rows: int
    most_numbers: int  # of a vector
    interpreted: bool

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def all_heads(self) -> int:
        """Of queries, keys and values."""
        return self.num_heads + 2 * self.num_kv_heads

    @property
    def vector(self) -> int:
        """Adjacent numbers of a thread."""
        return math.gcd(self.pairs, self.head_dim // 2, self.most_numbers)

    @property
    def threads_of_head(self) -> int:
        return self.head_dim // (2 * self.vector)

    @property
    def parts(self) -> int:
        """Thread blocks of a token."""
        return -(-self.all_heads * self.threads_of_head // THREADS)

    @property
    def layout(self) -> Layout:
        """[THREADS, vector]: a row for each thread."""
        width = self.vector
        tiling = plgpu.Tiling(((THREADS, width), (_LANES, width)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-2,), vector_dim=-1)


def _write(refs: dict[str, Ref], spec: _Spec, block: jax.Array) -> None:
    """One thread block: some heads of one token. Tokens after the last have rows of zeros, and no keys and values."""
    parts, width = jnp.int32(spec.parts), jnp.int32(spec.vector)
    number = lax.div(block, parts)
    token, is_token = jnp.minimum(number, spec.num_tokens - 1), number < spec.num_tokens
    slot = refs["slots"][token]

    def along_numbers(x: jax.Array) -> jax.Array:
        """[THREADS] -> [THREADS, vector]"""
        x = lax.broadcast_in_dim(x, (THREADS, spec.vector), [0])
        return x if spec.interpreted else plgpu.layout_cast(x, spec.layout)

    thread = lax.broadcasted_iota(jnp.int32, (THREADS,), 0)
    if not spec.interpreted:
        thread = plgpu.layout_cast(thread, spec.layout.reduce(1))
    place = thread + (block - number * parts) * THREADS
    head = lax.div(place, jnp.full_like(place, spec.threads_of_head))
    place = place - head * spec.threads_of_head
    is_turned = place < spec.pairs // spec.vector
    first = place * width * jnp.where(is_turned, 1, 2)
    second = first + jnp.where(is_turned, spec.pairs, width)

    source = jnp.minimum(head, spec.all_heads - 1)
    pair = [_load(refs["qkv"], token, (source, column), spec).astype(jnp.float32) for column in (first, second)]
    angle = jnp.where(is_turned, first, 0)
    cos, sin = (_load(refs[name], token, (angle,), spec) for name in ("cos", "sin"))
    turned = pair[0] * cos - pair[1] * sin, pair[1] * cos + pair[0] * sin
    turns = along_numbers(jnp.where(is_turned & (head < spec.num_heads + spec.num_kv_heads), 1, 0)) > 0
    results = [jnp.where(turns, new, old) for new, old in zip(turned, pair, strict=True)]

    kv_head = lax.div(head, jnp.full_like(head, spec.group))
    row = number * spec.group + head - kv_head * spec.group
    is_row = (head < spec.num_heads) & (row < spec.num_rows)
    for column, result in zip((first, second), results, strict=True):
        _store(refs["queries"], (kv_head, row, column), jnp.where(is_token, result, 0.0), is_row, spec)

    block_size = refs["keys"].shape[2]

    @pl.when(is_token & (slot >= 0) & (slot < spec.num_blocks * block_size))
    def _() -> None:
        block_of_slot = lax.div(slot, jnp.int32(block_size))
        offset = slot - block_of_slot * block_size
        block_of_layer = refs["numbers"][LAYER] * spec.num_blocks + block_of_slot
        for name, first_head in (("keys", spec.num_heads), ("values", spec.num_heads + spec.num_kv_heads)):
            own = head - first_head
            is_own = (own >= 0) & (own < spec.num_kv_heads)
            target = refs[name].at[block_of_layer, :, offset]
            for column, result in zip((first, second), results, strict=True):
                _store(target, (own, column), result.astype(refs["qkv"].dtype), is_own, spec)


def _load(source: Ref, token: jax.Array, at: tuple[jax.Array, ...], spec: _Spec) -> jax.Array:
    """[THREADS, vector]: what each thread reads of a token, from where it says on."""
    if spec.interpreted:
        *axes, column = (index[:, None] for index in at)
        return source[token][*axes, column + jnp.arange(spec.vector)]
    kind = plgpu.ShapeDtypeStruct((THREADS, spec.vector), source.dtype, layout=spec.layout)
    layouts = [spec.layout.reduce(1)] * len(at)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *layouts), return_type=kind)
    def load(_: object, source: ir.Value, *at: Any) -> Any:
        layout, register = spec.layout.to_mgpu(), ir.VectorType.get((spec.vector,), source.type.element_type)
        numbers = vector.load(register, source, _indices(at), alignment=_alignment(register))
        registers = np.full(layout.registers_shape((THREADS, spec.vector)), numbers, dtype=object)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return load(source.at[token], *at)


def _store(target: Ref, at: tuple[jax.Array, ...], numbers: jax.Array, stores: jax.Array, spec: _Spec) -> None:
    """Writes the numbers [THREADS, vector] of each thread for which `stores` is true to where it says."""
    numbers = numbers.astype(target.dtype)
    if spec.interpreted:

        def thread(i: jax.Array, _: None) -> None:
            @pl.when(stores[i])
            def _() -> None:
                *axes, column = (index[i] for index in at)
                target.at[*axes, pl.ds(column, spec.vector)][...] = numbers[i]

        number = jnp.arange(THREADS, dtype=jnp.int32)
        begin, end = jnp.min(jnp.where(stores, number, THREADS)), jnp.max(jnp.where(stores, number + 1, 0))
        lax.fori_loop(begin, end, thread, None)
        return
    layout = spec.layout.reduce(1)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), spec.layout, layout, *[layout] * len(at)))
    def store(_: object, target: ir.Value, numbers: Any, stores: Any, *at: Any) -> None:
        (register,) = numbers.registers.flat
        (condition,) = _scalars([stores])
        with mgpu.when(condition):
            vector.store(register, target, _indices(at), alignment=_alignment(register.type))

    store(target, numbers, stores, *at)


def _alignment(register: Any) -> int:
    """In bytes: a vector's number of bytes, of which the hardware moves 16 at a time."""
    return min(16, register.shape[0] * mgpu.bytewidth(register.element_type))


def _indices(arrays: Sequence[Any]) -> list[ir.Value]:
    """The numbers of this thread as indices."""
    return [arith.index_cast(ir.IndexType.get(), number) for number in _scalars(arrays)]


def _scalars(arrays: Sequence[Any]) -> list[ir.Value]:
    """The numbers of this thread in arrays [THREADS]."""
    return [vector.extract(register, [], [0]) for array in arrays for register in array.registers.flat]
