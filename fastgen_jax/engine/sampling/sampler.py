"""The sampler of the step program: logits in, tokens and log-probabilities out, pure functions throughout.

Order: the engine's logits processor; repetition, presence and frequency penalties; logit bias; ban of stop tokens; token
masks; temperature; top-k; top-p (of what top-k left, renormalized); min-p; a draw from what is left, renormalized. The
lowest token id wins every tie: of equal logits, greedy decoding takes it, and top-k and top-p keep it first, so that
`top_k=k` keeps exactly k tokens and `top_k=1` is greedy decoding. A row that contains a NaN yields some token of the
vocabulary.

A token depends on its logits, its request's parameters and `fold_in(key(seed), position)`, and on nothing else in the
batch. Therefore no sum of floats decides anything: probabilities are fixed-point integers (2**30 is 1), and a sum of
integers is the same in whatever order a compiler computes it. In the draw every token has its own random number, so that
logits that differ in their last bits, as those of two platforms do, draw the same token except for a share of draws as
small as the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
from jax import lax

from fastgen_jax.engine.sampling.adjustments import adjusted, has_penalties, masked
from fastgen_jax.engine.sampling.random_bits import bits_of, random_bits, row_keys
from fastgen_jax.engine.sampling.raw_logprobs import (
    RawLogprobs,
    Scale,
    below_largest,
    has_kernels,
    likeliest,
    no_likeliest,
    no_logprobs,
    raw_logprobs,
)
from fastgen_jax.engine.sampling.rows import (
    find_threshold,
    reaches,
    row_argmax,
    row_max,
    row_sum,
    sortable,
    sum_in_any_order,
)
from fastgen_jax.engine.sampling.state import MAX_TIMES, SamplerState
from fastgen_jax.engine.sampling.tables import SamplingBatch
from fastgen_jax.scheduling.request import MAX_TOP_LOGPROBS
from pallas_kernels import draw, gpu_target
from pallas_kernels.pytree import pytree

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float32, Int32, UInt32

MAX_LOGPROBS = MAX_TOP_LOGPROBS

Work: TypeAlias = Literal["any", "greedy", "sampled", "masked"]
"""What a program can do: "any" does what the flags of its batch ask for, by branches. A GPU's host has to read the flag of a
branch in the middle of a step, so it has more programs without branches: "greedy" takes the most likely tokens, "sampled"
also draws, and "masked" does both within token masks. They require that the flags ask for nothing else."""

_ONE = 30  # log2 of probability 1 in fixed point; rounding adds at most V / 2, so that sums stay below 2**31
_TOP_P_SLACK = 2.0**-22  # float32 rounds p and the total by 2**-24 each: without slack 0.9 of ten equals would be ten


@pytree
class SampleOutput:
    """One entry per sampled row. All but the first are zeros in a step without requests for log-probabilities, and the last
    two in one whose requests want those of no other tokens.

    `logprobs`, `ranks` and `top_*` are raw, of the model: before the logits processor, penalties, bias and temperature.
    """

    tokens: Int32[Array, " R"]
    """The sampled token, or the row's target."""
    processed_logprobs: Float32[Array, " R"]
    """Natural logarithm of the probability with which `tokens` is drawn, after everything that precedes the draw; -inf for a
    token that is never drawn, 0 in a row that takes the most likely one."""
    log_kept_masses: Float32[Array, " R"]
    """Natural logarithm of the share of the probability, after penalties, bias, masks and temperature, that belongs to the
    tokens that top-k, top-p and min-p kept."""
    logprobs: Float32[Array, " R"]
    """Natural logarithm of the probability of `tokens`."""
    ranks: Int32[Array, " R"]
    """1 + how many tokens are more likely."""
    top_ids: Int32[Array, "R max_logprobs"]
    """The most likely tokens, best first; V past the vocabulary's end."""
    top_logprobs: Float32[Array, "R max_logprobs"]


