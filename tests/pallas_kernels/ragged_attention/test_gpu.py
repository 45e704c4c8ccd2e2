"""The GPU kernel equals the reference in the Pallas Mosaic-GPU interpreter; the code around it is tested separately.

The interpreter may need more threads than this machine has cores, so it runs in a child process, `gpu_interpreter`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import gpu_target, jax_versions
from pallas_kernels import ragged_attention as ragged_attention_room
from pallas_kernels.jax_versions import AbstractGpu
from pallas_kernels.ragged_attention import Latents, QuantizedCache, contract, ragged_attention
from pallas_kernels.ragged_attention.autotune import autotune, time_call
from pallas_kernels.ragged_attention.autotune import main as autotune_command
from pallas_kernels.ragged_attention.gpu import ampere, hopper, hopper_wide
from pallas_kernels.ragged_attention.gpu import support as gpu_support
from pallas_kernels.ragged_attention.gpu.call import BODIES, ragged_attention_gpu
from pallas_kernels.ragged_attention.gpu.plan import combine, most_pieces, plan_chunks, plan_pieces
from pallas_kernels.ragged_attention.gpu.softmax_tile import (
    END,
    FIRST,
    HAS_SINK,
    POSITION,
    ROW,
    SEQUENCE,
    WINDOW,
    Spec,
)
from pallas_kernels.ragged_attention.gpu.tile_sizes import GpuTiles, candidates, choose, modeled
from pallas_kernels.ragged_attention.measured_tiles import Shape
from tests.pallas_kernels.ragged_attention.ragged_batches import make_batch

NUM_CASES = 31  # in `gpu_interpreter.ALL`
TOO_OLD = jax_versions.too_old(jax_versions.GPU_KERNELS)
NEEDS_KERNELS = pytest.mark.skipif(TOO_OLD is not None, reason=f"the GPU kernel {TOO_OLD}")


def run_interpreter(which: str, examples: int) -> None:
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # most of the time is compilation, and the host's code is not what is tested
    }
    command = [sys.executable, "-m", "tests.pallas_kernels.ragged_attention.gpu_interpreter", which, str(examples)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "equal: " in done.stdout


@NEEDS_KERNELS
def test_the_gpu_kernel_equals_the_reference() -> None:
    run_interpreter("quick", 1)


@NEEDS_KERNELS
@pytest.mark.slow
@pytest.mark.parametrize("case", range(NUM_CASES))
def test_the_gpu_kernel_equals_the_reference_in_all_shapes(case: int) -> None:
    run_interpreter(str(case), 8)


def spec(
    *,
    group: int,
    partial: bool,
    generation: str = "hopper",
    head_dim: int = 128,
    cache_dtype: Any = jnp.bfloat16,
    latents: Latents | None = None,
) -> Spec:
    tiles = modeled(head_dim, group, generation, quantized=cache_dtype == jnp.int8, latents=latents)
    body = hopper_wide if head_dim > 256 and generation == "hopper" else BODIES[generation]
    rows_in, rows, rows_out = body.tile_rows(group, head_dim, partial=partial)
    return Spec(
        group=group,
        head_dim=head_dim if latents is None else latents.key_dim,
        value_dim=head_dim if latents is None else latents.value_dim,
        values_in_keys=latents is not None,
        block_size=32,
        rows=rows,
        rows_in=rows_in,
        rows_out=rows_out,
        keys=tiles.single_keys if partial else tiles.chunk_keys,
        stages=tiles.single_stages if partial else tiles.chunk_stages,
        blocks=tiles.blocks,
        num_blocks=1,
        scale=1.0,
        soft_cap=None,
        has_window=True,
        partial=partial,
        dtype=jnp.bfloat16,
        cache_dtype=cache_dtype,
        interpreted=True,
    )


NUM_SEQUENCES, NUM_TOKENS = 6, 400
chunk_lists = st.lists(
    st.tuples(st.sampled_from([0, 1, 1, 2, 31, 33, 64]), st.integers(0, 5000)),
    min_size=NUM_SEQUENCES,
    max_size=NUM_SEQUENCES,
)


@functools.cache
def plans(group: int, num_kv_heads: int, generation: str, independent: bool = False):
    """Both plans as one compiled function of the index arrays."""
    kind: Any = {"group": group, "generation": generation}

    def run(index: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        pieces = plan_pieces(
            **index,
            num_kv_heads=num_kv_heads,
            tiles=modeled(128, group, generation),
            spec=spec(**kind, partial=True),
            independent=independent,
        )
        tokens = jnp.arange(NUM_TOKENS, dtype=jnp.int32)
        sequence = jnp.sum(index["query_starts"][None, 1:] <= tokens[:, None], axis=1, dtype=jnp.int32)
        sequence = jnp.minimum(sequence, NUM_SEQUENCES - 1)
        chunks = plan_chunks(**index, num_tokens=NUM_TOKENS, sequence=sequence, spec=spec(**kind, partial=False))
        return (*pieces, *chunks, sequence)

    compiled = jax.jit(run)
    return lambda index: [np.asarray(x) for x in compiled(index)]


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    chunks=chunk_lists,
    kernel=st.sampled_from([("hopper", 3), ("ampere", 4)]),
    window=st.sampled_from([1, 77, 1000, 2**30]),
    num_kv_heads=st.sampled_from([1, 8]),
    independent=st.booleans(),
)
def test_every_query_is_planned_once_and_sees_all_its_keys(
    chunks: list[tuple[int, int]], kernel: tuple[str, int], window: int, num_kv_heads: int, independent: bool
) -> None:
    generation, group = kernel
    lengths = np.array([query for query, _ in chunks])
    contexts = np.array([query + old if query else 0 for query, old in chunks])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    index = {
        "query_starts": jnp.asarray(starts, jnp.int32),
        "context_lens": jnp.asarray(contexts, jnp.int32),
        "window": jnp.int32(window),
    }
    seen: dict[int, np.ndarray] = {}  # token -> the positions made visible to it by some tile

    def show(token: int, position: int, first: int, end: int) -> None:
        keys = np.arange(max(first, position - window + 1), min(end, position + 1))
        both = np.concatenate([seen.get(token, np.zeros(0, int)), keys])
        assert len(np.unique(both)) == len(both)  # no key twice
        seen[token] = np.sort(both)

    work, first_piece, pieces, tiles, tile, first_row, sequence = plans(group, num_kv_heads, generation, independent)(index)
    work, count = work[:-1], int(work[-1, 0])
    assert pieces.max() <= most_pieces(NUM_SEQUENCES, num_kv_heads, modeled(128, group, generation))
    assert count == pieces.sum()
    for i, row in enumerate(work[:count]):
        s = row[SEQUENCE]
        assert lengths[s] == 1
        assert first_piece[s] <= i < first_piece[s] + pieces[s]
        assert row[HAS_SINK] == (i == first_piece[s])
        assert row[WINDOW] == window
        assert row[ROW] == starts[s] * group
        assert row[FIRST] < row[END] <= contexts[s] == row[POSITION] + 1
        show(starts[s], row[POSITION], row[FIRST], row[END])

    tiles, count = tiles[:-1], int(tiles[-1, 0])
    for token in range(starts[-1]):
        s = sequence[token]
        if lengths[s] > 1:
            row = tiles[tile[token]]
            assert tile[token] < count
            assert row[SEQUENCE] == s
            assert row[ROW] // 8 * 8 + first_row[token] == token * group
            assert first_row[token] + group <= (128 if generation == "hopper" else 64)
            position = row[POSITION] + (first_row[token] - row[ROW] % 8) // group
            assert position == contexts[s] - starts[s + 1] + token
            show(token, position, row[FIRST], row[END])

    for token in range(starts[-1]):
        s = np.searchsorted(starts, token, side="right") - 1
        position = contexts[s] - starts[s + 1] + token
        np.testing.assert_array_equal(seen[token], np.arange(max(0, position - window + 1), position + 1))


@pytest.mark.parametrize("independent", [True, False])
def test_independent_pieces_of_a_context_do_not_depend_on_the_others(independent: bool) -> None:
    def borders(contexts: list[int]) -> list[list[int]]:
        index = {
            "query_starts": jnp.asarray([0, *np.cumsum(np.minimum(contexts, 1))], jnp.int32),
            "context_lens": jnp.asarray(contexts, jnp.int32),
            "window": jnp.int32(2**30),
        }
        work, first, count, *_ = plans(4, 8, "hopper", independent)(index)
        return work[first[0] : first[0] + count[0], [FIRST, END]].tolist()

    alone = borders([70_000, 0, 0, 0, 0, 0])
    assert len(alone) > 8
    assert (borders([70_000, 5, 90_000, 90_000, 90_000, 90_000]) == alone) == independent


def test_pieces_are_combined_exactly_and_unused_memory_is_not_read() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(3, 50)) * 4
    values = rng.normal(size=(50, 16))
    expected = np.exp2(scores) @ values / np.exp2(scores).sum(1, keepdims=True)
    partial, lse = np.full((6, 1, 3, 16), np.nan, np.float32), np.full((6, 1, 3), np.nan, np.float32)
    for i, keys in enumerate((slice(0, 7), slice(7, 30), slice(30, 50))):  # pieces 1, 2, 3 are the second sequence's
        weights = np.exp2(scores[:, keys])
        partial[1 + i, 0] = weights @ values[keys] / weights.sum(1, keepdims=True)
        lse[1 + i, 0] = np.log2(weights.sum(1))
    starts, pieces = jnp.asarray([1, 1, 4], jnp.int32), jnp.asarray([0, 3, 0], jnp.int32)
    rows = jnp.zeros(3, jnp.int32)
    out = jax.jit(functools.partial(combine, group=3, most=4))(partial, lse, starts, pieces, rows)
    np.testing.assert_allclose(out[1, 0], expected, atol=1e-5)
    later = (jnp.roll(partial, 2, axis=2), jnp.roll(lse, 2, axis=2), starts, pieces, rows + 2)
    np.testing.assert_array_equal(jax.jit(functools.partial(combine, group=1, most=4))(*later)[:, :, 0], out[:, :, 0])
    np.testing.assert_array_equal(out[0], 0.0)
    np.testing.assert_array_equal(out[2], 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": np.float32, "head_dim": 128}, "float16, int8 and float8_e4m3fn caches but k_cache has dtype float32"),
        ({"head_dim": 72}, "multiples of 16 but D is 72"),
        ({"head_dim": 320}, "D up to 256, and multiples of 128 up to 512, but D is 320"),
        ({"head_dim": 576}, "D up to 256, and multiples of 128 up to 512, but D is 576"),
        ({"head_dim": 512, "dtype": jnp.int8}, "8-bit caches if D is a multiple of 32 up to 128 but D is 512"),
        ({"block_size": 24}, "power of two of at least 8, but it is 24"),
        ({"block_size": 4}, "power of two of at least 8, but it is 4"),
        ({"group": 121}, "up to 120 query heads per KV head where D is 16 but there are 121"),
    ],
)
def test_what_the_gpu_kernel_does_not_support_is_refused(changes: dict, message: str) -> None:
    arguments = make_batch([(1, 3)], **({"dtype": jnp.bfloat16} | changes)).arguments()
    with pytest.raises(ValueError, match=message):
        ragged_attention_gpu(**arguments)


@pytest.mark.parametrize(
    ("head_dim", "block_size", "needed"),
    [(80, 16, 32), (80, 8, 32), (96, 8, 16), (64, 8, None), (128, 8, None), (16, 32, None)],
)
def test_ampere_refuses_blocks_that_four_warps_cannot_copy(head_dim: int, block_size: int, needed: int | None) -> None:
    cache = jax.ShapeDtypeStruct((4, 1, block_size, head_dim), jnp.bfloat16)
    reason = gpu_support.beyond_limits(cache, 4, "ampere")
    assert reason == (needed and f"needs a block size of at least {needed} where D is {head_dim}, but it is {block_size}")


@pytest.mark.parametrize(
    ("generation", "dtype", "head_dim", "block_size", "group", "message"),
    [
        ("hopper", "int8", 128, 64, 64, None),
        ("ampere", "int8", 128, 64, 48, None),
        ("hopper", "float8_e4m3fn", 64, 128, 1, None),
        ("hopper", "int8", 80, 64, 4, "a multiple of 32 up to 128 but D is 80"),
        ("ampere", "int8", 256, 64, 4, "a multiple of 32 up to 128 but D is 256"),
        ("hopper", "int8", 128, 32, 4, "blocks of at least 64 tokens but they have 32"),
        ("hopper", "int8", 128, 64, 60, "up to 57 query heads per KV head with an 8-bit cache but there are 60"),
        ("hopper", "int8", 128, 64, 71, "up to 64 query heads per KV head with an 8-bit cache but there are 71"),
        ("ampere", "int8", 128, 64, 71, "up to 48 query heads per KV head with an 8-bit cache but there are 71"),
        ("ampere", "float8_e4m3fn", 128, 64, 4, "supports int8 caches but not float8_e4m3fn; store int8"),
    ],
)
def test_8_bit_caches_that_do_not_fit_are_refused(
    generation: str, dtype: str, head_dim: int, block_size: int, group: int, message: str | None
) -> None:
    cache = jax.eval_shape(lambda: QuantizedCache.zeros((4, 1, block_size, head_dim), dtype))
    reason = gpu_support.beyond_limits(cache, group, generation)
    assert (reason is None) if message is None else message in (reason or "")


@pytest.mark.parametrize(("generation", "most"), [("hopper", 64), ("ampere", 48)])
def test_more_results_than_fit_are_refused(generation: str, most: int) -> None:
    cache = jax.ShapeDtypeStruct((4, 1, 32, 256), jnp.bfloat16)
    assert gpu_support.beyond_limits(cache, most, generation) is None
    reason = gpu_support.beyond_limits(cache, most + 1, generation)
    assert reason == f"supports up to {most} query heads per KV head where D is 256 but there are {most + 1}"


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("group", [1, 4, 71])
def test_modeled_tiles_fit_in_shared_memory(head_dim: int, group: int) -> None:
    if (head_dim, group) == (256, 71):
        pytest.skip("refused, see below")
    for partial in (False, True):
        made = spec(group=group, partial=partial, head_dim=head_dim)
        assert hopper.shared_bytes(made) <= 227 * 1024 - 1024
        taken = ampere.shared_bytes(spec(group=group, partial=partial, head_dim=head_dim, generation="ampere"))
        assert taken <= 99 * 1024  # of compute capability 8.6 and 8.9
        if head_dim <= 128:
            assert 2 * (taken + 1024) <= 164 * 1024  # two thread blocks on a multiprocessor of an A100


@pytest.mark.parametrize(
    ("head_dim", "latents", "stages"),
    [
        (640, Latents(key_dim=576, value_dim=512), 2),
        (288, Latents(key_dim=288, value_dim=256), 4),
        (512, None, 1),
        (384, None, 1),
    ],
)
def test_modeled_tiles_of_wide_heads_fit_in_shared_memory(head_dim: int, latents: Latents | None, stages: int) -> None:
    case: Any = {"group": 16, "head_dim": head_dim, "latents": latents}
    for partial in (False, True):
        made = spec(**case, partial=partial)
        assert made.stages == stages
        assert hopper_wide.shared_bytes(made) <= 227 * 1024 - 1024
        assert ampere.shared_bytes(spec(**case, partial=partial, generation="ampere")) <= 163 * 1024 - 1024


@pytest.mark.parametrize(
    ("group", "hopper", "ampere"),
    [
        (1, 1, 1),
        (16, 1, 1),
        (20, 1, 1),
        (30, 1, 2),
        (40, 1, 2),
        (57, 1, 3),
        (58, 2, None),
        (64, 1, 2),
        (71, None, None),
        (128, 2, 4),
        (120, 3, None),
        (256, 4, None),
    ],
)
def test_many_query_heads_of_a_wide_head_are_divided(group: int, hopper: int | None, ampere: int | None) -> None:
    parts = hopper
    assert gpu_support.parts_of(group, "hopper") == hopper
    assert gpu_support.parts_of(group, "ampere") == ampere
    cache = jax.ShapeDtypeStruct((4, 1, 32, 576), jnp.bfloat16)
    reason = gpu_support.beyond_limits(cache, group, "hopper", latents=Latents(key_dim=576, value_dim=512))
    assert (reason is None) == (parts is not None)
    if reason is not None:
        assert "up to 64 query heads per KV head where D is 576" in reason


@pytest.mark.parametrize(
    ("key_dim", "value_dim", "words"),
    [
        (640, 512, "keys of a multiple of 16 up to 576"),
        (576, 448, "values of a multiple of 128 up to 512 numbers but they have 576 and 448"),
        (584, 512, "they have 584 and 512"),
    ],
)
def test_latents_that_do_not_fit_are_refused(key_dim: int, value_dim: int, words: str) -> None:
    cache = jax.ShapeDtypeStruct((4, 1, 32, 640), jnp.bfloat16)
    latents = Latents(key_dim=key_dim, value_dim=value_dim)
    assert words in (gpu_support.beyond_limits(cache, 16, "hopper", latents=latents) or "")


@pytest.mark.parametrize(("capability", "refused"), [("8.0", False), ("8.6", True), ("8.9", True)])
def test_wide_heads_need_the_shared_memory_of_an_a100(capability: str, refused: bool) -> None:
    cache = jax.ShapeDtypeStruct((4, 1, 32, 512), jnp.bfloat16)
    device = AbstractGpu(device_kind="a GPU", num_cores=1, compute_capability=capability)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        reason = gpu_support.beyond_limits(cache, 8, "ampere")
    assert (reason == f"of GPUs of compute capability {capability} supports D up to 256 but D is 512") == refused
    assert refused or reason is None


def test_latents_of_a_narrow_head_need_no_kernel_of_their_own() -> None:
    cache = jax.ShapeDtypeStruct((4, 1, 32, 96), jnp.bfloat16)
    assert gpu_support.beyond_limits(cache, 16, "hopper", latents=Latents(key_dim=96, value_dim=64)) is None


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("group", [1, 48])
def test_modeled_tiles_of_8_bits_fit_in_shared_memory(head_dim: int, group: int) -> None:
    for partial in (False, True):
        case: Any = {"group": group, "partial": partial, "head_dim": head_dim, "cache_dtype": jnp.int8}
        assert hopper.shared_bytes(spec(**case)) <= 227 * 1024 - 1024
        taken = ampere.shared_bytes(spec(**case, generation="ampere"))
        assert 2 * (taken + 1024) <= 164 * 1024


@pytest.mark.parametrize(
    ("capability", "expected"),
    [("9.0", "hopper"), ("8.0", "ampere"), ("8.6", "ampere"), ("8.9", "ampere"), ("7.5", None), ("10.0", None)],
)
def test_the_compute_capability_chooses_the_kernel(capability: str, expected: str | None) -> None:
    device = AbstractGpu(device_kind="a GPU", num_cores=1, compute_capability=capability)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        assert gpu_target.generation() == expected


def test_tiles_measured_on_a_gpu_are_used_on_that_kind_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiles.json"
    monkeypatch.setenv("PALLAS_KERNELS_TILES", str(path))
    shape = Shape(
        num_heads=32, num_kv_heads=8, head_dim=128, block_size=32, num_tokens=512, num_sequences=64, dtype="bfloat16"
    )
    first = modeled(128, 4, "ampere", multiprocessors=72)

    def measure(tiles: GpuTiles) -> float:  # a device without room for 128 keys, on which many pieces are fast
        if max(tiles.chunk_keys, tiles.single_keys) > 64:
            raise RuntimeError("Shared memory requested exceeds device resources")
        return 1.0 / tiles.pieces + tiles.min_piece * 1e-9

    best = autotune(shape, candidates(first), measure=measure, kind="an A10", path=path, report=lambda line: None)
    assert best == dataclasses.replace(first, pieces=4 * first.pieces)
    assert json.loads(path.read_text())[shape.key("an A10")]["pieces"] == 4 * 8 * 72

    def chosen(kind: str, cores: int) -> GpuTiles:
        device = AbstractGpu(device_kind=kind, num_cores=cores, compute_capability="8.6")
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
            return choose(shape, "ampere")

    assert chosen("an A10", 72) == best
    assert chosen("an L4", 58) == modeled(128, 4, "ampere", multiprocessors=58)


def test_the_autotune_command_says_which_device_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        autotune_command(["--tokens", "8"])
    assert "measured on a TPU or a GPU of compute capability 8 or 9.0, but JAX runs on 'cpu'" in capsys.readouterr().err


def test_autotune_measures_a_valid_call() -> None:
    asked = []

    def attention(*arguments: Any, tiles: GpuTiles) -> tuple[jax.Array, jax.Array, jax.Array]:
        asked.append(tiles)
        contract.check(*arguments)
        return arguments[0], arguments[3], arguments[4]

    shape = Shape(num_heads=4, num_kv_heads=2, head_dim=16, block_size=16, num_tokens=8, num_sequences=3, dtype="bfloat16")
    choices = list(candidates(modeled(16, 2, "ampere")))
    assert len(set(choices)) == len(choices) > 10
    for choice in choices[:2]:
        assert time_call(functools.partial(attention, tiles=choice), shape, context=20, repeats=1) > 0
    assert asked == choices[:2]


def test_a_gpu_of_unknown_capability_and_a_cpu_have_no_kernel() -> None:
    device = AbstractGpu(device_kind="another GPU", num_cores=1)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        assert gpu_target.generation() is None
    assert gpu_target.generation() is None


@pytest.mark.parametrize(
    ("version", "capability", "generation", "words"),
    [
        ((0, 11, 2), "8.0", "ampere", "of GPUs of compute capability 8 needs jax 0.12 or newer"),
        ((0, 7, 2), "8.0", "ampere", "needs jax 0.10.2 or newer"),
        ((0, 7, 2), "9.0", "hopper", "needs jax 0.10.2 or newer"),
    ],
)
def test_an_old_jax_uses_xla_on_a_gpu_and_logs_it(
    version: tuple[int, ...],
    capability: str,
    generation: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(jax, "__version_info__", version)
    ragged_attention_room._warn_once.cache_clear()
    arguments = make_batch([(1, 3)], head_dim=64, dtype=jnp.bfloat16).arguments()
    device = AbstractGpu(device_kind="a GPU", num_cores=1, compute_capability=capability)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        ragged_attention(**arguments)
    assert f"runs in plain XLA: the GPU kernel {words}" in caplog.text
    with pytest.raises(ValueError, match=re.escape(words)):
        ragged_attention_gpu(**arguments, generation=generation)


@NEEDS_KERNELS
@pytest.mark.parametrize("shape", [(64, 256), (64, 128), (64,)])
def test_the_registers_of_a_thread_are_where_they_are_stored(shape: tuple[int, ...]) -> None:
    from jax.experimental.mosaic import gpu as mgpu

    layout = mgpu.WGMMA_LAYOUT if len(shape) == 2 else mgpu.WGMMA_ROW_LAYOUT
    offsets = np.array(hopper_wide.register_offsets(layout, shape))
    # PTX: thread t of warp w has rows 16 w + t / 4 and 8 more, and of each 8 columns those from 2 (t % 4) on.
    rows = 16 * np.arange(4)[:, None] + np.arange(8)[None, :]
    places = [rows] if len(shape) == 1 else [rows[..., None], 2 * np.arange(4)]
    stored = np.zeros(shape, int)
    for offset in offsets:
        at = [place + by for place, by in zip(places, offset, strict=True)]
        for vector in range(2 if len(shape) == 2 else 1):
            np.add.at(stored, (*at[:-1], at[-1] + vector) if len(shape) == 2 else tuple(at), 1)
    np.testing.assert_array_equal(stored, 1)  # each number once
    assert {int(offset[0]) for offset in offsets} == {0, 8}


@pytest.mark.skipif(jax.__version_info__ < jax_versions.AMPERE_KERNEL, reason="this jax has no layouts for mma")
@pytest.mark.parametrize("rows", [64, 128])
def test_a_product_is_the_left_operand_of_the_next_without_conversion(rows: int) -> None:
    from jax.experimental.mosaic import gpu as mgpu

    layouts = mgpu.MMALayouts(jnp.bfloat16)

    def elements(layout: Any) -> np.ndarray:
        """The element of [rows, 64] at each place: [threads, registers, numbers of a register]."""
        tiled = layout.tiling.tile_shape((rows, 64))
        numbers = np.arange(rows * 64).reshape(rows, 64)
        for tile in layout.tiling.tiles:  # the last axes become (how many tiles, inside of one)
            outer = numbers.ndim - len(tile)
            shape = [n for size, inner in zip(numbers.shape[outer:], tile, strict=True) for n in (size // inner, inner)]
            numbers = numbers.reshape(*numbers.shape[:outer], *shape)
            axes = [outer + 2 * i for i in range(len(tile))] + [outer + 2 * i + 1 for i in range(len(tile))]
            numbers = numbers.transpose(*range(outer), *axes)
        assert numbers.shape == tiled
        threads = [axis % numbers.ndim for axis in (*layout.partitioned_warp_dims, *layout.partitioned_lane_dims)]
        vector = layout.vector_dim % numbers.ndim
        registers = [axis for axis in range(numbers.ndim) if axis not in (*threads, vector)]
        numbers = numbers.transpose(*threads, *registers, vector)
        return numbers.reshape(128, -1, numbers.shape[-1])

    np.testing.assert_array_equal(elements(layouts.acc), elements(layouts.lhs))


def test_a_program_for_a_gpu_uses_xla_unless_it_is_known_to_be_a_hopper() -> None:
    arguments = make_batch([(3, 20), (1, 5)], num_tokens=6, head_dim=64, dtype=jnp.bfloat16).arguments()
    program = jax.jit(ragged_attention).trace(**arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" not in program  # this process has no GPU, and no mesh says what it lowers for
