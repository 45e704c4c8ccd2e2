"""The state of an engine as plain data that can be sent between processes."""

from __future__ import annotations

import time

from fastgen_jax.engine.engine import Engine
from fastgen_jax.json_types import JsonObject


def take_snapshot(engine: Engine, *, since_step: int | None = None) -> JsonObject:
    """Gauges and counters of an engine, and with `since_step` the timeline from that step on.

    Call it in the engine's thread. A time of the timeline plus `clock_offset` is in seconds since the epoch.
    """
    scheduler, metrics = engine.scheduler, engine.metrics
    counters = {
        name: value for name, value in vars(metrics).items() if isinstance(value, int) and not isinstance(value, bool)
    }
    steps = []
    if since_step is not None:
        steps = [tuple(step) for step in metrics.timeline if step.number >= since_step]
    return {
        "asleep": engine.is_asleep,
        "paused": engine.is_paused,
        "weight_version": engine.weight_version,
        "running": engine.num_running,
        "waiting": engine.num_waiting,
        "blocks": engine.config.num_blocks,
        "free_blocks": scheduler.num_free_blocks,
        "token_budget": engine.config.token_budget,
        "counters": {
            **counters,
            "preemptions": scheduler.stats.num_preemptions,
            "prefix_hit_tokens": scheduler.stats.num_prefix_hit_tokens,
        },
        "steps": steps,
        "clock_offset": time.time() - time.perf_counter(),
    }
