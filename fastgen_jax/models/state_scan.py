"""Linear recurrences over sequences that are computed in chunks of any size, with the same bits for every split.

For each head, with a state S [key_dim, value_dim] that is zero before position 0:

    S = exp(g) S                                             g <= 0: the decay
    u = v                       or, by the delta rule,       u = rate (v - S^T k)
    S = S + k u^T
    out = S^T q

Tokens are computed in pieces that begin at multiples of a fixed size, whatever a step's chunks are:

    position   0       C       2C      3C                   C = 4
    chunks     [aaaaaaaaaaaaab|bb|c|d ...                   the steps in which the tokens were computed
    pieces     [aaaa|aaaa|aaaa|abbb|cd..

Within a piece, everything is a product of matrices of C rows. A sequence keeps the state at the beginning of its last piece,
and the k, v, g and rate of its tokens. A step that continues a piece computes it again from its beginning: the rows before
are the same as when they were computed, and those that are still missing are zeros, which later become the same numbers
with which a single step would compute the piece. So the bits of a token's result do not depend on the split. Source of the
products: arXiv:2405.21060 and arXiv:2412.06464.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastgen_jax.models.state_rows import StateRows

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
# Sequences whose pieces are computed at the same time; a CPU computes one after another.
_SEQUENCES = 8
_SEQUENCES_ON_GPU = 16  # a turn is some 20 launches


class Inputs(NamedTuple):
    """What the recurrence reads of each token, in float32: K key heads, each for H / K adjacent value heads."""

    k: Float[Array, "T K D"]
    v: Float[Array, "T H Dv"]
    decay: Float[Array, "T H"]
    rate: Float[Array, "T H"] | None
    """None: the plain recurrence, without the delta rule."""


class States(NamedTuple):
    """Pools over layers and slots; see `core.states`."""

    matrix: Float[Array, "places H D Dv"]
    """The state before the first token of a sequence's last piece."""
    recent: Float[Array, "places C _"]
    """`Inputs` of the tokens of that piece, flat and side by side, perhaps with zeros after them."""


def piece_size(platform: str) -> int:
    """Tokens of a piece: on a CPU few, because a step computes a piece even for a single token."""
    return 16 if platform == "cpu" else 64


