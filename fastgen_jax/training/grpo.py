"""Group relative policy optimization (arXiv:2402.03300), whole: rollouts, rewards, advantages, updates, new weights.

engine      a a a a | b b b b         groups of answers to one prompt, whose prompt blocks are shared
reward      1 0 0 1 | 0 0 1 0
advantage   + - - + | - - + -         within a group, so that no model of values is needed
update      log-probabilities of the tokens by the trainable forward pass, against those of the rollout
engine      the new weights, for the next step
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fastgen_jax.engine.engine import Engine
from fastgen_jax.engine.outputs import RequestOutput, VersionRuns
from fastgen_jax.engine.prompts import Prompt
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.weight_spec import Params
from fastgen_jax.scheduling import SamplingParams
from fastgen_jax.training.batch import TrainingBatch, pack, per_row
from fastgen_jax.training.forward import DEFAULTS, Options, logprobs, options_of
from fastgen_jax.training.settings import Settings
from fastgen_jax.training.update import Metrics, make_update


@dataclass(kw_only=True)
class Answer:
    """An answer, or the part of it that has been generated."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Those with which the tokens were drawn; empty in an evaluation."""
    versions: VersionRuns = field(default_factory=VersionRuns)
    """Of the weights that generated the tokens."""
    finish_reason: str | None = None
    """"stop" or "length"; None: it is not finished."""

    def extend(self, output: RequestOutput) -> None:
        """Adds an output of the engine."""
        if output.error:
            raise RuntimeError(f"an answer failed: {output.error}")
        self.token_ids += output.new_token_ids
        self.text += output.text
        self.versions.add(output)
        self.finish_reason = output.finish_reason


Reward = Callable[[Prompt, Answer], float]


@dataclass(kw_only=True)
class Group:
    """The answers to one prompt."""

    number: int
    prompt: Prompt
    prompt_ids: tuple[int, ...]
    answers: list[Answer]


