"""Better step sizes for the next start, from steps that are timed while the engine has no request."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from fastgen_jax.engine import ladder
from fastgen_jax.engine.background import BackgroundCompiler
from fastgen_jax.engine.ladder import CostModel
from fastgen_jax.engine.programs import Program
from fastgen_jax.engine.runner import Runner, is_measured, shortest
from fastgen_jax.engine.samplers import Sampler

log = logging.getLogger(__name__)

PAUSE = 0.5  # seconds between two looks at a compilation
NEAR = 1.05  # of the shortest run: so near must be the next two, or other programs disturb the measurement
LONGEST_STEP = 2.0  # seconds: a longer step is estimated from shorter ones, because a request that arrives waits for it


class Refinement:
    """Replaces the modeled times of steps by measured ones, one step at a time, and chooses among `candidates` again.

    First the engine's own programs are timed. Then a size that is chosen but has no program gets one, compiled by a thread,
    and is timed too, until every chosen size is known. Such programs run no request of this process, whose answers they
    could change by rounding; the next start loads them. Steps write neither into the KV cache nor into a slot.
    """

    def __init__(
        self,
        runner: Runner,
        cost: CostModel,
        candidates: Sequence[int],
        *,
        save: Callable[[Sequence[int], Mapping[int, float]], object],
    ) -> None:
        """`save` gets the chosen sizes and the seconds of a full step of every candidate."""
        self._runner = runner
        self._cost = cost
        self._candidates = tuple(candidates)
        self._save = save
        self._others: dict[int, Program] = {}  # replaced, never changed: another thread adds programs
        self._compiler: BackgroundCompiler | None = None
        self._times: defaultdict[tuple[int, int], list[float]] = defaultdict(list)  # by (tokens, program)

    def advance(self) -> float | None:
        """Times one step, or begins a compilation; seconds until the next call makes sense, None when all is done.

        The caller holds the engine's locks.
        """
        if self._compiler is not None and not self._compiler.is_done:
            return PAUSE
        if any(is_measured(times, repeats=20, at_least=1.6) and not _is_steady(times) for times in self._times.values()):
            log.info("step sizes are not measured: other programs disturb it; the next start tries again")
            return None
        point = self._next_point()
        if point is not None:
            tokens, size = point
            self._times[point].append(self._runner.time_step(self._programs[size], tokens))
            return 0.0
        seconds = {size: self._seconds(size, tokens=size) for size in self._candidates}
        chosen = ladder.choose(
            seconds,
            max_num_seqs=self._runner.config.max_num_seqs,
            seconds_within=lambda size, tokens: self._seconds(size, tokens=tokens),
        )
        missing = [size for size in chosen if size not in self._programs]
        if not missing:
            self._save(chosen, seconds)
            before = self._runner.config.budget_ladder
            log.info(
                "step sizes measured while idle: %s; %s",
                ", ".join(map(str, chosen)),
                "they are in use" if chosen == before else f"later starts use them instead of {', '.join(map(str, before))}",
            )
            return None
        if self._compiler is not None and self._compiler.failure is not None:
            return None
        self._compiler = BackgroundCompiler(
            self._runner.programs, [(missing[0], "any")], self._add, otherwise="step sizes are not measured"
        )
        self._compiler.start()
        return PAUSE

    def close(self) -> None:
        """Ends the thread after the program that it is compiling, and waits for it."""
        if self._compiler is not None:
            self._compiler.stop()
            self._compiler.wait()
        self._others = {}

    def _add(self, program: Program | Sampler) -> bool:
        program = cast("Program", program)  # those that were ordered
        self._others = {**self._others, program.bucket.num_tokens: program}
        return True

    @property
    def _programs(self) -> dict[int, Program]:
        return {**self._others, **self._runner.compiled}

    def _next_point(self) -> tuple[int, int] | None:
        """The step to time next, as its tokens and the size of its program; None if enough is known.

        Each step is repeated, in turn with the others, so that other load on the machine affects all of them.
        """
        sizes = sorted(self._programs)
        points = [
            self._point(tokens, next(size for size in sizes if size >= tokens))
            for tokens in self._candidates
            if tokens <= sizes[-1]
        ]
        wanted = [
            point
            for point in dict.fromkeys(points)
            if not (is_measured(self._times[point]) and _is_steady(self._times[point]))
            and (not any(self._times.values()) or self._seconds(point[1], tokens=point[0]) <= LONGEST_STEP)
        ]
        return min(wanted, key=lambda point: (len(self._times[point]), point), default=None)

    def _point(self, tokens: int, size: int) -> tuple[int, int]:
        return (tokens if self._cost.skips_padding else size), size

    def _seconds(self, size: int, *, tokens: int) -> float:
        """The time of a step in the program of `size`: measured, else by the cost model that fits what was measured."""
        measured = {point: shortest(times) for point, times in self._times.items() if times}
        tokens, size = self._point(tokens, size)
        if (tokens, size) in measured:
            return measured[tokens, size]
        cost, unit = self._cost.fitted(measured)
        padded = min((other for count, other in measured if count == tokens and other > size), default=None)
        if padded is None:
            return unit * cost(tokens, within=size)
        return measured[tokens, padded] * cost(tokens, within=size) / cost(tokens, within=padded)


def _is_steady(times: Sequence[float]) -> bool:
    """Whether the three shortest runs of a step agree, not counting the first."""
    return max(sorted(times[1:] or times)[:3]) <= NEAR * shortest(times)
