"""Reads the runs of `fastgen bench offline` and `compare` from their files and tabulates engines per workload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from fastgen_jax.bench.metrics import Summary, median_summary
from fastgen_jax.bench.results import read_lines
from fastgen_jax.bench.tables import milliseconds, table
from fastgen_jax.json_types import JsonObject


@dataclass(frozen=True, kw_only=True)
class EngineRuns:
    """All runs of one engine on one workload in one file."""

    engine: str
    workload: str
    source: str
    """The file's name without its suffix."""
    summaries: tuple[Summary, ...]
    context: JsonObject
    """Machine, command, and the engine's description of itself."""


def read_engine_runs(paths: Sequence[Path]) -> list[EngineRuns]:
    """The runs in the files, in order of appearance, ignoring other lines.

    Raises ValueError for a file that is not JSON lines.
    """
    groups: dict[tuple[str, str, str], list[JsonObject]] = {}
    for path in paths:
        for line in read_lines(path):
            if {"engine", "workload", "output_rate"} <= line.keys():
                groups.setdefault((line["workload"], line["engine"], path.stem), []).append(line)
    names = [field.name for field in fields(Summary)]
    return [
        EngineRuns(
            engine=engine,
            workload=workload,
            source=source,
            summaries=tuple(Summary(**{name: line[name] for name in names}) for line in lines),
            context={
                "command": lines[-1].get("command"),
                "machine": lines[-1].get("machine"),
                "versions": lines[-1].get("description"),
            },
        )
        for (workload, engine, source), lines in groups.items()
    ]


def engine_tables(groups: Sequence[EngineRuns]) -> list[str]:
    """Lines of Markdown: for each workload the medians of every engine, and the ratio of the first engine to each."""
    lines: list[str] = []
    several = len({group.source for group in groups}) > 1
    for workload in dict.fromkeys(group.workload for group in groups):
        here = [group for group in groups if group.workload == workload]
        first = median_summary(here[0].summaries)
        rows = []
        for group in here:
            median = median_summary(group.summaries)
            rates = [summary.total_rate for summary in group.summaries]
            rows.append(
                (
                    f"{group.engine} ({group.source})" if several else group.engine,
                    len(rates),
                    f"{median.total_rate:.0f}",
                    f"{min(rates):.0f}-{max(rates):.0f}",
                    f"{median.output_rate:.1f}",
                    f"{median.ttft_p50:.2f}",
                    milliseconds(median.token_latency_p50, digits=1),
                    milliseconds(median.token_latency_p95, digits=1),
                    f"{first.total_rate / median.total_rate:.2f}",
                )
            )
        lines += ["", f"Workload {workload}, medians", ""]
        lines += table(
            (
                "engine",
                "runs",
                "total tok/s",
                "range",
                "output tok/s",
                "first token s",
                "gap P50 ms",
                "P95 ms",
                f"{here[0].engine} / this engine",
            ),
            rows,
        )
    return lines
