"""Which layers one loop computes."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from fastgen_jax.models.segments import run_loops, segments

KINDS = [
    ("aaaa", ["4 a"]),
    ("a", ["1 a"]),
    ("abbbb", ["1 a", "4 b"]),
    ("aaabaaabaaabaaab", ["4 aaab"]),  # Qwen3-Next
    ("aabaabaababababa", ["3 aab", "3 ab", "1 a"]),  # LFM2
    ("aaaaabaaaaaaaaabaaaaaaaaabaaaa", ["3 aaaaabaaaa"]),  # Granite 4
    ("", []),
]


@pytest.mark.parametrize(("kinds", "found"), KINDS)
def test_loops_cover_the_layers_with_few_bodies(kinds, found):
    got = segments(kinds)
    assert [f"{s.repeats} {kinds[s.start : s.start + s.period]}" for s in got] == found
    assert "".join(kinds[s.start : s.start + s.period] * s.repeats for s in got) == kinds


@pytest.mark.parametrize("kinds", ["abbbb", "aaabaaabaaabc", "aabaabaababababa"])
def test_each_layer_finds_its_rows_in_nested_loops(kinds):
    """Layers write down their number, and the row that they have among the layers of kind b."""
    with_b = [i for i, kind in enumerate(kinds) if kind == "b"]
    bodies = 0

    def note(carry, place):
        nonlocal bodies
        bodies += 1
        numbers, rows = carry
        index, row = place.row(range(len(kinds))), place.row(with_b)
        assert (row is None) == (kinds[place.first] != "b")
        return numbers.at[index].set(index), rows if row is None else rows.at[index].set(row)

    numbers, rows = run_loops(kinds, note, (-np.ones(len(kinds), np.int32) + jax.numpy.zeros(1, np.int32),) * 2)
    assert numbers.tolist() == list(range(len(kinds)))
    assert rows.tolist() == [with_b.index(i) if i in with_b else -1 for i in range(len(kinds))]
    assert bodies < len(kinds) / 2
