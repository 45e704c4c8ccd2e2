"""Service-level promises, and how long steps have taken so far."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from fastgen_jax.scheduling.sequence import Sequence

# Weight of each step relative to the next one. About 5 steps count: the cost of a token grows with the contexts of the
# prompts that are being computed, which differ from prompt to prompt.
_MEMORY = 0.8
_MARGIN = 0.9  # the share of the gap between tokens that is planned for: the promise covers the slower steps, not the mean


@dataclass(frozen=True, kw_only=True, slots=True)
class Promise:
    """A service level: the first token within `prompt_tokens / prompt_rate` seconds, then `generation_rate` tokens/s.

    Both rates are in tokens per second; FastGen uses 512, and 2, 4 or 6. A request that has no first token `grace`
    seconds after it was due is refused. Raises ValueError for rates that are not above 0 and for a negative grace.
    """

    prompt_rate: float
    generation_rate: float
    grace: float = 1.0

    def __post_init__(self) -> None:
        if not self.grace >= 0:
            raise ValueError(f"grace is {self.grace!r}; it must be 0 seconds or more")
        for name in ("prompt_rate", "generation_rate"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value!r}; it must be a number of tokens per second above 0")

    def deadline(self, sequence: Sequence) -> float:
        """When the first token of a sequence is due, on the clock of its arrival time."""
        return sequence.request.arrival_time + sequence.num_prompt_tokens / self.prompt_rate


class Pace:
    """How long steps take, learned from those that ran: a straight line through (tokens, seconds), old steps fading.

    `clock` returns seconds on the clock of the requests' arrival times. A step is padded to one of `step_sizes`,
    ascending, unless there are none. `Scheduler` reports the steps; policies only read.
    """

    def __init__(self, promise: Promise, clock: Callable[[], float], step_sizes: tuple[int, ...] = ()) -> None:
        self.promise = promise
        self.now = clock
        self.step_sizes = step_sizes
        self._weight = self._tokens = self._seconds = self._squares = self._products = 0.0
        self._dispatch_times: deque[float] = deque()  # of the steps in flight
        self._last_commit = 0.0

    def dispatched(self) -> None:
        """Notes that a step was dispatched now."""
        self._dispatch_times.append(self.now())

    def committed(self, num_tokens: int) -> None:
        """Notes that the oldest step in flight, of `num_tokens` tokens, was read now."""
        now = self.now()
        self.observe(num_tokens, now - max(self._last_commit, self._dispatch_times.popleft()))
        self._last_commit = now

    def forget_steps_in_flight(self) -> None:
        """Notes that the steps in flight will never be read."""
        self._dispatch_times.clear()

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Adds the observation that a step of `num_tokens` tokens took `seconds`."""
        if self.step_sizes:
            num_tokens = next(size for size in self.step_sizes if size >= num_tokens)
        self._weight = _MEMORY * self._weight + 1
        self._tokens = _MEMORY * self._tokens + num_tokens
        self._seconds = _MEMORY * self._seconds + seconds
        self._squares = _MEMORY * self._squares + num_tokens * num_tokens
        self._products = _MEMORY * self._products + num_tokens * seconds

    def line(self) -> tuple[float, float]:
        """Seconds of an empty step and of each token in it; (0, 0) while nothing is known.

        Neither is ever negative. While all steps have the same size, all of the time is attributed to the tokens.
        """
        if not self._weight:
            return 0.0, 0.0
        spread = self._weight * self._squares - self._tokens**2
        per_token = self._seconds / self._tokens
        # Below a spread of 1% of the mean square, the slope would be noise.
        if spread > 0.01 * self._tokens**2:
            slope = (self._weight * self._products - self._tokens * self._seconds) / spread
            per_token = min(per_token, max(0.0, slope))
        return max(0.0, (self._seconds - per_token * self._tokens) / self._weight), per_token

    def seconds(self, num_tokens: float) -> float:
        """The expected seconds of a step of `num_tokens` tokens; 0 while nothing is known."""
        fixed, per_token = self.line()
        return fixed + per_token * num_tokens

    def tokens_within_a_gap(self) -> float:
        """The most tokens of a step that keeps the promised generation rate; infinite while nothing is known."""
        fixed, per_token = self.line()
        if not per_token:
            return math.inf
        tokens = max(0.0, (_MARGIN / self.promise.generation_rate - fixed) / per_token)
        if not self.step_sizes:
            return tokens
        return max((size for size in self.step_sizes if size <= tokens), default=0)
