"""The part `engine` of `gpu_check`: Llama-3-8B's shapes, with random weights that are made on the device."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgen_jax.bench.driver import StepLog, exactly, outputs_of
from fastgen_jax.bench.quick import Peaks, cost_model
from fastgen_jax.engine import Engine, EngineConfig
from fastgen_jax.json_types import JsonObject
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import family_of
from fastgen_jax.models.params import param_specs
from fastgen_jax.models.weight_spec import Kind, Params, WeightSpec
from fastgen_jax.plan.roofline import StepShape, step_shape
from tests.gate.models import LLAMA_3_8B

GAP = 2e-6  # seconds: kernels that follow one another closer than this are not apart


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is run."""

    model: Mapping[str, Any]  # a Hugging Face config
    options: Mapping[str, Any]  # of the engine
    single: tuple[int, int]  # tokens of the prompt, and generated
    streams: int
    stream: tuple[int, int]
    requests: int
    request: tuple[int, int]
    compared: int  # requests whose greedy tokens are compared


FULL = Sizes(
    model=LLAMA_3_8B,
    options={"dtype": "bfloat16", "max_num_seqs": 128, "max_context_len": 2048, "prefix_caching": False},
    single=(128, 128),
    streams=64,
    stream=(256, 64),
    requests=128,
    request=(1000, 200),
    compared=8,
)
TINY = Sizes(
    model=LLAMA_3_8B
    | {
        "vocab_size": 256,
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    options={
        "dtype": "float32",
        "max_num_seqs": 8,
        "max_context_len": 64,
        "token_budget": 32,
        "num_blocks": 64,
        "prefix_caching": False,
        "compile_cache_dir": "",
    },
    single=(8, 6),
    streams=4,
    stream=(8, 8),
    requests=8,
    request=(20, 6),
    compared=2,
)


def random_params(model: ModelConfig, dtype: str) -> Params:
    """Weights made on the device, one after another, so that no more than one of them exists in float32."""

    @partial(jax.jit, static_argnums=(0, 1))
    def make(shape: tuple[int, ...], scale: float, key: jax.Array) -> jax.Array:
        return (jax.random.normal(key, shape, jnp.bfloat16) * scale).astype(dtype)

    def weight(name: str, spec: WeightSpec, *stack: int) -> jax.Array:
        shape = (*stack, *spec.shape)
        if spec.initial is not None:
            return jnp.full(shape, spec.initial, dtype)
        fan_in = spec.shape[-1] if spec.kind is Kind.TABLE else spec.shape[-2]
        return make(shape, 1 / math.sqrt(fan_in), jax.random.key(zlib.crc32(name.encode())))

    specs = param_specs(model)
    layers = {name: weight(name, spec, model.num_layers) for name, spec in specs.pop("layers").items()}
    return {name: weight(name, spec) for name, spec in specs.items()} | {"layers": layers}


def make_engine(sizes: Sizes) -> Engine:
    """The engine, with all of its programs compiled."""
    hf = dict(sizes.model)
    model = family_of(hf["architectures"][0]).config_from_hf(hf)
    options = dict(sizes.options)
    return Engine(random_params(model, options["dtype"]), model, EngineConfig.from_options(options))


def prompts(engine: Engine, number: int, length: int, *, seed: int) -> list[list[int]]:
    return np.random.default_rng(seed).integers(0, engine.model.vocab_size, (number, length)).tolist()


def measure_engine(
    engine: Engine,
    sizes: Sizes,
    *,
    bandwidth: float,
    peak: float,
    say: Callable[[str], object],
    allows: Callable[[str], bool] = lambda _: True,
) -> JsonObject:
    """All figures; `say` gets each line of the table as soon as it is known, and `allows` says whether to go on.

    `bandwidth` and `peak` are bytes and operations per second that this device reaches.
    """
    cost = cost_model(engine, Peaks(bytes_per_s=bandwidth, flops_per_s=peak), tokens=max(engine.config.budget_ladder))
    found: JsonObject = {"weights_floor_ms": 1e3 * cost.weights}

    steps = []
    for size in engine.config.budget_ladder:
        took = engine.measure_step(size)
        floor = cost(StepShape(size, min(size, engine.config.max_num_seqs), 0.0, 0.0, 0.0))
        steps.append({"tokens": size, "ms": 1e3 * took, "floor_ms": 1e3 * floor, "over_floor": took / floor})
        say(f"step of {size} tokens: {1e3 * took:.2f} ms, {took / floor:.2f} of its floor of {1e3 * floor:.2f} ms")
    found["steps"] = steps

    def run(name: str, number: int, lengths: tuple[int, int]) -> None:
        requests = [
            (f"{name} {i}", ids, lengths[1]) for i, ids in enumerate(prompts(engine, number, lengths[0], seed=number))
        ]
        first = len(engine.metrics.timeline)
        with StepLog(engine) as log:
            start = time.perf_counter()
            ends = [when for when, _ in outputs_of(engine, requests)]
        seconds = ends[-1] - start
        generating = [s for s in log.steps if len(s.chunks) == number and all(n == 1 for *_, n in s.chunks)]
        host = [sum(t.seconds(phase) for phase in ("plan", "pack", "commit")) for t in list(engine.metrics.timeline)[first:]]
        floors = [cost(step_shape([c[1:] for c in s.chunks], s.num_sample_rows, engine.config.windows)) for s in log.steps]
        figures: JsonObject = {
            "requests": number,
            "prompt_tokens": lengths[0],
            "generated_tokens": lengths[1],
            "seconds": seconds,
            "output_tokens_per_s": number * lengths[1] / seconds,
            "tokens_per_s": number * sum(lengths) / seconds,
            "over_floor": sum(s.seconds for s in log.steps) / sum(floors),
            "generating_step_ms": 1e3 * median(s.seconds for s in generating) if generating else None,
            "host_ms": 1e3 * median(host) if host else None,
        }
        found[name] = figures
        step = figures["generating_step_ms"]
        say(
            f"{name}: {number} x {lengths[0]}/{lengths[1]} in {seconds:.2f} s, {figures['output_tokens_per_s']:,.0f} output "
            f"tokens/s, {figures['over_floor']:.2f} of the floor; generating step "
            f"{'-' if step is None else f'{step:.2f} ms'}, host {figures['host_ms'] or 0:.3f} ms a step"
        )

    run("warm up", 1, (sizes.single[0], 4))
    del found["warm up"]
    for name, number, lengths in (
        ("single stream", 1, sizes.single),
        ("generating", sizes.streams, sizes.stream),
        ("mixed", sizes.requests, sizes.request),
    ):
        if allows(name):
            run(name, number, lengths)
    if allows("gaps"):
        found["gaps"] = traced_gaps(engine, sizes)
        say(f"trace of {sizes.streams} generating: {described(found['gaps'])}")
    if allows("greedy"):
        found["greedy"] = compare_greedy(engine, sizes)
        say("greedy tokens alone and among others: {equal} of {requests} requests equal".format(**found["greedy"]))
    return found


def compare_greedy(engine: Engine, sizes: Sizes) -> JsonObject:
    """How many requests get the same greedy tokens alone as among others."""
    asked = prompts(engine, sizes.compared, sizes.stream[0], seed=1)
    others = prompts(engine, sizes.streams - sizes.compared, sizes.stream[0] + 1, seed=2)

    def tokens(requests: list[tuple[str, list[int], int]]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {name: [] for name, *_ in requests}
        for _, outputs in outputs_of(engine, requests):
            for output in outputs:
                found[output.request_id] += output.new_token_ids
        return found

    wanted = [(f"asked {i}", ids, sizes.stream[1]) for i, ids in enumerate(asked)]
    alone: dict[str, list[int]] = {}
    for request in wanted:
        alone |= tokens([request])
    together = tokens([*wanted, *((f"other {i}", ids, sizes.stream[1]) for i, ids in enumerate(others))])
    first = [next((n for n, (a, b) in enumerate(zip(alone[x], together[x], strict=True)) if a != b), None) for x in alone]
    return {"requests": len(wanted), "equal": first.count(None), "first_difference": first}


def traced_gaps(engine: Engine, sizes: Sizes) -> JsonObject | None:
    """How busy the device is while `streams` sequences generate, from a trace; None if the trace has no device."""
    ids = prompts(engine, sizes.streams, sizes.stream[0], seed=3)
    for prompt in ids:
        engine.add(prompt, exactly(sizes.stream[1]))
    while not (timeline := engine.metrics.timeline) or timeline[-1].num_generating < sizes.streams:
        engine.step()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(min(20, sizes.stream[1] // 2)):
                engine.step()
        for request in engine.request_ids:
            engine.abort(request)
        while engine.has_work:
            engine.step()
        (path,) = Path(folder).rglob("*.trace.json.gz")
        return gaps_of(json.loads(gzip.decompress(path.read_bytes()))["traceEvents"])


def gaps_of(events: Iterable[Mapping[str, Any]]) -> JsonObject | None:
    """The share of the time in which a GPU runs something, and the gaps, from the events of a trace in Chrome's format.

    The events of the device are those of processes whose name begins with "/device:GPU" and of threads that are streams.
    """
    events = list(events)
    names = {
        (e["pid"], e.get("tid")): e["args"]["name"] for e in events if e.get("ph") == "M" and "name" in e.get("args", {})
    }
    devices = {e["pid"] for e in events if e.get("name") == "process_name" and e["args"]["name"].startswith("/device:GPU")}
    spans = sorted(
        (1e-6 * e["ts"], 1e-6 * (e["ts"] + e.get("dur", 0.0)))
        for e in events
        if e.get("ph") == "X" and e["pid"] in devices and "Stream" in names.get((e["pid"], e.get("tid")), "")
    )
    if not spans:
        return None
    busy, gaps, (begin, end) = 0.0, [], spans[0]
    first = begin
    for start, stop in spans[1:]:
        if start > end:
            if start - end > GAP:
                gaps.append(start - end)
            busy += end - begin
            begin, end = start, stop
        else:
            end = max(end, stop)
    busy += end - begin
    return {
        "busy_share": busy / (end - first),
        "gaps": len(gaps),
        "largest_gap_us": 1e6 * max(gaps, default=0.0),
        "kernels": len(spans),
        "seconds": end - first,
    }


def described(gaps: JsonObject | None) -> str:
    if gaps is None:
        return "no GPU in the trace"
    return (
        f"busy {100 * gaps['busy_share']:.1f} % of {1e3 * gaps['seconds']:.1f} ms, {gaps['kernels']} kernels, "
        f"{gaps['gaps']} gaps of more than {1e6 * GAP:.0f} us, the largest {gaps['largest_gap_us']:.0f} us"
    )
