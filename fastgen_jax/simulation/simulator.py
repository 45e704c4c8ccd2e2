"""The simulation loop: clients or a trace, replicas, and a router between them."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fastgen_jax.bench.loads import Load, LoadRequest
from fastgen_jax.bench.metrics import RequestTimes
from fastgen_jax.simulation.costs import StepCost
from fastgen_jax.simulation.replica import Refusal, Replica, ReplicaConfig, StepRecord

Router = Callable[[Sequence[Replica], LoadRequest], int]
"""Chooses the replica that gets a request; returns its index."""


def least_work(replicas: Sequence[Replica], request: LoadRequest) -> int:
    """The replica that would be done first: the fewest tokens outstanding, minus those of the prompt that it knows.

    The same rule as the router of `fastgen serve`, with work measured in tokens. The first one wins a tie.
    """
    return min(range(len(replicas)), key=lambda i: replicas[i].outstanding_tokens - replicas[i].known_tokens(request))


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """The result of a simulation; requests are in the order in which they finished."""

    requests: tuple[RequestTimes, ...]
    refused: tuple[Refusal, ...]
    seconds: float
    """When the last token arrived."""
    busy_seconds: tuple[float, ...]
    """How long the device of each replica was busy."""
    num_steps: tuple[int, ...]
    num_preemptions: int
    num_prefix_hit_tokens: int
    steps: tuple[tuple[StepRecord, ...], ...] = field(repr=False)
    """The timeline of each replica, if it was requested."""


def simulate(
    load: Load,
    config: ReplicaConfig,
    cost: StepCost,
    *,
    num_replicas: int = 1,
    router: Router = least_work,
    record_steps: bool = False,
) -> Simulation:
    """Runs `load` on `num_replicas` equal replicas. Deterministic: nothing is random, and no clock is read.

    Raises ValueError for a request that no replica can hold.
    """
    if num_replicas < 1:
        raise ValueError(f"num_replicas is {num_replicas}; use at least 1")
    world = _World(load, [Replica(config, cost, record_steps=record_steps) for _ in range(num_replicas)], router)
    world.run()
    stats = [replica.scheduler.stats for replica in world.replicas]
    return Simulation(
        requests=tuple(world.finished),
        refused=tuple(world.refused),
        seconds=world.now,
        busy_seconds=tuple(replica.busy_seconds for replica in world.replicas),
        num_steps=tuple(s.num_steps for s in stats),
        num_preemptions=sum(s.num_preemptions for s in stats),
        num_prefix_hit_tokens=sum(s.num_prefix_hit_tokens for s in stats),
        steps=tuple(tuple(replica.steps or ()) for replica in world.replicas),
    )


class _World:
    """There are two kinds of events: a request is sent, a replica wakes. At equal times, requests come first."""

    def __init__(self, load: Load, replicas: list[Replica], router: Router) -> None:
        self.load = load
        self.replicas = replicas
        self.router = router
        self.now = 0.0
        self.finished: list[RequestTimes] = []
        self.refused: list[Refusal] = []
        self._wakes: list[tuple[float, int]] = []
        self._queue = deque(load.requests)  # closed loop: requests that no client has sent yet
        self._warming = {request.request_id for request in load.warmup}
        if load.num_clients is None:
            self._arrivals = [(request.arrival, i, request) for i, request in enumerate(load.requests)]
        elif load.warmup:
            self._arrivals = [(0.0, i, request) for i, request in enumerate(load.warmup)]
        else:
            self._arrivals = []
            self._start_clients(0.0)
        heapq.heapify(self._arrivals)

    def run(self) -> None:
        arrivals, wakes, replicas = self._arrivals, self._wakes, self.replicas
        while arrivals or wakes:
            wake = wakes[0][0] if wakes else math.inf
            if arrivals and arrivals[0][0] <= wake:
                self.now, _, request = heapq.heappop(arrivals)
                self._send(request)
                continue
            self.now, index = heapq.heappop(wakes)
            replica = replicas[index]
            for times in replica.commit(self.now):
                if self._ended(times.request_id):
                    self.finished.append(times)
            while arrivals and arrivals[0][0] <= self.now:  # the next requests of the clients that were just answered
                _, _, request = heapq.heappop(arrivals)
                self._send(request, busy=index)
            self.now = replica.fast_forward(self.now, self._horizon())
            self._dispatch(index)

    def _horizon(self) -> float:
        """Until when only the current replica acts. In a closed loop the answer of another replica triggers a request."""
        arrival = self._arrivals[0][0] if self._arrivals else math.inf
        if self.load.num_clients is None or not self._wakes:
            return arrival
        return min(arrival, self._wakes[0][0])

    def _dispatch(self, index: int) -> None:
        replica = self.replicas[index]
        for refusal in replica.dispatch(self.now):
            if self._ended(refusal.request_id):
                self.refused.append(refusal)
        if replica.wake is not None:
            heapq.heappush(self._wakes, (replica.wake, index))

    def _send(self, request: LoadRequest, busy: int | None = None) -> None:
        """Sends a request to a replica, which starts immediately if it is idle and not the `busy` one."""
        index = self.router(self.replicas, request)
        replica = self.replicas[index]
        prompt = self._prompt(request)
        replica.remember(request)
        replica.add(request.request_id, prompt, request.max_new_tokens, sent=self.now, now=self.now)
        if replica.wake is None and index != busy:
            self._dispatch(index)

    def _prompt(self, request: LoadRequest) -> tuple[int, ...]:
        """Token ids for the scheduler, which uses them only to find equal prefixes."""
        if not request.prefix_blocks:
            return (0,) * request.num_prompt_tokens
        size = self.load.prefix_block_size
        ids: list[int] = []
        for block in request.prefix_blocks:
            ids += [block] * size
        return tuple(ids[: request.num_prompt_tokens])

    def _ended(self, request_id: str) -> bool:
        """Lets the client continue; returns False for a request that is not measured."""
        if request_id in self._warming:
            self._warming.remove(request_id)
            if not self._warming:
                self._start_clients(self.now)
            return False
        if self.load.num_clients is not None:
            self._next_of_client(self.now)
        return True

    def _start_clients(self, now: float) -> None:
        for wait in self.load.stagger:
            self._next_of_client(now + wait)

    def _next_of_client(self, at: float) -> None:
        if self._queue:
            request = self._queue.popleft()
            heapq.heappush(self._arrivals, (at, len(self._queue), request))
