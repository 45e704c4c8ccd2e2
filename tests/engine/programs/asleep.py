"""Prints a line of JSON: resident memory of an engine of SmolLM2 awake, asleep and awake again, sizes, seconds to wake.

python -m tests.engine.programs.asleep
"""

from __future__ import annotations

import gc
import json
import time

if __name__ == "__main__":
    import jax
    import psutil

    from fastgen_jax import Engine, SamplingParams

    def resident() -> int:
        gc.collect()
        return psutil.Process().memory_info().rss

    def answer() -> str:
        engine.add("The capital of France is", SamplingParams(max_new_tokens=8, do_sample=False))
        text = ""
        while engine.has_work:
            text += "".join(output.text for output in engine.step())
        return text

    engine = Engine.from_pretrained("smollm2-135m-instruct", token_budget=16, budget_ladder=(), num_blocks=1024)
    before = answer()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((engine.params, engine.runner.kv_cache, engine.runner.state)))
    awake = resident()
    engine.release_memory(weights="dropped")
    asleep = resident()
    start, start_cpu = time.perf_counter(), time.process_time()
    engine.restore_memory()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    again = answer()
    memory = {"awake": awake, "asleep": asleep, "again": resident(), "held": held}
    print(json.dumps({**memory, "seconds": seconds, "cpu_seconds": cpu_seconds, "same": before == again}))
