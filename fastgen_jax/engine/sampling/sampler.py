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
from typing import TYPE_CHECKING, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from fastgen_jax.engine.sampling.random_bits import random_bits
from fastgen_jax.engine.sampling.state import MAX_TIMES, SamplerState
from fastgen_jax.engine.sampling.tables import SamplingBatch
from fastgen_jax.scheduling.request import MAX_TOP_LOGPROBS
from pallas_kernels.pytree import pytree

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float32, Int16, Int32, Shaped, UInt32

MAX_LOGPROBS = MAX_TOP_LOGPROBS

Work: TypeAlias = Literal["any", "greedy", "sampled"]
"""What a program can do: "any" does what the flags of its batch ask for, by branches. A GPU's host has to read the flag of a
branch in the middle of a step, so it has two more programs without branches: "greedy" takes the most likely tokens, and
"sampled" also draws. They require that the flags ask for nothing else."""

_ONE = 30  # log2 of probability 1 in fixed point; rounding adds at most V / 2, so that sums stay below 2**31
_TOP_P_SLACK = 2.0**-22  # float32 rounds p and the total by 2**-24 each: without slack 0.9 of ten equals would be ten
_PIECE_WIDTH = 128  # lanes of a vector register on TPU; a vocabulary then has a few hundred pieces


@pytree
class SampleOutput:
    """One entry per sampled row. All but the first two are zeros in a step without requests for log-probabilities.

    Log-probabilities are those of the model: before the logits processor, penalties, bias and temperature.
    """

    tokens: Int32[Array, " R"]
    """The sampled token, or the row's target."""
    sampled_logprobs: Float32[Array, " R"]
    """Natural logarithm of the probability with which the token was drawn, after everything that precedes the draw; 0 for
    a token that was taken as the most likely one."""
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
        chosen, sampled_logprobs = _branch(processed, state, batch)
    else:
        chosen, sampled_logprobs = (
            _certain(_argmax(processed)) if work == "greedy" else _drawn(processed, batch, has_branches=False)
        )
    tokens = jnp.where(batch.targets < vocab_size, batch.targets, chosen)
    some, none = (partial(of, max_logprobs=max_logprobs) for of in (_logprobs, _no_logprobs))
    logprobs, ranks, top_ids, top_logprobs = (
        lax.cond(batch.any_logprobs > 0, some, none, logits, tokens) if work == "any" else none(logits, tokens)
    )
    output = SampleOutput(
        tokens=tokens,
        sampled_logprobs=sampled_logprobs,
        logprobs=logprobs,
        ranks=ranks,
        top_ids=top_ids,
        top_logprobs=top_logprobs,
    )
    return output, _remember(state, batch, tokens)


def _branch(
    logits: Float32[Array, "R V"], state: SamplerState, batch: SamplingBatch
) -> tuple[Int32[Array, " R"], Float32[Array, " R"]]:
    """The tokens and their log-probabilities, by what the flags of the batch ask for."""
    # One switch whose branches have loops that may make zero passes, instead of nested conditionals: on a CPU with two
    # cores, jax 0.10.2 takes twice as long for passes over the vocabulary inside nested conditionals.
    adjusts = (batch.any_penalties | batch.any_bias | batch.any_bans | batch.any_masks) > 0
    branch = jnp.where(batch.any_sampling > 0, 2, adjusts.astype(jnp.int32))
    branches = (lambda logits, *_: _certain(_argmax(logits)), _adjusted_argmax, _sampled)
    return lax.switch(branch, branches, logits, state, batch)