class Rollouts:
    """Groups of answers that an engine generates."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._requests: dict[str, tuple[Group, int]] = {}
        self._finished: list[Group] = []
        self.num_running = 0
        """Groups that are not finished."""
        self.num_tokens = 0
        """Tokens generated so far."""

    def start(self, number: int, prompt: Prompt) -> None:
        """Begins group `number`: with one answer, and when that has computed the prompt, the others share its blocks."""
        answers = [Answer() for _ in range(self._settings.group_size)]
        group = Group(number=number, prompt=prompt, prompt_ids=tuple(map(int, self._engine.encode(prompt))), answers=answers)
        self._add(group, 0)
        self.num_running += 1

    def take(self, count: int) -> list[Group]:
        """The next `count` groups to finish, in the order of their numbers; runs the engine until they have."""
        while len(self._finished) < count:
            if not self._engine.has_work:
                raise RuntimeError(f"the engine has no work, but only {len(self._finished)} of {count} groups are finished")
            for output in self._engine.step():
                self.extend(output)
        taken = sorted(self._finished[:count], key=lambda group: group.number)
        del self._finished[:count]
        return taken

    def params_of(self, number: int, i: int) -> SamplingParams:
        """The sampling of answer i of group `number`."""
        settings = self._settings
        seed = np.random.SeedSequence((settings.seed, number, i)).generate_state(1)[0]
        return SamplingParams(
            max_new_tokens=settings.max_new_tokens, temperature=settings.temperature, seed=int(seed), logprobs=0
        )

    def _add(self, group: Group, i: int) -> None:
        self._requests[self._engine.add(group.prompt_ids, self.params_of(group.number, i))] = (group, i)

    def extend(self, output: RequestOutput) -> None:
        """Adds an output of the engine to its answer."""
        if output.request_id not in self._requests:
            return  # of someone else
        group, i = self._requests[output.request_id]
        answer = group.answers[i]
        if i == 0 and not answer.token_ids:
            for other in range(1, len(group.answers)):
                self._add(group, other)
        answer.extend(output)
        for entry in output.logprobs or ():
            assert entry.processed_logprob is not None, "a generated token was drawn"
            answer.logprobs.append(entry.processed_logprob)
        self.num_tokens += len(output.new_token_ids)
        if output.finished:
            del self._requests[output.request_id]
            if all(answer.finish_reason for answer in group.answers):
                self._finished.append(group)
                self.num_running -= 1


def grpo_loss(
    params: Params,
    batch: TrainingBatch,
    advantages: jax.Array,
    rollout: jax.Array,
    reference: jax.Array | None,
    *,
    config: ModelConfig,
    settings: Settings,
    options: Options = DEFAULTS,
) -> tuple[jax.Array, Metrics]:
    """The clipped objective per token, negated; all arrays are f32[R], `rollout` and `reference` are log-probabilities.

    `difference` among the metrics is the largest one between these log-probabilities and those of the rollout: 0 on a CPU in
    float32 for tokens that the same weights have generated.
    """
    current = logprobs(params, batch, config=config, options=options, temperature=settings.temperature)
    used, count = batch.is_used, jnp.maximum(batch.ragged.num_sample_rows, 1).astype(jnp.float32)
    change = jnp.where(used, current - rollout, 0.0)
    ratio = jnp.exp(change)
    clipped = jnp.clip(ratio, 1.0 - settings.clip_low, 1.0 + settings.clip_high)
    gain = jnp.minimum(ratio * advantages, clipped * advantages)
    if reference is not None:  # Schulman's estimator, which is never negative
        behind = jnp.where(used, reference - current, 0.0)
        gain = gain - settings.kl * (jnp.exp(behind) - behind - 1.0)
    loss = -jnp.sum(jnp.where(used, gain, 0.0)) / count
    return loss, {
        "difference": jnp.max(jnp.abs(change)),
        "clipped": jnp.sum(used & (ratio * advantages > clipped * advantages), dtype=jnp.float32) / count,
        "entropy": -jnp.sum(jnp.where(used, current, 0.0)) / count,
    }


class GRPO:
    """A training in progress, one `step` after another. The newest weights are in `params`."""

    def __init__(
        self,
        engine: Engine,
        params: Params,
        prompts: Sequence[Prompt],
        reward: Reward,
        optimizer: optax.GradientTransformation,
        *,
        settings: Settings,
        options: Options | None = None,
    ) -> None:
        """`params` are plain and become those of the engine, whose model they are of.

        Without `options`, updates have the number formats of the engine; the weights keep theirs.
        """
        self.params = params
        self.settings = settings
        self._engine, self._prompts, self._reward = engine, list(prompts), reward
        self._rollouts = Rollouts(engine, settings)
        self._num_started = 0
        self._opt_state = optimizer.init(params)
        how = {"config": engine.model, "options": options or options_of(engine)}
        self._update = make_update(partial(grpo_loss, settings=settings, **how), optimizer)
        self._logprobs = jax.jit(partial(logprobs, temperature=settings.temperature, **how))
        self._reference = params if settings.kl else None
        engine.update_params(params)

    def step(self) -> dict[str, float]:
        """Generates answers, updates the weights with them, and passes these to the engine; returns metrics.

        `reward` is the mean of the answers' rewards, `continued_answers` how many of them were begun before an earlier
        update, and `*_seconds` are where the time went.
        """
        settings, times = self.settings, [time.perf_counter()]
        before = self._rollouts.num_tokens
        while self._rollouts.num_running < (settings.groups_in_flight or settings.prompts_per_step):
            self._rollouts.start(self._num_started, self._prompt(self._num_started))
            self._num_started += 1
        groups = self._rollouts.take(settings.prompts_per_step)
        times.append(time.perf_counter())

        rewards = np.array([[self._reward(group.prompt, answer) for answer in group.answers] for group in groups])
        advantages = rewards - rewards.mean(axis=1, keepdims=True)
        if settings.normalize:
            advantages = advantages / (rewards.std(axis=1, keepdims=True) + 1e-4)  # it may be 0
        answers = [(group.prompt_ids, answer) for group in groups for answer in group.answers]
        sequences = [(*prompt, *answer.token_ids) for prompt, answer in answers]
        batch = pack(
            sequences,
            [len(prompt) for prompt, _ in answers],
            num_tokens=_rounded(sum(map(len, sequences))),
            num_rows=_rounded(sum(len(answer.token_ids) for _, answer in answers)),
        )
        data = (
            batch,
            per_row(advantages.reshape(-1), batch),
            per_row([answer.logprobs for _, answer in answers], batch),
            None if self._reference is None else self._logprobs(self._reference, batch),
        )
        metrics: list[Metrics] = []
        for _ in range(settings.passes):
            self.params, self._opt_state, values = self._update(self.params, self._opt_state, *data)
            metrics.append(values)
        jax.block_until_ready(self.params)
        times.append(time.perf_counter())
        self._engine.update_params(self.params)
        times.append(time.perf_counter())
        rollout, train, load = np.diff(times)
        return {
            "reward": float(rewards.mean()),
            "reward_deviation": float(rewards.std(axis=1).mean()),
            "continued_answers": sum(len(answer.versions.runs) > 1 for _, answer in answers),
            "answer_tokens": float(np.mean([len(answer.token_ids) for _, answer in answers])),
            **{name: float(value) for name, value in metrics[0].items()},
            "generated_tokens": self._rollouts.num_tokens - before,
            "rollout_seconds": float(rollout),
            "train_seconds": float(train),
            "load_seconds": float(load),
        }

    def evaluate(self, prompts: Sequence[Prompt], params: SamplingParams | None = None) -> tuple[float, list[Answer]]:
        """The mean reward of an answer to each of `prompts`, and the answers: greedy ones, unless `params` differ."""
        params = params or SamplingParams(max_new_tokens=self.settings.max_new_tokens, do_sample=False)
        answers = {self._engine.add(prompt, params): Answer() for prompt in prompts}
        while not all(answer.finish_reason for answer in answers.values()):
            for output in self._engine.step():
                if output.request_id in answers:
                    answers[output.request_id].extend(output)
                else:
                    self._rollouts.extend(output)
        pairs = list(zip(prompts, answers.values(), strict=True))
        return float(np.mean([self._reward(*pair) for pair in pairs])), [answer for _, answer in pairs]

    def _prompt(self, number: int) -> Prompt:
        """The prompt of a group: all prompts in a random order, then all of them in another one."""
        turn, place = divmod(number, len(self._prompts))
        order = np.random.default_rng((self.settings.seed, turn)).permutation(len(self._prompts))
        return self._prompts[order[place]]


def _rounded(count: int) -> int:
    """A size that few compiled programs share: 2, 3, 4, 6, 8, 12, 16, ... times 64."""
    size = 64
    while size < count:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size
