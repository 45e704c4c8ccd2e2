"""The tower of Qwen2-VL (arXiv:2409.12191), Qwen2.5-VL (arXiv:2502.13923) and Qwen3-VL (arXiv:2511.21631).

    patches -> (+ positions) -> layers -> norm -> m x m patches as one row -> MLP -> rows for the decoder

A layer is x += attn(norm(x)); x += mlp(norm(x)), with queries and keys rotated by row and column. In Qwen2.5-VL most layers
attend within windows. In Qwen3-VL the results of some layers become rows as well (DeepStack, arXiv:2406.04334).

The shapes are fixed: an image is laid out in slots for tokens, window by window, of which there are as many as in the
smallest of `num_slots` that suffices. A window at the edge of an image has slots that are not used.

    image of 3 x 5 tokens       slots with windows of 2 x 2 tokens
        a b | c d | e             [ a b f g | c d h i | e - j - | k l - - | m n - - | o - - - | - - - - | ... ]
        f g | h i | j
        ---------------
        k l | m n | o
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastgen_jax.models.layers import ACTIVATIONS, project
from fastgen_jax.models.segments import Place, layer_weights, run_loops
from fastgen_jax.models.vision.attention import attend_all, attend_within
from fastgen_jax.models.vision.config import MOST_RATIO, QwenVisionConfig
from fastgen_jax.models.weight_spec import LayerWeights, Params
from pallas_kernels.rotary import rotate

if TYPE_CHECKING:
    from jaxtyping import Array, Float, UInt8

_NORM_EPS = 1e-6
_THETA = 10_000.0
_LEAST_SLOTS = 64  # a smaller program would hardly be faster


class Inputs(NamedTuple):
    """An image in slots for tokens, each of m x m patches: NumPy arrays, or on the device jax.Array, or their shapes."""

    patches: Any
    """u8[n, 3 * p * p]: the values of each patch: of its red pixels, row by row, then its green and blue ones."""
    places: Any
    """i32[n, 2]: row and column of each patch."""
    is_patch: Any
    """bool[n]"""
    size: Any
    """i32[2]: rows and columns of patches."""
    slots: Any
    """i32[n / m / m]: the slot of each token, row by row; as many as there are slots, of which the first mean something."""


def num_slots(config: QwenVisionConfig) -> tuple[int, ...]:
    """For how many slots the tower is compiled, ascending: doubled each time, up to what the largest image takes."""
    side, most = config.window or 1, config.most_tokens
    largest = 0
    for rows in range(1, most + 1):
        # Sides are rounded to tokens, half a token either way.
        columns = min(most // rows, MOST_RATIO * (rows + 1))
        if rows <= MOST_RATIO * (columns + 1):
            largest = max(largest, _padded(rows, side) * _padded(columns, side))
    sizes = []
    size = -(-_LEAST_SLOTS // side**2) * side**2
    while size < largest:
        sizes.append(size)
        size *= 2
    return (*sizes, largest)


def shapes(config: QwenVisionConfig) -> list[Inputs]:
    """The shapes of `inputs`."""
    found = []
    for slots in num_slots(config):
        n = slots * config.merge**2
        found.append(
            Inputs(
                patches=jax.ShapeDtypeStruct((n, 3 * config.patch_size**2), jnp.uint8),
                places=jax.ShapeDtypeStruct((n, 2), jnp.int32),
                is_patch=jax.ShapeDtypeStruct((n,), jnp.bool_),
                size=jax.ShapeDtypeStruct((2,), jnp.int32),
                slots=jax.ShapeDtypeStruct((slots,), jnp.int32),
            )
        )
    return found


def inputs(pixels: UInt8[np.ndarray, "Y X 3"], *, config: QwenVisionConfig) -> Inputs:
    """What `embed` reads of an image with a size from `config.resized`, as NumPy arrays.

    Raises ValueError if it takes more slots than there are, which only very narrow images do.
    """
    p, m, side = config.patch_size, config.merge, config.window or 1
    rows, columns = config.grid(pixels.shape[1], pixels.shape[0])
    numbers = np.full((_padded(rows, side), _padded(columns, side)), -1, np.int32)
    numbers[:rows, :columns] = np.arange(rows * columns, dtype=np.int32).reshape(rows, columns)
    in_windows = numbers.reshape(numbers.shape[0] // side, side, numbers.shape[1] // side, side)
    token_of = in_windows.transpose(0, 2, 1, 3).reshape(-1)  # for each slot
    total = next((size for size in num_slots(config) if size >= len(token_of)), None)
    if total is None:
        raise ValueError(
            f"takes {len(token_of)} slots for tokens in its shape of {rows} x {columns}, more than {num_slots(config)[-1]}; "
            "crop it, so that it is less narrow"
        )
    used = np.flatnonzero(token_of >= 0)
    tokens = token_of[used]
    slots = np.zeros(total, np.int32)
    slots[tokens] = used
    y, x = np.divmod(tokens, columns)
    my, mx = np.divmod(np.arange(m * m, dtype=np.int32), m)
    places = np.zeros((total, m * m, 2), np.int32)
    places[used] = np.stack([y[:, None] * m + my, x[:, None] * m + mx], axis=-1)
    values = pixels.reshape(rows, m, p, columns, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    patches = np.zeros((total, m * m * 3 * p * p), np.uint8)
    patches[used] = values.reshape(rows * columns, -1)[tokens]
    is_patch = np.zeros((total, m * m), np.bool_)
    is_patch[used] = True
    return Inputs(
        patches=patches.reshape(total * m * m, -1),
        places=places.reshape(-1, 2),
        is_patch=is_patch.reshape(-1),
        size=np.array([rows * m, columns * m], np.int32),
        slots=slots,
    )


def embed(params: Params, inputs: Inputs, *, config: QwenVisionConfig) -> Float[Array, "parts tokens E"]:
    """The rows of an image, in the dtype of the weights, and after them those of each of `deep_layers`.

    Rows after those of its tokens are finite and meaningless.
    """
    x = _embed_patches(params, inputs, config)
    heads, dim = config.num_heads, config.embed_dim // config.num_heads
    frequency = 1.0 / _THETA ** (np.arange(0, dim // 2, 2, dtype=np.float64) / (dim // 2))
    angles = inputs.places.astype(jnp.float32)[:, :, None] * jnp.asarray(frequency, jnp.float32)[None, None, :]
    angles = angles.reshape(len(x), dim // 2)
    cos, sin = jnp.cos(angles), jnp.sin(angles)

    is_full = [config.window is None or layer in config.full_layers for layer in range(config.num_layers)]
    window = ((config.window or 1) * config.merge) ** 2

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: int) -> jax.Array:
        if is_full[layer]:
            return attend_all(q, k, v, inputs.is_patch)
        return attend_within(q, k, v, inputs.is_patch, window=window)

    def layer(carry: tuple[jax.Array, jax.Array], place: Place) -> tuple[jax.Array, jax.Array]:
        x, kept = carry
        w = layer_weights(params["layers"], place)
        h = _norm(x, w, "attn_norm", config)
        qkv = project(h, w, "qkv").reshape(-1, 3, heads, dim)
        out = attend(rotate(qkv[:, 0], cos, sin), rotate(qkv[:, 1], cos, sin), qkv[:, 2], place.first)
        x = x + project(out.reshape(x.shape), w, "o")
        h = _norm(x, w, "mlp_norm", config)
        hidden = ACTIVATIONS[config.activation](project(h, w, "gate" if config.is_gated else "up"))
        if config.is_gated:
            hidden = hidden * project(h, w, "up")
        x = x + project(hidden, w, "down")
        row = place.row(config.deep_layers)
        return x, kept if row is None else jax.lax.dynamic_update_index_in_dim(kept, x, row, axis=0)

    # Attention is chosen by the loops over layers: a branch would make the host of a GPU wait.
    kinds = [(full, number in config.deep_layers) for number, full in enumerate(is_full)]
    x, kept = run_loops(kinds, layer, (x, jnp.zeros((len(config.deep_layers), *x.shape), x.dtype)))

    wide = config.embed_dim * config.merge**2
    parts = [_merge(_norm(x, params, "merger_norm", config).reshape(-1, wide), params, "merger_")]
    for row in range(len(config.deep_layers)):
        w = {name: leaf[row] for name, leaf in params["deep"].items()}
        parts.append(_merge(_norm(kept[row].reshape(-1, wide), w, "norm", config), w, ""))
    return jnp.take(jnp.stack(parts), inputs.slots, axis=1)


def _embed_patches(params: Params, inputs: Inputs, config: QwenVisionConfig) -> Float[Array, "n E"]:
    mean, std = (jnp.asarray(values, jnp.float32)[None, :, None, None] for values in (config.mean, config.std))
    values = inputs.patches.reshape(-1, 3, 1, config.patch_size**2).astype(jnp.float32)
    values = (values * config.rescale - mean) / std
    values = jnp.broadcast_to(values, (*values.shape[:2], config.frames, values.shape[3]))
    weight = params["patch"]
    x = values.reshape(-1, weight.shape[0]).astype(weight.dtype) @ weight
    if config.patch_bias:
        x = x + params["patch_bias"][None, :]
    if config.position_side is not None:
        x = x + _positions(params["positions"], inputs, config.position_side).astype(x.dtype)
    return x


def _positions(table: Float[Array, "places E"], inputs: Inputs, side: int) -> Float[Array, "n E"]:
    """The positions of patches, between the four next ones in a table for an image of side x side patches, in float32."""
    last = jnp.maximum(inputs.size - 1, 1).astype(jnp.float32)[None, :]
    at = inputs.places.astype(jnp.float32) * (side - 1) / last  # [n, 2]
    low = jnp.floor(at)
    share = at - low
    found = jnp.float32(0.0)
    for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
        corner = jnp.minimum(low.astype(jnp.int32) + jnp.asarray([[y, x]]), side - 1)
        weight = jnp.where(jnp.asarray([[y, x]]) == 1, share, 1.0 - share)
        rows = jnp.take(table, corner[:, 0] * side + corner[:, 1], axis=0).astype(jnp.float32)
        found = found + rows * (weight[:, :1] * weight[:, 1:])
    return found


def _merge(x: Float[Array, "slots wide"], w: LayerWeights, prefix: str) -> Float[Array, "slots E"]:
    """The MLP at the end, of rows that are already normalized."""
    return project(ACTIVATIONS["gelu"](project(x, w, f"{prefix}up")), w, f"{prefix}down")


def _norm(x: Float[Array, "n width"], w: LayerWeights, name: str, config: QwenVisionConfig) -> Float[Array, "n width"]:
    """RMS norm or LayerNorm, in float32."""
    x32 = x.astype(jnp.float32)
    if config.norm == "layer":
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    unit = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + _NORM_EPS)
    unit = unit * w[name].astype(jnp.float32)[None, :]
    if config.norm == "layer":
        unit = unit + w[f"{name}_bias"].astype(jnp.float32)[None, :]
    return unit.astype(x.dtype)


def _padded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
