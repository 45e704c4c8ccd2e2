"""Compares the GPU kernel, run in the Pallas Mosaic-GPU interpreter, with the reference, in a separate process:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.pallas_kernels.ragged_attention.gpu_interpreter quick

The interpreter runs every warpgroup in a thread that waits inside a callback. XLA's pool has as many threads as there are
cores or devices, and must have more than two.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from jax._src import core
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from pallas_kernels.ragged_attention import Latents
from pallas_kernels.ragged_attention.arguments import Plans
from pallas_kernels.ragged_attention.gpu.call import plan_gpu, ragged_attention_gpu, stack_plans
from pallas_kernels.ragged_attention.gpu.tile_sizes import GpuTiles
from pallas_kernels.ragged_attention.quantized import is_quantized
from pallas_kernels.ragged_attention.reference import ragged_attention_reference
from tests.pallas_kernels.ragged_attention.ragged_batches import Batch, make_batch, make_latent

NUM_SEQUENCES, NUM_TOKENS, MAX_CONTEXT = 5, 40, 330  # contexts of three steps and more
# Weights are rounded to the dtype of the cache before they are multiplied by the values, and so are the results.
TOLERANCE = {"bfloat16": 2e-2, "float16": 3e-3, "int8": 2e-2, "float8_e4m3fn": 2e-2}
NO_WINDOW = 2**31 - 1
MIXED = [(16, 271), (1, 15), (0, 0), (2, 2), (1, 240)]  # (new tokens, context) of each sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    generation: str = "hopper"
    num_kv_heads: int = 2
    group: int = 3
    head_dim: int = 64
    block_size: int = 16
    soft_cap: float | None = None
    alibi: bool = False
    sinks: bool = False
    window: bool = True
    pairs: int = 0  # of a head that are rotated
    kinds: bool = False  # whether plan, places and rotation are one of two, as in a model with several kinds of layers
    latents: Latents | None = None
    has_values: bool = False  # whether there is a cache of values although they are in their keys, as beside an indexer
    dtype: str = "bfloat16"
    chunk_keys: int = 64
    single_keys: int = 64
    stages: int = 2
    blocks: int = 3
    pieces: int = 12

    @property
    def tiles(self) -> GpuTiles:
        return GpuTiles(
            chunk_keys=self.chunk_keys,
            chunk_stages=self.stages,
            single_keys=self.single_keys,
            single_stages=self.stages,
            pieces=self.pieces,
            min_piece=64,
            blocks=self.blocks,
        )

    def options(self) -> dict[str, Any]:
        heads = self.num_kv_heads * self.group
        options: dict[str, Any] = {"soft_cap": self.soft_cap, "latents": self.latents}
        if self.latents is not None and not self.has_values:
            options["v_cache"] = None
        if self.alibi:
            options["alibi_slopes"] = jnp.asarray(2.0 ** -np.linspace(1, 8, heads), jnp.float32)
        if self.sinks:
            options["sinks"] = jnp.asarray(np.linspace(-3, 6, heads), jnp.float32)
        if self.pairs:
            angle = jnp.asarray(np.random.default_rng(3).normal(size=(NUM_TOKENS, self.pairs)), jnp.float32)
            options["rotation"] = (jnp.cos(angle), jnp.sin(angle))
        return options


LATENTS = Latents(key_dim=576, value_dim=512)  # of DeepSeek V2 and V3
NARROW = Latents(key_dim=288, value_dim=256)  # of MiniCPM3
QUICK = [
    Case(soft_cap=5.0, sinks=True, pairs=32, kinds=True),
    Case(num_kv_heads=1, group=16, head_dim=640, block_size=32, latents=LATENTS),
]
AMPERE_WIDE: Any = {"generation": "ampere", "chunk_keys": 32, "single_keys": 32}
ALL = [
    *QUICK,
    Case(generation="ampere", num_kv_heads=1, window=False, sinks=True, stages=3, blocks=2),
    Case(window=False, chunk_keys=128),
    Case(num_kv_heads=1, group=4, head_dim=128, block_size=32, alibi=True, chunk_keys=128, single_keys=128),
    Case(num_kv_heads=3, group=1, block_size=128, dtype="float16", stages=3),
    Case(num_kv_heads=1, group=8, head_dim=80, block_size=8, sinks=True, alibi=True, blocks=1),
    Case(num_kv_heads=1, group=71, block_size=64, pieces=5),
    Case(num_kv_heads=2, group=2, head_dim=256, block_size=256, soft_cap=3.0, window=False, stages=3),
    Case(num_kv_heads=1, group=6, head_dim=96, block_size=16, sinks=True, window=False, blocks=7, pieces=1),
    Case(num_kv_heads=1, group=128, head_dim=288, block_size=64, latents=NARROW, window=False, blocks=2, pieces=6),
    Case(num_kv_heads=1, group=40, head_dim=288, block_size=16, latents=NARROW, stages=3, has_values=True),
    Case(num_kv_heads=1, group=20, head_dim=576, block_size=128, latents=LATENTS, dtype="float16", sinks=True),
    Case(num_kv_heads=2, group=8, head_dim=512, block_size=32, soft_cap=5.0, stages=1),
    Case(num_kv_heads=1, group=2, head_dim=512, block_size=8, alibi=True, sinks=True, pairs=64, stages=1),
    Case(num_kv_heads=1, group=3, head_dim=384, block_size=128, blocks=5),
    Case(dtype="int8", block_size=64, window=False),
    Case(dtype="float8_e4m3fn", num_kv_heads=1, group=4, head_dim=128, block_size=128, sinks=True, stages=3, chunk_keys=128),
    Case(generation="ampere", dtype="int8", block_size=64, soft_cap=5.0),
    Case(generation="ampere", dtype="int8", num_kv_heads=1, group=40, head_dim=128, block_size=128, stages=3),
    Case(generation="ampere", alibi=True, block_size=8, head_dim=128, pairs=16, kinds=True),
    Case(generation="ampere", num_kv_heads=3, group=1, block_size=128, dtype="float16", soft_cap=5.0),
    Case(generation="ampere", num_kv_heads=1, group=17, head_dim=80, block_size=32, sinks=True, blocks=1),
    Case(generation="ampere", num_kv_heads=1, group=40, block_size=64, alibi=True, stages=3),
    Case(generation="ampere", num_kv_heads=1, group=71, chunk_keys=32, single_keys=32, pieces=5),
    Case(num_kv_heads=1, group=16, head_dim=640, block_size=32, latents=LATENTS, stages=3, has_values=True, **AMPERE_WIDE),
    Case(num_kv_heads=1, group=60, head_dim=288, block_size=16, latents=NARROW, window=False, **AMPERE_WIDE),
    Case(num_kv_heads=2, group=8, head_dim=512, block_size=64, soft_cap=5.0, sinks=True, stages=1, **AMPERE_WIDE),
    Case(generation="ampere", group=2, head_dim=256, block_size=256, chunk_keys=32, single_keys=32, blocks=7),
    Case(num_kv_heads=1, group=5, head_dim=96, latents=Latents(key_dim=96, value_dim=64), pairs=32),
    Case(dtype="int8", num_kv_heads=1, group=4, head_dim=96, block_size=64, latents=Latents(key_dim=80, value_dim=64)),
]


@st.composite
def ragged_chunks(draw: st.DrawFn) -> list[tuple[int, int]]:
    chunks, room = [], NUM_TOKENS
    for _ in range(NUM_SEQUENCES):
        query = draw(st.sampled_from([0, 1, 1, 1, 2, 5, 16, 24]).filter(lambda n: n <= room))  # noqa: B023
        old = draw(st.one_of(st.sampled_from([0, 15, 16, 63, 64, 127, 128, 255]), st.integers(0, MAX_CONTEXT - 24)))
        chunks.append((query, query + old if query else 0))
        room -= query
    return chunks


@functools.cache
def compiled(implementation: str, case: Case) -> Any:
    if implementation == "reference":
        return jax.jit(ragged_attention_reference)
    interpret = InterpretGPUParams(detect_races=True)
    return jax.jit(
        functools.partial(ragged_attention_gpu, generation=case.generation, tiles=case.tiles, interpret=interpret)
    )


def run(implementation: str, batch: Batch, case: Case, **options: Any) -> list[np.ndarray]:
    arguments = batch.arguments(**case.options(), **options)
    if case.kinds and implementation == "gpu":
        arguments |= second_of_two_kinds(arguments, case)
    return [np.asarray(x, np.float32) for x in jax.tree.leaves(compiled(implementation, case)(**arguments))]


def second_of_two_kinds(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """Index and scoring that read theirs from stacks, in which those of another kind of layer come first."""
    index, scoring, q = arguments["index"], arguments["scoring"], arguments["q"]
    nowhere = jnp.full_like(index.kv_slots, -1)
    other = dataclasses.replace(index, block_tables=jnp.zeros_like(index.block_tables), kv_slots=nowhere)
    plans = [
        plan_gpu(
            arguments["k_cache"],
            each,
            window,
            num_tokens=q.shape[0],
            num_heads=q.shape[1],
            num_blocks=arguments["layer"].num_blocks,
            tiles=case.tiles,
            generation=case.generation,
        )
        for each, window in ((other, 3), (index, scoring.sliding_window))
    ]
    plan = stack_plans(plans, [other, index])[1]
    if scoring.rotation is not None:
        rotation = tuple(jnp.stack([jnp.zeros_like(table), table]) for table in scoring.rotation)
        scoring = dataclasses.replace(scoring, rotation=rotation, rotation_row=jnp.int32(1))
    return {"index": dataclasses.replace(index, plans=Plans(gpu=plan)), "scoring": scoring}


def check_case(case: Case, *, examples: int) -> None:
    max_blocks = -(-MAX_CONTEXT // case.block_size)
    windows = st.sampled_from([NO_WINDOW, NO_WINDOW, 1, 20, 150]) if case.window else st.none()

    # Without the phase that explains failures, whose tracing of every line slows the tracing of programs. The first batch
    # that is generated is empty, so a single one is that of `example`.
    phases = [Phase.explicit, *([Phase.generate] if examples > 1 else [])]

    @settings(max_examples=examples, phases=phases, deadline=None, derandomize=True, database=None)
    @given(chunks=ragged_chunks(), window=windows, layer=st.integers(0, 2))
    @example(chunks=MIXED, window=20 if case.window else None, layer=1)
    def check(chunks: list[tuple[int, int]], window: int | None, layer: int) -> None:
        dtype = jnp.dtype(case.dtype)
        batch = make_batch(
            chunks,
            num_kv_heads=case.num_kv_heads,
            group=case.group,
            head_dim=case.head_dim,
            block_size=case.block_size,
            layer=layer,
            num_tokens=NUM_TOKENS,
            max_blocks=max_blocks,
            num_blocks=NUM_SEQUENCES * max_blocks,
            dtype=dtype,
        )
        for name in ("q", "k", "v"):
            batch.arrays[name] = batch.arrays[name].astype(jnp.bfloat16 if is_quantized(dtype) else dtype)
        if case.latents is not None:
            make_latent(batch, case.latents)
        options = {} if window is None else {"sliding_window": jnp.asarray(window, jnp.int32)}
        expected = run("reference", batch, case, **options)
        interpret_pallas_call.reset_gpu_interpret_mode_state()
        out, *caches = run("gpu", batch, case, **options)
        assert not interpret_pallas_call.get_races().races_found
        width = case.head_dim if case.latents is None else case.latents.value_dim
        np.testing.assert_allclose(out[..., :width], expected[0][..., :width], atol=TOLERANCE[case.dtype], rtol=0)
        assert np.isfinite(out).all()
        for i, (cache, expected_cache) in enumerate(zip(caches, expected[1:], strict=True)):
            # A compiler may or may not round a product before another is added, which can change a rotated key's last bit.
            is_rotated = case.pairs > 0 and i == 0
            np.testing.assert_allclose(cache, expected_cache, rtol=2.0**-7 if is_rotated else 0, atol=1e-6 * is_rotated)

    check()


def compile_once() -> None:
    """Makes all warpgroups and thread blocks share one compiled program; the interpreter compiles one for each."""
    programs: dict[Any, Any] = {}
    lock = threading.Lock()

    def run_jaxpr(jaxpr: Any, consts: Any, *args: Any) -> None:
        def evaluate(consts: Any, *args: Any) -> None:
            core.eval_jaxpr(jaxpr, consts, *args)

        key = (id(jaxpr), *((x.shape, str(x.dtype)) for x in jax.tree.leaves((consts, args))))
        with lock:
            if key not in programs:  # keeps the jaxpr alive, so that its id is not reused
                programs[key] = (jaxpr, jax.jit(evaluate).lower(consts, *args).compile())
        programs[key][1](consts, *args)

    thread_map._run_jaxpr = run_jaxpr


def main(which: str, examples: int) -> None:
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    compile_once()
    for case in QUICK if which == "quick" else ALL if which == "all" else [ALL[int(which)]]:
        check_case(case, examples=examples)
        print(f"equal: {case}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