def _remember(state: SamplerState, batch: SamplingBatch, tokens: Int32[Array, " R"]) -> SamplerState:
    # R elements each: not worth a conditional, and without one the compiler sees that the tables are updated in place.
    max_num_seqs = state.last_tokens.shape[0]
    slots = jnp.where(batch.writes_token > 0, batch.slots, max_num_seqs)
    counted = jnp.where(_has_penalties(batch), slots, max_num_seqs)
    count = state.token_counts.at[counted, tokens].get(mode="fill", fill_value=0)
    more = jnp.where(count < 2 * MAX_TIMES, jnp.int16(2), jnp.int16(0))
    return replace(
        state,
        last_tokens=state.last_tokens.at[slots].set(tokens, mode="drop"),
        token_counts=state.token_counts.at[counted, tokens].add(more, mode="drop"),
    )


def _has_penalties(batch: SamplingBatch) -> Bool[Array, " R"]:
    return (batch.presence_penalty != 0) | (batch.frequency_penalty != 0) | (batch.repetition_penalty != 1)


def _pieces(x: Shaped[Array, "R V"], *, fill: int | float) -> Shaped[Array, "R pieces width"]:
    """`x` in pieces, padded with `fill`.

    Reductions and searches have two levels: over each piece, then over the pieces. The first one vectorizes on every
    platform; a CPU needs ten times as long for an argmax over whole rows, and many passes for a running sum.
    """
    num_rows, length = x.shape
    width = min(_PIECE_WIDTH, length)
    return jnp.pad(x, ((0, 0), (0, -length % width)), constant_values=fill).reshape(num_rows, -1, width)


def _piece(pieces: Shaped[Array, "R pieces width"], index: Int32[Array, " R"]) -> Shaped[Array, "R width"]:
    """One piece of each row."""
    return jnp.take_along_axis(pieces, index[:, None, None], axis=1, mode="clip")[:, 0]


def _largest(logits: Float32[Array, "R V"]) -> Float32[Array, " R"]:
    return jnp.max(jnp.max(_pieces(logits, fill=-jnp.inf), axis=2), axis=1)


def _argmax(logits: Float32[Array, "R V"]) -> Int32[Array, " R"]:
    """The lowest index of the largest value."""

    def first(x: jax.Array, value: jax.Array) -> jax.Array:
        ids = lax.broadcasted_iota(jnp.int32, x.shape, 1)
        return jnp.min(jnp.where(x == value[:, None], ids, x.shape[1] - 1), axis=1)

    pieces = _pieces(logits, fill=-jnp.inf)
    maxima = jnp.max(pieces, axis=2)
    largest = jnp.max(maxima, axis=1)
    piece = first(maxima, largest)
    index = piece * pieces.shape[2] + first(_piece(pieces, piece), largest)
    return jnp.minimum(index, logits.shape[1] - 1)  # a NaN equals nothing, not even in the last piece


def _certain(tokens: Int32[Array, " R"]) -> tuple[Int32[Array, " R"], Float32[Array, " R"]]:
    """Tokens chosen with certainty, and their log-probabilities: zeros."""
    return tokens, jnp.zeros(tokens.shape, jnp.float32)


def _adjusted_argmax(
    logits: Float32[Array, "R V"], state: SamplerState, batch: SamplingBatch
) -> tuple[Int32[Array, " R"], Float32[Array, " R"]]:
    return _certain(_argmax(_adjusted(logits, state, batch)))


def _sampled(
    logits: Float32[Array, "R V"], state: SamplerState, batch: SamplingBatch
) -> tuple[Int32[Array, " R"], Float32[Array, " R"]]:
    return _drawn(_adjusted(logits, state, batch), batch, has_branches=True)


def _drawn(
    logits: Float32[Array, "R V"], batch: SamplingBatch, *, has_branches: bool
) -> tuple[Int32[Array, " R"], Float32[Array, " R"]]:
    weights = _weights(logits, batch, has_branches=has_branches)
    is_drawn = batch.temperature > 0
    speeds = _speeds(weights, random_bits(batch.seeds, batch.positions, logits.shape[1]))
    tokens = _argmax(jnp.where(is_drawn[:, None], speeds, logits))
    return tokens, jnp.where(is_drawn, _log_share(weights, tokens), 0.0)


