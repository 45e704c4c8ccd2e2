"""Tokens per second on this machine, and what its arithmetic and memory allow, in about 20 seconds.

    fastgen bench quick

Measures how fast this machine multiplies matrices and reads memory, then prompts, one stream, and as many streams as run at
the same time. The roofline is the time that the same steps would take if they did nothing but their matrix products at the
one rate, or nothing but read weights and KV cache at the other, whichever is longer. A second start is measured: the first
also compiles.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from fastgen_jax.bench import machine
from fastgen_jax.bench.options import add_engine_option, make_engine
from fastgen_jax.bench.tables import table
from fastgen_jax.flags import DEFAULT_MODEL, MODEL_HELP

if TYPE_CHECKING:
    from fastgen_jax import Engine
    from fastgen_jax.bench.driver import StepTime
    from fastgen_jax.plan.roofline import Roofline

PROMPT = 16  # tokens of a prompt whose generation is measured
SHORTEST = 64  # tokens of a stream, prompt included, that the KV cache must hold for every stream


class Peaks(NamedTuple):
    """What this machine can do."""

    flops_per_s: float
    bytes_per_s: float

    def best(self, other: Peaks) -> Peaks:
        """The larger of each."""
        return Peaks(*map(max, self, other))


class Run(NamedTuple):
    """Steps that followed one another."""

    steps: list[StepTime]
    generates: bool
    """Whether their sampled tokens count; otherwise all tokens that they computed."""


class Rate(NamedTuple):
    """Measured steps: how many tokens they were for, their duration, and what the roofline allows."""

    tokens: int
    seconds: float
    allowed_seconds: float
    bound: str
    """What limits these steps: "arithmetic" or "memory"."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's flags."""
    parser.add_argument(
        "model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL", help=f"{MODEL_HELP} (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="duration of each of the three measurements (default: %(default)g)"
    )
    add_engine_option(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the table and returns the exit code."""
    if not args.seconds > 0:
        raise ValueError(f"--seconds is {args.seconds}; it must be above 0")
    begin = time.perf_counter()
    load = machine.ForeignLoad(os.getpgid(0))
    before = _peaks()  # an engine takes most of an accelerator's memory
    start = time.perf_counter()
    engine = make_engine(args)
    seconds_to_start = time.perf_counter() - start
    runs = measure(engine, seconds=args.seconds)
    # Again, and the better counts: other programs may have disturbed the first.
    peaks = before.best(_peaks()) if _on_cpu() else before
    facts = machine.describe()
    print(engine.describe())
    print(
        f"{facts['cores']} cores of {facts['cpu']}: {peaks.flops_per_s / 1e9:,.0f} GFLOP/s, "
        f"{peaks.bytes_per_s / 1e9:,.1f} GB/s, measured now{machine.disturbance(load.cores())}\n"
    )
    print("\n".join(report({name: rate(engine, run, peaks) for name, run in runs.items()})))
    print(f"\nstart of the engine {seconds_to_start:.1f} s, in all {time.perf_counter() - begin:.1f} s")
    return 0


def report(rates: dict[str, Rate]) -> list[str]:
    """Lines of Markdown."""
    return table(
        ("", "tokens/s", "roofline", "share", "limited by"),
        [
            (
                name,
                f"{rate.tokens / rate.seconds:,.1f}",
                f"{rate.tokens / rate.allowed_seconds:,.1f}",
                f"{rate.allowed_seconds / rate.seconds:.0%}",
                rate.bound,
            )
            for name, rate in rates.items()
        ],
    )


def measure(engine: Engine, *, seconds: float) -> dict[str, Run]:
    """Prompts, one stream, and as many streams as run at the same time; each takes about `seconds`."""
    config = engine.config
    longest = config.longest_sequence - 1
    groups, num_blocks = config.groups, config.num_blocks
    streams = max(1, min(config.max_num_seqs, groups.sequences(num_blocks, min(SHORTEST, longest))))
    prompt = max(1, min(config.token_budget, longest))
    return {
        f"prompts of {prompt:,} tokens": _prompts(engine, prompt, seconds),
        "1 stream": _streams(engine, 1, longest, seconds),
        f"{streams} streams": _streams(engine, streams, groups.longest(num_blocks // streams - 1, longest), seconds),
    }


def rate(engine: Engine, run: Run, peaks: Peaks) -> Rate:
    """What the steps of a run reached, and what the roofline of these peaks allows; ValueError for less than two steps."""
    if len(run.steps) < 2:
        raise ValueError("too few steps were measured; raise --seconds, or the KV cache with --option num_blocks=N")
    from fastgen_jax.plan.roofline import step_shape

    cost, windows = cost_model(engine, peaks, tokens=max(step.num_tokens for step in run.steps)), engine.config.windows
    steps = run.steps[1:]  # from the end of the first step to that of the last
    parts = [cost.parts(step_shape([chunk[1:] for chunk in step.chunks], step.num_sample_rows, windows)) for step in steps]
    arithmetic = sum(part.compute for part in parts) >= sum(part.memory for part in parts)
    return Rate(
        tokens=sum(step.num_sample_rows if run.generates else step.num_tokens for step in steps),
        seconds=run.steps[-1].read - run.steps[0].read,
        allowed_seconds=sum(part.seconds for part in parts),
        bound="arithmetic" if arithmetic else "memory",
    )


def _prompts(engine: Engine, length: int, seconds: float) -> Run:
    """Prompts that follow one another."""
    tokens = _random_tokens(engine)

    def feed() -> None:
        while engine.num_waiting + engine.num_running < 3:  # one that is computed, one that fills its last step, one to wait
            _add(engine, [next(tokens) for _ in range(length)], 1)

    return Run(_steps(engine, feed, seconds, wanted=lambda step: True), generates=False)


def _streams(engine: Engine, number: int, length: int, seconds: float) -> Run:
    """Steps in which `number` sequences generate one token each."""
    tokens = _random_tokens(engine)
    prompt = max(1, min(PROMPT, length - 2))
    for _ in range(number):
        _add(engine, [next(tokens) for _ in range(prompt)], length - prompt)
    generating = lambda step: len(step.chunks) == number and all(n == 1 for *_, n in step.chunks)  # noqa: E731
    return Run(_steps(engine, lambda: None, seconds, wanted=generating), generates=True)


def _steps(
    engine: Engine, feed: Callable[[], None], seconds: float, *, wanted: Callable[[StepTime], bool]
) -> list[StepTime]:
    """Steps in a row that are `wanted`, for `seconds` since the first of them or until nothing is left to do."""
    from fastgen_jax.bench.driver import StepLog

    found: list[StepTime] = []
    with StepLog(engine) as log:
        feed()
        seen = 0
        while engine.has_work and not (found and found[-1].read - found[0].read >= seconds):
            engine.step()
            new, seen = log.steps[seen:], len(log.steps)
            found += [step for step in new if wanted(step)]
            feed()
        for request_id in engine.request_ids:
            engine.abort(request_id)
        while engine.has_work:
            engine.step()
    return found


def _add(engine: Engine, prompt: Sequence[int], num_tokens: int) -> None:
    from fastgen_jax.bench.driver import exactly

    engine.add(list(prompt), exactly(num_tokens))


def _random_tokens(engine: Engine) -> Iterator[int]:
    """Token ids without repetition for a while, so that prompts have no common prefix."""
    return (number * 7919 % engine.model.vocab_size for number in count(1))


def cost_model(engine: Engine, peaks: Peaks, *, tokens: int) -> Roofline:
    """The roofline of a device with these peaks, for the weights and the KV cache of this engine."""
    import jax
    import jax.numpy as jnp

    from fastgen_jax.core import scale_bytes, stored_head_dim
    from fastgen_jax.devices import Device
    from fastgen_jax.models.division import divided
    from fastgen_jax.models.params import param_specs
    from fastgen_jax.plan.estimate import read_weight_bytes
    from fastgen_jax.plan.roofline import roofline

    model, config = engine.model, engine.config
    num_devices = config.tensor_parallel or 1
    itemsize = jnp.dtype(config.dtype).itemsize
    kept = config.choices.formats.kept if config.choices.formats is not None else ()
    platform = jax.default_backend()
    weights = read_weight_bytes(
        model, num_devices, itemsize, tokens=tokens, quantize=config.quantize, kept=kept, platform=platform
    )
    if "lm_head" in {*param_specs(model), *dict(kept)}:  # of a separate embedding only the rows of these tokens are read
        weights -= (model.vocab_size - tokens) * model.embed_dim * itemsize // num_devices
    kv_bytes = divided(model, num_devices).kv_bytes_per_token(
        jnp.dtype(config.kv_dtype).itemsize,
        stored_head_dim=stored_head_dim(model.head_dim, platform, values_in_keys=model.values_in_keys),
        scale_bytes=scale_bytes(config.kv_dtype),
    )
    here = Device(
        kind="this machine",
        platform=platform,
        reported_as=(),
        memory_bytes=0,
        memory_bytes_per_s=peaks.bytes_per_s,
        flops_per_s=peaks.flops_per_s,
        link_bytes_per_s=float("inf"),
        all_reduce_latency_s=0,
        source="measured",
    )
    return roofline(
        model,
        here,
        num_devices,
        weight_bytes=weights,
        kv_bytes_per_token=kv_bytes / num_devices,
        activation_bytes=itemsize,
    )


def _peaks() -> Peaks:
    """Measured now. A CPU computes in float32; an accelerator is fastest in one of the types of 16 bits."""
    import jax

    dtypes = {"cpu": ("float32",), "tpu": ("bfloat16",)}.get(jax.default_backend(), ("bfloat16", "float16"))
    flops_per_s = max(max(machine.matmul_peak(dtype).values()) for dtype in dtypes)
    return Peaks(flops_per_s, max(machine.memory_peak().values()))


def _on_cpu() -> bool:
    import jax

    return jax.default_backend() == "cpu"
