"""What one would otherwise learn on a rented TPU: `make tpu-check` compiles for v4, v5e, v5p, v6e and TPU7x, here.

Each kind of TPU has a process of its own, since the compiler may abort; the parent prints the table. A check fails if
its program does not compile, copies the KV cache, takes more temporary memory than the bound, or VMEM overflows.
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
from collections.abc import Callable
from typing import Any

TOPOLOGIES = {"v5e": "v5e:2x4", "v6e": "v6e:2x4", "v5p": "v5p:2x2x2", "v4": "v4:2x2x2", "tpu7x": "tpu7x:2x2x1"}
MIB = 2**20
KERNEL_TEMPORARIES = 64 * MIB  # padded copies of a step's queries, keys and values; the cache is 1000 MiB and more
STEP_TEMPORARIES = 640 * MIB  # activations of 512 tokens and their logits
SECONDS_A_PROGRAM = 180  # of processor time


@dataclasses.dataclass(kw_only=True)
class Result:
    kind: str
    check: str
    passed: bool
    seconds: float
    temporaries: int = 0
    words: str = ""


def check_kernel(call: Any, mesh: Any, *, tiles: Any = None) -> tuple[int, str]:
    """Compiles one call; returns the bytes of temporaries and a complaint, "" if there is none."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from fastgen_jax.plan.program import compile_lowered, lowering_for
    from pallas_kernels.ragged_attention.tpu import ragged_attention_tpu

    replicated = NamedSharding(mesh, PartitionSpec())

    def array(shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated)

    dtype = jnp.dtype(call.dtype)
    max_blocks = call.context // call.block_size
    num_blocks = min(call.num_sequences, 8) * max_blocks
    new = array((call.num_tokens, call.num_kv_heads, call.head_dim), dtype)
    cache = array((num_blocks, call.num_kv_heads, call.block_size, call.head_dim), dtype)
    extras = {name: array((call.num_heads,), jnp.float32) for name in ("alibi_slopes", "sinks") if call.extras}
    attention = functools.partial(
        ragged_attention_tpu, layer=0, num_blocks=num_blocks, scale=0.1, sliding_window=call.window,
        soft_cap=call.soft_cap, tiles=tiles,
    )  # fmt: skip
    with lowering_for(mesh):
        lowered = jax.jit(attention, donate_argnums=(3, 4)).lower(
            array((call.num_tokens, call.num_heads, call.head_dim), dtype), new, new, cache, cache,
            kv_slots=array((call.num_tokens,)), query_starts=array((call.num_sequences + 1,)),
            context_lens=array((call.num_sequences,)), block_tables=array((call.num_sequences, max_blocks)), **extras,
        )
        memory = compile_lowered(lowered).memory_analysis()
    cache_bytes = 2 * cache.size * dtype.itemsize
    return memory.temp_size_in_bytes, complaint(memory, cache_bytes, KERNEL_TEMPORARIES)


def complaint(memory: Any, cache_bytes: int, bound: int) -> str:
    if memory.alias_size_in_bytes < cache_bytes:
        return f"the KV cache is copied: {memory.alias_size_in_bytes} of its {cache_bytes} bytes are aliased"
    if memory.temp_size_in_bytes > bound:
        return f"temporaries of {memory.temp_size_in_bytes / MIB:.0f} MiB exceed the bound of {bound / MIB:.0f} MiB"
    return ""


def check_step(hf: dict[str, Any], mesh: Any, *, num_layers: int | None = None) -> tuple[int, str]:
    from fastgen_jax.models.families import family_of
    from fastgen_jax.plan.program import compile_step

    hf = hf if num_layers is None else hf | {"num_hidden_layers": num_layers}
    model = family_of(hf["architectures"][0]).config_from_hf(hf)
    program = compile_step(
        model, mesh, token_budget=512, max_num_seqs=64, max_context_len=8192, block_size=128, num_blocks=512
    )
    return program.temporaries, complaint(program.compiled.memory_analysis(), program.cache, STEP_TEMPORARIES)