def _log_share(weights: Int32[Array, "R V"], tokens: Int32[Array, " R"]) -> Float32[Array, " R"]:
    """The logarithm of the share of the weight of each row's token in the sum of the row's weights."""
    weight = jnp.take_along_axis(weights, tokens[:, None], axis=1, mode="clip")[:, 0]
    # For a token that was drawn both are at least 1. log1p, unlike log, rounds alike in full vectors and in the remainder.
    of_weight, of_sum = (jnp.log1p((x - 1).astype(jnp.float32)) for x in (weight, _sum(weights)))
    return of_weight - of_sum


def _adjusted(logits: Float32[Array, "R V"], state: SamplerState, batch: SamplingBatch) -> Float32[Array, "R V"]:
    def unchanged(logits: Float32[Array, "R V"], *_: object) -> Float32[Array, "R V"]:
        return logits

    logits = lax.cond(batch.any_penalties > 0, _penalized, unchanged, logits, state.token_counts, batch)
    logits = lax.cond(batch.any_bias > 0, _biased, unchanged, logits, state, batch)
    logits = lax.cond(batch.any_bans > 0, lambda x, _, b: _banned(x, b), unchanged, logits, state, batch)
    return lax.cond(batch.any_masks > 0, _masked, unchanged, logits, state, batch)


def _penalized(
    logits: Float32[Array, "R V"], token_counts: Int16[Array, "S V"], batch: SamplingBatch
) -> Float32[Array, "R V"]:
    """Sources: CTRL (arXiv:1909.05858) for repetition, OpenAI's API for the other two."""
    counts = token_counts.at[batch.slots].get(mode="fill", fill_value=0)  # [R, V]
    penalty = batch.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(counts > 0, repeated, logits)
    times = (counts >> 1).astype(jnp.float32)
    minus = batch.frequency_penalty[:, None] * times + batch.presence_penalty[:, None]
    return jnp.where(times > 0, logits - minus, logits)


def _biased(logits: Float32[Array, "R V"], state: SamplerState, batch: SamplingBatch) -> Float32[Array, "R V"]:
    slots = jnp.where(batch.has_bias > 0, batch.slots, state.bias_ids.shape[0])
    ids = state.bias_ids.at[slots].get(mode="fill", fill_value=logits.shape[1])
    values = state.bias_values.at[slots].get(mode="fill", fill_value=0)
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    return logits.at[rows, ids].add(values, mode="drop")


def _banned(logits: Float32[Array, "R V"], batch: SamplingBatch) -> Float32[Array, "R V"]:
    early = (batch.positions < batch.ban_before)[:, None]
    ids = jnp.where(early, batch.stop_ids, logits.shape[1])
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    return logits.at[rows, ids].set(-jnp.inf, mode="drop")


def _masked(logits: Float32[Array, "R V"], state: SamplerState, batch: SamplingBatch) -> Float32[Array, "R V"]:
    slots = jnp.where(batch.has_mask > 0, batch.slots, state.token_masks.shape[0])
    words = state.token_masks.at[slots].get(mode="fill", fill_value=-1)  # [R, ceil(V / 32)]; all ones without a mask
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.int32)[None, None, :]) & 1  # [R, words, 32]
    return jnp.where(bits.reshape(logits.shape[0], -1)[:, : logits.shape[1]] > 0, logits, -jnp.inf)


def _speeds(weights: Int32[Array, "R V"], bits: UInt32[Array, "R V"]) -> Float32[Array, "R V"]:
    """Numbers whose largest is at each index with a probability in proportion to its weight, by 32 random bits for each.

    Each token finishes after an exponentially distributed time, with its weight as the rate, and the fastest is drawn: the
    Gumbel-max trick without its second logarithm. A draw from a running sum over the vocabulary needs one random number
    instead of V, but a change of any weight would move the borders of all later tokens.
    """
    uniform = (bits.astype(jnp.float32) + 0.5) * 2.0**-32  # finely spaced near 0, where the first ones finish
    seconds = -jnp.log1p(-jnp.minimum(uniform, 1 - 2.0**-24))
    return jnp.where(weights > 0, weights.astype(jnp.float32) / seconds, -1)


