"""One HTTP request as work for the engine: its samples, their streams, and their combined usage."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NotRequired, ParamSpec, Protocol, TypedDict, TypeVar

from fastgen_jax.api.async_engine import Stream
from fastgen_jax.api.pooling import Pooled, Pooling
from fastgen_jax.engine.intake import Intake, samples
from fastgen_jax.engine.outputs import RequestOutput, VersionRuns
from fastgen_jax.engine.prompts import Prompt, TokenIds
from fastgen_jax.engine.updating import PauseMode
from fastgen_jax.json_types import JsonObject
from fastgen_jax.scheduling import Request, SamplingParams
from fastgen_jax.text.grammar import Grammar, GrammarMatcher, compile_threads

P = ParamSpec("P")
T = TypeVar("T")

LONG_PROMPT = 4000  # characters, about a millisecond: longer prompts are tokenized in another thread
Snapshot = JsonObject  # what `take_snapshot` returns


class TokenUsage(TypedDict):
    """Token counts in OpenAI's format."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CachedTokens(TypedDict):
    """Prompt tokens found in the prefix cache."""

    cached_tokens: int


class Milliseconds(TypedDict):
    """Times of the slowest sample."""

    queue_ms: float
    first_token_ms: float
    total_ms: float
    mean_gap_ms: float
    longest_gap_ms: float


class ReasoningTokens(TypedDict):
    """Generated tokens that belong to the reasoning."""

    reasoning_tokens: int


class Usage(TokenUsage):
    """Token counts of a finished request."""

    completion_tokens_details: NotRequired[ReasoningTokens]

    prompt_tokens_details: CachedTokens
    weight_versions: NotRequired[list[tuple[tuple[int, int], ...]]]
    """For each sample the versions of the weights that generated it, with the number of tokens of each; an extension.
    Omitted while the weights are those from the start."""


class Backend(Protocol):
    """Runs requests: `AsyncEngine`, or a router with several replicas."""

    @property
    def intake(self) -> Intake:
        """Validates and builds requests."""
        ...

    @property
    def max_queue(self) -> int:
        """Number of requests that may wait in a replica."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether requests are accepted."""
        ...

    @property
    def is_asleep(self) -> bool:
        """Whether every engine has given its memory back; the next request wakes one."""
        ...

    @property
    def failure(self) -> str | None:
        """Why no request can be answered anymore; None if one can."""
        ...

    @property
    def num_unfinished(self) -> int:
        """Number of requests that have not ended."""
        ...

    def submit(
        self,
        request: Request,
        *,
        grammar: Grammar | None = None,
        matcher: GrammarMatcher | None = None,
        deadline: float | None = None,
    ) -> Stream:
        """See `AsyncEngine.submit`."""
        ...

    async def snapshots(self, *, since_step: int | None = None) -> list[Snapshot]:
        """Returns one snapshot per replica."""
        ...

    async def update_params(self, params: str, *, version: int | None = None, recompute: bool = False) -> int:
        """Replaces the weights by those of a checkpoint; see `Engine.update_params`."""
        ...

    async def pause(self, mode: PauseMode = "keep") -> None:
        """See `Engine.pause`."""
        ...

    async def resume(self) -> None:
        """See `Engine.resume`."""
        ...

    async def pool(self, texts: Sequence[TokenIds], pooling: Pooling, *, token_ids: tuple[int, ...] = ()) -> list[Pooled]:
        """See `fastgen_jax.api.pooling.pool`."""
        ...

    async def drain(self, timeout: float) -> bool:
        """Accepts no more requests and waits for the running ones; returns whether all ended in `timeout` seconds."""
        ...

    async def close(self) -> None:
        """Aborts all requests and stops the engines."""
        ...


@dataclass
class Timing:
    """Times of one sample, in seconds of `time.monotonic`."""

    start: float
    first: float | None = None
    last: float | None = None
    longest_gap: float = 0.0
    queue: float = 0.0

    def note(self, output: RequestOutput) -> float | None:
        """Records an output; returns the gap since the previous one, None for the first."""
        now = time.monotonic()
        gap = None if self.last is None else now - self.last
        if gap is None:
            self.first, self.queue = now, output.queue_seconds
        else:
            self.longest_gap = max(self.longest_gap, gap)
        self.last = now
        return gap


