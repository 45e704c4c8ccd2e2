"""The engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from fastgen_jax.engine import startup
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.metrics import Metrics, compile_count
from fastgen_jax.engine.outputs import RequestOutput, RequestState, SampledRows
from fastgen_jax.engine.packing import Packer
from fastgen_jax.engine.research import ResearchInterface
from fastgen_jax.engine.runner import StepOutput
from fastgen_jax.engine.sampling_tables import SamplingTables, validate
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.params import Params
from fastgen_jax.scheduling import Chunk, Request, SamplingParams, Scheduler, Step
from fastgen_jax.scheduling import Sequence as HostSequence
from fastgen_jax.text import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or chat messages `[{"role": ..., "content": ...}, ...]`."""


class Engine(ResearchInterface):
    """Continuous batching with Dynamic SplitFuse over a blocked KV cache (DeepSpeed-FastGen, arXiv:2401.08671).

        engine = Engine.from_pretrained("smollm2-135m-instruct")
        engine.add("The capital of France is", SamplingParams(max_new_tokens=8, do_sample=False))
        while engine.has_work:
            for output in engine.step():
                print(output.text, end="")

    Everything is compiled before the constructor returns. Not thread-safe: one thread owns an engine.
    """

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
            max_num_seqs=resolved.max_num_seqs, max_blocks=self._runner.max_blocks, num_blocks=resolved.num_blocks,
            block_size=resolved.block_size, tables=self._tables,
        )
        self._states: dict[str, RequestState] = {}
        self._in_flight: deque[tuple[Step, StepOutput]] = deque()
        self._numbers = itertools.count()
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
        params, model_config, tokenizer = startup.load(model, config, progress=progress)
        return cls(params, model_config, config, tokenizer=tokenizer, progress=progress)

    # Requests

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> str:
        """Queues a request and returns its id.

        A lower `priority` runs first; equal ones run in order of arrival. Raises ValueError, and changes nothing, if
        the prompt is empty or too long, a token id is not in the vocabulary, the id is taken, or the request could
        never fit into the cache.
        """
        params = params or SamplingParams()
        if params.n != 1:
            raise ValueError(f"n is {params.n}; the engine runs one sequence a request: add it {params.n} times with "
                             f"different seeds, or use pipeline, which does that")
        validate(params, self.model.vocab_size, eos_token_ids=self.eos_token_ids)
        if params.stop and self.tokenizer is None:
            raise ValueError(f"stop strings {params.stop} need a tokenizer, and this engine has none; use stop_token_ids")
        request_id = f"request-{next(self._numbers)}" if request_id is None else request_id
        if request_id in self._states:
            raise ValueError(f"request id {request_id!r} is already in use; choose another, or leave it out")
        seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(4), "little")
        request = Request(
            request_id=request_id,
            prompt_token_ids=self.encode(prompt),
            params=params,
            eos_token_ids=self.eos_token_ids,
            priority=priority,
            arrival_time=time.monotonic(),
            seed=seed,
        )
        sequence = self._scheduler.add(request)
        self._states[request_id] = RequestState(sequence, self.tokenizer)
        self.metrics.requests += 1
        self.metrics.prompt_tokens += len(request.prompt_token_ids)
        return request_id

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt in any of its forms; ValueError if it is empty or not one of them."""
        token_ids: Sequence[Any]
        if isinstance(prompt, str):
            token_ids = self._need_tokenizer("text").encode(prompt)
        elif len(prompt) and isinstance(prompt[0], Mapping):
            messages = cast("Sequence[Mapping[str, Any]]", prompt)
            token_ids = self._need_tokenizer("chat messages").encode_chat(messages)
        else:
            token_ids = prompt
        if not len(token_ids):
            raise ValueError("the prompt is empty; give at least one token")
        for token_id in token_ids:
            if not isinstance(token_id, int | np.integer) or isinstance(token_id, bool):
                raise ValueError(f"the prompt holds {token_id!r}; give text, token ids, or chat messages")
            if not 0 <= token_id < self.model.vocab_size:
                raise ValueError(f"token id {token_id} is outside the vocabulary, 0..{self.model.vocab_size - 1}")
        return tuple(map(int, token_ids))

    def abort(self, request_id: str) -> bool:
        """Ends a request and frees its blocks at once; False if there is none of that id (it may just have finished)."""
        if not self._scheduler.abort(request_id):
            return False
        del self._states[request_id]
        self.metrics.aborted += 1
        return True

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished or a step has not been read."""
        return bool(self._in_flight) or self._scheduler.has_work

    @property
    def num_running(self) -> int:
        """Requests that hold KV blocks."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that do not run yet, or not any more for lack of blocks."""
        return self._scheduler.num_waiting

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler, to look at: its statistics, its estimates, its integrity check."""
        return self._scheduler

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a sequence: those of the checkpoint and those of its tokenizer."""
        ids = self.model.eos_token_ids
        return ids or (self.tokenizer.eos_token_ids if self.tokenizer else ())

    # Steps

    def step(self) -> list[RequestOutput]:
        """Runs one step and returns what became known: with overlap, the results of the step before it.

        Returns an empty list when nothing has finished computing yet, or nothing is left to do.
        """
        compiles = compile_count()
        dispatched = self._dispatch()
        # One step stays in flight while the host works, unless there was nothing to put behind it.
        keep = 1 if dispatched and self.config.overlap else 0
        outputs = [self._refuse(sequence) for sequence in self._scheduler.take_refused()]
        while len(self._in_flight) > keep:
            outputs += self._commit(*self._in_flight.popleft())
        self.metrics.compiles_while_serving += compile_count() - compiles
        return outputs

    def measure_step(self, num_tokens: int) -> float:
        """Seconds of one full step of the bucket for `num_tokens`, measured now; ValueError unless the engine is idle.

        It overwrites the cache, so prefixes cached so far are forgotten.
        """
        if self.has_work or self._put_sequences:
            raise ValueError("the engine has requests or sequences; measure it while it is idle")
        return self._runner.measure(self._runner.bucket(num_tokens).num_tokens, repeats=1)

    def _dispatch(self) -> bool:
        start = time.perf_counter()
        step = self._scheduler.schedule()
        if step is None:
            return False
        planned = time.perf_counter()
        for sequence in step.admitted:
            self._admit(sequence)
        bucket = self._runner.bucket(step.num_tokens)
        packed = self._packer.pack(step, bucket)
        done = time.perf_counter()
        output = self._runner.run(packed, bucket)
        self._in_flight.append((step, output))
        m = self.metrics
        m.plan_seconds.append(planned - start)
        m.pack_seconds.append(done - planned)
        m.dispatch_seconds.append(time.perf_counter() - done)
        m.count_step(num_tokens=step.num_tokens, bucket=bucket.num_tokens, token_budget=self.config.full_step)
        return True

    def _admit(self, sequence: HostSequence) -> None:
        request, slot = sequence.request, sequence.slot
        assert slot is not None  # it was admitted
        update = self._tables.admit(
            slot, request.params, eos_token_ids=request.eos_token_ids, seed=request.seed,
            num_prompt_tokens=sequence.num_prompt_tokens,
        )
        if update:
            self._runner.reset_slot(
                slot, prompt_ids=request.prompt_token_ids, output_ids=sequence.output_token_ids,
                logit_bias=request.params.logit_bias,
            )

    def _refuse(self, sequence: HostSequence) -> RequestOutput:
        """The only output of a request whose promise cannot be kept."""
        self.metrics.refused += 1
        output, _ = self._states.pop(sequence.request_id).advance([], [])
        return output

    def _commit(self, step: Step, output: StepOutput) -> list[RequestOutput]:
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
        outputs = self._outputs(rows, row_chunks, set(advanced))
        m = self.metrics
        m.generated_tokens += len(advanced)
        m.wasted_rows += len(step.sampled) - len(advanced)
        m.wait_seconds.append(read - start)
        m.commit_seconds.append(committed - read)
        m.output_seconds.append(time.perf_counter() - committed)
        return outputs

    def _read(self, step: Step, output: StepOutput) -> SampledRows:
        sampled = output.sampled
        wanted = any(
            chunk.sequence.request.params.logprobs is not None or chunk.sequence.request.params.prompt_logprobs is not None
            for chunk in step.chunks
        )
        logprobs = None
        if wanted:
            logprobs = tuple(
                np.asarray(x) for x in (sampled.logprobs, sampled.ranks, sampled.top_ids, sampled.top_logprobs)
            )
        return SampledRows(np.asarray(sampled.tokens), logprobs)

    def _outputs(
        self, rows: SampledRows, row_chunks: list[tuple[int, Chunk]], advanced: set[HostSequence]
    ) -> list[RequestOutput]:
        outputs = []
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
                        state.add_prompt_logprob(position, rows.logprob(row, token_id, params.prompt_logprobs))
            if not chunk.samples or sequence not in advanced:
                continue
            token_id = rows.tokens[end - 1]
            logprobs = [] if params.logprobs is None else [rows.logprob(end - 1, token_id, params.logprobs)]
            output, stopped = state.advance([token_id], logprobs)
            if stopped and sequence.finish_reason is None:
                self._scheduler.finish(sequence, "stop")
            if output.finished:
                del self._states[request.request_id]
                self.metrics.finished += 1
            outputs.append(output)
        return outputs

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(f"a prompt of {what} needs a tokenizer, and this engine has none; give token ids")
        return self.tokenizer
