"""Beam search, from requests of one token each.

The prefix cache holds what the beams have in common, so that a step computes at most a block of tokens for each of them.
Source: the beam search of vLLM's server, whose results it has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from fastgen_jax.api.async_engine import RequestFailedError, Stream
from fastgen_jax.api.engine_thread import Failure
from fastgen_jax.engine.outputs import RequestOutput, VersionRuns
from fastgen_jax.engine.prompts import TokenIds
from fastgen_jax.scheduling import Request, SamplingParams
from fastgen_jax.serving.work import Backend, Timing, Work


@dataclass(frozen=True)
class Beam:
    """A continuation of the prompt, and its log-probability."""

    token_ids: tuple[int, ...]
    logprob: float
    ended: bool = False

    def score(self, length_penalty: float) -> float:
        """The log-probability divided by a power of the length."""
        return self.logprob / len(self.token_ids) ** length_penalty if self.token_ids else 0.0


def start_beams(
    backend: Backend,
    prompt: TokenIds,
    params: SamplingParams,
    *,
    width: int,
    length_penalty: float,
    priority: int = 0,
    deadline: float | None = None,
    cache_salt: str = "",
) -> Work:
    """Starts a search; the samples of the work are the best `width` answers, best first, when it has ended.

    `params` has a limit on the length. Raises ValueError, QueueFullError and ClosedError as `AsyncEngine.submit` does.
    """
    intake = backend.intake
    step = SamplingParams(max_new_tokens=1, temperature=0, ignore_eos=True, logprobs=2 * width, adapter=params.adapter)
    make = partial(intake.request, priority=priority, cache_salt=cache_salt)
    first = make(prompt, replace(params, logprobs=None))  # checks that the whole answer fits

    async def continuations(beam: Beam) -> list[Beam]:
        request = make(TokenIds((*prompt, *beam.token_ids)), step)
        stream = backend.submit(request, deadline=deadline)
        try:
            outputs = [output async for output in stream]
        finally:
            stream.close()
        assert outputs[-1].logprobs is not None  # they were requested
        (entry,) = outputs[-1].logprobs
        ends = frozenset((*(() if params.ignore_eos else intake.eos_token_ids), *params.stop_token_ids))
        return [Beam((*beam.token_ids, i), beam.logprob + value, i in ends) for i, value in entry.top.items()]

    async def search() -> None:
        try:
            beams, ended = [Beam((), 0.0)], []
            for _ in range(params.max_new_tokens or 1):
                found = [beam for group in await asyncio.gather(*map(continuations, beams)) for beam in group]
                ended += [beam for beam in found if beam.ended]
                beams = sorted((beam for beam in found if not beam.ended), key=lambda beam: -beam.logprob)[:width]
                if not beams:
                    break
            best = sorted([*ended, *beams], key=lambda beam: -beam.score(length_penalty))
            for stream, beam in zip(streams, best, strict=False):
                stream.put(_output(stream.request, beam, backend))
        except Exception as error:
            failure = error.failure if isinstance(error, RequestFailedError) else None
            for stream in streams:
                stream.put(failure or Failure(stream.request.request_id, "step", str(error)))

    def cancel(_: Stream) -> None:
        task.cancel()

    streams = [Stream(first, cancel) for _ in range(width)]
    task = asyncio.create_task(search())
    zeros = [0] * width
    timings = [Timing(first.arrival_time) for _ in streams]
    versions = [VersionRuns() for _ in streams]
    return Work([prompt], [params] * width, streams, timings, [*zeros], [*zeros], [None] * width, versions)


def _output(request: Request, beam: Beam, backend: Backend) -> RequestOutput:
    """The whole answer of a beam as one output; the token that ended it is not part of the text."""
    tokenizer = backend.intake.tokenizer
    shown: Sequence[int] = beam.token_ids[:-1] if beam.ended else beam.token_ids
    skip = request.params.skip_special_tokens
    return RequestOutput(
        request_id=request.request_id,
        new_token_ids=beam.token_ids,
        text=tokenizer.decode(shown, skip_special_tokens=skip) if tokenizer is not None else "",
        finished=True,
        finish_reason="stop" if beam.ended else "length",
        logprobs=None,
        prompt_logprobs=None,
        num_prompt_tokens=len(request.prompt_token_ids),
        num_cached_tokens=0,
        num_generated_tokens=len(beam.token_ids),
        stop_reason=beam.token_ids[-1] if beam.ended and beam.token_ids[-1] in request.params.stop_token_ids else None,
    )
