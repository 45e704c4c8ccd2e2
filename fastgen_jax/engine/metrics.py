"""Counters and timings of the engine's work."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import Literal, NamedTuple, get_args

import jax

from fastgen_jax.json_types import JsonObject
from fastgen_jax.scheduling import Step

WINDOW = 4096  # steps that the timeline holds

_in_this_thread = threading.local()  # JAX reports a compilation in the thread that needs its result


def _count_compiles(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _in_this_thread.compiles = compile_count() + 1


jax.monitoring.register_event_duration_secs_listener(_count_compiles)


def compile_count() -> int:
    """XLA compilations by this thread so far."""
    return getattr(_in_this_thread, "compiles", 0)


Phase = Literal["plan", "pack", "dispatch", "wait", "commit", "output"]


class StepTimer:
    """Measures the phases of one step: `with timer("plan"): ...`."""

    def __init__(self) -> None:
        self._spans: dict[Phase, tuple[float, float]] = {}
        self._phase: Phase = "plan"
        self._start = 0.0

    def __call__(self, phase: Phase) -> StepTimer:
        self._phase = phase
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._spans[self._phase] = (self._start, time.perf_counter())

    def span(self, phase: Phase) -> tuple[float, float]:
        """When a phase started and ended."""
        return self._spans[phase]


class StepTimes(NamedTuple):
    """What one step carried, and when its phases started and ended, in seconds of `time.perf_counter`.

    start .. planned .. packed .. dispatched     waited .. read .. committed .. done
      plan     pack     dispatch        device       wait    commit     output
    """

    number: int
    num_tokens: int
    """Tokens of all chunks."""
    num_generating: int
    """Those that are the last token of a generating sequence; the rest belong to prompts, or are recomputed after a
    preemption."""
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

    def seconds(self, phase: Phase) -> float:
        """Duration of a phase."""
        first, last = _MARKS[phase]
        return getattr(self, last) - getattr(self, first)


_MARKS: dict[Phase, tuple[str, str]] = {
    "plan": ("start", "planned"),
    "pack": ("planned", "packed"),
    "dispatch": ("packed", "dispatched"),
    "wait": ("waited", "read"),
    "commit": ("read", "committed"),
    "output": ("committed", "done"),
}


@dataclass
class Metrics:
    """Counters since the engine started, and a timeline of the latest steps."""

    steps: int = 0
    tokens: int = 0
    """Tokens computed, prompt and generated."""
    sleeps: int = 0
    """Times that the engine gave its memory back."""
    wakes: int = 0
    padded_tokens: int = 0
    """Tokens of the buckets that ran, filled or not."""
    full_steps: int = 0
    """Steps that used the whole token budget."""
    prompt_tokens: int = 0
    """Prompt tokens of the requests that were added."""
    generated_tokens: int = 0
    wasted_rows: int = 0
    """Sampled rows of sequences that had finished by the time their tokens were read."""
    requests: int = 0
    finished: int = 0
    aborted: int = 0
    refused: int = 0
    """Requests that policy "sla" could not serve in time."""
    masks: int = 0
    """Masks of the tokens that a grammar allows next, one for each token."""
    mask_seconds: float = 0.0
    """Time in which they were computed."""
    compiles_while_serving: int = 0
    """Compilations that `Engine.step` waited for: each is a bug. Those of other threads do not count."""
    steps_by_budget: dict[int, int] = field(default_factory=dict)
    timeline: deque[StepTimes] = field(default_factory=lambda: deque(maxlen=WINDOW))
    """The last steps, oldest first."""

    def count_dispatch(
        self, step: Step, timer: StepTimer, *, bucket: int, token_budget: int, num_running: int, num_waiting: int
    ) -> StepTimes:
        """Counts a step that was dispatched; returns its entry of the timeline, to be completed by `count_commit`."""
        (start, planned), (_, packed), (_, dispatched) = map(timer.span, ("plan", "pack", "dispatch"))
        times = StepTimes(
            number=self.steps,
            num_tokens=step.num_tokens,
            num_generating=sum(chunk.samples for chunk in step.chunks if chunk.length == 1),
            bucket=bucket,
            num_running=num_running,
            num_waiting=num_waiting,
            start=start,
            planned=planned,
            packed=packed,
            dispatched=dispatched,
        )
        self.steps += 1
        self.tokens += step.num_tokens
        self.padded_tokens += bucket
        self.full_steps += step.num_tokens == token_budget
        self.steps_by_budget[bucket] = self.steps_by_budget.get(bucket, 0) + 1
        return times

    def count_commit(self, times: StepTimes, timer: StepTimer, *, num_sampled: int, num_advanced: int) -> None:
        """Counts a step whose results were read, and adds it to the timeline."""
        (waited, read), (_, committed), (_, done) = map(timer.span, ("wait", "commit", "output"))
        self.generated_tokens += num_advanced
        self.wasted_rows += num_sampled - num_advanced
        self.timeline.append(times._replace(waited=waited, read=read, committed=committed, done=done))

    def snapshot(self) -> JsonObject:
        """Plain numbers: the counters, and the times as medians in milliseconds over the last steps.

        `host_ms` is plan + pack + commit: the work of the host that a device without overlap would wait for.
        """
        counters = {name: value for name, value in vars(self).items() if not isinstance(value, deque)}
        counters["steps_by_budget"] = dict(sorted(self.steps_by_budget.items()))
        steps = [*self.timeline]
        medians = {
            f"{phase}_ms": 1e3 * median(step.seconds(phase) for step in steps) if steps else 0.0 for phase in get_args(Phase)
        }
        host = medians["plan_ms"] + medians["pack_ms"] + medians["commit_ms"]
        fill = self.tokens / self.padded_tokens if self.padded_tokens else 0.0
        return {**counters, **medians, "host_ms": host, "budget_fill": fill}
