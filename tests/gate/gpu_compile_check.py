"""Compiles for an H100, an A100 and a T4 without a GPU: `make gpu-compile-check`.

A check fails if its program does not compile, copies the KV cache or a weight, exceeds the bounds on temporary memory and on
launches per layer, or makes the host wait in the middle of a step; or if a kernel spills more than a few registers, uses
more shared memory than a thread block has, or has matrix instructions that the assembler had to serialize. Checks that
require a newer jax are listed as skipped, not failed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.gate.calls import CALLS, Call, lower_attention
from tests.gate.models import (
    IMAGE_MODELS,
    LLAMA_3_8B,
    LLAMA_3_70B,
    MIXTRAL_8X7B,
    QWEN3_30B_A3B,
    SMALL_GPU_MODELS,
    SPARSE_MODELS,
    STATE_MODELS,
    WIDE_MODELS,
    released,
    tower_of,
)

MIB = 2**20
KERNEL_TEMPORARIES = 96 * MIB  # results per tile; the cache has 500 MiB or more
STEP_TEMPORARIES = 768 * MIB  # activations of 512 tokens and their logits
# Of kernels in a layer of a Llama, which has four products, two norms and four kernels of attention.
LAUNCHES_PER_LAYER = 14
LAUNCHES_PER_LAYER_IN_INT8 = 16  # parts of products are added up, as in int4
LAUNCHES_ON_SEVERAL = 20  # with two sums over devices
LAUNCHES_PER_LAYER_IN_FP8 = 20  # rows are rounded before each product
LAUNCHES_PER_LAYER_WITH_EXPERTS = 43
LAUNCHES_WITHOUT_A_KERNEL = 44  # outside of the loops of portable attention
LAUNCHES_WITH_A_STATE = {
    "Granite-4.0-H-Micro": 190,
    "Qwen3-Next, 8 layers": 193,
    "Granite-4.0-H-Tiny": 420,
    "LFM2-1.2B": 43,
    "Nemotron-3-Nano, 20 layers": 143,
}
"""In a period of layers, outside of the loops over pieces."""
LAUNCHES_OF_SPARSE_ATTENTION = 88  # outside of its loops
WAITS_OF_SPARSE_ATTENTION = 4  # to choose: two loops and a branch; to attend to the chosen keys: a loop
LAUNCHES_WITH_WIDE_HEADS = {"DeepSeek-V3, 5 layers": 70, "Gemma-4-31B": 160}
"""In the layer with the most of DeepSeek V3, one with experts; in a period of six layers of Gemma 4."""
TOWER_TEMPORARIES = 1024 * MIB  # of 25,600 patches
SPILLED_BYTES = 32  # per thread, for plain attention
SPILLED_BYTES_WHERE_TIGHT = 256  # soft cap, window, ALiBi and sinks together, or an accumulator of 256 columns
SHARED_BYTES = 232448  # maximum for a thread block on an H100
SHARED_BYTES_AMPERE = 99 * 1024  # 163 KiB on an A100, but this on GPUs of compute capability 8.6 and 8.9
SHARED_BYTES_WIDE = {"9.0": SHARED_BYTES, "8.0": 163 * 1024}  # other GPUs have no kernel for heads wider than 256

# Without the float32 cache, which these kernels do not support, and without the largest tables.
GPU_CALLS = (
    *(call for call in CALLS if call.dtype != "float32" and call.context < 2**20),
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


def family_config(hf: dict[str, Any]) -> Any:
    """The model's config, imported here because the environment must be set before JAX is."""
    from fastgen_jax.models.families import family_of

    return family_of(hf["architectures"][0]).config_from_hf(hf)


