"""Loads: which requests are sent when, the same for a server, an engine in this process, and the simulator.

A closed loop has a number of clients, each of which sends its next request when the last one is answered. In an open
loop requests come at given times, whoever is ready for them. Lengths only: `prompt_ids` gives them content.
"""

from __future__ import annotations

import csv
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from fastgen_jax.bench.workloads import SEED, SPREAD, sample_lengths

CLIENT_LADDER = (1, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32)  # FastGen's numbers of clients
MAX_PROMPT = 4000  # tokens; FastGen cuts longer prompts
STAGGER_SECONDS = 0.01  # times U(0, clients): when a client of a closed loop starts
MOONCAKE_BLOCK = 512  # tokens that one hash of the Mooncake traces stands for


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadRequest:
    """One request of a load: lengths in tokens, arrival in seconds after the start (open loop only).

    `prefix_blocks` name the prompt's blocks of `Load.prefix_block_size` tokens: equal names, equal tokens.
    """

    request_id: str
    num_prompt_tokens: int
    max_new_tokens: int
    arrival: float = 0.0
    prefix_blocks: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests in order, and how they are sent.

    `num_clients` is None for an open loop. In a closed loop client i first sends `warmup[i]`, which is not measured;
    when all are answered it waits `stagger[i]` seconds and then takes requests off the common queue.
    """

    name: str
    requests: tuple[LoadRequest, ...]
    num_clients: int | None = None
    warmup: tuple[LoadRequest, ...] = ()
    stagger: tuple[float, ...] = ()
    prefix_block_size: int = 0
    facts: dict[str, Any]
    """How it was made: what another needs to make it again."""

    @property
    def longest_context(self) -> int:
        """Prompt and output tokens of the longest request."""
        return max(r.num_prompt_tokens + r.max_new_tokens for r in (*self.requests, *self.warmup))

    @property
    def duration(self) -> float:
        """Seconds from the start to the last arrival; 0 for a closed loop."""
        return self.requests[-1].arrival if self.num_clients is None else 0.0

    def prompt_ids(self, request: LoadRequest, *, vocab_size: int, num_reserved_ids: int = 256) -> tuple[int, ...]:
        """Token ids of a prompt: random, the same on every machine, alike where `prefix_blocks` are."""
        low = min(num_reserved_ids, vocab_size - 1)
        if not request.prefix_blocks:
            rng = np.random.default_rng((SEED, zlib.crc32(f"{self.name} {request.request_id}".encode())))
            return tuple(rng.integers(low, vocab_size, request.num_prompt_tokens).tolist())
        ids: list[int] = []
        for block in request.prefix_blocks:
            rng = np.random.default_rng((SEED, block))
            ids += rng.integers(low, vocab_size, self.prefix_block_size).tolist()
        return tuple(ids[: request.num_prompt_tokens])

    def to_jsonable(self) -> dict[str, Any]:
        """The load as plain dicts and lists."""
        return asdict(self)


def closed_loop(
    num_clients: int,
    *,
    num_requests: int,
    mean_prompt: int,
    mean_output: int,
    spread: float = SPREAD,
    max_prompt: int = MAX_PROMPT,
    length_scale: float = 1.0,
    warmup: int = 1,
    seed: int = SEED,
) -> Load:
    """FastGen's load: `int(N(mean, spread * mean))` tokens, prompts cut at `max_prompt`.

    `length_scale` scales the means and the cut; `warmup` requests a client are sent before the measurement.
    Raises ValueError for numbers below 1.
    """
    for name, value in (("num_clients", num_clients), ("num_requests", num_requests)):
        if value < 1:
            raise ValueError(f"{name} is {value}; a closed loop needs at least 1")
    _positive(length_scale=length_scale)
    if warmup < 0:
        raise ValueError(f"warmup is {warmup} requests a client; use 0 or more")
    rng = np.random.default_rng(seed)
    count = num_requests + warmup * num_clients
    prompts = sample_lengths(_scaled(mean_prompt, length_scale), count, spread=spread, rng=rng)
    outputs = sample_lengths(_scaled(mean_output, length_scale), count, spread=spread, rng=rng)
    cut = _scaled(max_prompt, length_scale)
    requests = [
        LoadRequest(request_id=f"r{i}", num_prompt_tokens=min(prompt, cut), max_new_tokens=output)
        for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
    ]
    return Load(
        name=f"closed-{mean_prompt}-{mean_output}",
        requests=tuple(requests[:num_requests]),
        warmup=tuple(requests[num_requests:]),
        num_clients=num_clients,
        stagger=tuple((rng.uniform(0, num_clients, num_clients) * STAGGER_SECONDS).tolist()),
        facts={
            "loop": "closed",
            "num_clients": num_clients,
            "num_requests": num_requests,
            "mean_prompt": mean_prompt,
            "mean_output": mean_output,
            "spread": spread,
            "max_prompt": max_prompt,
            "length_scale": length_scale,
            "warmup": warmup,
            "seed": seed,
        },
    )


def open_loop(
    rate: float,
    *,
    num_requests: int,
    mean_prompt: int,
    mean_output: int,
    gap_cv: float = 1.0,
    spread: float = SPREAD,
    max_prompt: int = MAX_PROMPT,
    length_scale: float = 1.0,
    seed: int = SEED,
) -> Load:
    """Arrivals at `rate` requests a second with Gamma-distributed gaps: Poisson if their coefficient of variation is 1.

    Lengths as in `closed_loop`. Raises ValueError for a rate, a variation or a count that is not positive.
    """
    _positive(rate=rate, gap_cv=gap_cv, length_scale=length_scale)
    if num_requests < 1:
        raise ValueError(f"num_requests is {num_requests}; a load needs at least 1")
    rng = np.random.default_rng(seed)
    prompts = sample_lengths(_scaled(mean_prompt, length_scale), num_requests, spread=spread, rng=rng)
    outputs = sample_lengths(_scaled(mean_output, length_scale), num_requests, spread=spread, rng=rng)
    shape = 1 / gap_cv**2
    arrivals = np.cumsum(rng.gamma(shape, 1 / (rate * shape), num_requests))
    cut = _scaled(max_prompt, length_scale)
    return Load(
        name=f"open-{mean_prompt}-{mean_output}",
        requests=tuple(
            LoadRequest(request_id=f"r{i}", num_prompt_tokens=min(prompt, cut), max_new_tokens=output, arrival=float(at))
            for i, (prompt, output, at) in enumerate(zip(prompts, outputs, arrivals, strict=True))
        ),
        facts={
            "loop": "open",
            "rate": rate,
            "gap_cv": gap_cv,
            "num_requests": num_requests,
            "mean_prompt": mean_prompt,
            "mean_output": mean_output,
            "spread": spread,
            "max_prompt": max_prompt,
            "length_scale": length_scale,
            "seed": seed,
        },
    )


def read_trace(
    path: Path,
    *,
    speed: float = 1.0,
    length_scale: float = 1.0,
    first: int | None = None,
    max_context_len: int | None = None,
) -> Load:
    """A recorded trace: Azure's LLM inference CSV, or Mooncake's JSON lines with the hashes of shared prefixes.

    `speed` 2 halves the gaps between arrivals. `length_scale` scales prompts, outputs and hashed blocks alike. `first`
    keeps so many requests. Prompts are cut to what `max_context_len` leaves. Raises ValueError for a file in neither
    form, naming the line.
    """
    _positive(speed=speed, length_scale=length_scale)
    if first is not None and first < 1:
        raise ValueError(f"first is {first} requests; a trace needs at least 1")
    try:
        rows = _azure_rows(path) if path.suffix == ".csv" else _mooncake_rows(path)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no trace: {error!r}; give a .csv with TIMESTAMP, ContextTokens, GeneratedTokens, or a .jsonl with "
            "timestamp, input_length, output_length, hash_ids"
        ) from error
    requests = []
    for row in rows[:first]:
        output = _scaled(row.max_new_tokens, length_scale)
        prompt = _scaled(row.num_prompt_tokens, length_scale)
        if max_context_len is not None:
            output = min(output, max_context_len - 1)
            prompt = min(prompt, max_context_len - output)
        requests.append(replace(row, num_prompt_tokens=prompt, max_new_tokens=output, arrival=row.arrival / speed))
    if not requests:
        raise ValueError(f"{path} has 0 requests; give a trace with at least 1")
    return Load(
        name=path.stem,
        requests=tuple(requests),
        prefix_block_size=_scaled(MOONCAKE_BLOCK, length_scale) if requests[0].prefix_blocks else 0,
        facts={
            "loop": "open",
            "trace": path.name,
            "speed": speed,
            "length_scale": length_scale,
            "num_requests": len(requests),
            "max_context_len": max_context_len,
        },
    )


def _azure_rows(path: Path) -> list[LoadRequest]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    start = datetime.fromisoformat(rows[0]["TIMESTAMP"]) if rows else None
    return [
        LoadRequest(
            request_id=f"r{i}",
            num_prompt_tokens=int(row["ContextTokens"]),
            max_new_tokens=int(row["GeneratedTokens"]),
            arrival=(datetime.fromisoformat(row["TIMESTAMP"]) - start).total_seconds() if start else 0.0,
        )
        for i, row in enumerate(rows)
    ]


def _mooncake_rows(path: Path) -> list[LoadRequest]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [
        LoadRequest(
            request_id=f"r{i}",
            num_prompt_tokens=row["input_length"],
            max_new_tokens=max(1, row["output_length"]),
            arrival=row["timestamp"] / 1000,
            prefix_blocks=tuple(row["hash_ids"]),
        )
        for i, row in enumerate(rows)
    ]


def offered_rate(requests: Sequence[LoadRequest]) -> float:
    """Requests a second between the first arrival and the last; 0 if all come at once."""
    seconds = requests[-1].arrival - requests[0].arrival
    return (len(requests) - 1) / seconds if seconds > 0 else 0.0


def _scaled(tokens: int, scale: float) -> int:
    return max(1, round(tokens * scale))


def _positive(**values: float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{name} is {value}; it must be above 0")