def scan(
    q: Float[Array, "T K D"],
    inputs: Inputs,
    states: States,
    rows: StateRows,
    layer: Int[Array, ""] | int,
    num_layers: int,
    *,
    together: int | None = None,
    fixed_length: bool = False,
) -> tuple[Float[Array, "T H Dv"], States]:
    """`out` of each token, and the states after this step. Results of padding are zeros.

    Pieces of `together` sequences are computed at the same time; None: as many as suit the platform. With `fixed_length` the
    number of turns follows from shapes and not from the chunks, as always on a GPU, whose host would wait for it.
    """
    num_places, size, _ = states.recent.shape
    places = rows.places(layer, num_places, num_layers)
    flat = jnp.concatenate([x.reshape(x.shape[0], -1) for x in inputs if x is not None], axis=-1)  # [T, _]
    flat = jnp.pad(flat, ((0, 0), (0, states.recent.shape[2] - flat.shape[1])))  # on a TPU it is filled up
    first = rows.starts // size
    counts = jnp.where(rows.stops > rows.starts, -(-rows.stops // size) - first, 0)  # pieces of each row
    order = jnp.argsort(-counts, stable=True).astype(jnp.int32)  # so that the rows with an i-th piece are the first ones
    run = partial(_run, form=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs))
    arguments = (q, flat, states, places, rows.starts, rows.stops, rows.first_tokens, counts, order)
    if together is None:
        one, some, more = (min(n, counts.shape[0]) for n in (1, _SEQUENCES, _SEQUENCES_ON_GPU))
        gpu = partial(run, group=more, fixed_length=True)
        out, matrix = jax.lax.platform_dependent(
            *arguments, cpu=partial(run, group=one), cuda=gpu, rocm=gpu, default=partial(run, group=some)
        )
    else:
        out, matrix = run(*arguments, group=together, fixed_length=fixed_length)
    # Last: until here, `recent` holds what the first pieces of this step continue.
    mine, stop = jnp.take(places, rows.of_tokens), jnp.take(rows.stops, rows.of_tokens)
    kept = rows.is_token & (rows.positions >= stop // size * size)
    target = jnp.where(kept, mine * size + rows.positions % size, num_places * size)
    recent = states.recent.reshape(num_places * size, -1).at[target].set(flat, mode="drop", unique_indices=True)
    return out, States(matrix=matrix, recent=recent.reshape(states.recent.shape))


def _run(
    q: jax.Array,
    flat: jax.Array,
    states: States,
    places: jax.Array,
    starts: jax.Array,
    stops: jax.Array,
    first_tokens: jax.Array,
    counts: jax.Array,
    order: jax.Array,
    *,
    form: Inputs,
    group: int,
    fixed_length: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """All pieces of all rows, the i-th pieces of `group` rows at a time."""
    num_tokens, size = q.shape[0], states.recent.shape[1]
    num_places = states.matrix.shape[0]
    padded = jnp.pad(order, (0, -order.shape[0] % group))
    steps = jnp.arange(size, dtype=jnp.int32)

    def some(i: jax.Array, number: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out, pool = carry
        row = jax.lax.dynamic_slice(padded, (number * group,), (group,))
        is_row = (jnp.take(counts, row) > i) & (number * group + jnp.arange(group) < order.shape[0])
        start, stop, place = (jnp.take(x, row)[:, None] for x in (starts, stops, places))
        position = (start // size + i) * size + steps[None, :]  # [group, C]
        token = jnp.take(first_tokens, row)[:, None] + position - start
        is_new = is_row[:, None] & (position >= start) & (position < stop)
        held = jnp.take(states.recent, place[:, 0], axis=0, mode="clip")  # [group, C, _]
        piece = jnp.where((position < start)[..., None], held, 0.0)
        piece = jnp.where(is_new[..., None], jnp.take(flat, token, axis=0, mode="clip"), piece)
        asked = jnp.where(is_new[..., None, None], jnp.take(q, token, axis=0, mode="clip"), 0.0)
        before = jnp.take(pool, place[:, 0], axis=0, mode="clip")
        before = jnp.where((position[:, 0] > 0)[:, None, None, None], before, 0.0)
        answer, after = _piece(asked, _unflat(piece, form), before)
        out = out.at[jnp.where(is_new, token, num_tokens)].set(answer, mode="drop")
        ends = is_row & (stop[:, 0] >= position[:, 0] + size)
        pool = pool.at[jnp.where(ends, place[:, 0], num_places)].set(after, mode="drop")
        return out, pool

    def of_all(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        having = jnp.sum(counts > i)
        return jax.lax.fori_loop(0, -(-having // group), partial(some, i), carry)

    _, num_heads, value_dim = form.v.shape
    out = jnp.zeros((num_tokens, num_heads, value_dim), jnp.float32)
    if not fixed_length:
        return jax.lax.fori_loop(0, jnp.max(counts), of_all, (out, states.matrix))
    turns = jnp.asarray(_turns(num_tokens, order.shape[0], size, group))
    return jax.lax.fori_loop(0, len(turns), lambda n, carry: some(turns[n, 0], turns[n, 1], carry), (out, states.matrix))


def _turns(num_tokens: int, num_rows: int, size: int, group: int) -> Int[np.ndarray, "turns 2"]:
    """(i, number) of the turns that suffice for any chunks: the i-th pieces of which rows, in order of their pieces.

    A row that begins at the end of a piece has an i-th piece, from 0, if it has at least (i - 1) * size + 2 tokens.
    """
    tokens = (1, *range(2, num_tokens + 1, size))  # that a row with an i-th piece has at least
    having = [min(num_rows, num_tokens // n) for n in tokens]
    return np.array([(i, number) for i, rows in enumerate(having) for number in range(-(-rows // group))], np.int32)


def _unflat(piece: jax.Array, form: Inputs) -> Inputs:
    """The inputs of tokens [..., C, _] in the form of `form`."""
    parts, start = [], 0
    for leaf in form:
        if leaf is None:
            parts.append(None)
            continue
        size = 1
        for n in leaf.shape[1:]:
            size *= n
        parts.append(piece[..., start : start + size].reshape(*piece.shape[:-1], *leaf.shape[1:]))
        start += size
    return Inputs(*parts)


def _piece(
    q: Float[Array, "S C K D"], inputs: Inputs, before: Float[Array, "S H D Dv"]
) -> tuple[Float[Array, "S C H Dv"], Float[Array, "S H D Dv"]]:
    """The results of one piece of each sequence, and the states after it."""
    k, v, decay, rate = inputs
    share, size = v.shape[2] // k.shape[2], k.shape[1]

    def for_values(x: jax.Array) -> jax.Array:
        """Heads of keys on axis 1, each repeated for the heads of values that it serves."""
        return x if share == 1 else jnp.repeat(x, share, axis=1)

    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # [S, heads, C, _]
    total = jnp.swapaxes(jnp.cumsum(decay, axis=1), 1, 2)  # [S, H, C]: from the beginning of the piece
    since = total[..., :, None] - total[..., None, :]  # [S, H, C, C]
    causal = jnp.tril(jnp.ones((size, size), bool))[None, None]
    since = jnp.exp(jnp.where(causal, since, -jnp.inf))
    from_start = jnp.exp(total)[..., None]  # [S, H, C, 1]
    heads_k, heads_q = for_values(k), for_values(q)
    if rate is not None:
        gain = jnp.swapaxes(rate, 1, 2)[..., None]
        strictly = jnp.tril(jnp.ones((size, size), bool), -1)[None, None]
        lower = jnp.where(strictly, gain * since * for_values(_einsum("shtd,shud->shtu", k, k)), 0.0)
        v = gain * (v - from_start * _einsum("shtd,shde->shte", heads_k, before))
        v = _einsum("shtu,shue->shte", _inverse(lower), v)
    scores = since * for_values(_einsum("shtd,shud->shtu", q, k))
    out = from_start * _einsum("shtd,shde->shte", heads_q, before) + _einsum("shtu,shue->shte", scores, v)
    left = jnp.exp(total[..., -1:] - total)[..., None]  # of each token, at the end of the piece
    after = from_start[:, :, -1:] * before + _einsum("shtd,shte->shde", heads_k, left * v)
    return jnp.swapaxes(out, 1, 2), after


def _inverse(lower: Float[Array, "*heads C C"]) -> Float[Array, "*heads C C"]:
    """The inverse of I + lower, which is strictly lower triangular; C is a power of two.

    From the inverses of two blocks on the diagonal follows that of both together, as stable as substitution:
    [[A, 0], [B, D]] has the inverse [[A', 0], [-D' B A', D']].
    """
    size = lower.shape[-1]
    index = jnp.arange(size)
    inverse = jnp.broadcast_to(jnp.eye(size), lower.shape)
    width = 1
    while width < size:
        pair, half = index // (2 * width), index // width % 2
        between = (pair[:, None] == pair[None, :]) & (half[:, None] > half[None, :])
        block = jnp.where(between, lower, 0.0)
        product = _einsum("...ij,...jk->...ik", inverse, block)
        inverse = inverse - _einsum("...ij,...jk->...ik", product, inverse)
        width *= 2
    return inverse
