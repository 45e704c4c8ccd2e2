"""Loads: which requests are sent when, for a server, an engine in this process, or the simulator.

In a closed loop each of several clients sends its next request when the previous one is answered. In an open loop requests
arrive at given times, regardless of the server. A load only has lengths; `prompt_ids` generates the token ids.
"""

from __future__ import annotations

import csv
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np

from fastgen_jax.bench.workloads import SEED, SPREAD, sample_lengths
from fastgen_jax.json_types import JsonObject

CLIENT_LADDER = (1, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32)  # FastGen's numbers of clients
MAX_PROMPT = 4000  # tokens; FastGen truncates longer prompts
STAGGER_SECONDS = 0.01  # a client of a closed loop starts after this times U(0, clients)
MOONCAKE_BLOCK = 512  # tokens per hash in the Mooncake traces


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadRequest:
    """One request of a load: lengths in tokens, arrival in seconds after the start (open loops only).

    `prefix_blocks` names the prompt's blocks of `Load.prefix_block_size` tokens; equal names mean equal tokens.
    """

    request_id: str
    num_prompt_tokens: int
    max_new_tokens: int
    arrival: float = 0.0
    prefix_blocks: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests in order, and how they are sent.

    `num_clients` is None for an open loop. In a closed loop client i first sends `warmup[i]`, which is not measured. Once
    all of these are answered, it waits `stagger[i]` seconds and then takes requests from the shared queue.
    """

    name: str
    requests: tuple[LoadRequest, ...]
    num_clients: int | None = None
    warmup: tuple[LoadRequest, ...] = ()
    stagger: tuple[float, ...] = ()
    prefix_block_size: int = 0
    facts: JsonObject
    """The arguments that reproduce this load."""

    @property
    def longest_context(self) -> int:
        """Prompt and output tokens of the longest request."""
        return max(r.num_prompt_tokens + r.max_new_tokens for r in (*self.requests, *self.warmup))

    @property
    def duration(self) -> float:
        """Seconds from the start to the last arrival; 0 for a closed loop."""
        return self.requests[-1].arrival if self.num_clients is None else 0.0

    def prompt_ids(self, request: LoadRequest, *, vocab_size: int, num_reserved_ids: int = 256) -> tuple[int, ...]:
        """Random token ids of a prompt: the same on every machine, and equal where `prefix_blocks` are equal."""
        low = min(num_reserved_ids, vocab_size - 1)
        if not request.prefix_blocks:
            rng = np.random.default_rng((SEED, zlib.crc32(f"{self.name} {request.request_id}".encode())))
            return tuple(rng.integers(low, vocab_size, request.num_prompt_tokens).tolist())
        ids: list[int] = []
        for block in request.prefix_blocks:
            rng = np.random.default_rng((SEED, block))
            ids += rng.integers(low, vocab_size, self.prefix_block_size).tolist()
        return tuple(ids[: request.num_prompt_tokens])

    def to_jsonable(self) -> JsonObject:
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
    """FastGen's load: lengths of `int(N(mean, spread * mean))` tokens, prompts truncated to `max_prompt`.

    `length_scale` scales the means and `max_prompt`. Each client sends `warmup` requests before the measurement.
    Raises ValueError for numbers below 1.
    """
    for name, value in (("num_clients", num_clients), ("num_requests", num_requests)):
        if value < 1:
            raise ValueError(f"{name} is {value}; a closed loop needs at least 1")
    _positive(length_scale=length_scale)
    if warmup < 0:
        raise ValueError(f"warmup is {warmup} requests per client; it must be 0 or more")
    rng = np.random.default_rng(seed)
    lengths = _Lengths(mean_prompt, mean_output, spread, max_prompt, length_scale)
    requests = lengths.requests(num_requests + warmup * num_clients, rng)
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
            **asdict(lengths),
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
    """Arrivals at `rate` requests per second with Gamma-distributed gaps; a coefficient of variation of 1 is Poisson.

    Lengths are drawn as in `closed_loop`. Raises ValueError for a rate, variation or count that is not positive.
    """
    _positive(rate=rate, gap_cv=gap_cv, length_scale=length_scale)
    if num_requests < 1:
        raise ValueError(f"num_requests is {num_requests}; a load needs at least 1")
    rng = np.random.default_rng(seed)
    lengths = _Lengths(mean_prompt, mean_output, spread, max_prompt, length_scale)
    requests = lengths.requests(num_requests, rng)
    shape = 1 / gap_cv**2
    arrivals = np.cumsum(rng.gamma(shape, 1 / (rate * shape), num_requests)).tolist()
    return Load(
        name=f"open-{mean_prompt}-{mean_output}",
        requests=tuple(replace(request, arrival=at) for request, at in zip(requests, arrivals, strict=True)),
        facts={
            "loop": "open",
            "rate": rate,
            "gap_cv": gap_cv,
            "num_requests": num_requests,
            **asdict(lengths),
            "seed": seed,
        },
    )


@dataclass(frozen=True)
class _Lengths:
    """How lengths are drawn, in tokens; see `closed_loop`."""

    mean_prompt: int
    mean_output: int
    spread: float
    max_prompt: int
    length_scale: float

    def requests(self, count: int, rng: np.random.Generator) -> list[LoadRequest]:
        """Requests of random lengths without arrival times."""
        scale = self.length_scale
        prompts = sample_lengths(_scaled(self.mean_prompt, scale), count, spread=self.spread, rng=rng)
        outputs = sample_lengths(_scaled(self.mean_output, scale), count, spread=self.spread, rng=rng)
        limit = _scaled(self.max_prompt, scale)
        return [
            LoadRequest(request_id=f"r{i}", num_prompt_tokens=min(prompt, limit), max_new_tokens=output)
            for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
        ]


def read_trace(
    path: Path,
    *,
    speed: float = 1.0,
    length_scale: float = 1.0,
    first: int | None = None,
    max_context_len: int | None = None,
) -> Load:
    """A recorded trace: Azure's LLM inference CSV, or Mooncake's JSON lines with hashes of shared prefixes.

    A `speed` of 2 halves the gaps between arrivals. `length_scale` scales prompts, outputs and hashed blocks. `first` keeps
    only that many requests. Prompts are truncated so that prompt and output fit into `max_context_len`. Raises ValueError
    for a file in neither format.
    """
    _positive(speed=speed, length_scale=length_scale)
    if first is not None and first < 1:
        raise ValueError(f"first is {first} requests; it must be at least 1")
    try:
        rows = _azure_rows(path) if path.suffix == ".csv" else _mooncake_rows(path)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a trace: {error!r}; pass a .csv with TIMESTAMP, ContextTokens, GeneratedTokens, or a .jsonl "
            "with timestamp, input_length, output_length, hash_ids"
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
        raise ValueError(f"{path} has 0 requests; pass a trace with at least 1")
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
    """Requests per second between the first and the last arrival; 0 if all arrive at the same time."""
    seconds = requests[-1].arrival - requests[0].arrival
    return (len(requests) - 1) / seconds if seconds > 0 else 0.0


def _scaled(tokens: int, scale: float) -> int:
    return max(1, round(tokens * scale))


def _positive(**values: float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{name} is {value}; it must be above 0")
