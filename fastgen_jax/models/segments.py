"""Which layers of a model are computed by one loop."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple, TypeVar

Number = TypeVar("Number")  # an int, or a traced one


class Segment(NamedTuple):
    """The layers [start, start + period * repeats), in which layer i + period is of the kind of layer i.

    One loop computes them, whose body is one period. So the program does not grow with depth.
    """

    start: int
    period: int
    repeats: int

    def row(self, layers: Sequence[int], offset: int, i: Number) -> Number | None:
        """The place in `layers` of layer `offset` of the i-th period; None if `layers` does not have it."""
        if self.start + offset not in layers:
            return None
        each = sum(self.start <= layer < self.start + self.period for layer in layers)
        return layers.index(self.start + offset) + i * each  # pyright: ignore[reportOperatorIssue, reportReturnType]


def segments(kinds: Sequence[Hashable]) -> list[Segment]:
    """Segments that cover layers of these kinds: from each start, the one that leaves out the most loop bodies.

    kind     a a a a          a b b b b        a a b a a b a a b a      a b b a b b b
    loops    4 x a            a, 4 x b         3 x aab, a               2 x abb, b
    """
    found, start = [], 0
    while start < len(kinds):
        best = Segment(start, 1, 1)
        for period in range(1, (len(kinds) - start) // 2 + 1):
            repeats = 1
            while list(kinds[start + repeats * period :][:period]) == list(kinds[start:][:period]):
                repeats += 1
            if (repeats - 1) * period > (best.repeats - 1) * best.period:
                best = Segment(start, period, repeats)
        found.append(best)
        start += best.period * best.repeats
    return found