def sample(
    logits: Float32[Array, "R V"],
    state: SamplerState,
    batch: SamplingBatch,
    *,
    max_logprobs: int,
    process: Callable[[Array], Array] | None = None,
    work: Work = "any",
) -> tuple[SampleOutput, SamplerState]:
    """The next token of every row of `logits`, and the state updated with it.

    `process` changes the logits before anything else does; the model's log-probabilities are those of the unchanged logits.
    A step whose rows are all greedy costs an argmax. No token depends on `work`, if it suffices. Donate
    `state`: it is then updated in place.

    Raises:
        ValueError: `logits` is not a float32 matrix, or its vocabulary is not the state's.
    """
    vocab_size = state.token_counts.shape[1]
    if logits.ndim != 2 or logits.shape[1] != vocab_size or logits.dtype != jnp.float32:
        raise ValueError(
            f"logits are {logits.dtype}{list(logits.shape)} but the sampler requires float32[R, {vocab_size}]; "
            "convert them, and initialize the state with the model's vocab_size"
        )
    processed = logits if process is None else process(logits)
    if work == "any":
        chosen, raw, is_raw = _branch(processed, state, batch)
        is_raw &= process is None
    else:  # without log-probabilities
        if work == "masked":
            processed = masked(processed, state, batch)
        chosen = _certain(row_argmax(processed) if work == "greedy" else _drawn(processed, batch, has_branches=False)[0])
        raw, is_raw = no_logprobs(len(logits)), True
    tokens = jnp.where(batch.targets < vocab_size, batch.targets, chosen.tokens)
    logprobs, ranks, scale = raw
    top_ids, top_logprobs = no_likeliest(logits, scale, max_logprobs=max_logprobs)
    if work == "any":
        wants, wants_top = batch.any_logprobs > 0, (batch.any_logprobs > 0) & (batch.any_top_logprobs > 0)
        logprobs, ranks, scale = lax.cond(
            wants & ~is_raw,
            lambda logits, tokens, _: raw_logprobs(logits, tokens),
            lambda _logits, _tokens, raw: raw,
            logits,
            tokens,
            raw,
        )
        some, none = (partial(of, max_logprobs=max_logprobs) for of in (likeliest, no_likeliest))
        top_ids, top_logprobs = lax.cond(wants_top, some, none, logits, scale)
    output = SampleOutput(
        tokens=tokens,
        processed_logprobs=chosen.processed_logprobs,
        log_kept_masses=chosen.log_kept_masses,
        logprobs=logprobs,
        ranks=ranks,
        top_ids=top_ids,
        top_logprobs=top_logprobs,
    )
    return output, _remember(state, batch, tokens)


class _Chosen(NamedTuple):
    """Tokens, and the fields of `SampleOutput` that say how they were drawn."""

    tokens: Int32[Array, " R"]
    processed_logprobs: Float32[Array, " R"]
    log_kept_masses: Float32[Array, " R"]


def _branch(
    logits: Float32[Array, "R V"], state: SamplerState, batch: SamplingBatch
) -> tuple[_Chosen, RawLogprobs, Bool[Array, ""]]:
    """What the flags of the batch ask for; and whether `RawLogprobs` are those of the chosen tokens, as far as wanted."""
    # One switch whose branches have loops that may make zero passes, instead of nested conditionals: on a CPU with two
    # cores, jax 0.10.2 takes twice as long for passes over the vocabulary inside nested conditionals.
    adjusts = (batch.any_penalties | batch.any_bias | batch.any_bans | batch.any_masks) > 0
    is_sampled = batch.any_sampling > 0
    if not has_kernels():
        branches = (lambda logits, *_: (_certain(row_argmax(logits)), no_logprobs(len(logits))), _adjusted_argmax, _sampled)
        branch = jnp.where(is_sampled, 2, adjusts.astype(jnp.int32))
        return *lax.switch(branch, branches, logits, state, batch), batch.any_logprobs == 0
    limits = jnp.any((batch.temperature > 0) & (_uses_top_k(logits, batch) | (batch.top_p < 1) | (batch.min_p > 0)))
    branch = jnp.where(adjusts | (is_sampled & limits), 1 + is_sampled.astype(jnp.int32), 0)
    branches = (lambda logits, _, batch: _in_one_pass(logits, batch), _adjusted_argmax, _sampled)
    return *lax.switch(branch, branches, logits, state, batch), (branch == 0) | (batch.any_logprobs == 0)


def _in_one_pass(logits: Float32[Array, "R V"], batch: SamplingBatch) -> tuple[_Chosen, RawLogprobs]:
    """Rows that only a temperature changes. The results are those of `_sampled` and `raw_logprobs`, to the last bit."""
    found = draw.in_one_pass(logits, batch.seeds, batch.positions, batch.temperature, batch.targets, batch.any_logprobs)
    fastest = _fastest(found.weights, found.bits)
    tokens, ranks = (jnp.take_along_axis(x, fastest, axis=1, mode="clip")[:, 0] for x in (found.ids, found.ranks))
    logit = jnp.take_along_axis(logits, tokens[:, None], axis=1, mode="clip")
    exponent = below_largest(logit, found.largest) / _divisor(batch)
    logprobs = exponent[:, 0] - jnp.log1p(found.totals - 1)
    wants, zeros = batch.any_logprobs > 0, jnp.zeros(logprobs.shape, jnp.float32)
    scale = Scale(found.largest, jnp.log1p(found.raw_totals - 1))
    raw = RawLogprobs(jnp.where(wants, scale.logprobs(logit)[:, 0], 0.0), ranks, scale)
    return _Chosen(tokens, jnp.where((batch.temperature > 0) & wants, logprobs, 0.0), zeros), raw


