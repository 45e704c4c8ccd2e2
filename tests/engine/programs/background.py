"""Ends, or with "forever" waits for an interrupt, while a program is being compiled in the background."""

from __future__ import annotations

import sys
import threading
import time

from fastgen_jax import Engine, EngineConfig
from fastgen_jax.engine.programs import Program, Programs
from tests.tiny import drain, greedy, tiny_model

compile_program = Programs.compile


def watched(programs: Programs, budget: int) -> Program:
    """Says what is compiled; that of a smaller step takes until the main thread has ended."""
    print("compiling", budget, flush=True)
    if budget < 32:
        threading.main_thread().join()
    program = compile_program(programs, budget)
    if budget < 32:
        print("compiled", budget, flush=True)
    return program


if __name__ == "__main__":
    Programs.compile = watched
    params, model = tiny_model()
    options = {"token_budget": 32, "budget_ladder": (4, 8), "max_num_seqs": 8, "block_size": 4, "num_blocks": 64}
    engine = Engine(params, model, EngineConfig(**options, background_compile=True))
    engine.add([5, 6, 7], greedy(2))
    drain(engine)
    assert "jax.experimental.pallas" not in sys.modules, "a CPU needs none of it, and it takes a fifth of a second"
    print("answered", flush=True)
    while "forever" in sys.argv:
        time.sleep(60)
