"""One replica: the engine's loop around the engine's scheduler, in simulated time."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from fastgen_jax.bench.loads import LoadRequest
from fastgen_jax.bench.metrics import RequestTimes
from fastgen_jax.plan.roofline import StepShape, decode_attended
from fastgen_jax.scheduling import Promise, Request, SamplingParams, Scheduler, Sequence, Step
from fastgen_jax.scheduling.fixed_chunks import fixed_chunk_size
from fastgen_jax.simulation.costs import StepCost, of_whole_steps, shape_of

PREFIXES_REMEMBERED = 512  # blocks of Mooncake prompts, 512 tokens each, that the router remembers per replica


@dataclass(frozen=True, kw_only=True)
class ReplicaConfig:
    """The engine settings that affect timing; the fields have the names of those of `EngineConfig`."""

    num_blocks: int
    max_context_len: int
    policy: str = "splitfuse"
    token_budget: int = 768
    max_num_seqs: int = 256
    block_size: int = 64
    windows: tuple[int | None, ...] = (None,)
    """The sliding window of each cache group of the model's layers; None: without one."""
    prefix_caching: bool = False
    overlap: bool = True
    host_seconds: float = 0.0
    """Seconds to plan, pack and read a step; with `overlap` the device runs another step meanwhile."""
    promise: Promise | None = None
    step_sizes: tuple[int, ...] = ()
    """Sizes to which the device pads a step; a policy with a promise takes them into account."""
    deterministic: bool = False
    """Every step has `token_budget` tokens, and chunks of prompts depend on their own request alone."""

    def __post_init__(self) -> None:
        if self.deterministic and not self.chunk_size:
            least = self.max_num_seqs - 1 + self.block_size
            raise ValueError(
                f"deterministic with token_budget={self.token_budget}: a step must hold a block of prompt beside "
                f"max_num_seqs={self.max_num_seqs} sequences; choose at least {least}, or a smaller max_num_seqs"
            )

    @property
    def chunk_size(self) -> int | None:
        """Tokens of a chunk of a prompt; None: as many as fit."""
        if not self.deterministic:
            return None
        return max(0, fixed_chunk_size(self.token_budget, max_num_seqs=self.max_num_seqs, block_size=self.block_size))


@lru_cache(maxsize=4096)
def _params(max_new_tokens: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True, do_sample=False)


class Refusal(NamedTuple):
    """A request that was refused because it could not be served in time."""

    request_id: str
    num_prompt_tokens: int
    sent: float
    at: float


class StepRecord(NamedTuple):
    """One step of the timeline: when the device ran it, and its chunks as (request id, start, length)."""

    start: float
    end: float
    num_tokens: int
    chunks: tuple[tuple[str, int, int], ...]