def _fastest(weights: Int32[Array, "R n"], bits: UInt32[Array, "R n"]) -> Int32[Array, "R 1"]:
    """Which of the front-runners of each row is drawn, by the logarithms of `_speeds`."""
    return jnp.argmax(_speeds(weights, bits), axis=1, keepdims=True)


def _remember(state: SamplerState, batch: SamplingBatch, tokens: Int32[Array, " R"]) -> SamplerState:
    # R elements each: not worth a conditional, and without one the compiler sees that the tables are updated in place.
    max_num_seqs = state.last_tokens.shape[0]
    slots = jnp.where(batch.writes_token > 0, batch.slots, max_num_seqs)
    counted = jnp.where(has_penalties(batch), slots, max_num_seqs)
    count = state.token_counts.at[counted, tokens].get(mode="fill", fill_value=0)
    more = jnp.where(count < 2 * MAX_TIMES, jnp.int16(2), jnp.int16(0))
    return replace(
        state,
        last_tokens=state.last_tokens.at[slots].set(tokens, mode="drop"),
        token_counts=state.token_counts.at[counted, tokens].add(more, mode="drop"),
    )


class _Weights(NamedTuple):
    """What a token is drawn from."""

    values: Int32[Array, "R V"]
    """0 for a token that is not kept; a row sums to less than 2**31."""
    largest: Float32[Array, " R"]
    """The largest logit of each row."""
    sum_of_ratios: Float32[Array, " R"]
    """Of what top-k let through; see `_ratios`."""
    sum_of_masses: Int32[Array, " R"]
    """The same in fixed point: the weights before top-p and min-p."""
    top_k: tuple[Int32[Array, " R"], Int32[Array, " R"]]
    """What a logit `reaches` that top-k let through."""


def _certain(tokens: Int32[Array, " R"]) -> _Chosen:
    """Tokens chosen with certainty."""
    zeros = jnp.zeros(tokens.shape, jnp.float32)
    return _Chosen(tokens, zeros, zeros)


def _adjusted_argmax(
    logits: Float32[Array, "R V"], state: SamplerState, batch: SamplingBatch
) -> tuple[_Chosen, RawLogprobs]:
    return _certain(row_argmax(adjusted(logits, state, batch))), no_logprobs(len(logits))


def _sampled(logits: Float32[Array, "R V"], state: SamplerState, batch: SamplingBatch) -> tuple[_Chosen, RawLogprobs]:
    logits = adjusted(logits, state, batch)
    tokens, weights = _drawn(logits, batch, has_branches=True)
    tokens = jnp.where(batch.targets < logits.shape[1], batch.targets, tokens)
    logprobs, log_kept_masses = _processed_logprobs(logits, tokens, weights, batch)
    is_wanted = (batch.temperature > 0) & (batch.any_logprobs > 0)
    chosen = _Chosen(tokens, jnp.where(is_wanted, logprobs, 0.0), jnp.where(is_wanted, log_kept_masses, 0.0))
    return chosen, no_logprobs(len(logits))


def _drawn(
    logits: Float32[Array, "R V"], batch: SamplingBatch, *, has_branches: bool
) -> tuple[Int32[Array, " R"], _Weights]:
    weights = _weights(logits, batch, has_branches=has_branches)
    is_drawn = batch.temperature > 0
    if has_kernels():
        keys = row_keys(batch.seeds, batch.positions)
        ids = draw.front_runners(logits, weights.values, keys, is_drawn)
        few = jnp.take_along_axis(weights.values, ids, axis=1, mode="clip")
        fastest = _fastest(few, bits_of(keys, ids.astype(jnp.uint32)))
        return jnp.take_along_axis(ids, fastest, axis=1, mode="clip")[:, 0], weights
    speeds = _speeds(weights.values, random_bits(batch.seeds, batch.positions, logits.shape[1]))
    return row_argmax(jnp.where(is_drawn[:, None], speeds, logits)), weights


