"""The engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

from fastgen_jax.core.progress import Phases
from fastgen_jax.engine import startup
from fastgen_jax.engine.adapters import Adapter, Adapters, AdapterSource
from fastgen_jax.engine.background import BackgroundCompiler
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.describe import describe
from fastgen_jax.engine.intake import Intake
from fastgen_jax.engine.journal import Journal
from fastgen_jax.engine.metrics import Metrics
from fastgen_jax.engine.outputs import Outbox, RequestOutput, RequestState
from fastgen_jax.engine.programs import Program
from fastgen_jax.engine.prompts import Prompt, TokenIds, TokenIdsInput
from fastgen_jax.engine.refinement import PAUSE
from fastgen_jax.engine.samplers import Sampler
from fastgen_jax.engine.scoring import Scores, scores_of, scoring_requests
from fastgen_jax.engine.sleep import Sleep, WeightsPlace
from fastgen_jax.engine.stepper import Stepper
from fastgen_jax.engine.tower import Tower
from fastgen_jax.engine.updating import PauseMode, Updating
from fastgen_jax.images import ImageSource
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.weight_spec import Params
from fastgen_jax.scheduling import Request, SamplingParams, Scheduler
from fastgen_jax.scheduling.manual import ManualSequences
from fastgen_jax.text import Tokenizer
from fastgen_jax.text.grammar import Grammar, GrammarMatcher

T = TypeVar("T")
log = logging.getLogger(__name__)


class Engine:
    """Continuous batching with Dynamic SplitFuse over a blocked KV cache (DeepSpeed-FastGen, arXiv:2401.08671).

        engine = Engine.from_pretrained("smollm2-135m-instruct")
        engine.add("The capital of France is", SamplingParams(max_new_tokens=8, do_sample=False))
        while engine.has_work:
            for output in engine.step():
                print(output.text, end="")

    `from_pretrained` returns when the program of a full step is ready, and compiles those of smaller steps in the
    background. Methods may be called from any thread; calls are serialized. An exception, in particular a
    KeyboardInterrupt, may be raised at any point: the next call detects that an operation did not complete and continues
    with the existing requests and outputs. Missing results are computed again and do not differ.
    """

    name: str = ""
    """The argument of `from_pretrained`; empty for an engine made from weights."""
    startup_seconds: Mapping[str, float] = MappingProxyType({})
    """How long each phase of `from_pretrained` took."""

    def __init__(
        self,
        params: Params,
        model: ModelConfig,
        config: EngineConfig | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        progress: bool | Phases = False,
        tower: Tower | None = None,
    ) -> None:
        """Compiles everything, or with `background_compile` the program of a full step; `params` are plain or prepared.

        `progress` shows a bar while programs compile, or is the display of a longer start. `tower` reads images. Raises
        ValueError if `config` is incompatible with the model or the free memory.
        """
        self.model = model
        phases = progress if isinstance(progress, Phases) else Phases(log, bar=progress)
        with contextlib.nullcontext() if phases is progress else phases:
            self.config, self.runner, self._refinement = startup.start(
                params, model, config or EngineConfig(), phases=phases, tower=tower
            )
        """The settings in use, and the compiled programs with their device memory; use `runner` only within `exclusive`."""
        choices = self.config.choices
        self.tokenizer = tokenizer
        self.intake = Intake(tokenizer, model, self.config)
        self.metrics = Metrics()
        self.scheduler = Scheduler(
            num_blocks=self.config.num_blocks,
            block_size=self.config.block_size,
            windows=self.config.windows,
            token_budget=self.config.token_budget,
            max_num_seqs=self.config.max_num_seqs,
            max_context_len=self.config.max_context_len,
            max_sample_rows=self.config.max_sample_rows,
            policy=choices.policy,
            prefix_caching=self.config.prefix_caching,
            promise=choices.promise,
            step_sizes=self.config.budget_ladder if choices.promise else (),
            chunk_size=self.config.chunk_size,
        )
        """For its statistics, estimates and integrity check; only the engine changes it."""
        self.manual_sequences = ManualSequences(self.scheduler)
        """Sequences of `Research`; change them only within `exclusive`."""
        self._journal = Journal(self.runner, self.scheduler, self.manual_sequences, self.metrics)
        self._stepper = Stepper(self.config, self.runner, self.scheduler, self._journal, self.metrics)
        self._sleep = Sleep(self.runner, self.scheduler, self.metrics)
        self._updating = Updating(
            self.runner, self.scheduler, self._journal, self.manual_sequences, self._stepper, self._sleep
        )
        self._adapters = Adapters(self.runner, self._journal, self._updating)
        for adapter, folder in choices.adapter_folders.items():
            self.load_adapter(adapter, folder)
        missing = self.runner.missing(self.config.budget_ladder)
        self._compiler = BackgroundCompiler(self.runner.programs, missing, self._add_program)
        if missing:
            self._compiler.start()
        # For grammars, started by the first request that has one.
        samplers = self.runner.samplers
        self._sampler_compiler = BackgroundCompiler(
            samplers, samplers.wanted(), self._add_program, otherwise="steps with a grammar wait for the tokens before"
        )

    @classmethod
    def from_pretrained(
        cls, model: str | os.PathLike[str], config: EngineConfig | None = None, *, progress: bool = False, **options: Any
    ) -> Engine:
        """An engine for a checkpoint: a directory in Hugging Face layout, a GGUF file, a built-in name or a repo id.

        `options` are fields of `EngineConfig`, as an alternative to `config`. Raises ValueError for an unknown
        option, and for a checkpoint that is missing, damaged or of an unsupported architecture.
        """
        if config is not None and options:
            raise ValueError(f"pass either config or options, not both; options were {', '.join(sorted(options))}")
        config = config or EngineConfig.from_options(options)
        if config.background_compile is None and config.promise is None:
            config = replace(config, background_compile=True)
        with Phases(log, names=startup.PHASES, bar=progress) as phases:
            params, model_config, tokenizer, config, path, tower = startup.load(model, config, phases=phases)
            engine = cls(params, model_config, config, tokenizer=tokenizer, progress=phases, tower=tower)
            compiled, wanted = len(engine.runner.budgets), len(engine.config.budget_ladder)
            rest = f"; compiled {compiled} of {wanted} programs, the rest in the background" if compiled < wanted else ""
            phases.say(f"ready in {sum(phases.seconds.values()):.1f} s{rest}")
        engine.startup_seconds = phases.seconds
        engine.runner.own_params()
        engine._sleep.reload = partial(startup.reload, path, model_config, engine.config)
        engine.name = os.fspath(model)
        return engine

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.describe()}; {self.num_running} running, {self.num_waiting} waiting)"

    def describe(self) -> str:
        """Model, number formats, devices and the size of the KV cache, in one line."""
        return describe(self.name, self.model, self.config)

    # Requests

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        grammar: Grammar | None = None,
        images: Sequence[ImageSource] = (),
    ) -> str:
        """Queues a request and returns its id.

        A lower `priority` runs first; equal ones run in order of arrival. With `grammar`, only tokens that it allows are
        sampled. `images` are those of the prompt; see `Intake.parts`. Raises ValueError, and changes nothing, if the prompt
        is empty or too long, a token id is not in the vocabulary, the id is taken, an image cannot be read, or the request
        could never fit into the cache.
        """
        matcher = self.intake.matcher(grammar) if grammar else None
        parts = self.intake.parts(prompt, images)
        request = self.intake.request(
            parts.token_ids,
            params,
            request_id=request_id,
            priority=priority,
            awaits_each_token=matcher is not None,
            images=parts.images,
        )
        return self.add_request(request, matcher)

    def add_request(self, request: Request, matcher: GrammarMatcher | None = None, *, box: Outbox | None = None) -> str:
        """Queues a request from `intake.request`, with a matcher if it has a grammar; see `add`.

        Its outputs go to `box` and are returned by `step(box)`.
        """
        journal, request_id, state = self._journal, request.request_id, None
        try:
            with journal.turn, journal.lock:
                if not self.scheduler.is_held:  # else the memory may be in use, and the request cannot run yet
                    self._wake_if_asleep()
                journal.begin()
                try:
                    request = self._adapters.assign(request)
                    sequence = self.scheduler.add(request)
                except ValueError:
                    journal.is_open = False  # nothing has changed
                    raise
                filtered = self.intake.token_filter(request.params, matcher) or matcher
                state = RequestState(sequence, self.tokenizer, filtered, box=box or journal.box)
                journal.states[request_id] = state
                self.metrics.requests += 1
                self.metrics.prompt_tokens += len(request.prompt_token_ids)
                journal.is_open = False
                if request.awaits_each_token:
                    self._sampler_compiler.start()
        except BaseException:
            if state is not None and journal.states.get(request_id) is state:
                self.abort(request_id)  # the caller does not know its id yet
            raise
        return request_id

    def encode(self, prompt: Prompt) -> TokenIds:
        """Token ids of a prompt in any supported form; ValueError if it is empty or in another form."""
        return self.intake.encode(prompt)

    def abort(self, request_id: str) -> bool:
        """Ends a request and frees its blocks; False if there is no such request, for example because it has finished."""
        journal = self._journal
        with journal.turn, journal.lock:
            known = journal.states.pop(request_id, None) is not None
            self.metrics.aborted += known
            if known and not journal.is_open:  # else the next operation begins without it
                journal.is_open = True
                self.scheduler.abort(request_id)
                journal.is_open = False
        return known

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished and not paused, a step has not been read, or outputs have not been taken."""
        return self._journal.has_work

    def has_work_for(self, box: Outbox) -> bool:
        """Whether `step(box)` would do something for the requests of `box`, or for a step that no request waits for."""
        return self._journal.has_work_for(box)

    @property
    def num_running(self) -> int:
        """Requests that hold KV blocks."""
        return self.scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that have not started, or were preempted because no blocks were free."""
        return self.scheduler.num_waiting

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Ids of the unfinished requests, in the order in which they were added."""
        return tuple(self._journal.states)

    def requests_of(self, box: Outbox) -> tuple[str, ...]:
        """Ids of the unfinished requests whose outputs go to `box`."""
        return self._journal.requests_of(box)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a sequence: those of the checkpoint, else those of its tokenizer."""
        return self.intake.eos_token_ids

    # Steps

    def step(self, box: Outbox | None = None) -> list[RequestOutput]:
        """Runs one step and returns the outputs that are ready: with overlap, those of the step before it.

        The list is empty if nothing has been computed yet, or nothing is left to do. With `box`, returns the outputs of
        its requests; without it, those of requests that have no box. Either way, the step computes for all requests.

        After a KeyboardInterrupt the next call continues as if nothing had happened, and returns what this one had
        computed. After an error, each request of the failed steps ends with an output that contains the error, unless
        `recover` is called first.
        """
        journal = self._journal
        box = box or journal.box
        with journal.turn:
            pass
        with journal.lock:
            if not (journal.is_destroyed and box.outputs):
                journal.run(self._stepper.step)
        # No calls from here on: an exception from outside is raised before all of this, or after the caller has the outputs.
        outputs = box.outputs
        box.outputs = []
        return outputs

    def recover(self, box: Outbox | None = None) -> list[str]:
        """Makes the engine usable again after `step` raised; returns the ids of the requests that it ends.

        After a KeyboardInterrupt there are none. After an error they are the requests of the steps that were being
        computed. All other requests continue: waiting ones keep waiting, running ones and manual sequences are
        recomputed. Cached prefixes are dropped. Without this call the next operation does the same, but the requests end
        with an output, as requests of boxes other than `box` always do.
        """
        return self._journal.recover(box)

    def measure_step(self, num_tokens: int) -> float:
        """Seconds of one full step of the bucket for `num_tokens`, measured now; ValueError unless the engine is idle.

        It writes nowhere, so cached prefixes stay.
        """
        with self._journal.turn, self._journal.lock:
            self._journal.check()
            self._updating.refuse_requests("a step can be measured")
            self._updating.refuse_sequences("a step can be measured")
            return self.exclusive(lambda: self.runner.measure(self.runner.bucket(num_tokens).num_tokens, repeats=1))

    def refine(self) -> float | None:
        """Times one step of an idle engine, to choose the step sizes of later starts; see `EngineConfig.refine_ladder`.

        Returns seconds after which the next call makes sense, None if none does. No request of this engine is affected.
        """
        journal = self._journal
        with journal.turn, journal.lock:
            if self._refinement is None or journal.is_destroyed:
                return None
            is_idle = not (journal.is_open or journal.is_busy or len(self.manual_sequences) or self.is_asleep)
            if not (is_idle and self._compiler.is_done and self._sampler_compiler.is_done):
                return PAUSE
            pause = None
            try:
                pause = journal.exclusive(self._refinement.advance)
            except Exception as error:  # the next operation repairs what it left behind
                log.warning(
                    "timing a step while idle failed (%s: %s); step sizes are not measured", type(error).__name__, error
                )
            if pause is None:
                self._refinement = None
        return pause

    # Between steps

    def _add_program(self, program: Program | Sampler) -> bool:
        """Makes a program that another thread compiled available to the next step; False if the engine is destroyed."""
        journal = self._journal
        with journal.turn, journal.lock:
            if journal.is_destroyed:
                return False
            # Interrupted, and the next user repairs it; or without memory or weights.
            if journal.is_open or self.runner.is_asleep or self.runner.weights_are_lost:
                self.runner.add(program, warm=False)
            else:
                journal.exclusive(lambda: self.runner.add(program))
        return True

    def wait_until_compiled(self) -> None:
        """Returns when no program is being compiled in the background; a failure is in the log."""
        self._compiler.wait()
        self._sampler_compiler.wait()

    def exclusive(self, operation: Callable[[], T]) -> T:
        """Runs `operation` between two steps and returns its result; it may change `manual_sequences` and use `runner`.

        If it raises, for example because of an interrupt, `manual_sequences` is left as before or as after the change.
        """
        journal = self._journal
        with journal.turn, journal.lock:
            self._wake_if_asleep()
            return journal.exclusive(operation)

    # Weights

    @property
    def params(self) -> Params:
        """The weights in the form that the engine uses: in its dtype, packed for a CPU, or quantized as configured."""
        if self.is_asleep:
            raise ValueError("the engine is asleep; call engine.restore_memory() before its weights are read")
        return self.runner.params

    @property
    def weight_version(self) -> int:
        """The version of the weights: 0 at first. Each output has that of the weights that computed its token."""
        return self.runner.weight_version

    def update_params(
        self, params: Params | str | os.PathLike[str], *, version: int | None = None, recompute: bool = False
    ) -> int:
        """Replaces the weights between two steps and returns their version, `version` or the next one.

        `params` are weights of the same model: plain, as `load_params` and `init_params` return them, prepared, or a
        checkpoint in any form that `from_pretrained` reads. Arrays that have the dtype, the form and the place with which
        the engine computes are used as they are, without a copy; they stay the caller's and are never deleted. Others are
        prepared as at startup. Nothing is compiled. For a moment both sets are in memory.

        No later request uses a cached prefix of the old weights. Unfinished requests continue with the new weights after
        their last token; the keys and values of their tokens stay those of the old weights or, with `recompute`, are
        computed again. Log-probabilities of a prompt come from one version: if they are incomplete, they start over.

        An engine without memory (`release_memory`) takes it with these weights. Raises ValueError, and changes nothing, if
        a weight is missing, unexpected or of another shape or kind, or there are sequences of `Research`.
        """
        return self._updating.update(params, version=version, recompute=recompute)

    # Adapters

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The loaded adapters, by name."""
        return self._adapters.table

    def check_adapter(self, name: str | None) -> None:
        """ValueError if `name` is not that of a loaded adapter; None is accepted."""
        self._adapters.check(name)

    def load_adapter(self, name: str, source: AdapterSource, *, scale: float | None = None, version: int = 0) -> None:
        """Loads a LoRA adapter between two steps; requests choose it by `SamplingParams(adapter=name)`.

        `source` is a folder that PEFT has saved, or leaves as `lora_params` returns them, with their `scale` (alpha / rank;
        None: 1). Nothing is compiled, and other requests do not change. Outputs of its requests have `version` as their
        `weight_version`.

        Raises ValueError, and changes nothing, if the adapter is of another model or of a kind that is not supported, has a
        rank above `max_adapter_rank`, the name is taken, or `max_adapters` are loaded.
        """
        self._adapters.load(name, source, scale=scale, version=version)

    def update_adapter(
        self,
        name: str,
        source: AdapterSource,
        *,
        scale: float | None = None,
        version: int | None = None,
        recompute: bool = False,
    ) -> int:
        """Replaces the weights of a loaded adapter between two steps; returns their version, `version` or the next one.

        `source` and `scale` are as for `load_adapter`, unfinished requests and prefixes as for `update_params`: requests
        continue with the new adapter, and all cached prefixes are dropped.
        """
        return self._adapters.update(name, source, scale=scale, version=version, recompute=recompute)

    def unload_adapter(self, name: str) -> None:
        """Refuses new requests of an adapter; its place is free when its unfinished ones, which go on, are done.

        Raises ValueError if it is not loaded.
        """
        self._adapters.unload(name)

    # Pauses

    def pause(self, mode: PauseMode = "keep") -> None:
        """Returns when no step runs and none will until `resume`; requests that are added meanwhile wait.

        Unfinished requests stay as they are with "keep", end with reason "abort" and the tokens that they have with
        "abort", and are finished first with "wait". While the engine is paused, `has_work` is false for requests that are
        kept, and `step` returns nothing of them.
        """
        self._updating.pause(mode, self.step)

    def resume(self) -> None:
        """Ends a pause. If the memory was released and there are requests, it is restored first."""
        self._updating.resume()

    @property
    def is_paused(self) -> bool:
        """Whether no request may run until `resume`."""
        return self.scheduler.is_paused

    @property
    def wakers(self) -> list[Callable[[], object]]:
        """Functions to call after `pause` and `resume`, for threads that step and wait while there is nothing to do."""
        return self._updating.wakers

    def score(
        self,
        tokens: Sequence[TokenIdsInput],
        params: SamplingParams | None = None,
        *,
        start: int | Sequence[int] = 1,
        num_top: int = 0,
    ) -> list[Scores]:
        """The log-probability of each token of some sequences, given the tokens before it.

        They are the numbers that `logprobs` of the same tokens has when they are generated: the same steps compute both. On
        a CPU with native kernels they are equal to the last bit. With `params`, the processed ones are computed too, for
        its temperature, top-k, top-p, min-p and logit bias; its other fields have no effect.

        `start`, one number or one per sequence, is the position of the first token to score; the tokens before it may come
        from the prefix cache. `num_top` is how many of the most likely tokens `Scores.top` lists at each position. The
        requests run beside others, in the steps of this call. No array is larger than `max_num_seqs` rows of logits.

        Raises ValueError for a sequence that could not run, or of fewer than 2 tokens, and while the engine is paused.
        """
        requests = scoring_requests(self.intake, tokens, params, start=start, num_top=num_top)
        if self.scheduler.is_held:
            raise ValueError("the engine is paused, so that nothing can be scored; call engine.resume() first")
        box, outputs = Outbox(), dict[str, RequestOutput]()
        try:
            for request in requests:
                self.add_request(request, box=box)
            while self.has_work_for(box):
                outputs.update((output.request_id, output) for output in self.step(box))
        except BaseException:
            for request in requests:
                self.abort(request.request_id)
            raise
        return [scores_of(request, outputs.get(request.request_id)) for request in requests]

    def reset_prefix_cache(self) -> None:
        """Drops every cached prefix: no later request finds one computed before this call. Running requests continue."""
        self._journal.exclusive(self.scheduler.reset_prefix_cache)

    # Memory

    @property
    def is_asleep(self) -> bool:
        """Whether the engine has released its memory; see `release_memory`."""
        return self.runner.is_asleep

    def release_memory(self, *, weights: WeightsPlace | None = "device") -> None:
        """Gives the memory of the KV cache back until `restore_memory`, or until the next request; programs stay.

        The weights stay where they are, or move to "host" memory, or are "dropped". The engine then restores those of its
        checkpoint; if they do not come from one, it needs new ones: `restore_memory(params)`. Weights of the caller are
        never deleted, and on a CPU "host" and "device" are the same. None: drop them if they can be read again, unless an
        accelerator's fit easily on the host.

        Cached prefixes are dropped, and requests that a pause has kept are computed again. Raises ValueError while there
        are requests and the engine is not paused, and while there are sequences of `Research`.
        """
        self._updating.release(weights)

    def restore_memory(self, params: Params | None = None, *, version: int | None = None) -> None:
        """Takes the memory again after `release_memory`, with new weights if given; does nothing if the engine has it.

        `params` and `version` are as for `update_params`. A request does the same without arguments, unless the engine is
        paused. An exception leaves the engine without memory, and the next call tries again. Raises ValueError if there are
        no weights, or the checkpoint is gone.
        """
        self._updating.restore(params, version=version)

    def _wake_if_asleep(self) -> None:
        if self.runner.is_asleep:
            self.restore_memory()

    def destroy(self) -> None:
        """Frees the cache, and the weights if the engine loaded them; any later use raises ValueError.

        Unfinished requests end with an output that says so. A program that is being compiled in the background is
        completed, which this waits for, and dropped.
        """
        self._compiler.stop()
        self._sampler_compiler.stop()
        self._journal.destroy()
        self.wait_until_compiled()
        if self._refinement is not None:
            self._refinement.close()
        self._sleep.forget()