class Replica:
    """What `Engine.step` does, with a cost model instead of a device.

    `wake` is when the host will read the oldest step in flight; None if there is none. The simulator calls `commit` at
    that time, adds the requests that arrived in between, and then calls `dispatch`, as the engine's thread does.
    """

    def __init__(self, config: ReplicaConfig, cost: StepCost, *, record_steps: bool = False) -> None:
        self.config = config
        self.cost = of_whole_steps(cost, config.token_budget) if config.deterministic else cost
        self.now = 0.0
        self.wake: float | None = None
        self.busy_seconds = 0.0
        self.outstanding_tokens = 0
        self.steps: list[StepRecord] | None = [] if record_steps else None
        self.scheduler = Scheduler(
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            windows=config.windows,
            token_budget=config.token_budget,
            max_num_seqs=config.max_num_seqs,
            max_context_len=config.max_context_len,
            max_sample_rows=min(config.token_budget, config.max_num_seqs),
            policy=config.policy,
            prefix_caching=config.prefix_caching,
            promise=config.promise,
            clock=lambda: self.now,
            step_sizes=config.step_sizes if config.promise else (),
            chunk_size=config.chunk_size,
        )
        self._in_flight: deque[tuple[Step, float]] = deque()
        self._keep = 0
        self._device_free = 0.0
        self._commit_times: list[float] = []
        self._sent: dict[str, float] = {}
        self._prefixes: OrderedDict[int, None] = OrderedDict()  # oldest first

    def add(self, request_id: str, prompt: tuple[int, ...], max_new_tokens: int, *, sent: float, now: float) -> None:
        """Queues a request that was sent at `sent` and reaches the engine at `now`."""
        self.scheduler.add(
            Request(request_id=request_id, prompt_token_ids=prompt, params=_params(max_new_tokens), arrival_time=now, seed=0)
        )
        self.outstanding_tokens += len(prompt) + max_new_tokens
        self._sent[request_id] = sent

    def remember(self, request: LoadRequest) -> None:
        """Notes that the prompt's blocks will be in the prefix cache; a router cannot know when they are evicted."""
        if self.config.prefix_caching:
            for block in request.prefix_blocks:
                self._prefixes[block] = None
                self._prefixes.move_to_end(block)
            while len(self._prefixes) > PREFIXES_REMEMBERED:
                self._prefixes.popitem(last=False)

    def known_tokens(self, request: LoadRequest) -> int:
        """Tokens at the start of the prompt that the router assumes are in the replica's prefix cache."""
        blocks = request.prefix_blocks
        if not self._prefixes or not blocks:
            return 0
        known = next((i for i, block in enumerate(blocks) if block not in self._prefixes), len(blocks))
        return known * request.num_prompt_tokens // len(blocks)

    def dispatch(self, now: float) -> list[Refusal]:
        """Plans the next step, dispatches it and sets `wake`; returns the requests that the plan refuses."""
        self.now = now
        step = self.scheduler.schedule()
        self._keep = 0
        if step is not None:
            seconds = self.cost(shape_of(step, self.config.windows))
            start = max(self._device_free, now + self.config.host_seconds)
            self._device_free = start + seconds
            self.busy_seconds += seconds
            self._in_flight.append((step, self._device_free))
            self._keep = int(self.config.overlap)
            if self.steps is not None:
                chunks = tuple((c.sequence.request_id, c.start, c.length) for c in step.chunks)
                self.steps.append(StepRecord(start, self._device_free, step.num_tokens, chunks))
        if len(self._in_flight) > self._keep:
            self.wake = max(now, self._in_flight[0][1])
        elif self._in_flight:
            self.wake = now  # nothing to wait for yet: plan the next step right away
        else:
            self.wake = None
        return [self._refuse(sequence) for sequence in self.scheduler.take_refused()] if self.config.promise else []

    def commit(self, now: float) -> list[RequestTimes]:
        """Reads the steps that are due; returns the requests that finished."""
        self.now = now
        done: list[RequestTimes] = []
        while len(self._in_flight) > self._keep:
            step, end = self._in_flight.popleft()
            self.now = max(self.now, end)
            # Each simulated token is the number of the commit that produced it, which tells when it arrived.
            number = len(self._commit_times)
            self._commit_times.append(self.now)
            advanced = self.scheduler.commit(step, [number] * len(step.sampled))
            self.outstanding_tokens -= len(advanced)
            done += [self._times_of(sequence) for sequence in advanced if sequence.finish_reason is not None]
        return done

    def fast_forward(self, now: float, horizon: float) -> float:
        """Runs the steps of pure generation that end before `horizon`, as `dispatch` and `commit` would from `now` on.

        Returns the time of the last commit, when `dispatch` is due; `now` if there is no such step. Call it before
        `dispatch`, if only this replica acts before `horizon`.
        """
        in_flight, overlap = self._in_flight, self.config.overlap
        if self.steps is not None or len(in_flight) != overlap:  # a timeline needs every step
            return now
        run = self.scheduler.steady_run()
        if run is None:
            return now
        most, num_sequences, contexts = run
        cost, host_seconds, times = self.cost, self.config.host_seconds, self._commit_times
        first = len(times)
        free, due, busy = self._device_free, in_flight[0][1] if overlap else 0.0, self.busy_seconds
        windows, attended = self.config.windows, sum(contexts)
        for i in range(most):
            if windows != (None,):
                attended = decode_attended([context + i for context in contexts], windows)
            seconds = cost(StepShape(num_sequences, num_sequences, attended, 0, 0))
            start = now + host_seconds
            end = (start if start > free else free) + seconds
            wake = due if overlap else end
            if wake < now:
                wake = now
            if wake >= horizon:
                break
            now, free, due, busy = wake, end, end, busy + seconds
            attended += num_sequences
            times.append(now)
        count = len(times) - first
        if not count:
            return now
        self.now, self._device_free, self.busy_seconds = now, free, busy
        self.outstanding_tokens -= count * num_sequences
        step = self.scheduler.skip(count, range(first, len(times)))
        if step is not None:
            in_flight[0] = step, due
        return now

    def _refuse(self, sequence: Sequence) -> Refusal:
        self.outstanding_tokens -= sequence.max_total_tokens
        sent = self._sent.pop(sequence.request_id)
        return Refusal(sequence.request_id, sequence.num_prompt_tokens, sent, self.now)

    def _times_of(self, sequence: Sequence) -> RequestTimes:
        self.outstanding_tokens -= sequence.num_prompt_tokens
        times = self._commit_times
        return RequestTimes(
            request_id=sequence.request_id,
            num_prompt_tokens=sequence.num_prompt_tokens,
            start=self._sent.pop(sequence.request_id),
            token_times=tuple(map(times.__getitem__, sequence.output_token_ids)),
        )
