"""One step of the engine: plan, pack, dispatch, and commit the step before it."""

from __future__ import annotations

import time
from collections import abc

import numpy as np

from fastgen_jax.engine.journal import InFlight, Journal
from fastgen_jax.engine.metrics import Metrics, StepTimer, StepTimes, compile_count
from fastgen_jax.engine.outputs import SampledRows
from fastgen_jax.engine.packing import Bucket, Packer
from fastgen_jax.engine.resolve import ResolvedConfig
from fastgen_jax.engine.runner import Runner
from fastgen_jax.engine.sampling.tables import SamplingTables
from fastgen_jax.scheduling import Scheduler, Sequence, Step
from fastgen_jax.text.filters import Matcher, fill_masks


class Stepper:
    """Runs steps for the requests of a journal. The caller holds the engine's locks and notes what fails."""

    def __init__(
        self, config: ResolvedConfig, runner: Runner, scheduler: Scheduler, journal: Journal, metrics: Metrics
    ) -> None:
        self._config = config
        self._runner = runner
        self._scheduler = scheduler
        self._journal = journal
        self._metrics = metrics
        self._tables = SamplingTables(config.max_num_seqs, runner.model.vocab_size)
        self._packer = Packer(config, self._tables)

    def step(self) -> None:
        """Plans, packs and dispatches a step; then commits the one before it, whose tokens have arrived in the meantime."""
        journal, timer, compiles = self._journal, StepTimer(), compile_count()
        if journal.in_flight and journal.in_flight[-1].is_masked and not self._runner.samples_later:
            self.drain()  # the next masks depend on its tokens
        with timer("plan"):
            step = journal.dispatching = self._scheduler.schedule()
        if step is not None:
            journal.in_flight.append(self._dispatch(step, timer))
            journal.dispatching = None
        self._end_refused()
        # With overlap one step stays in flight while the host works, unless no step was dispatched after it.
        num_kept = 1 if step is not None and self._config.choices.overlap else 0
        while len(journal.in_flight) > num_kept:
            self._commit(journal.in_flight[0])
            journal.in_flight.popleft()
        self._metrics.compiles_while_serving += compile_count() - compiles

    def drain(self) -> None:
        """Commits the steps in flight."""
        while self._journal.in_flight:
            self._commit(self._journal.in_flight[0])
            self._journal.in_flight.popleft()

    def _dispatch(self, step: Step, timer: StepTimer) -> InFlight:
        """Packs and dispatches a step.

        If some of its tokens depend on masks, which depend on the tokens of the step before, then the layers are dispatched
        first. While they run, those tokens are read and the masks computed; then the sampling is dispatched.
        """
        runner = self._runner
        masked = [(sequence, sequence.slot) for sequence in step.sampled if sequence.awaits_each_token]
        sampling = None
        with timer("pack"):
            bucket = runner.bucket(step.num_tokens)
            for sequence in step.admitted:
                self._admit(sequence)
            packed = self._packer.pack(step, bucket)
            if masked and runner.samples_later:
                sampling = bucket.take_sampling(packed)
            elif masked:  # none of them has a token in flight
                self._set_masks(masked)
        with timer("dispatch"):
            output = runner.run(packed, bucket)
        times = self._count(step, bucket, timer)
        sampled = output.sampled
        if sampling is not None:
            self.drain()
            self._set_masks(masked)
            sampled = runner.sample(output, sampling, bucket)
        return InFlight(step, sampled, timer, times, runner.weight_version, bool(masked))

    def _admit(self, sequence: Sequence) -> None:
        """Writes the sampling parameters of a sequence to its slot."""
        request, slot = sequence.request, sequence.slot
        assert slot is not None  # it was admitted
        state = self._journal.states[request.request_id]
        needs_history = self._tables.admit(
            slot,
            request.params,
            eos_token_ids=request.eos_token_ids,
            seed=request.seed,
            num_prompt_tokens=sequence.num_prompt_tokens,
            has_mask=state.matcher is not None,
            next_token_id=request.next_token_id,
        )
        state.note_start()
        if state.matcher is not None and state.matcher.is_static:
            self._runner.set_masks([slot], self._masks([state.matcher]))
        if needs_history:
            self._runner.reset_slot(
                slot,
                prompt_ids=request.prompt_token_ids,
                output_ids=sequence.output_token_ids,
                logit_bias=request.params.logit_bias,
            )

    def _set_masks(self, masked: abc.Iterable[tuple[Sequence, int | None]]) -> None:
        """Sends the device masks of the tokens that the matchers of some sequences, in their slots, allow next."""
        slots: list[int] = []
        matchers: list[Matcher] = []
        for sequence, slot in masked:
            state = self._journal.states.get(sequence.request_id)
            if state is None or state.sequence is not sequence:
                continue  # the step before was its last one, and this token will be dropped
            if slot is not None and state.matcher is not None and not state.matcher.is_static:
                slots.append(slot)
                matchers.append(state.matcher)
        start = time.perf_counter()
        masks = self._masks(matchers)
        self._metrics.masks += len(matchers)
        self._metrics.mask_seconds += time.perf_counter() - start
        self._runner.set_masks(slots, masks)

    def _masks(self, matchers: abc.Sequence[Matcher]) -> np.ndarray:
        masks = np.zeros((len(matchers), -(-self._runner.model.vocab_size // 32)), np.int32)
        fill_masks(matchers, masks)
        return masks

    def _count(self, step: Step, bucket: Bucket, timer: StepTimer) -> StepTimes:
        return self._metrics.count_dispatch(
            step,
            timer,
            bucket=bucket.num_tokens,
            token_budget=self._config.token_budget,
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
        )

    def _end_refused(self) -> None:
        for sequence in self._scheduler.take_refused():
            self._metrics.refused += 1
            state = self._journal.states[sequence.request_id]
            self._journal.publish(state.advance([], []), state)

    def _commit(self, entry: InFlight) -> None:
        step, sampled, timer, times, weight_version, _ = entry
        with timer("wait"):
            rows = SampledRows(step, sampled)
        with timer("commit"):
            advanced = self._scheduler.commit(step, rows.new_tokens)
        with timer("output"):
            self._publish_outputs(rows, set(advanced), weight_version)
        self._metrics.count_commit(times, timer, num_sampled=len(step.sampled), num_advanced=len(advanced))

    def _publish_outputs(self, rows: SampledRows, advanced: set[Sequence], weight_version: int) -> None:
        for end, chunk in rows.chunks:
            sequence = chunk.sequence
            state = self._journal.states.get(sequence.request_id)
            if state is None or state.sequence is not sequence:
                continue  # aborted, or finished by an earlier step
            params = sequence.request.params
            if params.prompt_logprobs is not None:
                for position, logprob in rows.prompt_logprobs(end, chunk):
                    state.add_prompt_logprob(position, logprob)
            if not chunk.samples or sequence not in advanced:
                continue
            token_id = rows.tokens[end - 1]
            logprobs = [] if params.logprobs is None else [rows.logprob(end - 1, token_id, params.logprobs, processed=True)]
            output = state.advance([token_id], logprobs, weight_version=weight_version)
            if output.finished and sequence.finish_reason is None:
                self._scheduler.finish(sequence, "abort" if output.error else "stop")
            self._metrics.finished += output.finished
            self._journal.publish(output, state)
