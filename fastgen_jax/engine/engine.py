"""The engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np

from fastgen_jax.engine import startup
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.describe import describe
from fastgen_jax.engine.intake import Intake, Prompt
from fastgen_jax.engine.metrics import Metrics, StepTimes, compile_count
from fastgen_jax.engine.outputs import Outbox, RequestOutput, RequestState, SampledRows
from fastgen_jax.engine.packing import Packer
from fastgen_jax.engine.research import ResearchInterface
from fastgen_jax.engine.runner import StepOutput
from fastgen_jax.engine.sampling_tables import SamplingTables
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.weight_spec import Params
from fastgen_jax.scheduling import Chunk, Request, SamplingParams, Scheduler, Step
from fastgen_jax.scheduling import Sequence as HostSequence
from fastgen_jax.text import Tokenizer
from fastgen_jax.text.grammar import Grammar, GrammarMatcher

__all__ = ["Engine", "Prompt"]


class Engine(ResearchInterface):
    """Continuous batching with Dynamic SplitFuse over a blocked KV cache (DeepSpeed-FastGen, arXiv:2401.08671).

        engine = Engine.from_pretrained("smollm2-135m-instruct")
        engine.add("The capital of France is", SamplingParams(max_new_tokens=8, do_sample=False))
        while engine.has_work:
            for output in engine.step():
                print(output.text, end="")

    Everything is compiled before the constructor returns. Any thread may call; calls take turns. An exception may come
    anywhere, a KeyboardInterrupt above all: the next call finds that an earlier one did not come to its end, and begins
    with the requests and the outputs that stand. What they lack is computed again, and is the same as it would have been.
    """

    name: str = ""
    """What `from_pretrained` was asked for; empty for an engine that was made from weights."""

    def __init__(
        self,
        params: Params,
        model: ModelConfig,
        config: EngineConfig | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        progress: bool = False,
    ) -> None:
        """Takes plain or prepared `params` and makes everything ready to serve.

        `progress` shows a bar while programs compile. Raises ValueError where `config` contradicts the model or the
        memory.
        """
        self.model = model
        self.config, self._runner = startup.start(params, model, config or EngineConfig(), progress=progress)
        resolved = self.config
        self.tokenizer = tokenizer
        self.intake = Intake(tokenizer, model, resolved)
        self.metrics = Metrics()
        self._scheduler = Scheduler(
            num_blocks=resolved.num_blocks,
            block_size=resolved.block_size,
            token_budget=resolved.full_step,
            max_num_seqs=resolved.max_num_seqs,
            max_context_len=resolved.max_context_len,
            max_sample_rows=resolved.max_sample_rows,
            policy=resolved.policy,
            prefix_caching=resolved.prefix_caching,
            promise=resolved.promise,
            step_sizes=resolved.budget_ladder if resolved.promise and resolved.budget_ladder else (),
        )
        self._tables = SamplingTables(resolved.max_num_seqs, model.vocab_size)
        self._packer = Packer(
            max_num_seqs=resolved.max_num_seqs,
            max_blocks=self._runner.max_blocks,
            num_blocks=resolved.num_blocks,
            block_size=resolved.block_size,
            tables=self._tables,
        )
        self._init_standing()
        self._init_research()

    @classmethod
    def from_pretrained(
        cls, model: str | os.PathLike[str], config: EngineConfig | None = None, *, progress: bool = False, **options: Any
    ) -> Engine:
        """An engine for a checkpoint: a directory in Hugging Face layout, a GGUF file, a built-in name or a repo id.

        `options` are fields of `EngineConfig`, as an alternative to `config`. Raises ValueError for an unknown
        option, and for a checkpoint that is missing, damaged or of an unsupported architecture.
        """
        if config is not None and options:
            raise ValueError(f"give either config or options, not both; options were {', '.join(sorted(options))}")
        config = config or EngineConfig.from_options(options)
        params, model_config, tokenizer, config = startup.load(model, config, progress=progress)
        engine = cls(params, model_config, config, tokenizer=tokenizer, progress=progress)
        engine._runner.own_params()
        engine.name = os.fspath(model)
        return engine

    def __repr__(self) -> str:
        return f"{type(self).__name__}({describe(self)}; {self.num_running} running, {self.num_waiting} waiting)"

    # Requests

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        grammar: Grammar | None = None,
    ) -> str:
        """Queues a request and returns its id.

        A lower `priority` runs first; equal ones run in order of arrival. With `grammar`, only tokens that keep to it
        are sampled. Raises ValueError, and changes nothing, if the prompt is empty or too long, a token id is not in
        the vocabulary, the id is taken, or the request could never fit into the cache.
        """
        matcher = self.intake.matcher(grammar) if grammar else None
        request = self.intake.request(
            prompt, params, request_id=request_id, priority=priority, awaits_each_token=matcher is not None
        )
        return self.add_request(request, matcher)

    def add_request(self, request: Request, matcher: GrammarMatcher | None = None, *, box: Outbox | None = None) -> str:
        """Queues a request that `intake` made, with the matcher of its grammar if it has one; see `add`.

        Its outputs go to `box` and come from `step(box)`.
        """
        request_id, state = request.request_id, None
        try:
            with self._turn, self._lock:
                self._begin()
                try:
                    if request_id in self._states:
                        raise ValueError(f"request id {request_id!r} is already in use; choose another, or leave it out")
                    sequence = self._scheduler.add(request)
                except ValueError:
                    self._open = False  # nothing has changed
                    raise
                state = RequestState(sequence, self.tokenizer, matcher, box=box or self._box)
                self._states[request_id] = state
                self.metrics.requests += 1
                self.metrics.prompt_tokens += len(request.prompt_token_ids)
                self._open = False
        except BaseException:
            if state is not None and self._states.get(request_id) is state:
                self.abort(request_id)  # nobody knows of it
            raise
        return request_id

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt in any of its forms; ValueError if it is empty or not one of them."""
        return self.intake.encode(prompt)

    def abort(self, request_id: str) -> bool:
        """Ends a request and frees its blocks at once; False if there is none of that id (it may just have finished)."""
        with self._turn, self._lock:
            known = self._states.pop(request_id, None) is not None
            self.metrics.aborted += known
            if known and not self._open:  # else the next operation begins without it
                self._open = True
                self._scheduler.abort(request_id)
                self._open = False
        return known

    @property
    def num_running(self) -> int:
        """Requests that hold KV blocks."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that do not run yet, or not any more for lack of blocks."""
        return self._scheduler.num_waiting

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Ids of the unfinished requests, in the order of adding."""
        return tuple(self._states)

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler, to look at: its statistics, its estimates, its integrity check."""
        return self._scheduler

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a sequence: those of the checkpoint and those of its tokenizer."""
        return self.intake.eos_token_ids

    # Steps

    def step(self, box: Outbox | None = None) -> list[RequestOutput]:
        """Runs one step and returns what became known: with overlap, the results of the step before it.

        Returns an empty list when nothing has finished computing yet, or nothing is left to do. `box` asks for the
        outputs of its requests instead of those that were added without one; all requests are computed for.

        After a KeyboardInterrupt the next call goes on as if nothing had happened, and returns what this one had found
        out. After an error, the requests that were being computed end with an output that has it as its `error`, unless
        `recover` is called first.
        """
        box = box or self._box
        with self._turn:
            pass
        with self._lock:
            if not (self._destroyed and box.outputs):
                self._begin()
                try:
                    self._step()
                except Exception as error:
                    self._failure = f"{type(error).__name__}: {error}"
                    raise
                self._open = False
        # No call from here on: an exception comes before all of this, or after the caller has the outputs.
        outputs = box.outputs
        box.outputs = []
        return outputs

    def measure_step(self, num_tokens: int) -> float:
        """Seconds of one full step of the bucket for `num_tokens`, measured now; ValueError unless the engine is idle.

        It overwrites the cache, so prefixes cached so far are forgotten.
        """
        with self._turn, self._lock:
            self._check()
            self._refuse_while_busy("a step can be measured")
            self._begin()
            self._scheduler.start_over(())
            seconds = self._runner.measure(self._runner.bucket(num_tokens).num_tokens, repeats=1)
            self._open = False
        return seconds

    def _step(self) -> None:
        compiles = compile_count()
        dispatched = self._dispatch()
        # One step stays in flight while the host works, unless there was nothing to put behind it.
        keep = 1 if dispatched and self.config.overlap else 0
        for sequence in self._scheduler.take_refused():
            self.metrics.refused += 1
            state = self._states[sequence.request_id]
            self._publish(state.advance([], []), state)
        while len(self._in_flight) > keep:
            self._commit(*self._in_flight[0])
            self._in_flight.popleft()
        self.metrics.compiles_while_serving += compile_count() - compiles

    def _dispatch(self) -> bool:
        start = time.perf_counter()
        step = self._scheduler.schedule()
        if step is None:
            return False
        self._dispatching = step
        planned = time.perf_counter()
        for sequence in step.admitted:
            self._admit(sequence)
        self._set_masks(step)
        bucket = self._runner.bucket(step.num_tokens)
        packed = self._packer.pack(step, bucket)
        done = time.perf_counter()
        output = self._runner.run(packed, bucket)
        dispatched = time.perf_counter()
        times = StepTimes(
            number=self.metrics.steps,
            num_tokens=step.num_tokens,
            num_generating=sum(c.samples for c in step.chunks if c.length == 1),
            bucket=bucket.num_tokens,
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            start=start,
            planned=planned,
            packed=done,
            dispatched=dispatched,
        )
        self._in_flight.append((step, output, times))
        self._dispatching = None
        m = self.metrics
        m.plan_seconds.append(planned - start)
        m.pack_seconds.append(done - planned)
        m.dispatch_seconds.append(dispatched - done)
        m.count_step(num_tokens=step.num_tokens, bucket=bucket.num_tokens, token_budget=self.config.full_step)
        return True

    def _set_masks(self, step: Step) -> None:
        """Sends the device what the grammars allow next; only steps with such requests pay for it."""
        if not any(sequence.awaits_each_token for sequence in step.sampled):
            return
        slots, matchers = [], []
        for sequence in step.sampled:
            matcher = self._states[sequence.request_id].matcher
            if matcher is not None:
                slots.append(sequence.slot)
                matchers.append(matcher)
        masks = np.zeros((len(slots), -(-self.model.vocab_size // 32)), np.int32)
        for row, matcher in zip(masks, matchers, strict=True):
            matcher.fill_mask(row)
        self._runner.set_masks(slots, masks)

    def _admit(self, sequence: HostSequence) -> None:
        request, slot = sequence.request, sequence.slot
        assert slot is not None  # it was admitted
        update = self._tables.admit(
            slot,
            request.params,
            eos_token_ids=request.eos_token_ids,
            seed=request.seed,
            num_prompt_tokens=sequence.num_prompt_tokens,
            has_mask=sequence.awaits_each_token,
        )
        self._states[request.request_id].note_start()
        if update:
            self._runner.reset_slot(
                slot,
                prompt_ids=request.prompt_token_ids,
                output_ids=sequence.output_token_ids,
                logit_bias=request.params.logit_bias,
            )

    def _commit(self, step: Step, output: StepOutput, times: StepTimes) -> None:
        start = time.perf_counter()
        rows = self._read(step, output)
        read = time.perf_counter()
        row_chunks = []  # (row behind its last one, chunk) of chunks with sampled rows
        row = 0
        for chunk in step.chunks:
            if chunk.num_sample_rows:
                row += chunk.num_sample_rows
                row_chunks.append((row, chunk))
        advanced = self._scheduler.commit(step, [rows.tokens[end - 1] for end, chunk in row_chunks if chunk.samples])
        committed = time.perf_counter()
        self._outputs(rows, row_chunks, set(advanced))
        m = self.metrics
        m.generated_tokens += len(advanced)
        m.wasted_rows += len(step.sampled) - len(advanced)
        m.wait_seconds.append(read - start)
        m.commit_seconds.append(committed - read)
        done = time.perf_counter()
        m.output_seconds.append(done - committed)
        m.timeline.append(times._replace(waited=start, read=read, committed=committed, done=done))

    def _read(self, step: Step, output: StepOutput) -> SampledRows:
        sampled = output.sampled
        wanted = any(
            chunk.sequence.request.params.logprobs is not None or chunk.sequence.request.params.prompt_logprobs is not None
            for chunk in step.chunks
        )
        logprobs = None
        if wanted:
            logprobs = tuple(
                np.asarray(x)
                for x in (sampled.logprobs, sampled.ranks, sampled.top_ids, sampled.top_logprobs, sampled.sampled_logprobs)
            )
        return SampledRows(np.asarray(sampled.tokens), logprobs)

    def _outputs(self, rows: SampledRows, row_chunks: list[tuple[int, Chunk]], advanced: set[HostSequence]) -> None:
        for end, chunk in row_chunks:
            sequence = chunk.sequence
            request = sequence.request
            state = self._states.get(request.request_id)
            if state is None or state.sequence is not sequence:
                continue  # aborted, or finished by an earlier step
            params = request.params
            if params.prompt_logprobs is not None:
                for back in range(chunk.num_sample_rows, 0, -1):
                    row, position = end - back, chunk.start + chunk.length - back + 1
                    if position < sequence.num_prompt_tokens:
                        token_id = request.prompt_token_ids[position]
                        state.add_prompt_logprob(
                            position, rows.logprob(row, token_id, params.prompt_logprobs, sampled=False)
                        )
            if not chunk.samples or sequence not in advanced:
                continue
            token_id = rows.tokens[end - 1]
            logprobs = [] if params.logprobs is None else [rows.logprob(end - 1, token_id, params.logprobs, sampled=True)]
            output = state.advance([token_id], logprobs)
            if output.finished and sequence.finish_reason is None:
                self._scheduler.finish(sequence, "abort" if output.error else "stop")
            self.metrics.finished += output.finished
            self._publish(output, state)