def _processed_logprobs(
    logits: Float32[Array, "R V"], tokens: Int32[Array, " R"], weights: _Weights, batch: SamplingBatch
) -> tuple[Float32[Array, " R"], Float32[Array, " R"]]:
    """The log-probabilities of `tokens` among what is kept of adjusted logits, and that of what is kept among all.

    Without limits, and at temperature 1, the first is computed as `raw_logprobs` does, to the last bit. Sums over the
    vocabulary are those that the draw needs too; only what top-k excluded takes another pass.
    """
    index = tokens[:, None]
    logit, weight = (jnp.take_along_axis(x, index, axis=1, mode="clip") for x in (logits, weights.values))
    exponent = below_largest(logit, weights.largest) / _divisor(batch)
    unlimited = reaches(sortable(logit), weights.top_k, ids=index) & ((batch.top_p >= 1) & (batch.min_p <= 0))[:, None]
    # Least likely tokens have a weight of 0 although they are kept. One that was drawn has not.
    is_kept = ((weight > 0) | unlimited)[:, 0]

    def log_of_all() -> Float32[Array, " R"]:
        return jnp.log1p(sum_in_any_order(_ratios(logits, weights.largest, batch)) - 1)

    # log1p, unlike log, rounds alike in full vectors and in the remainder.
    log_in_top_k = jnp.log1p(weights.sum_of_ratios - 1)
    log_all = lax.cond((batch.any_logprobs > 0) & jnp.any(_uses_top_k(logits, batch)), log_of_all, lambda: log_in_top_k)
    masses = (row_sum(weights.values), weights.sum_of_masses)
    of_kept, of_top_k = (jnp.log1p((x - 1).astype(jnp.float32)) for x in masses)
    log_kept = of_kept - of_top_k
    logprobs = exponent[:, 0] - log_in_top_k - log_kept
    return jnp.where(is_kept, logprobs, -jnp.inf), log_kept + (log_in_top_k - log_all)


def _speeds(weights: Int32[Array, "R V"], bits: UInt32[Array, "R V"]) -> Float32[Array, "R V"]:
    """Numbers whose largest is at each index with a probability in proportion to its weight, by 32 random bits for each.

    Each token finishes after an exponentially distributed time, with its weight as the rate, and the fastest is drawn: the
    Gumbel-max trick without its second logarithm. A draw from a running sum over the vocabulary needs one random number
    instead of V, but a change of any weight would move the borders of all later tokens.
    """
    uniform = (bits.astype(jnp.float32) + 0.5) * 2.0**-32  # finely spaced near 0, where the first ones finish
    seconds = -jnp.log1p(-jnp.minimum(uniform, 1 - 2.0**-24))
    return jnp.where(weights > 0, weights.astype(jnp.float32) / seconds, -1)


def _uses_top_k(logits: Float32[Array, "R V"], batch: SamplingBatch) -> Bool[Array, " R"]:
    return (batch.top_k > 0) & (batch.top_k < logits.shape[1])


def _divisor(batch: SamplingBatch) -> Float32[Array, "R 1"]:
    return jnp.maximum(batch.temperature, jnp.finfo(jnp.float32).tiny)[:, None]


def _ratios(logits: Float32[Array, "R V"], largest: Float32[Array, " R"], batch: SamplingBatch) -> Float32[Array, "R V"]:
    """Each probability as a fraction of the row's largest."""
    if has_kernels():
        return draw.exponentials(logits, largest, _divisor(batch)[:, 0])
    return jnp.exp(below_largest(logits, largest) / _divisor(batch))


def _weights(logits: Float32[Array, "R V"], batch: SamplingBatch, *, has_branches: bool) -> _Weights:
    largest = row_max(logits)
    ratios = _ratios(logits, largest, batch)
    keys = sortable(logits)
    top_k = find_threshold(
        keys,
        lambda reach: reach.astype(jnp.int32),
        batch.top_k,
        _uses_top_k(logits, batch),
        num_bits=32,
        has_branches=has_branches,
    )
    ratios = jnp.where(reaches(keys, top_k), ratios, 0)
    if gpu_target.platform() == "cpu":  # its compiler would compute the exponentials for each of their readers
        ratios = lax.optimization_barrier(ratios)

    sum_of_ratios = sum_in_any_order(ratios)
    masses = jnp.round(ratios * (2.0**_ONE / sum_of_ratios)[:, None]).astype(jnp.int32)
    total = row_sum(masses)
    enough = jnp.floor(batch.top_p * (1 - _TOP_P_SLACK) * total.astype(jnp.float32)).astype(jnp.int32)
    enough = jnp.clip(enough, 1, total)
    top_p = find_threshold(
        masses, lambda reach: jnp.where(reach, masses, 0), enough, batch.top_p < 1, num_bits=31, has_branches=has_branches
    )
    keep = reaches(masses, top_p) & (ratios >= batch.min_p[:, None])
    return _Weights(jnp.where(keep, masses, 0), largest, sum_of_ratios, total, top_k)
