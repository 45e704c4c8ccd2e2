"""Log-probabilities of tokens that are given: requests that score them, and what they return."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fastgen_jax.engine.intake import Intake
from fastgen_jax.engine.outputs import RequestOutput, TokenLogprob
from fastgen_jax.engine.prompts import TokenIds, TokenIdsInput, checked_token_ids
from fastgen_jax.scheduling import Request, SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Log-probabilities of the tokens of one sequence from position `start` on, one entry per token."""

    start: int
    logprobs: np.ndarray
    """Raw, f32[n]: of the model."""
    ranks: np.ndarray
    """i32[n]: 1 for the most probable token of the vocabulary."""
    processed_logprobs: np.ndarray | None
    """f32[n]: after logit bias, temperature, top-k, top-p and min-p; -inf for a token that these exclude. None without
    parameters."""
    log_kept_masses: np.ndarray | None
    """f32[n]: logarithm of the probability that top-k, top-p and min-p kept. `processed_logprobs + log_kept_masses` is the
    log-probability over the whole vocabulary. None without parameters."""
    top: tuple[dict[int, float], ...]
    """The most probable tokens at each position, best first: token id -> raw log-probability."""
    weight_version: int
    """The version of the weights that computed all of this."""


def scoring_requests(
    intake: Intake,
    tokens: Sequence[TokenIdsInput],
    params: SamplingParams | None,
    *,
    start: int | Sequence[int],
    num_top: int,
) -> list[Request]:
    """One request per sequence of token ids; ValueError for one that cannot be scored. See `Engine.score`."""
    if isinstance(tokens, str | bytes | Mapping):
        raise ValueError(f"tokens is {tokens!r}; pass a list of sequences of token ids")
    starts = [start] * len(tokens) if isinstance(start, int) else [*start]
    if len(starts) != len(tokens):
        raise ValueError(
            f"start has {len(starts)} positions for {len(tokens)} sequences; pass one per sequence, or one number"
        )
    requests = []
    for i, (ids, first) in enumerate(zip(tokens, starts, strict=True)):
        checked = checked_token_ids(ids, f"tokens[{i}]", vocab_size=intake.model.vocab_size)
        if len(checked) < 2:
            raise ValueError(f"tokens[{i}] has 1 token, which follows nothing and has no probability; pass at least 2")
        if isinstance(first, bool) or not isinstance(first, int | np.integer) or not 0 <= first < len(checked):
            raise ValueError(f"start of tokens[{i}] is {first!r}; it must be an int in [0, {len(checked) - 1}]")
        requests.append(_request(intake, checked, params, start=int(first), num_top=num_top))
    return requests


def _request(intake: Intake, tokens: TokenIds, params: SamplingParams | None, *, start: int, num_top: int) -> Request:
    """All but the last token are a prompt, after which the last one comes instead of a sampled one."""
    fixed = {"max_new_tokens": 1, "ignore_eos": True, "logprobs": num_top, "prompt_logprobs": num_top}
    if params is None:
        scored = SamplingParams(do_sample=False, prompt_logprobs_start=start, **fixed)
    else:
        scored = replace(
            params,
            **fixed,
            max_length=None,
            stop=(),
            stop_token_ids=(),
            n=1,
            seed=0,
            prompt_logprobs_start=start,
            logprobs_mode="processed",
        )
    return replace(intake.request(TokenIds(tokens[:-1]), scored), next_token_id=tokens[-1])


def scores_of(request: Request, output: RequestOutput | None) -> Scores:
    """The result of a request of `scoring_requests`, from its output; RuntimeError if it did not finish."""
    if output is None or output.error is not None or output.logprobs is None or not output.logprobs:
        why = "it was aborted" if output is None or output.error is None else output.error
        raise RuntimeError(f"a sequence could not be scored: {why}")
    entries: list[TokenLogprob] = [*(output.prompt_logprobs or ()), *output.logprobs]
    is_processed = request.params.logprobs_mode == "processed"
    return Scores(
        start=max(1, request.params.prompt_logprobs_start),
        logprobs=_floats(entry.logprob for entry in entries),
        ranks=np.array([entry.rank for entry in entries], np.int32),
        processed_logprobs=_floats(entry.processed_logprob for entry in entries) if is_processed else None,
        log_kept_masses=_floats(entry.log_kept_mass for entry in entries) if is_processed else None,
        top=tuple(entry.top for entry in entries),
        weight_version=output.weight_version,
    )


def _floats(values: Iterable[float | None]) -> np.ndarray:
    return np.array([*values], np.float32)
