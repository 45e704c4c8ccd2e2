"""Low-rank adapters (arXiv:2106.09685) of requests: each token is computed with the change of its request's adapter.

    rows     | adapter 0 | adapter 1 | adapter 3 | no adapter | padding |        y = x W + x A[adapter] B[adapter]

The rows of a step come in this order, so that a grouped product reads the matrices of the adapters in use and no others.
Where products are XLA's, two dense ones with the matrices of all adapters side by side are faster than a loop over groups:

    x [A0 | A1 | A2 | A3]   ->   only the columns of the row's adapter are kept, the rest are zero   ->   [B0; B1; B2; B3]

Either way the result of a row is the same whatever the other rows are. A fused matrix, such as `qkv`, has a matrix B for
each of the projections in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fastgen_jax.models.columns import join_columns
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.params import layers_with, plain_name
from fastgen_jax.models.targets import MLP
from fastgen_jax.models.weight_spec import LayerWeights, Leaf, Params
from pallas_kernels.grouped_matmul import GroupedWeight, PackedGroups, grouped_matmul
from pallas_kernels.matmul import DividedArray, Division, linear
from pallas_kernels.pytree import pytree, static

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

_OF_CALLED_ROWS = frozenset({"o", "mix_out", *MLP})  # what a layer multiplies after its attention or state


@pytree
class AdapterRows:
    """Which rows belong to which of n adapters."""

    ids: Int[Array, " rows"]
    """Ascending; n for rows without an adapter and for padding."""
    sizes: Int[Array, " n"]
    """How many rows each adapter has."""


@pytree
class AdaptedWeight:
    """A matrix [in, out] of a layer, or a stack of all layers' [L, in, out], and the changes of n adapters of rank r.

    An engine keeps it without `weight` and `rows`.
    """

    weight: Leaf = None
    """The matrix itself, in any form that `linear` multiplies."""
    rows: AdapterRows | None = None
    """Those of the product."""
    down: GroupedWeight
    """A, an array [in, parts, n, r], or packed [n, in, parts * r]."""
    up: tuple[GroupedWeight, ...]
    """B of each part, [n, r, columns]."""
    num_devices: int = static(default=1)
    """Over how many devices the columns are divided; see `columns`."""
    division: Division | None = static(default=None)
    """That of the inputs of `down`, if sums over devices are in order."""

    @property
    def count(self) -> int:
        """n"""
        return self.down.shape[-3 if isinstance(self.down, PackedGroups) else -2]


def with_adapters(params: Params, adapters: Mapping[str, AdaptedWeight], config: ModelConfig) -> Params:
    """`params` whose matrices have the changes of `adapters`, by their names and stacked over layers."""
    layers, having = params["layers"], layers_with(config)
    if isinstance(layers, Mapping):
        return {**params, "layers": {**layers, **{name: replace(w, weight=layers[name]) for name, w in adapters.items()}}}

    def adapted(name: str, weight: Leaf, layer: int) -> Leaf:
        if name not in adapters:
            return weight
        row = having[name].index(layer)
        return replace(jax.tree.map(lambda leaf: leaf[row], adapters[name]), weight=weight)

    return {
        **params,
        "layers": tuple(
            {name: adapted(name, weight, layer) for name, weight in weights.items()} for layer, weights in enumerate(layers)
        ),
    }


def rows_of(ids: Int[Array, " T"], count: int) -> AdapterRows:
    """The rows of `count` adapters, from the adapter of each row."""
    sizes = jnp.sum(ids[:, None] == jnp.arange(count, dtype=jnp.int32)[None, :], axis=0, dtype=jnp.int32)
    return AdapterRows(ids=ids, sizes=sizes)


def sampled_rows(ids: Int[Array, " T"], rows: Int[Array, " R"], num_rows: Int[Array, ""], count: int) -> AdapterRows:
    """The same for the sampled rows of a batch, of which `num_rows` are used."""
    chosen = jnp.take(ids, rows)
    return rows_of(jnp.where(jnp.arange(rows.shape[0]) < num_rows, chosen, count), count)


def bound(w: LayerWeights, tokens: AdapterRows, called: AdapterRows) -> LayerWeights:
    """The weights of a layer for a step with `tokens`, whose last part, after attention, runs for the rows `called`."""
    return {
        name: replace(leaf, rows=called if plain_name(name) in _OF_CALLED_ROWS else tokens)
        if isinstance(leaf, AdaptedWeight)
        else leaf
        for name, leaf in w.items()
    }


def adapted_linear(
    x: Float[Array, "T K"],
    w: AdaptedWeight,
    *,
    residual: Float[Array, "T N"] | None = None,
    num_rows: Int[Array, ""] | None = None,
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "T N"]:
    """`linear` with the change of each row's adapter; sums are in float32."""
    rows, out_dtype = w.rows, x.dtype if out_dtype is None else out_dtype
    assert rows is not None, "the weights of a layer are bound to rows"
    if not isinstance(w.down, PackedGroups):
        y = linear(x, w.weight, num_rows=num_rows, out_dtype=jnp.float32) + _dense_change(x, w, rows)
        return (y if residual is None else y + residual.astype(jnp.float32)).astype(out_dtype)

    def adapted() -> jax.Array:
        change = _grouped_change(x, w, rows)
        change = change if residual is None else change + residual.astype(jnp.float32)
        return linear(x, w.weight, residual=change.astype(x.dtype), num_rows=num_rows, out_dtype=out_dtype)

    def plain() -> jax.Array:
        return linear(x, w.weight, residual=residual, num_rows=num_rows, out_dtype=out_dtype)

    return jax.lax.cond(jnp.sum(rows.sizes) > 0, adapted, plain)  # on an accelerator the host would wait for it


def _grouped_change(x: jax.Array, w: AdaptedWeight, rows: AdapterRows) -> jax.Array:
    """float32[T, N]"""
    hidden = grouped_matmul(x, w.down, rows.sizes, out_dtype=jnp.float32)  # [T, parts * r]
    parts = jnp.split(hidden, len(w.up), axis=1)
    changes = [grouped_matmul(part, up, rows.sizes) for part, up in zip(parts, w.up, strict=True)]
    return jnp.concatenate(changes, axis=1) if len(changes) > 1 else changes[0]


def _dense_change(x: jax.Array, w: AdaptedWeight, rows: AdapterRows) -> jax.Array:
    """float32[T, N]"""
    assert isinstance(w.down, jax.Array), "dense matrices are arrays"
    inputs, parts, count, rank = w.down.shape
    flat = [up.reshape(count * rank, -1) for up in w.up if isinstance(up, jax.Array)]
    down = w.down.reshape(inputs, -1)
    down = down if w.division is None else DividedArray(values=down, division=w.division)
    hidden = linear(x, down, out_dtype=jnp.float32).reshape(-1, parts, count, rank)
    mine = rows.ids[:, None] == jnp.arange(count)[None, :]  # [T, n]
    hidden = jnp.where(mine[:, None, :, None], hidden, 0.0).astype(x.dtype).reshape(-1, parts, count * rank)
    changes = [linear(hidden[:, part], up, out_dtype=jnp.float32) for part, up in enumerate(flat)]
    change = join_columns(changes, w.num_devices)
    missing = w.weight.shape[1] - change.shape[1]  # on TPUs and GPUs weights of states are filled up: see `divided_state`
    return jnp.pad(change, ((0, 0), (0, missing))) if missing else change
