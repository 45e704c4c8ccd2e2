"""What stands in an engine when an exception comes, wherever it comes, and how the engine goes on from there."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from fastgen_jax.engine.metrics import Metrics, StepTimes
from fastgen_jax.engine.outputs import Outbox, RequestOutput, RequestState
from fastgen_jax.scheduling import Step

if TYPE_CHECKING:
    from fastgen_jax.engine.runner import Runner, StepOutput
    from fastgen_jax.scheduling import Scheduler


class Standing:
    """The requests that are unfinished and the outputs that nobody has taken yet; part of `Engine`.

    These two stand, whatever happens: all else is made anew from them after an operation that did not come to its end.
    An operation holds both locks, calls `_begin`, makes its changes and sets `_open` to False.
    """

    metrics: Metrics
    _runner: Runner
    _scheduler: Scheduler

    def _init_standing(self) -> None:
        self._states: dict[str, RequestState] = {}
        self._box = Outbox()
        self._in_flight: deque[tuple[Step, StepOutput, StepTimes]] = deque()
        self._dispatching: Step | None = None
        # Both are taken in `with` alone, which no exception can come into. Whoever waits for `_lock` holds `_turn`, and a
        # step waits for `_turn` first: a thread that steps in a loop leaves the others their turn.
        self._turn, self._lock = threading.RLock(), threading.RLock()
        self._open = False  # an operation has begun, and has not come to its end
        self._failure: str | None = None  # what the open one failed with, if it was a step
        self._destroyed = False

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished, a step has not been read, or outputs have not been taken."""
        return bool(self._states or self._in_flight or self._box.outputs)

    def has_work_for(self, box: Outbox) -> bool:
        """Whether `step(box)` has something to do for the requests of `box`, or for nobody: a step that none waits for."""
        states = [*self._states.values()]  # in one piece: another thread may be stepping
        # In this order: a last output is put into the box before, or in one with, forgetting its request.
        return any(state.box is box for state in states) or bool(self._in_flight and not states) or bool(box.outputs)

    def requests_of(self, box: Outbox) -> tuple[str, ...]:
        """Ids of the unfinished requests whose outputs go to `box`."""
        return tuple(request_id for request_id, state in [*self._states.items()] if state.box is box)

    def recover(self, box: Outbox | None = None) -> list[str]:
        """Makes the engine usable again after `step` raised; returns the ids of the requests that it ends.

        After a KeyboardInterrupt there are none. After an error they are those whose tokens were being computed. All
        others keep what they have: waiting ones wait, running ones and sequences of `put` are computed again. Prefixes
        cached so far are forgotten. Without a call of this the next operation does the same, and the requests end with an
        output; so do, in any case, those of other boxes than `box`.
        """
        with self._turn, self._lock:
            self._check()
            return self._mend(box or self._box) if self._open else []

    def destroy(self) -> None:
        """Frees the cache and the weights that the engine loaded, at once; whatever uses it afterwards raises ValueError.

        Unfinished requests end with an output that says so.
        """
        with self._turn, self._lock:
            self._destroyed = True
            for state in [*self._states.values()]:
                self._publish(state.failed("the engine was destroyed"), state)
            self._in_flight.clear()
            self._dispatching = None
            self._runner.destroy()

    # An operation: `_begin`, changes, `_open = False`; in one hold of both locks

    def _begin(self) -> None:
        self._mend_if_open()
        self._open = True

    def _mend_if_open(self) -> None:
        self._check()
        if self._open:
            self._mend(None)

    def _check(self) -> None:
        if self._destroyed:
            raise ValueError("this engine was destroyed; make a new one with Engine.from_pretrained(model)")

    def _mend(self, box: Outbox | None) -> list[str]:
        """Begins anew with what stands, after an operation that did not come to its end.

        If that was a step that failed, its requests end: those of `box` without an output, they are returned. This too
        may be interrupted, and is then done again.
        """
        failed, ended = self._failure is not None, []
        for state in self._lost() if failed else ():
            if state.box is box:
                ended.append(state.sequence.request_id)
                self._states.pop(state.sequence.request_id)
            else:
                why = f"the step that computed this request failed ({self._failure}); send it again"
                self._publish(state.failed(why), state)
            self.metrics.aborted += 1
        self._runner.reset(keep=not failed)
        self._in_flight.clear()
        self._dispatching = self._failure = None
        self._scheduler.start_over([(state.sequence, state.num_known) for state in self._states.values()])
        for request_id, state in [*self._states.items()]:
            self._states[request_id] = state.restarted()
        self._restart_research()
        self._open = False
        return ended

    def _lost(self) -> list[RequestState]:
        """The requests of the steps in flight; if there is no such step, the first of all.

        Then it was the plan that failed, and the next would fail too if nothing changed.
        """
        steps = [step for step, *_ in self._in_flight]
        if self._dispatching is not None:
            steps.append(self._dispatching)
        sequences = {chunk.sequence for step in steps for chunk in step.chunks}
        states = [*self._states.values()]
        return [state for state in states if state.sequence in sequences] if sequences else states[:1]

    def _publish(self, output: RequestOutput, state: RequestState) -> None:
        """Puts an output where it stands, and counts its tokens as known."""
        num_known = output.num_generated_tokens
        # No call among these lines: an exception from outside comes before all of them, or after.
        state.box.outputs += [output]
        state.num_known = num_known
        if output.finished:
            del self._states[output.request_id]

    def _restart_research(self) -> None:
        raise NotImplementedError
