"""`fastgen compile`: compiles an engine's programs before its first start, also for TPUs that are not attached."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from fastgen_jax.cli.parser import Options
from fastgen_jax.flags import MODEL_HELP, add_fields, given_options

MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    from fastgen_jax.engine.config import EngineConfig

    parser.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}, or, with --topology, a config.json alone")
    parser.add_argument(
        "--topology",
        help="devices to compile for, such as v5e:2x2 or h100:1; no weights are read (default: those of this machine)",
    )
    parser.add_argument(
        "--out",
        metavar="PLACE",
        help="folder or gs://bucket/prefix for the programs, the --compile-cache-dir of later starts (default: with "
        "--topology, nothing is saved; otherwise the usual cache)",
    )
    add_fields(parser.add_argument_group("engine"), EngineConfig, skip=("compile_cache_dir", "background_compile"))


def run(options: Options) -> int:
    """Runs the command and returns the exit code."""
    from fastgen_jax.engine.config import EngineConfig

    choices = EngineConfig(**given_options(options, EngineConfig))
    if options["topology"] is None:
        return _compile_here(options["model"], choices, options["out"])
    return _compile_ahead(options["model"], choices, options["topology"], options["out"])


def _compile_here(model: str, choices: Any, out: str | None) -> int:
    from fastgen_jax import Engine

    engine = Engine.from_pretrained(model, replace(choices, compile_cache_dir=out, background_compile=False), progress=True)
    samplers = engine.runner.samplers  # for grammars, which a server compiles when the first one comes
    for num_rows, work in samplers.wanted():
        samplers.compile(num_rows, work)
    count = len(engine.config.budget_ladder) + len(samplers.wanted())
    print(f"{count} programs are ready for starts with the same options: {engine.describe()}")
    return 0


def _compile_ahead(model: str, choices: Any, topology: str, out: str | None) -> int:
    from fastgen_jax.plan.ahead import ProgramAhead, compile_ahead
    from fastgen_jax.plan.source import describe

    programs: list[ProgramAhead] = []
    print(
        f"{'tokens':>7} {'sampling':>9} {'traced':>9} {'lowered':>9} {'compiled':>9} "
        f"{'arguments':>11} {'temporaries':>12} {'saved':>10}"
    )

    def report(program: ProgramAhead) -> None:
        programs.append(program)
        saved = f"{program.saved / MIB:.1f} MiB" if program.saved else "-"
        print(
            f"{program.tokens:7} {program.work:>9} {program.trace_seconds:7.1f} s {program.lower_seconds:7.1f} s "
            f"{program.compile_seconds:7.1f} s "
            f"{program.arguments / MIB:7,.0f} MiB {program.temporaries / MIB:8,.0f} MiB {saved:>10}",
            flush=True,
        )

    config, place = compile_ahead(describe(model), choices, topology, out=out, report=report)
    total = sum(program.trace_seconds + program.lower_seconds + program.compile_seconds for program in programs)
    print(f"{len(programs)} programs in {total:.0f} s; {config.num_blocks:,} KV blocks of {config.block_size} tokens")
    if place:
        print(f"saved in {place}; a start there with the same options and --compile-cache-dir {place} loads them")
    elif out is not None:
        print("nothing is saved: a GPU's compiler times matmul kernels on the GPU, so compile on a machine that has it")
    return 0
