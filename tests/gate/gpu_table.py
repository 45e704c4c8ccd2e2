"""Compiles whole steps for GPUs that are not present and prints what each copies, launches and waits for: one row a program.

python -m tests.gate.gpu_table --models Llama-3-8B gpt-oss-20b --devices 1 8 --quantize none int8
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from pathlib import Path

from tests.gate.shapes import GPU_MODELS

MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--models", nargs="+", default=list(GPU_MODELS), choices=list(GPU_MODELS))
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--quantize", nargs="+", default=["none", "int8"], choices=("none", "int8"))
    parser.add_argument("--kind", default="h100", help="h100, a100 or t4")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--work", default="greedy", choices=("any", "greedy", "sampled"))
    parser.add_argument("--text", type=Path, help="a folder for the text of each optimized program")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    from fastgen_jax.devices import parse_topology
    from fastgen_jax.models.families import family_of
    from fastgen_jax.plan.program import compile_step, deviceless_mesh

    print("| step | launches | collectives | waits | weights copied, MiB | temporaries, MiB | processor seconds |")
    print("|---|---|---|---|---|---|---|", flush=True)
    failed = 0
    for model, devices, quantize in itertools.product(options.models, options.devices, options.quantize):
        hf = GPU_MODELS[model]
        name = f"{model}, {devices} x {options.kind}, {'bfloat16' if quantize == 'none' else quantize}"
        start = time.process_time()
        try:
            program = compile_step(
                family_of(hf["architectures"][0]).config_from_hf(hf),
                deviceless_mesh(parse_topology(f"{options.kind}:{devices}")),
                token_budget=options.tokens,
                max_num_seqs=64,
                max_context_len=8192,
                block_size=32,
                num_blocks=2048,
                quantize=None if quantize == "none" else quantize,
                work=options.work,
            )
        except Exception as error:  # the other programs must be compiled too
            failed += 1
            print(f"| {name} | {type(error).__name__}: {' '.join(str(error).split())[:200]} | | | | | |", flush=True)
            continue
        copied = sum(copy.bytes * copy.times for copy in program.copies)
        print(
            f"| {name} | {program.operations} | {program.collectives} | {program.waits} | {copied / MIB:,.0f} | "
            f"{program.temporaries / MIB:,.0f} | {time.process_time() - start:.0f} |",
            flush=True,
        )
        if options.text is not None:
            text = program.compiled.as_text()
            assert text is not None, "the compiler does not show its program"
            (options.text / f"{model}-{devices}-{quantize}-{options.kind}.hlo").write_text(text)
    return failed


if __name__ == "__main__":
    sys.exit(main())
