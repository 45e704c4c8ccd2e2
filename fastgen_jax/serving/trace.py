"""The latest steps as a trace for Perfetto (ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastgen_jax.engine.metrics import StepTimes
from fastgen_jax.serving.work import Snapshot

Event = dict[str, object]  # of Chrome's trace event format

_PARTS = (
    ("plan", "start", "planned"),
    ("pack", "planned", "packed"),
    ("dispatch", "packed", "dispatched"),
    ("wait", "waited", "read"),
    ("commit", "read", "committed"),
    ("output", "committed", "done"),
)


def perfetto(snapshots: Sequence[Snapshot]) -> dict[str, object]:
    """Returns the trace of every engine, with the device's steps on one track and the host's work on another."""
    events: list[Event] = []
    for process, snapshot in enumerate(snapshots):
        events.append(_name("process_name", process, 0, f"engine {process}"))
        events += [_name("thread_name", process, thread, name) for thread, name in ((0, "device"), (1, "host"))]
        offset, free = snapshot["clock_offset"], 0.0
        for step in (StepTimes(*values) for values in snapshot["steps"]):
            facts = {
                "step": step.number,
                "tokens": step.num_tokens,
                "generated": step.num_generating,
                "prompt": step.num_tokens - step.num_generating,
                "bucket": step.bucket,
                "running": step.num_running,
                "waiting": step.num_waiting,
            }
            # A step that was dispatched while another ran started when that one ended.
            begin = max(step.dispatched, free)
            free = max(step.read, begin)
            events.append(_slice(f"{step.num_tokens} tokens", process, 0, begin + offset, free + offset, facts))
            for name, first, last in _PARTS:
                events.append(
                    _slice(
                        name, process, 1, getattr(step, first) + offset, getattr(step, last) + offset, {"step": step.number}
                    )
                )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _name(kind: str, process: int, thread: int, name: str) -> Event:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}


def _slice(name: str, process: int, thread: int, start: float, end: float, facts: Mapping[str, object]) -> Event:
    return {
        "ph": "X",
        "name": name,
        "pid": process,
        "tid": thread,
        "ts": round(1e6 * start, 3),
        "dur": round(1e6 * (end - start), 3),
        "args": facts,
    }
