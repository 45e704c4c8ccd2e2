"""Compiles for an H100, an A100 and a T4 without a GPU: `make gpu-compile-check`.

A check fails if its program does not compile, copies the KV cache or a weight, exceeds the bounds on temporary memory and on
launches per layer, or makes the host wait in the middle of a step; or if a kernel spills more than a few registers, uses
more shared memory than a thread block has, or has matrix instructions that the assembler had to serialize. Checks that
require a newer jax are listed as skipped, not failed.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable

from tests.gate.calls import INT4_PRODUCTS
from tests.gate.gpu_kernels import (
    AMPERE_CALLS,
    GPU_CALLS,
    MIB,
    MIXED,
    WIDE_CALLS,
    Kernel,
    check_kernel,
    check_product,
    check_refusal,
    check_spills,
)
from tests.gate.gpu_steps import (
    LAUNCHES_IN_HALVES,
    LAUNCHES_IN_ORDER,
    LAUNCHES_IN_ORDER_WITH_EXPERTS,
    LAUNCHES_OF_LATENTS_IN_FP8,
    LAUNCHES_OF_SPARSE_ATTENTION,
    LAUNCHES_ON_SEVERAL,
    LAUNCHES_PER_LAYER_IN_FP8,
    LAUNCHES_PER_LAYER_IN_INT8,
    LAUNCHES_PER_LAYER_WITH_EXPERTS,
    LAUNCHES_WITH_A_STATE,
    LAUNCHES_WITH_WIDE_HEADS,
    LAUNCHES_WITHOUT_A_KERNEL,
    check_copies,
    check_graphs,
    check_other_layers,
    check_same_layers,
    check_step,
    check_sums,
    check_tower,
)
from tests.gate.models import (
    DEEPSEEK_V3_5_LAYERS,
    GPT_OSS_20B,
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
from tests.gate.stored import AWQ, FP8_BLOCKS, FP8_TENSORS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--only", default="", help="run only checks whose name contains this")
    parser.add_argument("--seconds", type=float, default=3600.0, help="time limit of all checks; lists those not reached")
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
    checks |= {
        f"H100 product: int4, {product.name}": functools.partial(check_product, product, h100) for product in INT4_PRODUCTS
    }
    checks["H100 a too large tile is refused"] = functools.partial(check_refusal, h100)
    checks["H100 spilled registers are detected"] = functools.partial(check_spills, h100)
    checks["H100 copied weights are detected"] = functools.partial(check_copies, h100)
    if jax_versions.too_old(jax_versions.COMMAND_BUFFERS) is None:
        checks["H100 what is no graph is detected"] = functools.partial(check_graphs, h100)
    checks["H100 deterministic: Llama-3-8B"] = functools.partial(check_same_layers, LLAMA_3_8B, h100)
    checks["H100 deterministic: Qwen3-30B-A3B"] = functools.partial(check_same_layers, QWEN3_30B_A3B, h100)
    checks["H100 deterministic: other layers are noticed"] = functools.partial(check_other_layers, h100)
    facts: list[str] = []
    checks["H100 deterministic: sums of a library are noticed"] = functools.partial(check_sums, eight_h100)
    checks["H100 deterministic: Llama-3-8B on 8"] = functools.partial(
        check_same_layers, LLAMA_3_8B, eight_h100, launches=LAUNCHES_IN_ORDER, facts=facts
    )
    checks["H100 deterministic: Llama-3-8B on 8, int8"] = functools.partial(
        check_same_layers, LLAMA_3_8B, eight_h100, works=("greedy",), quantize="int8", facts=facts
    )
    checks["H100 deterministic: Qwen3-30B-A3B on 8"] = functools.partial(
        check_same_layers,
        QWEN3_30B_A3B,
        eight_h100,
        works=("greedy",),
        launches=LAUNCHES_IN_ORDER_WITH_EXPERTS,
        facts=facts,
    )
    checks["H100 deterministic: Qwen3-Next, 8 layers, on 8"] = functools.partial(
        check_same_layers, STATE_MODELS["Qwen3-Next, 8 layers"][0], eight_h100, works=("greedy",), facts=facts
    )
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
    checks["H100 step of 64: Llama-3-8B, AWQ"] = functools.partial(
        step, LLAMA_3_8B, h100, tokens=64, work="greedy", stored=AWQ, launches=LAUNCHES_PER_LAYER_IN_INT8
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
    for name, settings in (("FP8 in blocks", FP8_BLOCKS), ("FP8", FP8_TENSORS)):
        checks[f"H100 step of 64: Llama-3-8B, {name} as stored"] = functools.partial(
            step, LLAMA_3_8B, h100, tokens=64, work="greedy", stored=settings, launches=LAUNCHES_PER_LAYER_IN_FP8
        )
    # With 64 tokens, the rows of all experts have the shape of a weight.
    checks["H100 step of 128: DeepSeek-V3, 5 layers, FP8 in blocks as stored on 8"] = functools.partial(
        step,
        DEEPSEEK_V3_5_LAYERS,
        eight_h100,
        tokens=128,
        work="greedy",
        stored=FP8_BLOCKS,
        launches=LAUNCHES_OF_LATENTS_IN_FP8,
    )
    checks["H100 step: Llama-3-8B, fp8"] = functools.partial(
        step, LLAMA_3_8B, h100, work="greedy", quantize="fp8", launches=LAUNCHES_PER_LAYER_IN_FP8
    )
    checks["H100 step: Llama-3-70B on 8"] = functools.partial(step, LLAMA_3_70B, eight_h100, launches=LAUNCHES_ON_SEVERAL)
    checks["H100 step: Mixtral-8x7B on 8"] = functools.partial(
        step, MIXTRAL_8X7B, eight_h100, work="greedy", launches=LAUNCHES_PER_LAYER_WITH_EXPERTS
    )
    # The cache fills the GPU's memory, as in use: XLA then used to compute much of a layer twice.
    checks["H100 step of 64: gpt-oss-20b, full"] = functools.partial(
        step, GPT_OSS_20B, h100, tokens=64, work="greedy", num_blocks=40_000, launches=LAUNCHES_PER_LAYER_WITH_EXPERTS
    )
    # A vocabulary of 100,278 is no whole number of tiles.
    checks["H100 step of 64: Olmo-3.1-32B, int8"] = functools.partial(
        step,
        released("allenai/Olmo-3.1-32B-Instruct"),
        h100,
        tokens=64,
        work="greedy",
        quantize="int8",
        launches=LAUNCHES_ON_SEVERAL,
    )
    for name, (hf, num_devices) in STATE_MODELS.items():
        checks[f"H100 step of 64: {name} on {num_devices}"] = functools.partial(
            step, hf, h100, tokens=64, work="greedy", launches=LAUNCHES_WITH_A_STATE[name]
        )
    # 6,448 columns of a projection are no whole number of tiles.
    checks["H100 step of 64: Granite-4.0-H-Tiny, int8"] = functools.partial(
        step,
        STATE_MODELS["Granite-4.0-H-Tiny"][0],
        h100,
        tokens=64,
        work="greedy",
        quantize="int8",
        launches=LAUNCHES_WITH_A_STATE["Granite-4.0-H-Tiny, int8"],
    )
    for name, (model, changes, num_devices) in SPARSE_MODELS.items():
        checks[f"H100 step of 64: {name} on {num_devices}"] = functools.partial(
            step,
            released(model) | changes,
            eight_h100,
            tokens=64,
            work="greedy",
            launches=LAUNCHES_OF_SPARSE_ATTENTION,
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
        for quantize in (None, "int8"):  # int8 is multiplied in halves: see `pallas_kernels.matmul.halves`
            checks[f"T4 step of 64: {name}, {quantize or 'float16'}"] = functools.partial(
                step,
                SMALL_GPU_MODELS[name],
                t4,
                tokens=64,
                work="greedy",
                dtype="float16",
                quantize=quantize,
                launches=LAUNCHES_IN_HALVES if quantize else LAUNCHES_WITHOUT_A_KERNEL,
                has_kernel=False,
            )
    too_old = jax_versions.too_old(jax_versions.AMPERE_KERNEL)
    if too_old is None:
        checks |= {
            f"8.9 product: int4, {product.name}": functools.partial(check_product, product, ada) for product in INT4_PRODUCTS
        }
        checks |= {
            f"A100 product: int4, {product.name}": functools.partial(check_product, product, a100)
            for product in INT4_PRODUCTS
        }
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
        checks["A100 step of 64: Llama-3-8B, AWQ"] = functools.partial(
            step, LLAMA_3_8B, a100, tokens=64, work="greedy", stored=AWQ, launches=LAUNCHES_PER_LAYER_IN_INT8
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