def _weights(logits: Float32[Array, "R V"], batch: SamplingBatch, *, has_branches: bool) -> Int32[Array, "R V"]:
    """The weights to draw from, 0 for a token that is not kept; a row sums to less than 2**31."""
    vocab_size = logits.shape[1]
    largest = _largest(logits)[:, None]
    # The largest is set to 0 and not computed, because inf - inf is NaN.
    below = jnp.where(logits == largest, 0, logits - largest)
    ratios = jnp.exp(below / jnp.maximum(batch.temperature, jnp.finfo(jnp.float32).tiny)[:, None])

    uses_top_k = (batch.top_k > 0) & (batch.top_k < vocab_size)
    keep = _keep(
        _sortable(logits),
        lambda reach: reach.astype(jnp.int32),
        batch.top_k,
        uses_top_k,
        num_bits=32,
        has_branches=has_branches,
    )
    ratios = jnp.where(keep, ratios, 0)

    masses = jnp.round(ratios * (2.0**_ONE / _sum_in_any_order(ratios))[:, None]).astype(jnp.int32)
    total = _sum(masses)
    enough = jnp.floor(batch.top_p * (1 - _TOP_P_SLACK) * total.astype(jnp.float32)).astype(jnp.int32)
    enough = jnp.clip(enough, 1, total)
    keep = _keep(
        masses,
        lambda reach: jnp.where(reach, masses, 0),
        enough,
        batch.top_p < 1,
        num_bits=31,
        has_branches=has_branches,
    )
    return jnp.where(keep & (ratios >= batch.min_p[:, None]), masses, 0)


def _keep(
    keys: Int32[Array, "R V"],
    weigh: Callable[[Array], Array],
    enough: Int32[Array, " R"],
    is_limited: Bool[Array, " R"],
    *,
    num_bits: int,
    has_branches: bool,
) -> Bool[Array, "R V"]:
    """The fewest of the largest `keys` that weigh `enough` together; all keys of a row that is not limited.

    Keys above a threshold are kept, and the first of those equal to it. The threshold is the largest at which the keys
    that reach it weigh enough. It is found bit by bit from the highest: exact, in `num_bits` passes over the keys (32, or
    31 if none is negative), and many times faster than a sort. With branches, no pass is made if no row is limited.
    """

    def set_bit(i: Int32[Array, ""], threshold: Int32[Array, " R"]) -> Int32[Array, " R"]:
        higher = threshold + (jnp.int32(1) << (num_bits - 1 - i))  # the sign bit, added to the lowest int32, makes 0
        return jnp.where(_sum(weigh(keys >= higher[:, None])) >= enough, higher, threshold)

    def last_at(threshold: Int32[Array, " R"]) -> Int32[Array, " R"]:
        above = _sum(weigh(keys > threshold[:, None]))
        return _first_reaching(weigh(keys == threshold[:, None]), enough - above)

    lowest = jnp.full_like(enough, -(2**31) if num_bits == 32 else 0)
    if has_branches:
        any_limited = jnp.any(is_limited)
        threshold = lax.fori_loop(0, jnp.where(any_limited, num_bits, 0), set_bit, lowest)
        last = lax.cond(any_limited, last_at, jnp.zeros_like, threshold)
    else:
        threshold = lax.fori_loop(0, num_bits, set_bit, lowest)
        last = last_at(threshold)
    # Every relevant key is above the lowest: that of -inf for logits, 0 for masses.
    threshold = jnp.where(is_limited, threshold, lowest)[:, None]
    ids = lax.broadcasted_iota(jnp.int32, keys.shape, 1)
    return (keys > threshold) | ((keys == threshold) & (ids <= last[:, None]))


def _sum(x: Shaped[Array, "R n"]) -> Int32[Array, " R"]:
    return jnp.sum(x, axis=1, dtype=jnp.int32)


