"""Result files: one JSON line per run, with everything needed to understand the measurement and to repeat it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fastgen_jax.bench import machine
from fastgen_jax.bench.metrics import RequestTimes
from fastgen_jax.json_types import JsonFields, JsonObject

DIGITS = 6  # of a second: a microsecond
PACKAGES = ("fastgen_jax", "jax", "jaxlib", "numpy")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run of one load. Runs with the same `label` and different loads form a curve."""

    label: str
    """The engine and policy, and for a simulation the model and hardware."""
    source: str
    """ "measured" or "simulated"."""
    load: JsonObject
    """`Load.facts`."""
    requests: tuple[RequestTimes, ...]
    num_refused: int = 0
    num_failed: int = 0
    settings: JsonObject = field(default_factory=dict)
    context: JsonObject = field(default_factory=dict)
    """Machine, versions and command."""
    steps: tuple[tuple[float, float, int, tuple[tuple[str, int, int], ...]], ...] = ()
    """The first steps: start, end, tokens, and chunks as (request id, start, length)."""

    @property
    def num_clients(self) -> int | None:
        """Clients of a closed loop; None for an open loop."""
        return self.load.get("num_clients")

    @property
    def workload(self) -> str:
        """The load without its number of clients or its rate: what a curve is drawn over."""
        facts = self.load
        if "trace" in facts:
            return f"{facts['trace']}"
        scale = facts.get("length_scale", 1.0)
        return f"{facts['mean_prompt']}/{facts['mean_output']}" + (f" x {scale:g}" if scale != 1 else "")


def context() -> JsonObject:
    """Package versions and the command line; equal for equal commands."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a source tree
            continue
    return {"versions": versions, "python": sys.version.split()[0], "command": shlex.join(sys.argv)}


def measured_context() -> JsonObject:
    """`context()` and the machine."""
    return {**context(), "machine": machine.describe()}


def append_line(path: Path, record: JsonFields) -> None:
    """Appends an object to a file of JSON lines."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, separators=(",", ":")) + "\n")


def append(path: Path, records: Iterable[RunRecord]) -> None:
    """Appends runs to a file; times are rounded to microseconds."""
    for record in records:
        append_line(path, _to_jsonable(record))


def read_lines(path: Path) -> list[JsonObject]:
    """The JSON objects of a file of JSON lines; raises ValueError for any other file."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} contains no runs: {error}; pass a file written by a benchmark") from error
    return [line for line in lines if isinstance(line, dict)]


def read(path: Path, *, allow_empty: bool = False) -> list[RunRecord]:
    """The runs in a file, ignoring other lines; raises ValueError if there are none and `allow_empty` is false."""
    records = [_from_jsonable(line) for line in read_lines(path) if line.get("kind") == "run"]
    if not records and not allow_empty:
        raise ValueError(
            f"{path} contains no runs; pass a file written by bench serve, policies, offline or compare, or by simulate"
        )
    return records


def _to_jsonable(record: RunRecord) -> JsonObject:
    fields = {name: value for name, value in vars(record).items() if name not in ("requests", "steps")}
    requests = [
        [r.request_id, round(r.start, DIGITS), r.num_prompt_tokens, [round(at, DIGITS) for at in r.token_times]]
        for r in record.requests
    ]
    steps = [[round(start, DIGITS), round(end, DIGITS), tokens, chunks] for start, end, tokens, chunks in record.steps]
    return {"kind": "run", **fields, "requests": requests, "steps": steps}


def _from_jsonable(line: JsonObject) -> RunRecord:
    requests = tuple(
        RequestTimes(request_id=name, start=start, num_prompt_tokens=prompt, token_times=tuple(times))
        for name, start, prompt, times in line["requests"]
    )
    steps = tuple(
        (start, end, tokens, tuple((name, at, length) for name, at, length in chunks))
        for start, end, tokens, chunks in line["steps"]
    )
    fields = {name: value for name, value in line.items() if name not in ("kind", "requests", "steps")}
    return RunRecord(**fields, requests=requests, steps=steps)
