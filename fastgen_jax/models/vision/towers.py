"""The towers by the types of their configs. Each is a module with `shapes`, `inputs` and `embed`."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from fastgen_jax.models.vision import qwen, siglip
from fastgen_jax.models.vision.config import QwenVisionConfig, SiglipConfig, TowerConfig
from fastgen_jax.models.vision.weights import weights
from fastgen_jax.models.weight_spec import Params

if TYPE_CHECKING:
    from jaxtyping import Array, Float, UInt8

_LANES = 128  # of a TPU: arrays whose rows are no multiple of it are stored in another order of axes, and then copied
_HIDDEN = {"layers.gate": -1, "layers.gate_bias": -1, "layers.up": -1, "layers.up_bias": -1, "layers.down": -2}
"""The axis of the hidden units of the MLPs."""
_MODULES: dict[type[TowerConfig], ModuleType] = {SiglipConfig: siglip, QwenVisionConfig: qwen}


def shapes(config: TowerConfig) -> Sequence[Any]:
    """What `inputs` returns, as shapes: one entry for each program that is compiled, the smallest first."""
    return _MODULES[type(config)].shapes(config)


def inputs(pixels: UInt8[np.ndarray, "Y X 3"], *, config: TowerConfig) -> Any:
    """What `embed` reads of an image that has a size from `config.resized`: a pytree of NumPy arrays.

    Raises ValueError, whose message continues a sentence about the image, if it cannot be read in this shape.
    """
    return _MODULES[type(config)].inputs(pixels, config=config)


def embed(params: Params, inputs: Any, *, config: TowerConfig) -> Float[Array, "parts tokens E"]:
    """The rows of an image: those that replace the embeddings of its tokens, then those that are added after the first
    layers of the decoder. Rows after those of its tokens mean nothing."""
    return _MODULES[type(config)].embed(params, inputs, config=config)


def weight_shapes(config: TowerConfig, platform: str = "cpu") -> dict[str, tuple[int, ...]]:
    """The shapes of the weights as they are used, by their paths. On a TPU, hidden units are filled up with zeros."""
    found = {}
    for path, weight in weights(config).items():
        first, *rest = weight.shape
        sizes = (int(np.prod(rest)), first) if weight.is_matrix else weight.shape
        if platform == "tpu" and path in _HIDDEN:
            wide = list(sizes)
            wide[_HIDDEN[path]] = -(-config.mlp_dim // _LANES) * _LANES
            sizes = tuple(wide)
        found[path] = sizes if weight.count is None else (weight.count, *sizes)
    return found


def tree_of(leaves: dict[str, Any]) -> Params:
    """The weights by their paths as the tree that `embed` takes."""
    tree: Params = {}
    for path, leaf in leaves.items():
        *group, name = path.split(".")
        (tree.setdefault(group[0], {}) if group else tree)[name] = leaf
    return tree


def shape_of_rows(config: TowerConfig, dtype: Any) -> list[jax.ShapeDtypeStruct]:
    """The shapes of `embed` for each of `shapes`, with weights of `dtype`."""
    params = tree_of({path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in weight_shapes(config).items()})
    return [jax.eval_shape(lambda p, x: embed(p, x, config=config), params, given) for given in shapes(config)]
