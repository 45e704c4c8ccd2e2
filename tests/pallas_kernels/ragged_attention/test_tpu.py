"""The TPU kernels equal the reference in the Pallas TPU interpreter, which models memories, copies and semaphores.

Copies run in two modes: "eager", in which the race detector sees every access, and "on_wait", in which data arrives only
when the kernel waits for it. Neither replaces the compiler: see `make tpu-check`.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from fastgen_jax.core import packs_heads, stored_head_dim
from pallas_kernels import ragged_attention as ragged_attention_room
from pallas_kernels.ragged_attention import CacheLayer, Latents, ragged_attention
from pallas_kernels.ragged_attention.autotune import autotune, candidates
from pallas_kernels.ragged_attention.measured_tiles import entries
from pallas_kernels.ragged_attention.packed import pack_caches, unpack_cache
from pallas_kernels.ragged_attention.reference import ragged_attention_reference
from pallas_kernels.ragged_attention.tpu.call import ragged_attention_tpu
from pallas_kernels.ragged_attention.tpu.tile_sizes import DEVICES, Shape, Tiles, choose, modeled, vmem_bytes
from pallas_kernels.ragged_attention.tpu.write import granules_of, write_kv_tpu
from pallas_kernels.ragged_attention.tpu.write_quantized import write_kv_quantized_tpu
from pallas_kernels.ragged_attention.xla import write_kv
from tests.pallas_kernels.abstract_tpu import lowering_for_tpu
from tests.pallas_kernels.races import races_found
from tests.pallas_kernels.ragged_attention.ragged_batches import Batch, as_cache, make_batch, make_latent

NUM_SEQUENCES, NUM_TOKENS, MAX_CONTEXT = 5, 40, 300  # contexts of three pieces
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}  # bfloat16: weights are rounded to 8 bits before the product with the values
NO_WINDOW = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    num_kv_heads: int = 2
    group: int = 3
    head_dim: int = 128
    block_size: int = 16
    soft_cap: float | None = None
    alibi: bool = False
    sinks: bool = False
    dtype: str = "float32"  # dtype of the cache
    q_dtype: str | None = None  # dtype of q, k and v; None: bfloat16 with a bfloat16 cache, otherwise float32
    queries: int = 8
    sequences: int = 2
    cores: int = 1
    latents: Latents | None = None  # without a cache of values

    def options(self) -> dict[str, object]:
        heads = self.num_kv_heads * self.group
        options: dict[str, object] = {"soft_cap": self.soft_cap, "latents": self.latents}
        if self.latents is not None:
            options["v_cache"] = None
        if self.alibi:
            options["alibi_slopes"] = jnp.asarray(2.0 ** -np.linspace(1, 8, heads), jnp.float32)
        if self.sinks:
            options["sinks"] = jnp.asarray(np.linspace(-3, 6, heads), jnp.float32)
        return options

    @property
    def stored_head_dim(self) -> int:
        return stored_head_dim(self.head_dim, "tpu", values_in_keys=self.latents is not None)

    @property
    def tiles(self) -> Tiles:
        return Tiles(
            queries=self.queries, keys=128 * self.sequences, sequences=self.sequences, cores=self.cores, vmem_limit=2**24
        )


QUICK = [
    (Case(head_dim=64, dtype="int8", q_dtype="bfloat16", block_size=128), "eager"),
    (Case(num_kv_heads=1, group=5, head_dim=48, latents=Latents(key_dim=40, value_dim=32)), "eager"),
]
CASES = [
    Case(num_kv_heads=1, group=4, alibi=True, dtype="bfloat16", queries=16),
    Case(soft_cap=5.0, sinks=True),
    Case(dtype="int8", block_size=128, sinks=True),
    Case(group=1, sequences=1),
    Case(num_kv_heads=3, head_dim=64, sinks=True, sequences=1),
    Case(num_kv_heads=1, group=71, head_dim=64, alibi=True, queries=16),
    Case(head_dim=64, dtype="bfloat16", group=8, num_kv_heads=1, sequences=4, sinks=True),
    Case(head_dim=64, dtype="float8_e4m3fn", num_kv_heads=3, block_size=256, sequences=1),
    Case(head_dim=32, soft_cap=5.0, alibi=True, cores=2),
    Case(head_dim=80, block_size=8, group=4, soft_cap=2.0, alibi=True),
    Case(head_dim=96, sinks=True, soft_cap=5.0, block_size=32),
    Case(num_kv_heads=1, group=8, head_dim=256, dtype="bfloat16", sequences=4, block_size=128),
    Case(num_kv_heads=5, group=1, dtype="bfloat16"),
    Case(group=2, cores=2, dtype="bfloat16", queries=16),
    Case(num_kv_heads=1, group=4, dtype="int8", q_dtype="bfloat16", block_size=128, queries=16, alibi=True),
    Case(num_kv_heads=3, dtype="float8_e4m3fn", block_size=256, soft_cap=5.0, sequences=1),
    Case(num_kv_heads=1, group=16, head_dim=576, dtype="bfloat16", latents=Latents(key_dim=576, value_dim=512)),
    Case(num_kv_heads=1, dtype="int8", block_size=128, latents=Latents(key_dim=128, value_dim=96)),
]


@st.composite
def ragged_chunks(draw: st.DrawFn) -> list[tuple[int, int]]:
    chunks, room = [], NUM_TOKENS
    for _ in range(NUM_SEQUENCES):
        query = draw(st.sampled_from([0, 1, 1, 2, 5, 16, 20]).filter(lambda n: n <= room))  # noqa: B023
        old = draw(st.one_of(st.sampled_from([0, 15, 16, 127, 128, 255]), st.integers(0, MAX_CONTEXT - 20)))
        chunks.append((query, query + old if query else 0))
        room -= query
    return chunks


def as_on_a_tpu(arguments: dict[str, object], case: Case) -> dict[str, object]:
    """The arguments with heads as wide as in the TPU cache, and with that cache, as in the decoder."""
    more = case.stored_head_dim - case.head_dim

    def pad(x: jax.Array | None) -> jax.Array | None:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)]) if more and x is not None else x

    arguments = arguments | {name: pad(arguments[name]) for name in ("q", "k", "v")}
    if more:
        arguments |= {name: pad(arguments[name]) for name in ("k_cache", "v_cache")}
    if case.latents is None and packs_heads(case.head_dim, "tpu"):
        arguments |= {"k_cache": pack_caches(arguments["k_cache"], arguments["v_cache"]), "v_cache": None}
    return arguments


@functools.cache
def compiled(implementation: str, case: Case, mode: str):
    if implementation == "reference":
        return jax.jit(ragged_attention_reference)
    interpret = pltpu.InterpretParams(detect_races=True, dma_execution_mode=mode)
    return jax.jit(functools.partial(ragged_attention_tpu, tiles=case.tiles, interpret=interpret))


def run(implementation: str, batch: Batch, case: Case, mode: str, **options: object) -> list[np.ndarray]:
    arguments = batch.arguments(**case.options(), **options)
    if implementation == "tpu":
        arguments = as_on_a_tpu(arguments, case)
    out, k_cache, v_cache = compiled(implementation, case, mode)(**arguments)
    if implementation == "tpu" and v_cache is None and case.latents is None:
        k_cache, v_cache = unpack_cache(k_cache)
    results = jax.tree.leaves((out, k_cache, v_cache))
    if case.head_dim == case.stored_head_dim:
        return [np.asarray(x, np.float32) for x in results]
    return [np.asarray(x, np.float32)[..., : case.head_dim] for x in results]


def check_case(case: Case, mode: str, *, examples: int) -> None:
    max_blocks = -(-MAX_CONTEXT // case.block_size)

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(chunks=ragged_chunks(), window=st.sampled_from([NO_WINDOW, NO_WINDOW, 1, 20, 150]), layer=st.integers(0, 2))
    def check(chunks: list[tuple[int, int]], window: int, layer: int) -> None:
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
            dtype=jnp.dtype(case.dtype),
        )
        if case.latents is not None:
            make_latent(batch, case.latents)
        q_dtype = case.q_dtype or ("bfloat16" if case.dtype == "bfloat16" else "float32")
        for name in ("q", "k", "v"):
            batch.arrays[name] = batch.arrays[name].astype(jnp.dtype(q_dtype))
        window_array = jnp.asarray(window, jnp.int32)
        expected = run("reference", batch, case, mode, sliding_window=window_array)
        pltpu.reset_tpu_interpret_mode_state()
        out, *caches = run("tpu", batch, case, mode, sliding_window=window_array)
        assert not races_found()
        width = case.head_dim if case.latents is None else case.latents.value_dim
        np.testing.assert_allclose(out[..., :width], expected[0][..., :width], atol=TOLERANCE[q_dtype], rtol=0)
        assert np.isfinite(out).all()
        for cache, expected_cache in zip(caches, expected[1:], strict=True):
            np.testing.assert_array_equal(cache, expected_cache)

    check()


@pytest.mark.parametrize(("case", "mode"), QUICK, ids=str)
@pytest.mark.usefixtures("fast_compilation")
def test_the_tpu_kernel_equals_the_reference(case: Case, mode: str) -> None:
    check_case(case, mode, examples=2)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eager", "on_wait"])
@pytest.mark.parametrize("case", [case for case, _ in QUICK] + CASES, ids=str)
@pytest.mark.usefixtures("fast_compilation")
def test_the_tpu_kernel_equals_the_reference_in_all_shapes(case: Case, mode: str) -> None:
    check_case(case, mode, examples=12)


@pytest.mark.usefixtures("fast_compilation")
def test_scattered_slots_are_written_in_any_order() -> None:
    """Tokens of one granule that are not adjacent: each run must see what the previous one wrote."""
    rng = np.random.default_rng(0)
    shape, num_blocks = (6, 2, 16, 128), 3
    slots = rng.permutation(num_blocks * 16)[:20].astype(np.int32)
    slots[5] = num_blocks * 16  # padding
    k, v = (jnp.asarray(rng.standard_normal((20, 2, 128), dtype=np.float32)) for _ in range(2))
    caches = [jnp.full(shape, np.nan, jnp.float32) for _ in range(2)]
    arguments = {"kv_slots": jnp.asarray(slots), "layer": CacheLayer(number=1, num_blocks=num_blocks)}
    interpret = pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager")
    pltpu.reset_tpu_interpret_mode_state()
    granules = granules_of(arguments["kv_slots"], caches[0], num_blocks=num_blocks)
    scalars = jnp.stack([arguments["layer"].first_block, granules.number])
    write = functools.partial(write_kv_tpu, scalars=scalars, granules=granules, interpret=interpret)
    written = jax.jit(write)([k, v], caches)
    assert races_found() is False
    for ours, expected in zip(written, jax.jit(lambda *arrays: write_kv(*arrays, **arguments))(k, v, *caches), strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.slow
@pytest.mark.usefixtures("fast_compilation")
def test_scattered_slots_of_an_8_bit_cache_are_written_in_any_order() -> None:
    """Runs that share a block of scales but no keys: each must see the scales that the others wrote."""
    rng = np.random.default_rng(1)
    shape, num_blocks = (4, 2, 128, 128), 2
    run = np.arange(125, 131)  # from one block into the next
    others = rng.permutation(np.setdiff1d(np.arange(num_blocks * 128), run))[:18]
    slots = np.concatenate([others[:9], run, others[9:]]).astype(np.int32)
    slots[5] = num_blocks * 128  # padding
    k, v = (jnp.asarray(rng.standard_normal((24, 2, 128), dtype=np.float32)) for _ in range(2))
    caches = [as_cache(np.full(shape, np.nan, np.float32), jnp.int8) for _ in range(2)]
    caches = [jax.tree.map(jnp.asarray, cache) for cache in caches]
    arguments = {"kv_slots": jnp.asarray(slots), "layer": CacheLayer(number=1, num_blocks=num_blocks)}
    interpret = pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager")
    pltpu.reset_tpu_interpret_mode_state()
    granules = granules_of(arguments["kv_slots"], caches[0], num_blocks=num_blocks)
    scalars = jnp.stack([arguments["layer"].first_block, granules.number])
    write = functools.partial(write_kv_quantized_tpu, scalars=scalars, granules=granules, interpret=interpret)
    written = jax.jit(write)([k, v], caches)
    assert races_found() is False
    expected = jax.jit(lambda *arrays: write_kv(*arrays, **arguments))(k, v, *caches)
    for ours, other in zip(jax.tree.leaves(written), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 64, "head_dim": 128, "dtype": jnp.int8}, "power of two of at least 128, but it is 64"),
        ({"head_dim": 64}, "multiple of 128 numbers but they are 64; pad .* or pack keys and values of up to 64"),
        ({"block_size": 24, "head_dim": 128}, "power of two of at least 8, but it is 24"),
        ({"dtype": np.float16, "head_dim": 128}, "dtype float16; store bfloat16"),
        ({"max_blocks": 50_000, "head_dim": 128}, "up to 49152 blocks per sequence but block_tables has 50000"),
    ],
)
def test_what_the_tpu_kernel_does_not_support_is_refused(changes: dict, message: str) -> None:
    arguments = make_batch([(1, 3)], **changes).arguments()
    with pytest.raises(ValueError, match=message):
        ragged_attention_tpu(**arguments)


def test_an_old_jax_uses_xla_on_a_tpu_and_logs_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(jax, "__version_info__", (0, 7, 2))
    ragged_attention_room._warn_once.cache_clear()
    arguments = make_batch([(1, 3)], head_dim=128, dtype=jnp.int8, block_size=128).arguments()
    with lowering_for_tpu():
        ragged_attention(**arguments)
    assert "runs in plain XLA: the TPU kernel needs jax 0.10.2 or newer" in caplog.text
    with pytest.raises(ValueError, match=r"needs jax 0\.10\.2 or newer .* use implementation='xla'"):
        ragged_attention_tpu(**arguments)


def shape(num_heads: int, num_kv_heads: int, **changes: int) -> Shape:
    sizes = {"head_dim": 128, "block_size": 32, "num_tokens": 2048, "num_sequences": 64} | changes
    return Shape(num_heads=num_heads, num_kv_heads=num_kv_heads, dtype="bfloat16", **sizes)


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(8, 1), (32, 8), (32, 32), (71, 1), (128, 8)])
def test_modeled_tiles_are_powers_of_two_within_vmem(kind: str, num_heads: int, num_kv_heads: int) -> None:
    for num_tokens, num_sequences in ((1, 1), (64, 64), (2048, 64)):
        call = shape(num_heads, num_kv_heads, num_tokens=num_tokens, num_sequences=num_sequences)
        tiles = modeled(call, kind)
        for size in (tiles.queries, tiles.keys, tiles.sequences):
            assert size & (size - 1) == 0
        assert tiles.keys // tiles.sequences >= 128
        assert tiles.queries == 8 or vmem_bytes(tiles.queries, tiles.keys, call) <= DEVICES[kind].vmem_limit


def test_autotune_writes_the_fastest_tiles_that_work_and_choose_finds_them(tmp_path, monkeypatch) -> None:
    path = tmp_path / "tiles.json"
    monkeypatch.setenv("PALLAS_KERNELS_TILES", str(path))
    call = shape(32, 8)
    assert choose(call, "v5e") == modeled(call, "v5e")

    def measure(tiles: Tiles) -> float:
        if tiles.keys > 512:
            raise RuntimeError("Ran out of memory in memory space vmem")
        return 1e-3 / tiles.keys + 1e-6 * tiles.queries

    best = autotune(call, candidates(call, "v5e"), kind="v5e", measure=measure, path=path, report=lambda line: None)
    assert best.keys == 512
    assert best.queries == modeled(call, "v5e").queries // 2
    assert choose(call, "v5e") == best
    assert choose(shape(32, 8, num_tokens=1500), "v5e") == best  # the same class
    assert choose(shape(32, 4), "v5e") == modeled(shape(32, 4), "v5e")
    entries.cache_clear()


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        "{",
        "",
        '{"KEY": 5}',
        '{"KEY": {"queries": 8}}',
        '{"KEY": {"queries": null}}',
        '{"KEY": {"queries": 0, "keys": 0, "sequences": 0, "cores": 0, "vmem_limit": 0}}',
    ],
)
def test_a_damaged_file_of_tiles_logs_a_warning_and_autotune_fixes_it(tmp_path, monkeypatch, caplog, text) -> None:
    path = tmp_path / "tiles.json"
    monkeypatch.setenv("PALLAS_KERNELS_TILES", str(path))
    call = shape(32, 8)
    path.write_text(text.replace("KEY", call.key("v5e")))
    entries.cache_clear()
    for _ in range(3):
        assert choose(call, "v5e") == modeled(call, "v5e")
    assert caplog.text.count("does not hold measured tiles") == 1
    best = autotune(
        call, candidates(call, "v5e"), kind="v5e", measure=lambda tiles: 1 / tiles.keys, path=path, report=lambda line: None
    )
    assert choose(call, "v5e") == best
    entries.cache_clear()


def test_tiles_that_cannot_be_written_are_reported_and_not_lost(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    lines: list[str] = []
    call = shape(32, 8)
    best = autotune(
        call,
        candidates(call, "v5e"),
        kind="v5e",
        measure=lambda tiles: 1 / tiles.keys,
        path=tmp_path / "file" / "tiles.json",
        report=lines.append,
    )
    assert str(best) in lines[-1]
    assert "name another file in PALLAS_KERNELS_TILES" in lines[-1]
