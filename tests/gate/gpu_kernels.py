"""Compiles single kernels for GPUs that are not here, and reads what the assembler reports on them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.gate.calls import CALLS, Call, Int4Product, lower_attention, lower_int4

MIB = 2**20
KERNEL_TEMPORARIES = 104 * MIB  # results per tile; the cache has 500 MiB or more
SPILLED_BYTES = 32  # per thread, for plain attention
SPILLED_BYTES_WHERE_TIGHT = 256  # soft cap, window, ALiBi and sinks together, or an accumulator of 256 columns
SHARED_BYTES = 232448  # maximum for a thread block on an H100
SHARED_BYTES_AMPERE = 99 * 1024  # 163 KiB on an A100, but this on GPUs of compute capability 8.6 and 8.9
SHARED_BYTES_WIDE = {"9.0": SHARED_BYTES, "8.0": 163 * 1024}  # other GPUs have no kernel for heads wider than 256

# Without the float32 cache, which these kernels do not support, and without the largest tables. Only TPUs pack heads of 64.
GPU_CALLS = (
    *(dataclasses.replace(call, packed=False) for call in CALLS if call.dtype != "float32" and call.context < 2**20),
    Call(name="heads of 64, float16", num_tokens=512, head_dim=64, dtype="float16"),
    Call(name="heads of 80", num_tokens=512, head_dim=80),
    Call(name="heads of 96, B=16", num_tokens=512, head_dim=96, block_size=16),
    Call(name="B=8", num_tokens=512, block_size=8),
    Call(name="window alone", num_tokens=512, window=1024),
    Call(name="int8 KV, D=64, B=64", num_tokens=512, head_dim=64, block_size=64, kv_dtype="int8"),
)
WIDE_CALLS = (
    Call(name="latents, 16 query heads", num_tokens=512, num_heads=16, num_kv_heads=1, head_dim=576, latents=(576, 512)),
    Call(name="latents, 128 query heads", num_tokens=128, num_heads=128, num_kv_heads=1, head_dim=576, latents=(576, 512)),
    Call(name="latents of 640", num_tokens=64, num_heads=128, num_kv_heads=1, head_dim=640, latents=(576, 512)),
    Call(name="latents of 288", num_tokens=512, num_heads=40, num_kv_heads=1, head_dim=288, latents=(288, 256)),
    Call(name="heads of 512", num_tokens=512, num_heads=32, num_kv_heads=4, head_dim=512),
    Call(name="heads of 512, window, B=128", num_tokens=512, num_kv_heads=8, head_dim=512, block_size=128, window=1024),
    Call(name="heads of 512, cap, ALiBi, sinks", num_tokens=512, head_dim=512, window=1024, soft_cap=50.0, extras=True),
    Call(name="heads of 384, 3 query heads", num_tokens=512, num_heads=24, num_kv_heads=8, head_dim=384),
)
AMPERE_CALLS = [call for call in GPU_CALLS if call.kv_dtype != "float8_e4m3fn"]
MIXED = next(call for call in CALLS if call.name == "mixed 2k, 64 sequences")


@dataclasses.dataclass(kw_only=True)
class Kernel:
    """The assembler's report on a kernel."""

    name: str
    registers: int
    spilled: int  # bytes per thread
    serialized: bool  # whether matrix instructions wait for one another
    shared: int | None  # bytes of shared memory; None if this jax does not report it


