"""What new weights cost a loaded engine: milliseconds, bytes copied, programs compiled, requests lost; beside reloading.

python -m tests.engine.update_times                      # SmolLM2 with 32 streams; at most two minutes on two slow cores
python -m tests.engine.update_times --model sotu-1m
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax

from fastgen_jax import Engine, SamplingParams
from fastgen_jax.checkpoint import load_params, open_checkpoint, resolve_model
from fastgen_jax.engine.metrics import compile_count
from fastgen_jax.models.weight_spec import Params

REPEATS = 5


def pointers(params: Params) -> list[int]:
    return [shard.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]


def copied_bytes(given: Params, used: Params) -> int:
    """Bytes of `used` that are not the memory of `given`."""
    shared = {*pointers(given)}
    leaves = jax.tree.leaves(used)
    return sum(leaf.nbytes for leaf in leaves if not shared.issuperset(pointers(leaf)))


class Streams:
    """Requests that run until they are stopped, and the times between their steps."""

    def __init__(self, engine: Engine, count: int) -> None:
        self.engine = engine
        room = engine.config.num_blocks * engine.config.block_size // count - 16
        limit = min(engine.config.longest_sequence - 16, room, 2000)
        params = SamplingParams(max_new_tokens=limit, ignore_eos=True, temperature=1.0)
        self.ids = [engine.add([5 + i, 7, 11, 13], params) for i in range(count)]
        self.num_ended = 0
        for _ in range(6):
            self.step()

    def step(self) -> float:
        start = time.perf_counter()
        self.num_ended += sum(output.finished for output in self.engine.step())
        return time.perf_counter() - start

    def beside(self, operation: Callable[[], object]) -> tuple[float, list[float]]:
        """Seconds of `operation` in another thread, and of the steps meanwhile."""
        seconds: list[float] = []

        def timed() -> None:
            start = time.perf_counter()
            operation()
            seconds.append(time.perf_counter() - start)

        thread, steps = threading.Thread(target=timed), []
        thread.start()
        while thread.is_alive():
            steps.append(self.step())
        return seconds[0], steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a checkpoint (default: smollm2-135m-instruct)")
    parser.add_argument("--streams", type=int, default=32, help="running requests (default: 32)")
    parser.add_argument("--dtype", default=None, help="of the weights (default: the engine's)")
    parser.add_argument("--quantize", default="none", help="quantization of the engine (default: none)")
    options = parser.parse_args()
    start = time.perf_counter()
    engine = Engine.from_pretrained(
        options.model,
        dtype=options.dtype,
        quantize=options.quantize,
        token_budget=2 * options.streams,
        budget_ladder=(options.streams,),
        max_num_seqs=options.streams,
        num_blocks=1024,
        block_size=16,
        background_compile=False,
        progress=False,
    )
    print(f"start of an engine, warm or not: {time.perf_counter() - start:.1f} s; {engine.describe()}")
    path = resolve_model(options.model)
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.params))
    print(f"weights as the engine uses them: {num_bytes / 1e6:.0f} MB")
    plain = load_params(open_checkpoint(path), dtype=engine.config.dtype, stack_layers=True, prepare=None, progress=False)
    streams = Streams(engine, options.streams)
    usual = statistics.median(streams.step() for _ in range(10))
    print(f"{options.streams} streams; a step takes {1e3 * usual:.1f} ms (median)")
    other = jax.block_until_ready(jax.tree.map(lambda leaf: leaf.copy(), engine.params))
    compiles = compile_count()
    times = []
    for _ in range(REPEATS):
        given, other = other, engine.params
        start, busy = time.perf_counter(), time.thread_time()
        engine.update_params(given)
        times.append((time.perf_counter() - start, time.thread_time() - busy))
        assert copied_bytes(given, engine.params) == 0
        streams.step()
    shown = ", ".join(f"{1e3 * seconds:.1f} ({1e3 * busy:.1f})" for seconds, busy in times)
    print(f"arrays in the engine's form: {shown} ms (of processor time); 0 bytes copied")
    for name, params in (("plain arrays", plain), ("the checkpoint read again", path)):
        seconds, steps = streams.beside(lambda params=params: engine.update_params(params))
        copied = num_bytes if isinstance(params, Path) else copied_bytes(params, engine.params)
        print(
            f"{name}, in another thread: {1e3 * seconds:.0f} ms, {copied / 1e6:.0f} MB written, while {len(steps)} steps "
            f"took {1e3 * statistics.median(steps):.1f} ms (median) and {1e3 * max(steps):.1f} ms (longest)"
        )
    lost = streams.num_ended + sum(request_id not in engine.request_ids for request_id in streams.ids)
    print(f"programs compiled: {compile_count() - compiles}; requests lost: {lost}; version {engine.weight_version}")


if __name__ == "__main__":
    main()
