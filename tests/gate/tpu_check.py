"""Compiles for TPU v4, v5e, v5p, v6e and TPU7x without a TPU: `make tpu-check`.

Each kind of TPU has its own process, because the compiler may abort; the parent prints the table. A check fails if
its program does not compile, copies the KV cache, exceeds the bound on temporary memory, or overflows VMEM; if a layer
has more collectives than necessary or copies a weight; or if logits get another layout. Running out of `--seconds` is not
a failure: checks that were not reached are listed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

# Eight devices each; a TPU7x chip has two.
TOPOLOGIES = {"v5e": "v5e:2x4", "v6e": "v6e:2x4", "v5p": "v5p:2x2x2", "v4": "v4:2x2x2", "tpu7x": "tpu7x:2x2x1"}
MIB = 2**20
KERNEL_TEMPORARIES = 64 * MIB  # padded copies of a step's queries, keys and values; the cache has 1000 MiB or more
MAX_NUM_SEQS = 64
STEP_TEMPORARIES = 640 * MIB  # activations of 512 tokens and their logits
TOWER_TEMPORARIES = 1280 * MIB  # of 25,600 patches: scores, hidden units, and queries, keys and values in two layouts
SECONDS_PER_PROGRAM = 180  # of processor time
SECONDS_PER_LARGE_PROGRAM = 360  # with the kernels of 256 or 512 experts, and sorts
# Of a layer on eight devices and 512 tokens, with one to spare; with 64 tokens it is 30, on one device 25. Others are
# printed only.
MOST_OPERATIONS = {("v6e", "step: Llama-3-8B"): 35}
COLLECTIVES_PER_LAYER = 2
COLLECTIVES_IN_ORDER = 4  # each sum is an all-to-all and an all-gather
EXPERT_KINDS = ("v6e", "tpu7x")  # on which experts of awkward widths are compiled
WITH_LATENTS = ("DeepSeek-V3, 5 layers",)  # of `WIDE_MODELS`
INT4_KINDS = ("v5e", "v6e", "tpu7x")
# Formats in which activations are rounded, too, and the operands of the products as the compiler calls them.
NARROW_PRODUCTS = {"v5e": ("w8a8", "s8"), "v6e": ("w8a8", "s8"), "tpu7x": ("fp8", "f8e4m3fn")}
# The checks that CI has time for: a test of the gate itself, the kernels with both kinds of cache, and one whole step.
QUICK = (
    "a too large tile is refused",
    "a copied stack of experts is found",
    "logits in another layout are found",
    "products of int8 are told apart",
    "int4 product: 64 rows, a scale for 32 inputs",
    "attention: 70B on 8 devices, B=128",
    "attention: int8 KV, 70B on 8 devices",
    "step: Llama-3-8B",
)


@dataclasses.dataclass(kw_only=True)
class Result:
    kind: str
    check: str
    passed: bool
    seconds: float
    temporaries: int = 0  # bytes
    operations: int = 0  # per layer of a step
    words: str = ""


def check_kernel(call: Any, mesh: Any, *, tiles: Any = None) -> tuple[int, str]:
    """Compiles one call; returns the bytes of temporaries and an error message ("" if it passes)."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from fastgen_jax.plan.program import compile_lowered, lowering_for
    from pallas_kernels.ragged_attention.tpu.call import ragged_attention_tpu
    from tests.gate.calls import lower_attention

    replicated = NamedSharding(mesh, PartitionSpec())

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated)

    num_blocks = min(call.num_sequences, 8) * (call.context // call.block_size)
    attention = functools.partial(ragged_attention_tpu, tiles=tiles)
    with lowering_for(mesh):
        lowered, cache_bytes = lower_attention(call, attention, array, num_blocks=num_blocks)
        memory = compile_lowered(lowered).memory_analysis()
    return memory.temp_size_in_bytes, complaint(memory, cache_bytes, KERNEL_TEMPORARIES)


def complaint(memory: Any, cache_bytes: int, bound: int) -> str:
    if memory.alias_size_in_bytes < cache_bytes:
        return f"the KV cache is copied: {memory.alias_size_in_bytes} of its {cache_bytes} bytes are aliased"
    if memory.temp_size_in_bytes > bound:
        return f"temporaries of {memory.temp_size_in_bytes / MIB:.0f} MiB exceed the bound of {bound / MIB:.0f} MiB"
    return ""


def check_step(
    hf: dict[str, Any],
    mesh: Any,
    *,
    kv_dtype: str = "bfloat16",
    quantize: str | None = None,
    images: Any = None,
    tokens: int = 512,
    num_blocks: int = 512,
    operands: str | None = None,
    stored: dict[str, Any] | None = None,
    deterministic: bool = False,
) -> tuple[int, str, int]:
    """Compiles a whole tensor-parallel step; also returns the number of operations per layer. `images` are in it.

    The minimum of collectives per layer is one sum after each half. `operands` is the type of both operands of all products
    with weights, except that of a router, and of those of experts. Weights are those of a checkpoint with the settings
    `stored`. If `deterministic`, no sum over devices may have an order that a library chooses.
    """
    import jax.numpy as jnp

    from fastgen_jax.models.families import family_of
    from fastgen_jax.plan import hlo
    from fastgen_jax.plan.program import compile_step
    from fastgen_jax.plan.tower import step_images
    from tests.gate.stored import forms_of

    model = family_of(hf["architectures"][0]).config_from_hf(hf)
    program = compile_step(
        model,
        mesh,
        token_budget=tokens,
        max_num_seqs=MAX_NUM_SEQS,
        max_context_len=8192,
        block_size=128,
        num_blocks=num_blocks,
        kv_dtype=jnp.dtype(kv_dtype),
        quantize=quantize,
        kept=forms_of(stored, model, mesh),
        images=None if images is None else step_images(images, tokens, mesh, jnp.bfloat16),
        has_grids=images is not None and images.in_grid,
        deterministic=deterministic,
    )
    words = complaint(program.compiled.memory_analysis(), program.cache, STEP_TEMPORARIES)
    collectives = COLLECTIVES_IN_ORDER if deterministic else COLLECTIVES_PER_LAYER
    if program.collectives != (collectives if mesh.size > 1 else 0):
        words = words or f"{program.collectives} collectives in a layer instead of {collectives}"
    text = program.compiled.as_text() or ""
    sums = hlo.sums_of_floats(text)
    if deterministic and sums:
        words = words or f"sums over devices in an order that is not ours: {sums[0][:200]}"
    if not deterministic and mesh.size > 1 and len(sums) < COLLECTIVES_PER_LAYER:
        words = words or f"{len(sums)} sums over devices were found"
    if program.copies:
        words = words or f"{program.copies[0].name} copies a weight, cache or state: {program.copies[0].bytes / MIB:.0f} MiB"
    if relaid := hlo.relaid_rows(text, min(tokens, MAX_NUM_SEQS), model.vocab_size):
        words = words or f"the logits get another layout: {', '.join(relaid[:4])}"
    if operands is not None:
        products, experts = hlo.layer_products(text), hlo.layer_kernels(text, "grouped_matmul")
        wanted = {(operands, operands)} | ({("bf16", "bf16")} if model.moe else set())
        if set(products) != wanted or len(experts) != (2 if model.moe else 0):
            words = words or f"the products of a layer are {products} and {experts}, not of two {operands}"
        if any(types.count(operands) != 2 for types in experts):
            words = words or f"the experts' products have {experts}, not two {operands}"
    return program.temporaries, words, program.operations


def check_tower(images: Any, mesh: Any) -> tuple[int, str, int]:
    """Compiles a vision tower for its largest image; also returns the number of operations per layer."""
    from fastgen_jax.plan.tower import compile_tower

    program = compile_tower(images, mesh)
    words = ""
    if program.temporaries > TOWER_TEMPORARIES:
        words = f"temporaries of {program.temporaries / MIB:.0f} MiB exceed the bound of {TOWER_TEMPORARIES / MIB:.0f} MiB"
    if program.copies:
        words = words or f"{program.copies[0].name} copies a weight: {program.copies[0].bytes / MIB:.0f} MiB"
    return program.temporaries, words, program.operations


def check_step_refused(hf: dict[str, Any], mesh: Any) -> tuple[int, str]:
    """Weights that exceed a device's memory: the compiler must report this, not the first run."""
    from fastgen_jax.plan.program import DoesNotCompile

    try:
        check_step(hf, mesh)
    except DoesNotCompile as error:
        return 0, "" if "hbm" in str(error).lower() else f"refused, but not for memory: {error}"
    return 0, "a program beyond the device's memory was accepted"


def check_int4_product(mesh: Any, *, rows: int, size: int, has_offsets: bool) -> tuple[int, str]:
    """Compiles products with weights of 4 bits in a loop over layers: nothing as large as a weight may be written."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from fastgen_jax.plan.program import compile_lowered, lowering_for
    from pallas_kernels.matmul import Int4Weight, linear

    whole, layers, width, hidden = NamedSharding(mesh, PartitionSpec()), 4, 4096, 14336

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    def weight(inputs: int, outputs: int) -> Int4Weight:
        scales = array((layers, inputs // size, outputs), jnp.float32)
        values = array((layers, inputs // 2, outputs), jnp.uint8)
        return Int4Weight(values=values, scales=scales, offsets=scales if has_offsets else None)

    def loop(x: Any, up: Int4Weight, down: Int4Weight) -> Any:
        def layer(n: Any, x: Any) -> Any:
            return linear(linear(x, up.at_layer(n)), down.at_layer(n), residual=x)

        return jax.lax.fori_loop(0, layers, layer, x)

    arguments = array((rows, width), jnp.bfloat16), weight(width, hidden), weight(hidden, width)
    with lowering_for(mesh):
        memory = compile_lowered(jax.jit(loop).lower(*arguments)).memory_analysis()
    # Activations of 64 rows stay in VMEM, except on v5p; a matrix of 4 bits has 28 MiB.
    bound = rows * (4 * width + 6 * hidden) + MIB
    words = f"temporaries of {memory.temp_size_in_bytes / MIB:.0f} MiB" if memory.temp_size_in_bytes > bound else ""
    return memory.temp_size_in_bytes, words


def check_refusal(mesh: Any) -> tuple[int, str]:
    """Tests the gate itself: the compiler must refuse a tile that exceeds VMEM."""
    from fastgen_jax.plan.program import DoesNotCompile
    from pallas_kernels.ragged_attention.tpu.tile_sizes import Tiles
    from tests.gate.calls import Call

    call = Call(name="too large", num_tokens=64, num_kv_heads=32)
    try:
        check_kernel(call, mesh, tiles=Tiles(queries=16, keys=4096, sequences=1, cores=1, vmem_limit=16 * MIB))
    except DoesNotCompile as error:
        return 0, "" if "vmem" in str(error).lower() else f"refused, but not for VMEM: {error}"
    return 0, "a tile of 128 MiB was accepted in 16 MiB of VMEM"


def checks_of(kind: str, mesh: Any, small: Any, *, kv_dtypes: Sequence[str]) -> dict[str, Callable[[], tuple[Any, ...]]]:
    """All checks of a kind, most important first; `small` is a mesh of one device.

    Each model's step is compiled over a cache of each of the `kv_dtypes`.
    """
    from fastgen_jax.models.sharding import tensor_mesh
    from tests.gate import calls, models
    from tests.gate.noticed import check_copies_are_found, check_layouts_are_found, check_operands_are_found
    from tests.gate.stored import AWQ, FP8_TENSORS

    checks: dict[str, Callable[[], tuple[Any, ...]]] = {}
    checks["a too large tile is refused"] = functools.partial(check_refusal, small)
    checks["a copied stack of experts is found"] = functools.partial(check_copies_are_found, small)
    checks["logits in another layout are found"] = functools.partial(check_layouts_are_found, small)
    if NARROW_PRODUCTS.get(kind, ("",))[0] == "w8a8":
        checks["products of int8 are told apart"] = functools.partial(check_operands_are_found, small)
    for rows, size, has_offsets in ((64, 32, False), (512, 128, True)):
        words = f"int4 product: {rows} rows, a scale for {size} inputs" + ", offsets" * has_offsets
        checks[words] = functools.partial(check_int4_product, small, rows=rows, size=size, has_offsets=has_offsets)
    for call in calls.CALLS:
        checks[f"attention: {call.name}"] = functools.partial(check_kernel, call, small)
    for kv_dtype in kv_dtypes:
        for model, hf in models.MODELS.items():
            name = f"step: {model}" + ("" if kv_dtype == "bfloat16" else f", {kv_dtype} KV")
            if (kind, model) == ("v5e", "Llama-3-70B"):  # 141 GB of weights on eight devices of 16 GiB
                checks[f"{name} is refused"] = functools.partial(check_step_refused, hf, mesh)
            else:
                checks[name] = functools.partial(check_step, hf, mesh, kv_dtype=kv_dtype)
    for model, hf in (("Llama-3-8B", models.LLAMA_3_8B), ("Mixtral-8x7B", models.MIXTRAL_8X7B)):
        if model == "Llama-3-8B" or kind in EXPERT_KINDS:
            checks[f"step: {model}, deterministic"] = functools.partial(check_step, hf, mesh, deterministic=True)
    if kind in INT4_KINDS:
        for model, hf, some, tokens in (
            ("Llama-3-8B", models.LLAMA_3_8B, small, 64),
            ("Llama-3-8B", models.LLAMA_3_8B, mesh, 512),
            ("Mixtral-8x7B", models.MIXTRAL_8X7B, mesh, 512),
        ):
            name = f"step: {model} int4 on {some.size}"
            checks[name] = functools.partial(check_step, hf, some, tokens=tokens, quantize="int4")
        checks["step: Llama-3-8B AWQ on 1"] = functools.partial(check_step, models.LLAMA_3_8B, small, tokens=64, stored=AWQ)
    if kind in NARROW_PRODUCTS:
        quantize, operands = NARROW_PRODUCTS[kind]
        for some, tokens in ((small, 64), (mesh, 512)):
            checks[f"step: Llama-3-8B {quantize} on {some.size}"] = functools.partial(
                check_step,
                models.LLAMA_3_8B,
                some,
                tokens=tokens,
                num_blocks=256 if some.size == 1 else 512,  # a v5e has 16 GiB
                quantize=quantize,
                operands=operands,
            )
        for model, hf, kinds, num_devices in (
            ("Mixtral-8x7B", models.MIXTRAL_8X7B, ("v6e", "tpu7x"), 8),
            ("Qwen3-30B-A3B", models.QWEN3_30B_A3B, ("tpu7x",), 4),  # an expert has 192 inputs on a device
            ("Qwen3-30B-A3B", models.QWEN3_30B_A3B, ("tpu7x",), 8),  # scales of outputs are 1 MiB a layer
        ):
            if kind in kinds:
                checks[f"step: {model} {quantize} on {num_devices}"] = functools.partial(
                    check_step, hf, tensor_mesh(mesh.devices.flat[:num_devices]), quantize=quantize, operands=operands
                )
    if kind == "tpu7x":
        checks["step: Llama-3-8B, FP8 checkpoint on 1"] = functools.partial(
            check_step, models.LLAMA_3_8B, small, tokens=64, stored=FP8_TENSORS
        )
    checks["step: Llama-3-8B, int8 weights"] = functools.partial(check_step, models.LLAMA_3_8B, mesh, quantize="int8")
    if kind in EXPERT_KINDS:
        for model, (hf, num_devices) in models.EXPERT_MODELS.items():
            some = tensor_mesh(mesh.devices.flat[:num_devices])
            checks[f"step: {model} on {num_devices}"] = functools.partial(check_step, hf, some)
        for model, (hf, num_devices) in models.STATE_MODELS.items():
            some = tensor_mesh(mesh.devices.flat[:num_devices])
            checks[f"step: {model} on {num_devices}"] = functools.partial(check_step, hf, some)
        for model, (name, changes, num_devices) in models.SPARSE_MODELS.items():
            some, hf = tensor_mesh(mesh.devices.flat[:num_devices]), models.released(name) | changes
            checks[f"step: {model} on {num_devices}"] = functools.partial(check_step, hf, some)
        for model in WITH_LATENTS:
            hf, num_devices = models.WIDE_MODELS[model]
            some = tensor_mesh(mesh.devices.flat[:num_devices])
            checks[f"step: {model} on {num_devices}"] = functools.partial(check_step, hf, some)
        for model, (name, num_devices) in models.IMAGE_MODELS.items():
            some, images = tensor_mesh(mesh.devices.flat[:num_devices]), models.tower_of(model)
            checks[f"tower: {model}"] = functools.partial(check_tower, images, small)
            checks[f"step with images: {model} on {num_devices}"] = functools.partial(
                check_step, models.released(name), some, images=images
            )
    return checks


def too_many_operations(kind: str, check: str, operations: int) -> str:
    """An error message if a layer has more operations than are known to be needed."""
    most = MOST_OPERATIONS.get((kind, check), operations)
    return f"{operations} operations a layer, where {most} suffice" if operations > most else ""


def run_kind(kind: str, only: str, *, quick: bool, kv_dtypes: Sequence[str]) -> None:
    """Runs the checks of a kind and prints one JSON line each; the process that `main` starts."""
    from fastgen_jax.devices import parse_topology
    from fastgen_jax.plan.program import DoesNotCompile, deviceless_mesh

    topology = parse_topology(TOPOLOGIES[kind])
    mesh, small = deviceless_mesh(topology), deviceless_mesh(topology, num_devices=1)
    for name, check in checks_of(kind, mesh, small, kv_dtypes=kv_dtypes).items():
        if only not in name or (quick and name not in QUICK):
            continue
        start = time.process_time()  # excludes other processes
        temporaries, operations = 0, ()
        try:
            temporaries, words, *operations = check()
        except (DoesNotCompile, ValueError, NotImplementedError) as error:
            words = f"{type(error).__name__}: {error}"
        seconds = time.process_time() - start
        is_large = "DeepSeek" in name or "Qwen3-Next" in name
        limit = SECONDS_PER_LARGE_PROGRAM if is_large else SECONDS_PER_PROGRAM
        if seconds > limit and not words:
            words = f"took more than {limit} processor seconds"
        words = words or too_many_operations(kind, name, sum(operations))
        result = Result(
            kind=kind,
            check=name,
            passed=not words,
            seconds=seconds,
            temporaries=temporaries,
            operations=sum(operations),
            words=words,
        )
        print(json.dumps(dataclasses.asdict(result)), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--kinds", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--only", default="", help="run only checks whose name contains this")
    parser.add_argument("--seconds", type=float, default=1500.0, help="time limit of all checks; lists those not reached")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument(
        "--kv-dtypes",
        nargs="+",
        choices=("bfloat16", "int8", "float8_e4m3fn"),
        default=["bfloat16", "int8"],
        help="dtypes of the caches that steps are compiled with",
    )
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_this_process:
        run_kind(options.kinds[0], options.only, quick=options.quick, kv_dtypes=options.kv_dtypes)
        return 0

    from pallas_kernels import jax_versions

    if too_old := jax_versions.too_old(jax_versions.COMPILE_WITHOUT_DEVICE):
        print(f"tpu-check SKIPPED: compiling without a TPU {too_old}")
        return 0
    deadline = time.monotonic() + options.seconds
    failed = passed = unreached = 0
    print(f"{'':6} {'check':42} {'CPU':>8} {'temporaries':>12}")
    for i, kind in enumerate(options.kinds):
        # The remaining time is divided among the remaining kinds, so that a slow one does not starve the others.
        share = max(1.0, (deadline - time.monotonic()) / (len(options.kinds) - i))
        command = [sys.executable, "-m", "tests.gate.tpu_check", "--in-this-process", "--kinds", kind]
        command += ["--only", options.only] + ["--quick"] * options.quick + ["--kv-dtypes", *options.kv_dtypes]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        try:
            output, errors = process.communicate(timeout=share)
            crashed = process.returncode != 0
            ended = f"FAILED the process ended with {process.returncode}: {errors[-600:]}" if crashed else ""
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = process.communicate()
            ended, crashed = f"NOT REACHED within {share:.0f} s: the checks that are missing", False
        for line in output.splitlines():
            if not line.startswith("{"):
                continue
            result = Result(**json.loads(line))
            failed += not result.passed
            passed += result.passed
            print(
                f"{kind:6} {result.check:42} {result.seconds:6.1f} s {result.temporaries / MIB:8.0f} MiB"
                f"{f'  {result.operations} operations a layer' if result.operations else ''}"
                f"{'' if result.passed else '  FAILED ' + result.words}",
                flush=True,
            )
        failed += crashed
        unreached += bool(ended) and not crashed
        if ended:
            print(f"{kind:6} {ended}", flush=True)
    print(f"{passed} passed, {failed} failed" + (", some were not reached" if unreached else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
