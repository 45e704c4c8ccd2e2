"""One weight of all layers in one buffer, filled layer by layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from fastgen_jax.models.weight_spec import Leaf
from pallas_kernels.aligned import aligned_empty

if TYPE_CHECKING:
    import jax


class LayerStack:
    """The leaf of one weight with a leading layer axis. Rows are written in place, so that there is no second copy.

    Each row is the same pytree of arrays. A row on a CPU device is copied by NumPy into memory that the device can use; this
    compiles nothing. Other rows are written on their devices by a program that the buffer is donated to.
    """

    def __init__(self, path: str, num_rows: int) -> None:
        self._path = path
        self._num_rows = num_rows
        self._stack: Leaf = None

    def set_row(self, row: int, leaf: Leaf) -> None:
        """Writes the leaf of one layer.

        ValueError if its structure, or the shape or dtype of an array, differs from that of the first row that was set.
        """
        import jax

        if self._stack is None:
            self._stack = jax.tree.map(lambda x: _empty((self._num_rows, *x.shape), x), leaf)
        forms = [jax.tree.structure(self._stack), *((x.shape[1:], x.dtype) for x in jax.tree.leaves(self._stack))]
        if forms != [jax.tree.structure(leaf), *((x.shape, x.dtype) for x in jax.tree.leaves(leaf))]:
            raise ValueError(
                f"prepare({self._path!r}) returned another form for row {row} than for row 0 "
                f"({jax.tree.structure(leaf)}); layers that differ cannot be stacked, use stack_layers=False"
            )
        if all(isinstance(x, np.ndarray) for x in jax.tree.leaves(self._stack)):
            jax.tree.map(lambda whole, part: whole.__setitem__(row, part), self._stack, leaf)
        else:
            self._stack = _row_setter()(self._stack, leaf, row)

    def leaf(self) -> Leaf:
        """The stack as arrays of the device. No row may be set afterwards, because the memory is shared."""
        import jax

        return jax.tree.map(lambda x: jax.device_put(x) if isinstance(x, np.ndarray) else x, self._stack)


def _empty(shape: tuple[int, ...], row: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """A buffer for all rows: on the host if that is the device, else zeros, each row with the sharding of `row`."""
    import jax
    import jax.numpy as jnp

    place = getattr(row, "sharding", None)
    if isinstance(place, jax.sharding.NamedSharding):
        place = jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec(None, *place.spec))
    elif jax.default_backend() == "cpu":
        return aligned_empty(shape, row.dtype)
    return jnp.zeros(shape, row.dtype, device=place)


@functools.cache
def _row_setter() -> Callable[[Leaf, Leaf, int], Leaf]:
    import jax

    def set_row(stack: Leaf, leaf: Leaf, row: jax.Array) -> Leaf:
        return jax.tree.map(lambda whole, part: whole.at[row].set(part), stack, leaf)

    return jax.jit(set_row, donate_argnums=0)
