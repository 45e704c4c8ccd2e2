"""A program that ends as soon as it has its answer, while a thread frees the engine.

    python -m tests.api.programs.ending

Prints which thread freed the engine.
"""

from __future__ import annotations

import threading
import time

import jax.numpy as jnp

from fastgen_jax import Engine, EngineConfig
from fastgen_jax.api.sharing import SharedEngine
from fastgen_jax.scheduling import Request
from tests.tiny import greedy, tiny_model

freeing = threading.Event()


class Large:
    """Takes as long to free as a large engine, and is in JAX when the program ends."""

    def __del__(self) -> None:
        freeing.set()
        time.sleep(0.5)
        jnp.ones(3).block_until_ready()
        print(f"freed by {threading.current_thread().name}", flush=True)


def main() -> None:
    params, model = tiny_model()
    engine = Engine(params, model, EngineConfig(token_budget=8, max_num_seqs=2, block_size=4, num_blocks=8))
    engine.part = Large()
    shared = SharedEngine(engine)
    del engine
    request = Request(request_id="0", prompt_token_ids=(1, 2, 3), params=greedy(2), arrival_time=0.0, seed=0)
    for _ in shared.run([request]):
        pass


if __name__ == "__main__":
    main()
    freeing.wait(10)