def _sortable(x: Float32[Array, "R V"]) -> Int32[Array, "R V"]:
    """Integers that compare like the floats `x`; both zeros are equal."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0, x), jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.iinfo(jnp.int32).max, bits)


def _sum_in_any_order(ratios: Float32[Array, "R V"]) -> Float32[Array, " R"]:
    """The sum of each row, the same to the last bit in whatever order it is computed. Ratios are at most 1, V < 2**19.

    Each ratio is 39 bits in three digits, whose sums are exact.
    """
    total, rest = jnp.zeros(ratios.shape[0], jnp.float32), ratios
    digits = []
    for _ in range(3):
        rest = rest * 2.0**13
        digit = jnp.floor(rest)
        digits.append(jnp.sum(digit.astype(jnp.uint32), axis=1, dtype=jnp.uint32))
        rest = rest - digit
    for place, digit in reversed(list(enumerate(digits, 1))):
        total = total + digit.astype(jnp.float32) * 2.0 ** (-13 * place)
    return total


def _first_reaching(weights: Int32[Array, "R V"], enough: Int32[Array, " R"]) -> Int32[Array, " R"]:
    """The lowest index up to which the non-negative `weights` sum to `enough`, which is at least 1."""
    enough = enough[:, None]
    pieces = _pieces(weights, fill=0)
    sums = jnp.cumsum(jnp.sum(pieces, axis=2, dtype=jnp.int32), axis=1, dtype=jnp.int32)
    piece = jnp.minimum(_sum(sums < enough), sums.shape[1] - 1)
    before = jnp.take_along_axis(jnp.pad(sums, ((0, 0), (1, 0))), piece[:, None], axis=1, mode="clip")
    inside = jnp.cumsum(_piece(pieces, piece), axis=1, dtype=jnp.int32)
    return jnp.minimum(piece * pieces.shape[2] + _sum(inside < enough - before), weights.shape[1] - 1)


def _logprobs(
    logits: Float32[Array, "R V"], tokens: Int32[Array, " R"], *, max_logprobs: int
) -> tuple[Float32[Array, " R"], Int32[Array, " R"], Int32[Array, "R max_logprobs"], Float32[Array, "R max_logprobs"]]:
    vocab_size = logits.shape[1]
    largest = _largest(logits)[:, None]

    def below_largest(x: Float32[Array, "R n"]) -> Float32[Array, "R n"]:
        return jnp.where(x == largest, 0, x - largest)  # inf - inf would be NaN

    # The sum is at least 1. XLA's log, unlike its log1p, rounds differently in full vectors and in the remainder.
    log_total = jnp.log1p(_sum_in_any_order(jnp.exp(below_largest(logits))) - 1)[:, None]
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1, mode="clip")
    logprobs = (below_largest(chosen) - log_total)[:, 0]
    ranks = 1 + _sum(logits > chosen)
    num_top = min(max_logprobs, vocab_size)
    values, top_ids = lax.top_k(logits, num_top)
    fill = ((0, 0), (0, max_logprobs - num_top))
    return (
        logprobs,
        ranks,
        jnp.pad(top_ids.astype(jnp.int32), fill, constant_values=vocab_size),
        jnp.pad(below_largest(values) - log_total, fill, constant_values=-jnp.inf),
    )


def _no_logprobs(
    logits: Float32[Array, "R V"], tokens: Int32[Array, " R"], *, max_logprobs: int
) -> tuple[Float32[Array, " R"], Int32[Array, " R"], Int32[Array, "R max_logprobs"], Float32[Array, "R max_logprobs"]]:
    num_rows = tokens.shape[0]
    return (
        jnp.zeros(num_rows, jnp.float32),
        jnp.zeros(num_rows, jnp.int32),
        jnp.zeros((num_rows, max_logprobs), jnp.int32),
        jnp.zeros((num_rows, max_logprobs), jnp.float32),
    )
