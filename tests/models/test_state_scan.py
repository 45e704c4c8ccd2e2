"""The chunked recurrence and the convolution: equal to their definitions, with the same bits for every split."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax.models.state_rows import StateRows, convolved
from fastgen_jax.models.state_scan import Inputs, States, _turns, scan

LENGTHS = (23, 9, 4, 17)  # of the sequences; a piece has 4 tokens, so that most splits cut one
SIZE, SLOTS, TOKENS, LAYERS, LAYER = 4, 5, 32, 3, 1
KEY_HEADS, HEADS, KEY_DIM, VALUE_DIM = 2, 4, 6, 5
# Products of 4 rows against one term after another, in float32 against float64.
TOLERANCE = 2e-5
RNG = np.random.default_rng(0)
SEQUENCES = [
    {
        "q": RNG.standard_normal((length, KEY_HEADS, KEY_DIM)),
        "k": (k := RNG.standard_normal((length, KEY_HEADS, KEY_DIM))) / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": RNG.standard_normal((length, HEADS, VALUE_DIM)),
        "decay": -RNG.exponential(0.5, (length, HEADS)),
        "rate": RNG.uniform(0, 1, (length, HEADS)),
    }
    for length in LENGTHS
]


def steps_of(splits: list[list[int]]) -> list[list[tuple[int, int, int]]]:
    """(sequence, start, length) of the chunks of each step: the i-th step computes the i-th chunk of every sequence."""
    steps = []
    for i in range(max(map(len, splits))):
        steps.append([(s, sum(split[:i]), split[i]) for s, split in enumerate(splits) if i < len(split) and split[i]])
    return [step for step in steps if step]


def rows_of(chunks: list[tuple[int, int, int]]) -> StateRows:
    """The rows of a step; sequence s is in slot 4 - s. Two rows and some tokens are padding."""
    sizes = [length for _, _, length in chunks] + [0] * (len(LENGTHS) + 2 - len(chunks))
    ends = np.cumsum(sizes)
    starts = [start for _, start, _ in chunks] + [0] * (len(sizes) - len(chunks))
    positions = np.concatenate([np.arange(start, start + n) for _, start, n in chunks])
    of_tokens = np.repeat(np.arange(len(sizes)), sizes)
    padding = TOKENS - len(positions)
    return StateRows(
        **{
            name: jnp.asarray(value, jnp.int32)
            for name, value in {
                "slots": [SLOTS - 1 - s for s, _, _ in chunks] + [SLOTS] * (len(sizes) - len(chunks)),
                "starts": starts,
                "stops": np.add(starts, sizes),
                "first_tokens": ends - sizes,
                "of_tokens": np.pad(of_tokens, (0, padding)),
                "positions": np.pad(positions, (0, padding)),
            }.items()
        },
        is_token=jnp.arange(TOKENS) < ends[-1],
    )


def packed(name: str, chunks: list[tuple[int, int, int]]) -> jax.Array:
    values = np.concatenate([SEQUENCES[s][name][start : start + n] for s, start, n in chunks])
    return jnp.asarray(np.concatenate([values, np.full((TOKENS - len(values), *values.shape[1:]), 7.0)]), jnp.float32)


@partial(jax.jit, donate_argnums=2, static_argnames=("together", "fixed_length"))
def run(q, inputs, states, rows, together, fixed_length):
    return scan(q, inputs, states, StateRows(**rows), LAYER, LAYERS, together=together, fixed_length=fixed_length)


@partial(jax.jit, donate_argnums=2)
def run_conv(x, kernel, tails, rows):
    return convolved(x, kernel, tails, StateRows(**rows), LAYER, LAYERS)


def scanned(
    splits: list[list[int]], *, delta: bool, together: int | None = None, fixed_length: bool = False
) -> tuple[list[np.ndarray], States]:
    """The results of each sequence, and the states at the end. What earlier sequences left in the slots is not a number."""
    width = KEY_HEADS * KEY_DIM + HEADS * VALUE_DIM + HEADS * (1 + delta)
    states = States(
        matrix=jnp.full((LAYERS * SLOTS, HEADS, KEY_DIM, VALUE_DIM), jnp.nan),
        recent=jnp.full((LAYERS * SLOTS, SIZE, width), jnp.nan),
    )
    parts: list[list[np.ndarray]] = [[] for _ in LENGTHS]
    for chunks in steps_of(splits):
        rows = rows_of(chunks)
        k, v, decay = (packed(name, chunks) for name in ("k", "v", "decay"))
        inputs = Inputs(k=k, v=v, decay=decay, rate=packed("rate", chunks) if delta else None)
        out, states = run(packed("q", chunks), inputs, states, vars(rows), together, fixed_length)
        for row, (s, _, length) in enumerate(chunks):
            first = int(rows.first_tokens[row])
            parts[s].append(np.asarray(out)[first : first + length])
    return [np.concatenate(part) for part in parts if part], states


def defined(sequence: dict[str, np.ndarray], *, delta: bool) -> np.ndarray:
    """The recurrence as it is defined, one token after another."""
    q, k = (np.repeat(sequence[name], HEADS // KEY_HEADS, axis=1) for name in "qk")
    state, out = np.zeros((HEADS, KEY_DIM, VALUE_DIM)), []
    for t in range(len(q)):
        state = np.exp(sequence["decay"][t])[:, None, None] * state
        v = sequence["v"][t]
        if delta:
            v = sequence["rate"][t][:, None] * (v - np.einsum("hde,hd->he", state, k[t]))
        state = state + k[t][:, :, None] * v[:, None, :]
        out.append(np.einsum("hde,hd->he", state, q[t]))
    return np.stack(out)


TOGETHER = [[8, 8, 7], [8, 1], [4], [8, 9]]
SPLITS = [
    [[3, 1, 1, 9, 9], [9], [1, 3], [5, 4, 8]],
    [[1] * 23, [1] * 9, [1] * 4, [1] * 17],
    [[4, 4, 4, 11], [0, 5, 4], [0, 0, 2, 2], [16, 1]],
    [[0, 0, 0, 0, 23], [9], [0, 4], [0, 0, 17]],
]


@pytest.mark.parametrize(
    ("delta", "together", "fixed_length"),
    [(False, None, False), (True, None, False), (True, 3, False), (False, 2, True), (True, 3, True)],
)
def test_results_are_those_of_the_definition_and_no_split_changes_a_bit(delta, together, fixed_length):
    want, states = scanned(TOGETHER, delta=delta, together=together, fixed_length=fixed_length)
    for sequence, got in zip(SEQUENCES, want, strict=True):
        np.testing.assert_allclose(got, defined(sequence, delta=delta), atol=TOLERANCE)
    for splits in SPLITS:
        got, other = scanned(splits, delta=delta, together=together, fixed_length=fixed_length)
        for a, b in zip(want, got, strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(states.matrix, other.matrix)


@pytest.mark.parametrize(
    ("num_tokens", "num_rows", "size", "group"), [(7, 7, 4, 2), (12, 3, 4, 3), (9, 2, 2, 1), (1, 1, 4, 1)]
)
def test_turns_of_a_fixed_number_suffice_for_every_chunk_and_none_is_in_vain(num_tokens, num_rows, size, group):
    turns = {tuple(turn) for turn in _turns(num_tokens, num_rows, size, group).tolist()}

    def longest(i: int) -> int:
        """How many rows can have an i-th piece: each begins with the last token of a piece."""
        tokens = next(n for n in range(1, size * num_tokens) if -(-(size - 1 + n) // size) > i)
        return min(num_rows, num_tokens // tokens)

    wanted = {(i, number) for i in range(num_tokens) if longest(i) for number in range(-(-longest(i) // group))}
    assert turns == wanted


def test_steps_leave_other_layers_and_other_slots_alone():
    _, states = scanned([[5, 4], [0], [3, 1], [0]], delta=True)
    changed = ~np.isnan(np.asarray(states.recent)).all(axis=(1, 2))
    assert np.flatnonzero(changed).tolist() == [LAYER * SLOTS + slot for slot in (SLOTS - 3, SLOTS - 1)]


@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_convolution_continues_where_the_last_step_ended(width):
    kernel = jnp.asarray(RNG.standard_normal((width, KEY_HEADS * KEY_DIM)), jnp.float32)
    results = []
    for splits in (TOGETHER, *SPLITS):
        tails = jnp.full((LAYERS * SLOTS, (width - 1) * kernel.shape[1]), jnp.nan)
        parts: list[list[np.ndarray]] = [[] for _ in LENGTHS]
        for chunks in steps_of(splits):
            rows = rows_of(chunks)
            out, tails = run_conv(packed("q", chunks).reshape(TOKENS, -1), kernel, tails, vars(rows))
            for row, (s, _, length) in enumerate(chunks):
                first = int(rows.first_tokens[row])
                parts[s].append(np.asarray(out)[first : first + length])
        results.append([np.concatenate(part) for part in parts])
    for sequence, got in zip(SEQUENCES, results[0], strict=True):
        x = np.pad(sequence["q"].reshape(len(sequence["q"]), -1), ((width - 1, 0), (0, 0)))
        want = sum(x[j : j + len(got)] * np.asarray(kernel)[j][None, :] for j in range(width))
        np.testing.assert_allclose(got, want, atol=TOLERANCE)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
