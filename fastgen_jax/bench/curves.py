"""Curves over the runs of one label: latency against throughput, effective throughput, token latency."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fastgen_jax.bench.metrics import (
    PROMPT_TOKENS_PER_SECOND,
    ClosedLoopSummary,
    Variant,
    effective_throughput,
    summarize_closed_loop,
)
from fastgen_jax.bench.results import RunRecord


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The closed-loop runs of one label and workload, ordered by number of clients."""

    label: str
    workload: str
    runs: tuple[RunRecord, ...]
    summaries: tuple[ClosedLoopSummary, ...]

    def effective(
        self, rate: float, *, prompt_rate: float = PROMPT_TOKENS_PER_SECOND, variant: Variant = "ewm"
    ) -> list[float]:
        """Effective throughput of each run in requests per second, for an SLA of `rate` tokens per second."""
        return [
            effective_throughput(run.requests, tokens_per_second=rate, prompt_rate=prompt_rate, variant=variant)
            for run in self.runs
        ]

    def throughput_at(self, latency: float) -> float | None:
        """Requests per second at a mean latency in seconds, interpolated; None outside the measured range."""
        return _interpolate(latency, [s.latency for s in self.summaries], [s.throughput for s in self.summaries])

    def latency_at(self, throughput: float) -> float | None:
        """Mean latency in seconds at a throughput in requests per second, interpolated; None outside the measured range."""
        return _interpolate(throughput, [s.throughput for s in self.summaries], [s.latency for s in self.summaries])

    def summary(self, num_clients: int) -> ClosedLoopSummary:
        """The run with `num_clients` clients; raises ValueError if there is none."""
        for summary in self.summaries:
            if summary.num_clients == num_clients:
                return summary
        have = ", ".join(str(s.num_clients) for s in self.summaries)
        raise ValueError(f"{self.label} has no run with {num_clients} clients, only with {have}")


def curves(records: Iterable[RunRecord]) -> list[Curve]:
    """One curve per label and workload, in order of appearance; the last of repeated runs counts.

    Open loops have no number of clients and are ignored.
    """
    groups: dict[tuple[str, str], dict[int, RunRecord]] = {}
    for record in records:
        if record.num_clients is not None and record.requests:
            groups.setdefault((record.label, record.workload), {})[record.num_clients] = record
    return [
        Curve(
            label=label,
            workload=workload,
            runs=tuple(run for _, run in sorted(runs.items())),
            summaries=tuple(summarize_closed_loop(run.requests, num_clients=n) for n, run in sorted(runs.items())),
        )
        for (label, workload), runs in groups.items()
    ]


def _interpolate(at: float, xs: Sequence[float], ys: Sequence[float]) -> float | None:
    order = np.argsort(xs)
    x, y = np.asarray(xs)[order], np.asarray(ys)[order]
    return float(np.interp(at, x, y)) if x[0] <= at <= x[-1] else None