def check_step(
    hf: dict[str, Any],
    mesh: Any,
    *,
    tokens: int = 512,
    work: str = "any",
    dtype: str = "bfloat16",
    quantize: str | None = None,
    in_blocks: bool = False,
    launches: int = LAUNCHES_PER_LAYER,
    has_kernel: bool = True,
    waits: int = 0,
    images: Any = None,
    facts: list[str],
) -> tuple[int, list[Kernel], str]:
    """The whole step: the kernel must have been chosen, the cache updated in place, and every weight read where it is.

    In a greedy or sampled step the host may wait for `waits` values. Where there is no kernel, portable attention also waits
    for the conditions of its loops.
    """
    from fastgen_jax.plan.program import compile_step
    from fastgen_jax.plan.tower import step_images

    model, kernels = family_config(hf), list[Kernel]()
    with assembler_reports(kernels):
        program = compile_step(
            model,
            mesh,
            token_budget=tokens,
            max_num_seqs=64,
            max_context_len=8192,
            block_size=32,
            num_blocks=4096,
            dtype=dtype,
            quantize=quantize,
            in_blocks=in_blocks,
            work=work,  # pyright: ignore[reportArgumentType]
            images=None if images is None else step_images(images, tokens, mesh, dtype),
            has_grids=images is not None and images.in_grid,
        )
    copied = sum(copy.bytes * copy.times for copy in program.copies)
    inside = f" and {program.inner_operations} in loops" if program.inner_operations else ""
    facts.append(f"{program.operations} launches{inside}, {program.waits} waits, {copied / MIB:.0f} MiB of weights copied")
    words = memory_complaint(program.compiled.memory_analysis(), program.cache, STEP_TEMPORARIES)
    if not words and has_kernel and "ragged_attention_chunks" not in program.compiled.as_text():
        words = "the GPU kernel was not chosen"
    tight = model.head_dim > 128
    spilled, head_dim = SPILLED_BYTES_WHERE_TIGHT if tight else SPILLED_BYTES, model.cache_head_dim if has_kernel else 0
    words = words or kernel_complaint(kernels, spilled, mesh, head_dim=head_dim)
    if not words and copied:
        words = f"weights are copied: {program.copies[0].name} writes {program.copies[0].bytes / MIB:.0f} MiB"
    if not words and program.operations > launches:
        words = f"each layer launches {program.operations} kernels, more than {launches}"
    if not words and program.waits > waits and work != "any" and has_kernel:
        words = f"the host waits for {program.waits} values in the middle of a step"
    return program.temporaries, kernels, words


def check_same_layers(hf: dict[str, Any], mesh: Any, *, other_tokens: int | None = None) -> tuple[int, list[Kernel], str]:
    """With `deterministic`, which of its programs runs a step must not change how a layer is computed.

    `other_tokens` is the size of the last program, to test the gate itself.
    """
    from fastgen_jax.plan.hlo import layer_instructions
    from fastgen_jax.plan.program import compile_step

    layers: list[list[str]] = []
    for work in ("greedy", "sampled", "any"):
        program = compile_step(
            family_config(hf),
            mesh,
            token_budget=(other_tokens or 256) if work == "any" else 256,
            max_num_seqs=64,
            max_context_len=8192,
            block_size=32,
            num_blocks=2048,
            work=work,
            deterministic=True,
        )
        layers.append(layer_instructions(program.compiled.as_text() or ""))
        if layers[-1] != layers[0]:
            return (
                program.temporaries,
                [],
                f"the program for {work} steps computes layers in another way",
            )
    return program.temporaries, [], ""


def check_other_layers(mesh: Any) -> tuple[int, list[Kernel], str]:
    """Tests the gate itself: layers for another number of rows are others."""
    *rest, words = check_same_layers(LLAMA_3_8B, mesh, other_tokens=128)
    return *rest, "" if "in another way" in words else "other layers went unnoticed"


def check_tower(images: Any, mesh: Any, *, facts: list[str]) -> tuple[int, list[Kernel], str]:
    """A vision tower for its largest image: no weight is copied, and the host waits for nothing."""
    from fastgen_jax.plan.tower import compile_tower

    program = compile_tower(images, mesh)
    copied = sum(copy.bytes * copy.times for copy in program.copies)
    facts.append(f"{program.operations} launches, {program.waits} waits, {copied / MIB:.0f} MiB of weights copied")
    words = ""
    if program.temporaries > TOWER_TEMPORARIES:
        words = f"temporaries of {program.temporaries / MIB:.0f} MiB exceed the bound of {TOWER_TEMPORARIES / MIB:.0f} MiB"
    if not words and copied:
        words = f"weights are copied: {program.copies[0].name} writes {program.copies[0].bytes / MIB:.0f} MiB"
    return program.temporaries, [], words or ("the host waits" if program.waits else "")