@contextlib.contextmanager
def assembler_reports(kernels: list[Kernel]) -> Iterator[None]:
    """Collects the assembler's reports on Mosaic-GPU kernels compiled inside the context.

    A kernel that an earlier program of this process already compiled is not reported again.
    """
    with tempfile.TemporaryDirectory() as directory:
        os.environ |= {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_TO": directory}
        try:
            yield
        finally:
            del os.environ["MOSAIC_GPU_DUMP_PTXAS"], os.environ["MOSAIC_GPU_DUMP_TO"]
        for path in sorted(Path(directory).glob("*.ptxas")):
            text = path.read_text()
            (registers,) = re.findall(r"Used (\d+) registers", text)
            spilled = re.findall(r"(\d+) bytes spill stores", text)[-1]  # any warning precedes it
            resources = path.with_suffix(".resources.txt")
            shared = re.findall(r"smem_scratch_bytes=(\d+)", resources.read_text()) if resources.exists() else []
            kernels.append(
                Kernel(
                    name=re.sub(r"_\d+$", "", path.stem),
                    registers=int(registers),
                    spilled=int(spilled),
                    serialized="wgmma.mma_async instructions are serialized" in text,
                    shared=int(shared[0]) if shared else None,
                )
            )


def check_kernel(call: Call, mesh: Any, *, tiles: Any = None) -> tuple[int, list[Kernel], str]:
    """Compiles one call; returns the bytes of temporaries, its kernels, and an error message ("" if it passes)."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from fastgen_jax.plan.program import compile_lowered, lowering_for
    from pallas_kernels.ragged_attention.gpu.call import ragged_attention_gpu

    replicated = NamedSharding(mesh, PartitionSpec())

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated)

    num_blocks = min(call.num_sequences, 32) * (call.context // call.block_size)
    attention = functools.partial(ragged_attention_gpu, tiles=tiles)
    kernels: list[Kernel] = []
    with lowering_for(mesh), assembler_reports(kernels):
        lowered, cache_bytes = lower_attention(call, attention, array, num_blocks=num_blocks)
        memory = compile_lowered(lowered).memory_analysis()
    words = memory_complaint(memory, cache_bytes, KERNEL_TEMPORARIES)
    tight = call.extras or call.head_dim > 128
    words = words or kernel_complaint(
        kernels, SPILLED_BYTES_WHERE_TIGHT if tight else SPILLED_BYTES, mesh, head_dim=call.head_dim
    )
    return memory.temp_size_in_bytes, kernels, words


def check_product(product: Int4Product, mesh: Any) -> tuple[int, list[Kernel], str]:
    """Compiles one product with int4; returns as `check_kernel`."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from fastgen_jax.plan.program import compile_lowered, lowering_for

    array = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
    kernels: list[Kernel] = []
    with lowering_for(mesh), assembler_reports(kernels):
        compiled = compile_lowered(lower_int4(product, array))
    memory, text = compiled.memory_analysis(), compiled.as_text()
    words = "" if "multiply_tiles" in text else "the GPU kernel was not chosen"
    words = words or memory_complaint(memory, 0, KERNEL_TEMPORARIES) or kernel_complaint(kernels, 0, mesh, head_dim=0)
    return memory.temp_size_in_bytes, kernels, words


def memory_complaint(memory: Any, cache_bytes: int, bound: int) -> str:
    if memory.alias_size_in_bytes < cache_bytes:
        return f"the KV cache is copied: {memory.alias_size_in_bytes} of its {cache_bytes} bytes are aliased"
    if memory.temp_size_in_bytes > bound:
        return f"temporaries of {memory.temp_size_in_bytes / MIB:.0f} MiB exceed the bound of {bound / MIB:.0f} MiB"
    return ""


def kernel_complaint(kernels: list[Kernel], spilled: int, mesh: Any, *, head_dim: int) -> str:
    capability = mesh.devices.flat[0].compute_capability
    limit = SHARED_BYTES_WIDE[capability] if head_dim > 256 else SHARED_BYTES if capability == "9.0" else SHARED_BYTES_AMPERE
    for kernel in kernels:
        if (kernel.shared or 0) > limit:
            return f"{kernel.name} uses {kernel.shared} bytes of shared memory, more than {limit}"
        if kernel.spilled > spilled:
            return f"{kernel.name} spills {kernel.spilled} bytes per thread, more than {spilled}"
        if kernel.serialized:
            return f"the matrix instructions of {kernel.name} are serialized"
    return ""


def check_refusal(mesh: Any) -> tuple[int, list[Kernel], str]:
    """Tests the gate itself: a tile that exceeds shared memory must be refused."""
    from pallas_kernels.ragged_attention.gpu.tile_sizes import modeled

    tiles = dataclasses.replace(modeled(128, 4, "hopper"), chunk_stages=6)
    try:
        check_kernel(Call(name="too large", num_tokens=64), mesh, tiles=tiles)
    except Exception as error:  # from the lowering, before the compiler runs
        return 0, [], "" if "shared memory" in str(error) else f"refused, but not for shared memory: {error}"
    return 0, [], f"a tile of 400 KiB was accepted in {SHARED_BYTES} bytes of shared memory"


def check_spills(mesh: Any) -> tuple[int, list[Kernel], str]:
    """Tests the gate itself: a tile with too many scores for the registers compiles, and its spills must be reported."""
    from pallas_kernels.ragged_attention.gpu.tile_sizes import modeled

    call = Call(name="spills", num_tokens=64, num_heads=8, num_kv_heads=4, head_dim=256)
    tiles = dataclasses.replace(modeled(256, 2, "hopper"), chunk_keys=128, chunk_stages=1)
    *rest, words = check_kernel(call, mesh, tiles=tiles)
    return *rest, "" if "spills" in words else f"256 scores and accumulators per thread went unnoticed ({words!r})"
