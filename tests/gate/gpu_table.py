"""Compiles whole steps for GPUs that are not present and prints what each copies, launches and waits for: one row a program.

python -m tests.gate.gpu_table --models Llama-3-8B gpt-oss-20b --devices 1 8 --formats bfloat16 int8

Without a selection it makes the whole table, which takes about half an hour of processor time. `--seconds` ends it early;
the rows that were not reached are listed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from pathlib import Path

from tests.gate.models import GPU_MODELS, SMALL_GPU_MODELS

MIB = 2**20
MODELS = GPU_MODELS | SMALL_GPU_MODELS
NOT_QUANTIZED = ("bfloat16", "float16")
FORMATS = (*NOT_QUANTIZED, "int8", "int4", "fp8")
OF_KIND = {"t4": ("float16", "int8"), "a100": ("bfloat16", "int8", "int4"), "h100": ("bfloat16", "int8", "int4", "fp8")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="(default: those for the kind)")
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--kind", default="h100", choices=list(OF_KIND))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, help="of the weights (default: those of the kind)")
    parser.add_argument("--kv-dtype", help="of the KV cache (default: that of the activations)")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--work", default="greedy", choices=("any", "greedy", "sampled"))
    parser.add_argument("--deterministic", action="store_true", help="steps in which devices add up in order")
    parser.add_argument("--copies", type=int, default=1, help="names so many of the copied weights of each program")
    parser.add_argument("--seconds", type=float, help="starts no further program after this time")
    parser.add_argument("--text", type=Path, help="a folder for the text of each optimized program")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    from fastgen_jax.devices import parse_topology
    from fastgen_jax.models.families import family_of
    from fastgen_jax.plan.program import compile_step, deviceless_mesh

    print("| step | nodes | collectives | started | waits | weights copied, MiB | temporaries, MiB | processor seconds |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    failed, not_reached = 0, []
    models = options.models or list(SMALL_GPU_MODELS if options.kind == "t4" else GPU_MODELS)
    formats = options.formats or OF_KIND[options.kind]
    plain = next((name for name in formats if name in NOT_QUANTIZED), OF_KIND[options.kind][0])
    deadline = None if options.seconds is None else time.monotonic() + options.seconds
    for model, devices, stored in itertools.product(models, options.devices, formats):
        hf = MODELS[model]
        name = f"{model}, {devices} x {options.kind}, {stored}{', deterministic' if options.deterministic else ''}"
        if deadline is not None and time.monotonic() > deadline:
            not_reached.append(name)
            continue
        start = time.process_time()
        try:
            program = compile_step(
                family_of(hf["architectures"][0]).config_from_hf(hf),
                deviceless_mesh(parse_topology(f"{options.kind}:{devices}")),
                token_budget=options.tokens,
                max_num_seqs=64,
                max_context_len=8192,
                block_size=32 if options.kv_dtype is None else 128,
                num_blocks=2048 if options.kv_dtype is None else 512,
                dtype=stored if stored in NOT_QUANTIZED else plain,
                kv_dtype=options.kv_dtype,
                quantize=None if stored in NOT_QUANTIZED else stored,
                work=options.work,
                deterministic=options.deterministic,
            )
        except Exception as error:  # the other programs must be compiled too
            failed += 1
            print(f"| {name} | {type(error).__name__}: {' '.join(str(error).split())[:200]} | | | | | | |", flush=True)
            continue
        copied = sum(copy.bytes * copy.times for copy in program.copies)
        largest = ", ".join(
            f"{copy.name} {copy.bytes / MIB:.0f} x {copy.times}" for copy in program.copies[: options.copies]
        )
        print(
            f"| {name} | {program.operations} | {program.collectives} | {program.started} | {program.waits} | "
            f"{copied / MIB:,.0f}{f' ({largest})' if largest else ''} | "
            f"{program.temporaries / MIB:,.0f} | {time.process_time() - start:.0f} |",
            flush=True,
        )
        if options.text is not None:
            text = program.compiled.as_text()
            assert text is not None, "the compiler does not show its program"
            (options.text / f"{model}-{devices}-{stored}-{options.kind}.hlo").write_text(text)
    if not_reached:
        print(f"not reached in {options.seconds:.0f} s: {'; '.join(not_reached)}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