def check_copies(mesh: Any) -> tuple[int, list[Kernel], str]:
    """Tests the gate itself: XLA's Triton products copy the weights of each layer, which must be reported."""
    from fastgen_jax.engine import programs

    kept, programs._GPU_OPTIONS = programs._GPU_OPTIONS, {}
    try:
        *rest, words = check_step(LLAMA_3_8B, mesh, facts=[])
    finally:
        programs._GPU_OPTIONS = kept
    return *rest, "" if "weights are copied" in words else f"copies of weights went unnoticed ({words!r})"


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--only", default="", help="run only checks whose name contains this")
    parser.add_argument("--seconds", type=float, default=1800.0, help="time limit of all checks; lists those not reached")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    from fastgen_jax.devices import NoCompiler, parse_topology
    from fastgen_jax.plan.program import deviceless_mesh
    from pallas_kernels import jax_versions

    try:
        h100, eight_h100 = (deviceless_mesh(parse_topology(name)) for name in ("h100:1", "h100:8"))
        a100, eight_a100 = (deviceless_mesh(parse_topology(name)) for name in ("a100:1", "a100:8"))
        ada = deviceless_mesh(parse_topology("a100:1"), compute_capability="8.9")
        t4 = deviceless_mesh(parse_topology("t4:1"))
    except NoCompiler as error:
        print(f"gpu-compile-check SKIPPED: {error}")
        return 0
    checks: dict[str, Callable[[], tuple[int, list[Kernel], str]]] = {
        f"H100 attention: {call.name}": functools.partial(check_kernel, call, h100) for call in (*GPU_CALLS, *WIDE_CALLS)
    }
    checks["H100 a too large tile is refused"] = functools.partial(check_refusal, h100)
    checks["H100 spilled registers are detected"] = functools.partial(check_spills, h100)
    checks["H100 copied weights are detected"] = functools.partial(check_copies, h100)
    checks["H100 deterministic: Llama-3-8B"] = functools.partial(check_same_layers, LLAMA_3_8B, h100)
    checks["H100 deterministic: Qwen3-30B-A3B"] = functools.partial(check_same_layers, QWEN3_30B_A3B, h100)
    checks["H100 deterministic: other layers are noticed"] = functools.partial(check_other_layers, h100)
    facts: list[str] = []
    step = functools.partial(check_step, facts=facts)
    checks["H100 step: Llama-3-8B"] = functools.partial(step, LLAMA_3_8B, h100)
    for work in ("greedy", "sampled"):
        checks[f"H100 step of 64: Llama-3-8B, {work}"] = functools.partial(step, LLAMA_3_8B, h100, tokens=64, work=work)
    checks["H100 step of 64: Llama-3-8B, int8"] = functools.partial(
        step, LLAMA_3_8B, h100, tokens=64, work="greedy", quantize="int8", launches=LAUNCHES_PER_LAYER_IN_INT8
    )
    checks["H100 step of 64: Llama-3-8B, int4"] = functools.partial(
        step, LLAMA_3_8B, h100, tokens=64, work="greedy", quantize="int4", launches=LAUNCHES_PER_LAYER_IN_INT8
    )
    checks["H100 step of 64: Mixtral-8x7B on 8, int4"] = functools.partial(
        step,
        MIXTRAL_8X7B,
        eight_h100,
        tokens=64,
        work="greedy",
        quantize="int4",
        launches=LAUNCHES_PER_LAYER_WITH_EXPERTS,
    )
    checks["H100 step of 64: Llama-3-8B on 8, int8"] = functools.partial(
        step, LLAMA_3_8B, eight_h100, tokens=64, work="greedy", quantize="int8", launches=LAUNCHES_ON_SEVERAL
    )
    checks["H100 step of 64: Llama-3-8B, fp8"] = functools.partial(
        step, LLAMA_3_8B, h100, tokens=64, work="greedy", quantize="fp8", launches=LAUNCHES_PER_LAYER_IN_FP8
    )
    checks["H100 step of 64: Llama-3-8B, fp8 in blocks"] = functools.partial(
        step,
        LLAMA_3_8B,
        h100,
        tokens=64,
        work="greedy",
        quantize="fp8",
        in_blocks=True,
        launches=LAUNCHES_PER_LAYER_IN_FP8,
    )
    checks["H100 step: Llama-3-8B, fp8 in blocks"] = functools.partial(
        step, LLAMA_3_8B, h100, work="greedy", quantize="fp8", in_blocks=True, launches=LAUNCHES_PER_LAYER_IN_FP8
    )
    checks["H100 step: Llama-3-8B, fp8"] = functools.partial(
        step, LLAMA_3_8B, h100, work="greedy", quantize="fp8", launches=LAUNCHES_PER_LAYER_IN_FP8
    )
    checks["H100 step: Llama-3-70B on 8"] = functools.partial(step, LLAMA_3_70B, eight_h100, launches=LAUNCHES_ON_SEVERAL)
    checks["H100 step: Mixtral-8x7B on 8"] = functools.partial(
        step, MIXTRAL_8X7B, eight_h100, work="greedy", launches=LAUNCHES_PER_LAYER_WITH_EXPERTS
    )
    for name, (hf, num_devices) in STATE_MODELS.items():
        checks[f"H100 step of 64: {name} on {num_devices}"] = functools.partial(
            step, hf, h100, tokens=64, work="greedy", launches=LAUNCHES_WITH_A_STATE[name]
        )
    for name, (model, changes, num_devices) in SPARSE_MODELS.items():
        checks[f"H100 step of 64: {name} on {num_devices}"] = functools.partial(
            step,
            released(model) | changes,
            eight_h100,
            tokens=64,
            work="greedy",
            launches=LAUNCHES_OF_SPARSE_ATTENTION,
            waits=WAITS_OF_SPARSE_ATTENTION,
        )
    for name, (hf, num_devices) in WIDE_MODELS.items():
        checks[f"H100 step of 64: {name} on {num_devices}"] = functools.partial(
            step,
            hf,
            h100 if num_devices == 1 else eight_h100,
            tokens=64,
            work="greedy",
            launches=LAUNCHES_WITH_WIDE_HEADS[name],
        )
    for name, (model, num_devices) in IMAGE_MODELS.items():
        images = tower_of(name)
        checks[f"H100 tower: {name}"] = functools.partial(check_tower, images, h100, facts=facts)
        checks[f"H100 step with images: {name} on {num_devices}"] = functools.partial(
            step,
            released(model),
            h100 if num_devices == 1 else eight_h100,
            launches=LAUNCHES_WITHOUT_A_KERNEL,
            images=images,
        )
    for name in ("Qwen2.5-1.5B", "Gemma-3-1B"):  # the activations of the second are float32
        checks[f"T4 step of 64: {name}, float16"] = functools.partial(
            step,
            SMALL_GPU_MODELS[name],
            t4,
            tokens=64,
            work="greedy",
            dtype="float16",
            launches=LAUNCHES_WITHOUT_A_KERNEL,
            has_kernel=False,
        )
    too_old = jax_versions.too_old(jax_versions.AMPERE_KERNEL)
    if too_old is None:
        checks |= {
            f"A100 attention: {call.name}": functools.partial(check_kernel, call, a100)
            for call in (*AMPERE_CALLS, *WIDE_CALLS)
        }
        checks["8.9 attention: mixed"] = functools.partial(check_kernel, MIXED, ada)
        checks["A100 step: Llama-3-8B"] = functools.partial(step, LLAMA_3_8B, a100)
        checks["A100 step of 64: Llama-3-8B, int8"] = functools.partial(
            step, LLAMA_3_8B, a100, tokens=64, work="greedy", quantize="int8", launches=LAUNCHES_PER_LAYER_IN_INT8
        )
        checks["A100 step of 64: Llama-3-8B, int4"] = functools.partial(
            step, LLAMA_3_8B, a100, tokens=64, work="greedy", quantize="int4", launches=LAUNCHES_PER_LAYER_IN_INT8
        )
        checks["A100 step: Mixtral-8x7B on 8, int8"] = functools.partial(
            step, MIXTRAL_8X7B, eight_a100, work="greedy", quantize="int8", launches=LAUNCHES_PER_LAYER_WITH_EXPERTS
        )
        for name, (hf, _) in WIDE_MODELS.items():
            checks[f"A100 step of 64: {name} on 8"] = functools.partial(
                step, hf, eight_a100, tokens=64, work="greedy", launches=LAUNCHES_WITH_WIDE_HEADS[name]
            )
        checks["A100 step: Llama-3-70B on 8"] = functools.partial(
            step, LLAMA_3_70B, eight_a100, launches=LAUNCHES_ON_SEVERAL
        )
    else:
        print(f"A100 and compute capability 8.9 SKIPPED: the kernel {too_old}")

    deadline = time.monotonic() + options.seconds
    failed = 0
    print(f"{'check':42} {'CPU':>8} {'temporaries':>12}  registers and spilled bytes")
    for name, check in checks.items():
        if options.only not in name:
            continue
        if time.monotonic() > deadline:
            failed += 1
            print(f"{name:42} not reached in {options.seconds:.0f} s")
            continue
        start = time.process_time()
        temporaries, kernels, words = 0, [], ""
        facts.clear()
        try:
            temporaries, kernels, words = check()
        except Exception as error:  # any error of the compiler or the lowering; the next check is independent of it
            words = f"{type(error).__name__}: {error}"[:600]
        failed += bool(words)
        figures = ", ".join(
            [f"{k.name.removeprefix('ragged_attention_')} {k.registers}/{k.spilled}" for k in kernels] + facts
        )
        print(
            f"{name:42} {time.process_time() - start:6.1f} s {temporaries / MIB:8.0f} MiB  {figures}"
            f"{'  FAILED ' + words if words else ''}",
            flush=True,
        )
    print("all passed" if not failed else f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
