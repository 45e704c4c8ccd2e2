"""Loops over layers: which of them share a body."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fastgen_jax.models.weight_spec import LayerWeights
from pallas_kernels import gpu_target


class Segment(NamedTuple):
    """The layers [start, start + period * repeats), in which layer i + period is of the kind of layer i."""

    start: int
    period: int
    repeats: int

    def count(self, layers: Sequence[int]) -> int:
        """How many of `layers` are in one period."""
        return sum(self.start <= layer < self.start + self.period for layer in layers)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A layer in the body of loops."""

    first: int
    """Its number in the first iteration of all of them."""
    loops: tuple[tuple[Segment, int | jax.Array], ...] = ()
    """The loops, outermost first, each with its counter."""

    def row(self, layers: Sequence[int]) -> int | jax.Array | None:
        """The row of this layer in a stack that has one for each of `layers`; None if it is not one of them."""
        if self.first not in layers:
            return None
        return layers.index(self.first) + sum(i * segment.count(layers) for segment, i in self.loops)


def layer_weights(stacks: LayerWeights, place: Place) -> LayerWeights:
    """The weights of a layer out of `stacks` of all layers."""
    row = place.row(range(len(jax.tree.leaves(dict(stacks))[0])))
    assert row is not None, "it is one of the layers"
    return {name: jax.lax.dynamic_index_in_dim(leaf, row, keepdims=False) for name, leaf in stacks.items()}


def run_loops(kinds: Sequence[Hashable], compute: Callable[[Any, Place], Any], carry: Any) -> Any:
    """The last carry of `carry = compute(carry, place)` for all layers; those that `segments` finds alike share a body.

    So the program does not grow with depth.
    """
    return _run(kinds, 0, len(kinds), (), compute, carry)


def _run(
    kinds: Sequence[Hashable],
    start: int,
    stop: int,
    loops: tuple[tuple[Segment, int | jax.Array], ...],
    compute: Callable[[Any, Place], Any],
    carry: Any,
) -> Any:
    for segment in segments(kinds[start:stop], start):

        def period(carry: Any, i: int | jax.Array, segment: Segment = segment) -> Any:
            inside = (*loops, (segment, i))
            if segment.period == 1:
                return compute(carry, Place(first=segment.start, loops=inside))
            return _run(kinds, segment.start, segment.start + segment.period, inside, compute, carry)

        # On a GPU, products read their weights in place only if the layer depends on one counter.
        if segment.repeats == 1 or (loops and gpu_target.is_gpu()):
            for i in range(segment.repeats):
                carry = period(carry, i)
            continue

        def body(counted: tuple[Any, jax.Array], _: None, period: Callable[..., Any] = period) -> tuple[Any, None]:
            carry, i = counted
            return (period(carry, i), i + 1), None

        # The counter is carried: XLA makes one of it and the loop's own, and products on a GPU read their weights in place
        # only if it is the index. An array of layer numbers would be sliced in every layer.
        (carry, _), _ = jax.lax.scan(body, (carry, jnp.int32(0)), length=segment.repeats)
    return carry


def segments(kinds: Sequence[Hashable], start: int = 0) -> list[Segment]:
    """Segments that cover layers of these kinds, numbered from `start`: at each layer, the one that saves the most bodies.

    kind     a a a a          a b b b b        a a b a a b a a b a      a b b a b b b
    loops    4 x a            a, 4 x b         3 x aab, a               2 x abb, b
    """
    found, first = [], 0
    while first < len(kinds):
        best = Segment(first, 1, 1)
        for period in range(1, (len(kinds) - first) // 2 + 1):
            repeats = 1
            while list(kinds[first + repeats * period :][:period]) == list(kinds[first:][:period]):
                repeats += 1
            if (repeats - 1) * period > (best.repeats - 1) * best.period:
                best = Segment(first, period, repeats)
        found.append(best._replace(start=start + first))
        first += best.period * best.repeats
    return found
