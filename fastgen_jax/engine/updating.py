"""New weights for an engine with requests, and what a trainer beside it needs: pauses, and its memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import jax

from fastgen_jax.checkpoint import resolve_model
from fastgen_jax.engine import startup
from fastgen_jax.engine.huge_pages import use_huge_pages
from fastgen_jax.engine.journal import Journal
from fastgen_jax.engine.outputs import Outbox, RequestOutput
from fastgen_jax.engine.replacement import replacement_params
from fastgen_jax.engine.runner import Runner, read_whole
from fastgen_jax.engine.sleep import Sleep, WeightsPlace
from fastgen_jax.engine.stepper import Stepper
from fastgen_jax.models.weight_spec import Params
from fastgen_jax.scheduling import Scheduler
from fastgen_jax.scheduling.manual import ManualSequences

PauseMode = Literal["keep", "abort", "wait"]
"""What happens to unfinished requests in a pause: they stay as they are, end, or are finished first."""


class Updating:
    """The operations of `Engine` that change its weights, stop its steps, or take its memory; see the methods there."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        journal: Journal,
        sequences: ManualSequences,
        stepper: Stepper,
        sleep: Sleep,
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._journal = journal
        self._sequences = sequences
        self._stepper = stepper
        self._sleep = sleep
        self.wakers: list[Callable[[], object]] = []
        """Called after a change that may have made work for a thread that steps and now waits, or outputs for it."""

    def update(self, params: Params | str | os.PathLike[str], *, version: int | None, recompute: bool) -> int:
        """See `Engine.update_params`."""
        runner, journal = self._runner, self._journal
        if version is not None and (isinstance(version, bool) or not isinstance(version, int)):
            raise ValueError(f"version is {version!r}; pass an int, or None for the next one")
        journal.check()
        reload = None
        if isinstance(params, str | os.PathLike):
            path = resolve_model(os.fspath(params))
            reload = partial(startup.reload, path, runner.model, runner.config)
            params = reload()
        # Prepared before the locks are taken, so that other threads' steps go on.
        prepared = replacement_params(params, self._form(), runner.model, runner.config)
        jax.block_until_ready(prepared)
        use_huge_pages(read_whole(prepared))
        with journal.turn, journal.lock:
            journal.check()
            self.refuse_sequences("weights can be replaced")
            version = runner.weight_version + 1 if version is None else version
            if runner.is_asleep:
                journal.exclusive(lambda: self._sleep.wake(prepared, version=version))
            else:
                replace = partial(runner.replace_params, prepared, version=version)
                self.exchange(replace, recompute=recompute)
            self._sleep.reload = reload
            if reload is not None:
                runner.own_params()
        return version

    def _form(self) -> Params:
        """The weights, or their shapes, dtypes and places."""
        return self._sleep.form if self._runner.is_asleep else self._runner.params

    def exchange(self, replace: Callable[[], object], *, recompute: bool) -> None:
        """Runs `replace`, which exchanges weights, between two steps; the caller holds the locks."""
        journal, scheduler = self._journal, self._scheduler
        states = journal.states
        if not recompute and any(state.scores_prompt for state in states.values()):
            journal.run(self._stepper.drain)  # the answers of those of which a step in flight computes the end are complete
        journal.begin()
        # Dropped first: an interrupt between the two then costs no more than the prefixes.
        scheduler.reset_prefix_cache()
        replace()
        if recompute and states:
            return journal.start_over()
        for sequence in scheduler.score_prompts_again():
            states[sequence.request_id].prompt_logprobs.clear()
        journal.is_open = False
        return None

    def pause(self, mode: PauseMode, step: Callable[[Outbox], list[RequestOutput]]) -> None:
        """See `Engine.pause`; `step` is the engine's."""
        if mode not in get_args(PauseMode):
            raise ValueError(f"mode is {mode!r}; choose one of {', '.join(map(repr, get_args(PauseMode)))}")
        journal, scheduler = self._journal, self._scheduler
        with journal.turn, journal.lock:
            journal.check()
            if mode == "wait":
                self._wake_for_requests()
            scheduler.hold(only_new=mode == "wait")
            if mode != "wait":
                journal.run(self._stepper.drain)
                if mode == "abort":
                    journal.abort_all()
        if mode == "wait":
            self._finish_requests(step)
        self._tell()

    def _finish_requests(self, step: Callable[[Outbox], list[RequestOutput]]) -> None:
        scheduler, journal = self._scheduler, self._journal
        try:
            while scheduler.is_held and not scheduler.is_paused:
                step(Outbox())
        except BaseException:
            self.resume()
            raise
        with journal.turn, journal.lock:
            journal.run(self._stepper.drain)

    def resume(self) -> None:
        """See `Engine.resume`."""
        journal = self._journal
        with journal.turn, journal.lock:
            journal.check()
            self._wake_for_requests()
            self._scheduler.release()
        self._tell()

    def release(self, weights: WeightsPlace | None) -> None:
        """See `Engine.release_memory`."""
        if weights is not None and weights not in get_args(WeightsPlace):
            raise ValueError(
                f"weights is {weights!r}; choose one of {', '.join(map(repr, get_args(WeightsPlace)))}, or None"
            )
        journal, runner = self._journal, self._runner
        with journal.turn, journal.lock:
            journal.check()
            self.refuse_sequences("memory can be released")
            if not self._scheduler.is_paused:
                self.refuse_requests("memory can be released")
            if journal.states and not runner.is_asleep:
                journal.begin()
                journal.start_over()  # the cache of requests that are kept is lost
            journal.exclusive(lambda: self._sleep.fall_asleep(self._sleep.best_place if weights is None else weights))

    def restore(self, params: Params | None, *, version: int | None) -> None:
        """See `Engine.restore_memory`."""
        if version is not None and params is None:
            raise ValueError(f"version is {version}, but there are no params whose version it could be; omit it")
        self._journal.exclusive(lambda: self._sleep.wake(params, version=version))

    def _wake_for_requests(self) -> None:
        if self._runner.is_asleep and self._journal.states:
            self.restore(None, version=None)

    def refuse_requests(self, what: str) -> None:
        """ValueError, which says `what`, if there are requests."""
        if self._journal.is_busy:
            raise ValueError(
                f"the engine has {self._scheduler.num_running + self._scheduler.num_waiting} requests; {what} only while it "
                "is idle or paused: finish or abort them, or call engine.pause()"
            )

    def refuse_sequences(self, what: str) -> None:
        """ValueError, which says `what`, if there are manual sequences."""
        if len(self._sequences):
            raise ValueError(
                f"the engine has {len(self._sequences)} sequences of put, whose keys and values come from its weights; "
                f"{what} only without them: flush them"
            )

    def _tell(self) -> None:
        for waker in [*self.wakers]:
            waker()
