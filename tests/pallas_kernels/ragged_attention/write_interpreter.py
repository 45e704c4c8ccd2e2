"""Compares the kernel that rotates and writes, run in the Pallas Mosaic-GPU interpreter, with XLA, in a separate process:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.pallas_kernels.ragged_attention.write_interpreter all

As in `gpu_interpreter`, which says why it is one.
"""

from __future__ import annotations

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from pallas_kernels.ragged_attention import CacheLayer
from pallas_kernels.ragged_attention.gpu.write import rotate_and_write
from pallas_kernels.ragged_attention.xla import write_kv
from pallas_kernels.rotary import rotate
from tests.pallas_kernels.ragged_attention.gpu_interpreter import compile_once

LAYERS, LAYER, NUM_BLOCKS = 3, 1, 4
# A compiler may or may not round a product before it is subtracted, which can change the last bit of a result.
ULP = {"bfloat16": 2.0**-7, "float16": 2.0**-10}
PAST = 11  # rows after those of the last token


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    num_tokens: int = 5
    num_kv_heads: int = 2
    group: int = 3
    head_dim: int = 64
    pairs: int = 32
    block_size: int = 8
    dtype: str = "bfloat16"
    activations: str = ""
    """Their dtype; "": that of the caches."""


ALL = [
    Case(),
    Case(num_tokens=3, num_kv_heads=1, group=20, head_dim=80, pairs=20),
    Case(num_tokens=3, num_kv_heads=3, group=1, head_dim=16, pairs=8),
    Case(num_tokens=1, group=4, head_dim=128, pairs=64, block_size=32),
    Case(num_kv_heads=1, group=5, head_dim=80, pairs=40, dtype="float16"),
    Case(num_kv_heads=3, group=2, head_dim=96, pairs=48),
    Case(num_kv_heads=1, group=7, head_dim=112, pairs=56),
    Case(num_tokens=3, group=2, head_dim=256, pairs=64),
    Case(num_tokens=2, num_kv_heads=1, group=4, head_dim=512, pairs=64),
    Case(group=1, head_dim=32, pairs=5, activations="float32"),
    Case(num_tokens=2, num_kv_heads=8, group=4, head_dim=128, pairs=64, activations="float32"),
]


def check_case(case: Case) -> None:
    rng = np.random.default_rng(0)
    caches_dtype, dtype = jnp.dtype(case.dtype), jnp.dtype(case.activations or case.dtype)
    tokens, heads = case.num_tokens, case.num_kv_heads * case.group

    def normal(*shape: int, dtype: jnp.dtype) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    q, k, v = (normal(tokens, n, case.head_dim, dtype=dtype) for n in (heads, case.num_kv_heads, case.num_kv_heads))
    shape = (LAYERS * NUM_BLOCKS, case.num_kv_heads, case.block_size, case.head_dim)
    caches = [normal(*shape, dtype=caches_dtype) for _ in range(2)]
    num_slots = NUM_BLOCKS * case.block_size
    slots = rng.permutation(num_slots)[:tokens].astype(np.int32)
    slots[tokens // 2 :: 2] = num_slots + 3  # in the next layer: padding
    slots[tokens - 1] = -1 if tokens > 3 else slots[tokens - 1]
    angle = rng.normal(size=(tokens, case.pairs)).astype(np.float32)
    rotation = jnp.cos(angle), jnp.sin(angle)
    interpret_pallas_call.reset_gpu_interpret_mode_state()
    found = jax.jit(rotate_and_write, static_argnames=("num_blocks", "num_rows", "dtype", "interpret"))(
        q,
        k,
        v,
        rotation,
        *caches,
        kv_slots=jnp.asarray(slots),
        numbers=jnp.asarray([LAYER], jnp.int32),
        num_blocks=NUM_BLOCKS,
        num_rows=tokens * case.group + PAST,
        dtype=caches_dtype,
        interpret=InterpretGPUParams(detect_races=True),
    )
    assert not interpret_pallas_call.get_races().races_found
    layer = CacheLayer(number=LAYER, num_blocks=NUM_BLOCKS)
    written = write_kv(rotate(k, *rotation), v, *caches, kv_slots=jnp.asarray(slots), layer=layer)
    queries = rotate(q, *rotation).astype(caches_dtype).reshape(tokens, case.num_kv_heads, case.group, case.head_dim)
    queries = queries.swapaxes(0, 1).reshape(case.num_kv_heads, tokens * case.group, case.head_dim)
    padded = jnp.pad(queries, ((0, 0), (0, PAST), (0, 0)))
    for one, other in zip(found, (padded, written[0]), strict=False):
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        np.testing.assert_allclose(one, other, rtol=ULP[case.dtype], atol=1e-6)
        np.testing.assert_array_equal(one == 0, other == 0)
    np.testing.assert_array_equal(found[2], written[1])


def main(which: str) -> None:
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    compile_once()
    for case in ALL if which == "all" else [ALL[int(which)]]:
        check_case(case)
        print(f"equal: {case}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
