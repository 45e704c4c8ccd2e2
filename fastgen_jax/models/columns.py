"""The column order of projections that are fused into one matrix, on one device and on several.

    one device     q0 q1 q2 q3 | k0 k1 | v0 v1              all queries, then all keys, then all values
    two devices    q0 q1 | k0 | v0 || q2 q3 | k1 | v1       each half is exactly what one device computes

In the first order a contiguous half of the columns is not half of the heads, so every layer would have to move activations
between devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Shaped


def deal_columns(
    array: Shaped[np.ndarray, "*rows columns"] | Shaped[Array, "*rows columns"], parts: Sequence[int], num_devices: int
) -> Shaped[np.ndarray, "*rows columns"]:
    """`array` [..., sum(parts)] in the order for `num_devices`, each of which gets its share of every part."""
    pieces = np.split(np.asarray(array), np.cumsum(parts)[:-1], axis=-1)
    shares = [piece.reshape(*piece.shape[:-1], num_devices, -1) for piece in pieces]
    return np.concatenate(shares, axis=-1).reshape(array.shape)


def split_columns(y: Float[Array, "*rows columns"], parts: Sequence[int], num_devices: int) -> list[Float[Array, "*rows _"]]:
    """The parts [..., width] of `y` [..., sum(parts)], whose columns are in the order for `num_devices`."""
    lead = y.shape[:-1]
    shares = y.reshape(*lead, num_devices, -1)
    ends = np.cumsum(parts) // num_devices
    starts = [0, *ends[:-1]]
    return [shares[..., start:end].reshape(*lead, -1) for start, end in zip(starts, ends, strict=True)]


def join_columns(parts: Sequence[Float[Array, "*rows _"]], num_devices: int) -> Float[Array, "*rows columns"]:
    """The inverse of `split_columns`."""
    if len(parts) == 1:  # in order on any number of devices, or not divided
        return parts[0]
    lead = parts[0].shape[:-1]
    shares = jnp.concatenate([part.reshape(*lead, num_devices, -1) for part in parts], axis=-1)
    return shares.reshape(*lead, -1)