@dataclass
class Work:
    """The samples of one HTTP request: sample i belongs to prompt i // n."""

    prompts: list[TokenIds]
    params: list[SamplingParams]
    streams: list[Stream]
    timings: list[Timing] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)
    versions: list[VersionRuns] = field(default_factory=list)
    on_gap: Callable[[float | None, Timing], object] = lambda gap, timing: None
    """Called for each output with the seconds since the previous one, None for the first."""

    @property
    def samples_per_prompt(self) -> int:
        """Number of samples of each prompt."""
        return len(self.streams) // len(self.prompts)

    def __aiter__(self) -> AsyncIterator[tuple[int, list[RequestOutput]]]:
        """Yields (sample, its new outputs) as they arrive; leaving early aborts unfinished samples."""
        return self._outputs()

    def close(self) -> None:
        """Aborts unfinished samples."""
        for stream in self.streams:
            stream.close()

    @property
    def is_complete(self) -> bool:
        """Whether every sample has ended by itself."""
        return None not in self.reasons

    def usage_so_far(self) -> TokenUsage:
        """Returns the current token counts."""
        prompt, generated = sum(map(len, self.prompts)), sum(self.generated)
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}

    def usage(self) -> Usage:
        """Returns the token counts in OpenAI's format."""
        cached = sum(self.cached[i] for i in range(0, len(self.cached), self.samples_per_prompt))
        usage: Usage = {**self.usage_so_far(), "prompt_tokens_details": {"cached_tokens": cached}}
        versions = [runs.runs for runs in self.versions]
        if any(version for runs in versions for version, _ in runs):
            usage["weight_versions"] = versions
        return usage

    def timing(self) -> Milliseconds:
        """Returns the times of the slowest sample."""
        timing = max(self.timings, key=lambda t: t.last or t.start)
        first, last = timing.first or timing.start, timing.last or timing.start
        gaps = max(1, self.generated[self.timings.index(timing)] - 1)
        return {
            "queue_ms": round(1e3 * timing.queue, 3),
            "first_token_ms": round(1e3 * (first - timing.start), 3),
            "total_ms": round(1e3 * (last - timing.start), 3),
            "mean_gap_ms": round(1e3 * (last - first) / gaps, 3),
            "longest_gap_ms": round(1e3 * timing.longest_gap, 3),
        }

    def _note(self, index: int, outputs: Sequence[RequestOutput]) -> None:
        timing = self.timings[index]
        for output in outputs:
            self.on_gap(timing.note(output), timing)
            self.reasons[index] = output.finish_reason
            self.generated[index] += len(output.new_token_ids)
            self.cached[index] = output.num_cached_tokens
            self.versions[index].add(output)

    async def _outputs(self) -> AsyncIterator[tuple[int, list[RequestOutput]]]:
        try:
            if len(self.streams) == 1:
                async for outputs in self.streams[0].batches():
                    self._note(0, outputs)
                    yield 0, outputs
                return
            ready: asyncio.Queue[int] = asyncio.Queue()
            for index, stream in enumerate(self.streams):
                stream.on_put = partial(ready.put_nowait, index)
                ready.put_nowait(index)  # for outputs that have already arrived
            unfinished = set(range(len(self.streams)))
            while unfinished:
                index = await ready.get()
                outputs = self.streams[index].take()
                if outputs:
                    self._note(index, outputs)
                    yield index, outputs
                if self.streams[index].is_exhausted:
                    unfinished.discard(index)
        finally:
            self.close()


async def start_work(
    backend: Backend,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    *,
    num_samples: int,
    priority: int = 0,
    timeout: float | None = None,
    grammar: Grammar | None = None,
    new_tokens: int | None = None,
    add_special_tokens: bool = True,
    keep_tokens: int | None = None,
    cache_salt: str = "",
    shown_token_ids: tuple[int, ...] = (),
) -> Work:
    """Validates all samples, then submits them: either all run or none.

    `new_tokens` limits answers for which `params` has no limit; without it they may fill the context. `keep_tokens` is how
    many tokens at the end of each prompt are kept, -1 for as many as fit. `shown_token_ids` are special tokens that the
    text shows. Raises ValueError, QueueFullError and ClosedError as `AsyncEngine.submit` does.
    """
    intake, arrival = backend.intake, time.monotonic()
    if len(prompts) * num_samples > backend.max_queue:
        raise ValueError(
            f"{len(prompts)} prompts with n={num_samples} are more than the {backend.max_queue} requests that "
            "may wait in the queue; split them into several calls, or use fastgen batch"
        )
    every = _all_samples(params, num_samples)

    # Compiles it, in one of few threads; afterwards, matchers are copied.
    first = None if grammar is None else await beside(intake.matcher, grammar)

    def prepare() -> tuple[list[TokenIds], list[tuple[Request, GrammarMatcher | None]]]:
        encoded = [
            truncated(intake.encode(prompt, add_special_tokens=add_special_tokens), keep_tokens, intake, params)
            for prompt in prompts
        ]
        return encoded, [
            (
                intake.request(
                    ids,
                    intake.limited(sample, len(ids), new_tokens),
                    priority=priority,
                    awaits_each_token=first is not None,
                    shown_token_ids=shown_token_ids,
                    cache_salt=cache_salt,
                ),
                first.restarted() if first is not None else None,
            )
            for ids in encoded
            for sample in every
        ]

    size = sum(map(len, prompts)) * len(every)
    long = size > LONG_PROMPT or any(not isinstance(p, str) for p in prompts)
    encoded, requests = await asyncio.to_thread(prepare) if long else prepare()
    streams: list[Stream] = []
    try:
        for request, matcher in requests:
            deadline = None if timeout is None else arrival + timeout
            streams.append(backend.submit(request, grammar=grammar, matcher=matcher, deadline=deadline))
    except BaseException:
        for stream in streams:
            stream.close()
        raise
    zeros = [0] * len(streams)
    timings = [Timing(arrival) for _ in streams]
    versions = [VersionRuns() for _ in streams]
    return Work(encoded, every * len(encoded), streams, timings, [*zeros], [*zeros], [None] * len(streams), versions)


async def beside(function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """The result of a function that compiles a grammar, run in one of the threads for that."""
    call = partial(function, *args, **options)
    return await asyncio.get_running_loop().run_in_executor(compile_threads(), call)


def truncated(ids: TokenIds, keep_tokens: int | None, intake: Intake, params: SamplingParams) -> TokenIds:
    """The last `keep_tokens` of a prompt; -1: as many as fit before the answer; None: all."""
    if keep_tokens is None:
        return ids
    if keep_tokens == -1:
        keep_tokens = intake.config.longest_sequence - (params.max_new_tokens or 1)
    return TokenIds(ids[-max(1, keep_tokens) :])


def _all_samples(params: SamplingParams, num_samples: int) -> list[SamplingParams]:
    if num_samples > 1 and params.greedy:
        return [params] * num_samples  # the same answer several times, as OpenAI does
    return samples(replace(params, n=num_samples))
