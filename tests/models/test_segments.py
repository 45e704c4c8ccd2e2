"""Which layers one loop computes."""

from __future__ import annotations

import pytest

from fastgen_jax.models.segments import Segment, segments


@pytest.mark.parametrize(
    ("kinds", "found"),
    [
        ("aaaa", ["4 a"]),
        ("a", ["1 a"]),
        ("abbbb", ["1 a", "4 b"]),
        ("aaabaaabaaabaaab", ["4 aaab"]),  # Qwen3-Next
        ("aabaabaababababa", ["3 aab", "3 ab", "1 a"]),  # LFM2
        ("aaaaabaaaaaaaaabaaaaaaaaabaaaa", ["3 aaaaabaaaa"]),  # Granite 4
        ("", []),
    ],
)
def test_loops_cover_the_layers_with_few_bodies(kinds, found):
    got = segments(kinds)
    assert [f"{s.repeats} {kinds[s.start : s.start + s.period]}" for s in got] == found
    assert "".join(kinds[s.start : s.start + s.period] * s.repeats for s in got) == kinds


def test_rows_of_a_stack_are_those_of_its_layers():
    layers = (1, 2, 4, 5, 7, 8)  # of 9 layers in periods of 3
    segment = Segment(0, 3, 3)
    rows = [[segment.row(layers, offset, i) for offset in range(3)] for i in range(3)]
    assert rows == [[None, 0, 1], [None, 2, 3], [None, 4, 5]]
