"""The state of an engine that survives any exception, and how the engine recovers from it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from fastgen_jax.engine.metrics import Metrics, StepTimer, StepTimes
from fastgen_jax.engine.outputs import Outbox, RequestOutput, RequestState
from fastgen_jax.engine.runner import Runner
from fastgen_jax.engine.sampling.sampler import SampleOutput
from fastgen_jax.scheduling import Scheduler, Step
from fastgen_jax.scheduling.manual import ManualSequences

T = TypeVar("T")


class InFlight(NamedTuple):
    """A step that was dispatched and whose results the host has not read."""

    step: Step
    sampled: SampleOutput
    timer: StepTimer
    times: StepTimes
    """Times up to the dispatch."""
    weight_version: int
    """Of the weights that it computes with."""
    is_masked: bool
    """Whether a token depends on a mask, and the masks of the next step on that token."""


class Journal:
    """The unfinished requests and the outputs that no client has taken yet.

    These two survive any exception: everything else is rebuilt from them if an operation did not complete. An operation
    holds both locks, calls `begin`, makes its changes, and sets `is_open` to False.

    An exception from outside, such as a KeyboardInterrupt, is raised where a function is entered or where a call of C code
    returns. So lines without a call are atomic, and locks are taken by `with` statements only.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler, sequences: ManualSequences, metrics: Metrics) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._sequences = sequences
        self._metrics = metrics
        self.states: dict[str, RequestState] = {}
        self.box = Outbox()
        """Outputs of requests that were added without a box."""
        self.in_flight: deque[InFlight] = deque()
        self.dispatching: Step | None = None
        # A thread that waits for `lock` holds `turn`, and a step waits for `turn` first: so a thread that steps in a
        # loop lets other threads in.
        self.turn, self.lock = threading.RLock(), threading.RLock()
        self.is_open = False
        """Whether an operation has begun and not completed."""
        self.failure: str | None = None
        """The error of the open operation, if it was a step."""
        self.is_destroyed = False

    @property
    def is_busy(self) -> bool:
        """Whether a request is unfinished, a step has not been read, or outputs have not been taken."""
        return bool(self.states or self.in_flight or self.box.outputs)

    @property
    def has_work(self) -> bool:
        """Whether a step would do something: the engine is busy, and not only with requests that are paused."""
        return self.is_busy and bool(self.in_flight or self.box.outputs or not self._scheduler.is_paused)

    def has_work_for(self, box: Outbox) -> bool:
        """Whether a step would do something for the requests of `box`, or for a step in flight that no request waits for."""
        # Copied by one call: another thread may be stepping.
        states = [] if self._scheduler.is_paused else [*self.states.values()]
        # In this order: the last output of a request is in the box no later than the request is removed.
        return any(state.box is box for state in states) or bool(self.in_flight and not states) or bool(box.outputs)

    def requests_of(self, box: Outbox) -> tuple[str, ...]:
        """Ids of the unfinished requests whose outputs go to `box`."""
        return tuple(request_id for request_id, state in [*self.states.items()] if state.box is box)

    def begin(self) -> None:
        """Begins an operation, after repairing what an earlier one left behind; ValueError if the engine was destroyed."""
        self.check()
        if self.is_open:
            self._repair(None)
        self.is_open = True

    def check(self) -> None:
        """ValueError if the engine was destroyed."""
        if self.is_destroyed:
            raise ValueError("this engine was destroyed; make a new one with Engine.from_pretrained(model)")

    def exclusive(self, operation: Callable[[], T]) -> T:
        """Runs `operation` between two steps and returns its result; see `Engine.exclusive`."""
        with self.turn, self.lock:
            self.begin()
            try:
                result = operation()
            except BaseException:
                # If the device memory was lost, or this is interrupted too, the next operation repairs everything.
                if not self._runner.memory_is_lost:
                    self._sequences.settle()
                    self.is_open = False
                raise
            self.is_open = False
        return result

    def recover(self, box: Outbox | None) -> list[str]:
        """Repairs what a failed step left behind; returns the ids of the requests of `box` that end."""
        with self.turn, self.lock:
            self.check()
            return self._repair(box or self.box) if self.is_open else []

    def destroy(self) -> None:
        """Ends all requests and frees the device memory."""
        with self.turn, self.lock:
            self.is_destroyed = True
            for state in [*self.states.values()]:
                self.publish(state.ended("the engine was destroyed"), state)
            self.in_flight.clear()
            self.dispatching = None
            self._runner.destroy()

    def run(self, operation: Callable[[], object]) -> None:
        """Runs an operation of the stepper, which fails as a step does: if it raises, its requests end.

        They continue if someone deleted the weights: the engine is then paused, so that new ones can be passed.
        """
        self.begin()
        try:
            operation()
        except Exception as error:
            if self._runner.weights_are_lost:
                self._scheduler.hold(only_new=False)
                raise RuntimeError(
                    "the weights of the engine were deleted, for example because a trainer's step has donated them; the "
                    "engine is paused: pass the new ones to engine.update_params(params), then call engine.resume()"
                ) from error
            self.failure = f"{type(error).__name__}: {error}"
            raise
        self.is_open = False

    def start_over(self) -> None:
        """Completes an operation by computing everything that unfinished requests need again; forgets steps in flight."""
        self.is_open = True
        self._repair(None)

    def abort_all(self) -> None:
        """Ends all requests, each with an output."""
        self.begin()
        for request_id, state in [*self.states.items()]:
            self.publish(state.ended(), state)
            self._scheduler.abort(request_id)
            self._metrics.aborted += 1
        self.is_open = False

    def publish(self, output: RequestOutput, state: RequestState) -> None:
        """Puts an output into its box, and counts its tokens as known."""
        num_known = output.num_generated_tokens
        # No calls in these lines: an exception from outside is raised before or after all of them.
        state.box.outputs += [output]
        state.num_known = num_known
        if output.finished:
            del self.states[output.request_id]

    def _repair(self, box: Outbox | None) -> list[str]:
        """Starts over with the existing requests and outputs after an operation that did not complete.

        If the operation was a step that failed, its requests end; those of `box` end without an output, and their ids
        are returned. An interrupted repair is repeated by the next operation.
        """
        failed, ended = self.failure is not None, []
        for state in self._lost() if failed else ():
            if state.box is box:
                ended.append(state.sequence.request_id)
                self.states.pop(state.sequence.request_id)
            else:
                why = f"the step that computed this request failed ({self.failure}); send it again"
                self.publish(state.ended(why), state)
            self._metrics.aborted += 1
        self._runner.reset(keep=not failed)
        self.in_flight.clear()
        self.dispatching = self.failure = None
        self._scheduler.start_over([(state.sequence, state.num_known) for state in self.states.values()])
        for request_id, state in [*self.states.items()]:
            self.states[request_id] = state.restarted()
        self._sequences.forget_blocks()
        self.is_open = False
        return ended

    def _lost(self) -> list[RequestState]:
        """The requests of the steps in flight; if no step is in flight, the first of all requests.

        In that case planning failed, and would fail again if nothing changed.
        """
        steps = [entry.step for entry in self.in_flight]
        if self.dispatching is not None:
            steps.append(self.dispatching)
        sequences = {chunk.sequence for step in steps for chunk in step.chunks}
        states = [*self.states.values()]
        return [state for state in states if state.sequence in sequences] if sequences else states[:1]
