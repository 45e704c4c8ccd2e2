"""What the engine did, counted as it goes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import jax

WINDOW = 4096  # steps that the medians look back on

_compiles = 0


def _count_compiles(event: str, duration_secs: float, **kwargs: str | int) -> None:
    global _compiles
    if event == "/jax/core/compile/backend_compile_duration":
        _compiles += 1


jax.monitoring.register_event_duration_secs_listener(_count_compiles)


def compile_count() -> int:
    """XLA compilations in this process so far."""
    return _compiles


class StepTimes(NamedTuple):
    """What one step carried, and when its parts began on the clock of `time.perf_counter`, seconds.

    start .. planned .. packed .. dispatched     waited .. read .. committed .. done
      plan     pack     dispatch        device       wait    commit     output
    """

    number: int
    num_tokens: int
    """Tokens of all chunks."""
    num_generating: int
    """Of these, the last tokens of sequences that generate; the rest are prompts (and what preemption lost)."""
    bucket: int
    num_running: int
    num_waiting: int
    start: float
    planned: float
    packed: float
    dispatched: float
    waited: float = 0.0
    read: float = 0.0
    committed: float = 0.0
    done: float = 0.0


@dataclass
class Metrics:
    """Counters since the engine started, and recent times of the host's part of a step."""

    steps: int = 0
    tokens: int = 0
    """Tokens computed, prompt and generated."""
    padded_tokens: int = 0
    """Tokens of the buckets that ran, filled or not."""
    full_steps: int = 0
    """Steps that used the whole token budget."""
    prompt_tokens: int = 0
    """Prompt tokens of the requests that were added."""
    generated_tokens: int = 0
    wasted_rows: int = 0
    """Rows of sequences that turned out to be finished when their tokens were read."""
    requests: int = 0
    finished: int = 0
    aborted: int = 0
    refused: int = 0
    """Requests that policy sla could not serve in time."""
    compiles_while_serving: int = 0
    """Compilations inside `Engine.step`: each is a bug, or somebody else's thread compiling."""
    steps_by_budget: dict[int, int] = field(default_factory=dict)
    timeline: deque[StepTimes] = field(default_factory=lambda: deque(maxlen=WINDOW))
    """The last steps, oldest first."""
    plan_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    pack_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    dispatch_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    wait_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    commit_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    output_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def count_step(self, *, num_tokens: int, bucket: int, token_budget: int) -> None:
        """Counts a step that is about to run."""
        self.steps += 1
        self.tokens += num_tokens
        self.padded_tokens += bucket
        self.full_steps += num_tokens == token_budget
        self.steps_by_budget[bucket] = self.steps_by_budget.get(bucket, 0) + 1

    def snapshot(self) -> dict[str, Any]:
        """Plain numbers: counters as they stand, times as medians in milliseconds over the last steps.

        `host_ms` is plan + pack + commit: the host work that a device without overlap would wait for.
        """
        times = {name: getattr(self, f"{name}_seconds") for name in ("plan", "pack", "dispatch", "wait", "commit", "output")}
        counters = {name: value for name, value in vars(self).items() if not isinstance(value, deque)}
        counters["steps_by_budget"] = dict(sorted(self.steps_by_budget.items()))
        medians = {f"{name}_ms": 1e3 * median(values) if values else 0.0 for name, values in times.items()}
        host = medians["plan_ms"] + medians["pack_ms"] + medians["commit_ms"]
        fill = self.tokens / self.padded_tokens if self.padded_tokens else 0.0
        return {**counters, **medians, "host_ms": host, "budget_fill": fill}