def check_refusal(mesh: Any) -> tuple[int, str]:
    """The gate must be able to fail: a tile beyond VMEM is refused by the compiler."""
    from fastgen_jax.plan.program import DoesNotCompile
    from pallas_kernels.ragged_attention.tiles import Tiles
    from tests.gate.shapes import Call

    call = Call(name="too large", num_tokens=64, num_kv_heads=32)
    try:
        check_kernel(call, mesh, tiles=Tiles(queries=16, keys=4096, sequences=1, cores=1, vmem_limit=16 * MIB))
    except DoesNotCompile as error:
        return 0, "" if "vmem" in str(error).lower() else f"refused, but not for VMEM: {error}"
    return 0, "a tile of 128 MiB was accepted in 16 MiB of VMEM"


def checks_of(kind: str, mesh: Any, small: Any) -> dict[str, Callable[[], tuple[int, str]]]:
    """All checks of a kind, most important first; `small` is a mesh of one device."""
    from fastgen_jax.models.families import FAMILIES
    from tests.gate import shapes

    checks: dict[str, Callable[[], tuple[int, str]]] = {}
    for call in shapes.CALLS:
        checks[f"attention: {call.name}"] = functools.partial(check_kernel, call, small)
    checks["a too large tile is refused"] = functools.partial(check_refusal, small)
    checks["step: Llama-3-8B"] = functools.partial(check_step, shapes.LLAMA_3_8B, mesh)
    checks["step: Llama-3-70B"] = functools.partial(check_step, shapes.LLAMA_3_70B, mesh)
    if any("MixtralForCausalLM" in family.ARCHITECTURES for family in FAMILIES.values()):
        checks["step: Mixtral-8x7B"] = functools.partial(check_step, shapes.MIXTRAL_8X7B, mesh)
    return checks


def run_kind(kind: str, only: str) -> None:
    """Runs the checks of a kind and prints one JSON line each; the process that `main` starts."""
    from fastgen_jax.plan.devices import parse_topology
    from fastgen_jax.plan.program import DoesNotCompile, deviceless_mesh

    topology = parse_topology(TOPOLOGIES[kind])
    mesh, small = deviceless_mesh(topology), deviceless_mesh(topology, num_devices=1)
    for name, check in checks_of(kind, mesh, small).items():
        if only not in name:
            continue
        start = time.process_time()  # whoever else uses the machine does not count
        temporaries = 0
        try:
            temporaries, words = check()
        except (DoesNotCompile, ValueError, NotImplementedError) as error:
            words = f"{type(error).__name__}: {error}"
        seconds = time.process_time() - start
        if seconds > SECONDS_A_PROGRAM and not words:
            words = f"took more than {SECONDS_A_PROGRAM} processor seconds"
        result = Result(
            kind=kind, check=name, passed=not words, seconds=seconds, temporaries=temporaries, words=words
        )
        print(json.dumps(dataclasses.asdict(result)), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--kinds", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--only", default="", help="run the checks whose name holds this")
    parser.add_argument("--seconds", type=float, default=1500.0, help="time for all; what is not reached is named")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_this_process:
        run_kind(options.kinds[0], options.only)
        return 0

    deadline = time.monotonic() + options.seconds
    failed = 0
    print(f"{'':6} {'check':42} {'CPU':>8} {'temporaries':>12}")
    for i, kind in enumerate(options.kinds):
        # What is left is divided among the kinds that are left: a slow one does not starve the others.
        share = max(1.0, (deadline - time.monotonic()) / (len(options.kinds) - i))
        command = [sys.executable, "-m", "tests.gate.tpu_check", "--in-this-process", "--kinds", kind]
        command += ["--only", options.only]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        try:
            output, errors = process.communicate(timeout=share)
            ended = f"the process ended with {process.returncode}: {errors[-600:]}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = process.communicate()
            ended = f"stopped after {share:.0f} s; the checks that are missing were not reached"
        for line in output.splitlines():
            if not line.startswith("{"):
                continue
            result = Result(**json.loads(line))
            failed += not result.passed
            print(f"{kind:6} {result.check:42} {result.seconds:6.1f} s {result.temporaries / MIB:8.0f} MiB"
                  f"  {'' if result.passed else 'FAILED ' + result.words}", flush=True)
        if ended:
            failed += 1
            print(f"{kind:6} {ended}", flush=True)
    print("all passed" if not failed else f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
