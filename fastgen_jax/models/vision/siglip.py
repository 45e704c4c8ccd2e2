"""SigLIP (arXiv:2303.15343) with the projector of Gemma 3 (arXiv:2503.19786).

    pixels -> patches -> + positions -> layers -> norm -> average of k x k patches -> RMS norm -> rows for the decoder

A layer is x += attn(norm(x)); x += mlp(norm(x)), with full attention between all patches of an image.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from fastgen_jax.models.layers import ACTIVATIONS, project
from fastgen_jax.models.segments import Place, layer_weights, run_loops
from fastgen_jax.models.vision.attention import attend_all
from fastgen_jax.models.vision.config import SiglipConfig
from fastgen_jax.models.weight_spec import LayerWeights, Params

if TYPE_CHECKING:
    from jaxtyping import Array, Float, UInt8


def shapes(config: SiglipConfig) -> list[jax.ShapeDtypeStruct]:
    """The shapes of `inputs`."""
    return [jax.ShapeDtypeStruct((config.image_size, config.image_size, 3), jnp.uint8)]


def inputs(pixels: UInt8[np.ndarray, "Y X 3"], *, config: SiglipConfig) -> UInt8[np.ndarray, "Y X 3"]:
    """What `embed` reads of an image with a size from `config.resized`."""
    return pixels


def embed(params: Params, pixels: UInt8[Array, "Y X 3"], *, config: SiglipConfig) -> Float[Array, "1 n E"]:
    """The rows of an image of `image_size` x `image_size` pixels, in the dtype of the weights."""
    side, p, e = config.patches_per_side, config.patch_size, config.embed_dim
    mean, std = (jnp.asarray(values, jnp.float32)[None, None, :] for values in (config.mean, config.std))
    values = (pixels.astype(jnp.float32) * config.rescale - mean) / std
    patches = values.reshape(side, p, side, p, 3).transpose(0, 2, 4, 1, 3).reshape(side * side, 3 * p * p)
    x = project(patches.astype(params["patch"].dtype), params, "patch") + params["positions"]

    def layer(x: jax.Array, place: Place) -> jax.Array:
        w = layer_weights(params["layers"], place)
        h = _norm(x, w, "attn_norm", config)
        q, k, v = (project(h, w, name).reshape(-1, config.num_heads, e // config.num_heads) for name in "qkv")
        x = x + project(attend_all(q, k, v).reshape(x.shape), w, "o")
        h = _norm(x, w, "mlp_norm", config)
        return x + project(ACTIVATIONS[config.activation](project(h, w, "up")), w, "down")

    x = run_loops([None] * config.num_layers, layer, x)
    x = _norm(x, params, "post_norm", config).astype(jnp.float32)
    tokens = math.isqrt(config.tokens_per_image)
    kernel = side // tokens
    pooled = jnp.mean(x.reshape(tokens, kernel, tokens, kernel, e), axis=(1, 3)).reshape(-1, e)
    # As in all norms of Gemma, the stored scale is the scale - 1.
    scale = 1.0 + params["projector_norm"].astype(jnp.float32)[None, :]
    normed = pooled * jax.lax.rsqrt(jnp.mean(jnp.square(pooled), axis=-1, keepdims=True) + config.norm_eps) * scale
    return (normed.astype(params["projector"].dtype) @ params["projector"])[None]


def _norm(x: Float[Array, "n E"], w: LayerWeights, name: str, config: SiglipConfig) -> Float[Array, "n E"]:
    """LayerNorm, in float32."""
    x32 = x.astype(jnp.float32)
    centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    unit = centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + config.norm_eps)
    scale, shift = (w[key].astype(jnp.float32)[None, :] for key in (name, f"{name}_bias"))
    return (unit * scale + shift).astype(x.dtype)
