"""New weights for a running engine: checks that they fit its programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from fastgen_jax.engine.resolve import ResolvedConfig
from fastgen_jax.engine.weights import prepare_params
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.division import divided
from fastgen_jax.models.mla import Expansions
from fastgen_jax.models.params import head_spec, layer_specs, layers_with, param_specs
from fastgen_jax.models.weight_spec import Params
from pallas_kernels.grouped_matmul import PackedGroups
from pallas_kernels.matmul import Float8Weight, PackedWeight, ScaledWeight

_Shape = tuple[int, ...]


def replacement_params(params: Params, current: Params, model: ModelConfig, config: ResolvedConfig) -> Params:
    """`params`, plain or prepared, in the form and on the devices of `current`.

    Raises:
        ValueError: a weight is missing, unexpected, of another shape, or prepared for another config.
    """
    _check_shapes(params, current, model, config.tensor_parallel or 1)
    prepared = _in_forms_of(current, prepare_params(params, model, config))
    old, new = (_kinds(tree) for tree in (current, prepared))
    for path in [*old, *new]:
        if old.get(path) != new.get(path):
            in_blocks = config.keeps_blocks or config.kept_forms
            if (in_blocks and old.get(path, "").startswith(("uint8", "float8"))) or config.quantize == "int4":
                raise ValueError(
                    "the engine computes with weights in the quantized blocks of its checkpoint, which only those of "
                    "another checkpoint in the same format can replace; load it with quantize='none'"
                )
            raise ValueError(
                f"params{path} is {new.get(path)} but the engine computes with {old.get(path)}; pass plain weights, or "
                "weights prepared for an engine with the same config"
            )
    if jax.tree.structure(current) != jax.tree.structure(prepared):
        raise ValueError("params are not prepared as the engine computes with them; pass plain weights")
    return jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), prepared, current)


def _in_forms_of(current: Params, prepared: Params) -> Params:
    """`prepared`, with scales for every 128 inputs where the weights in use have such: each is that of the output."""
    old = dict(jax.tree_util.tree_leaves_with_path(current, is_leaf=_is_float8))

    def form(path: jax.tree_util.KeyPath, leaf: object) -> object:
        like = old.get(path)
        if isinstance(leaf, Float8Weight) and isinstance(like, Float8Weight) and like.in_blocks and not leaf.in_blocks:
            scales = jnp.broadcast_to(leaf.scales[..., None, :], (*leaf.scales.shape[:-1], *like.scales.shape[-2:]))
            return replace(leaf, scales=scales)
        return leaf

    return jax.tree_util.tree_map_with_path(form, prepared, is_leaf=_is_float8)


def _is_float8(leaf: object) -> bool:
    return isinstance(leaf, Float8Weight)


def _kinds(tree: Params) -> dict[str, str]:
    """Dtype and shape of every array, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _check_shapes(params: Params, current: Params, model: ModelConfig, num_devices: int) -> None:
    """ValueError unless the tree has the weights of the model.

    Every form of a weight has the shape of the original, except one that is divided over devices.
    """
    given, wanted = _weights_and_shapes(params, model)
    platform = jax.default_backend()
    _, shapes_of_divided = _weights_and_shapes(params, divided(model, num_devices, platform))
    # A tied head may be stored separately; if the new weights lack it, it is made from their embedding.
    if model.tie_embeddings and "lm_head" in current:
        wanted["params['lm_head']"] = head_spec(model).shape
    for name in wanted.keys() - given.keys():
        if not (model.tie_embeddings and name == "params['lm_head']"):
            raise ValueError(f"{name} {list(wanted[name])} is missing; pass all weights of the model")
    for name, leaf in given.items():
        if name not in wanted:
            raise ValueError(f"{name} is not a weight of this model; remove it")
        if not isinstance(leaf, jax.Array | np.ndarray | ScaledWeight | PackedWeight | PackedGroups | Expansions):
            raise ValueError(f"{name} is a {type(leaf).__name__}, but must be an array {list(wanted[name])}")
        is_prepared = _is_on_a_mesh(leaf) or platform != "cpu"  # where experts and the vocabulary may be wider
        if tuple(leaf.shape) not in (wanted[name], shapes_of_divided.get(name) if is_prepared else None):
            raise ValueError(f"{name} has shape {list(leaf.shape)}, but this model has {list(wanted[name])}")
        if isinstance(leaf, jax.Array | np.ndarray) and not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {leaf.dtype}, but must be floating point")


def _is_on_a_mesh(leaf: object) -> bool:
    parts = jax.tree.leaves(leaf)
    return all(isinstance(part, jax.Array) and isinstance(part.sharding, NamedSharding) for part in parts)


def _weights_and_shapes(params: Params, model: ModelConfig) -> tuple[dict[str, object], dict[str, _Shape]]:
    """The given weights, and the shapes that the model expects, by the same names."""
    specs = param_specs(model)
    given: dict[str, object] = {}
    wanted: dict[str, _Shape] = {}

    def add(place: str, leaves: Mapping[str, object], shapes: Mapping[str, _Shape]) -> None:
        given.update({f"{place}[{name!r}]": leaf for name, leaf in leaves.items()})
        wanted.update({f"{place}[{name!r}]": shape for name, shape in shapes.items()})

    layers = params.get("layers") if isinstance(params, Mapping) else None
    if isinstance(layers, Mapping):
        having = layers_with(model)
        add("params['layers']", layers, {name: (len(having[name]), *s.shape) for name, s in specs["layers"].items()})
    elif isinstance(layers, tuple | list) and len(layers) == model.num_layers:
        for i, layer in enumerate(layers):
            add(f"params['layers'][{i}]", layer, {name: s.shape for name, s in layer_specs(model, i).items()})
    else:
        raise ValueError(
            f"params must be a dict whose 'layers' are a dict of stacked weights or a tuple of {model.num_layers} dicts, as "
            "load_params and init_params return them"
        )
    add(
        "params",
        {name: leaf for name, leaf in params.items() if name != "layers"},
        {name: s.shape for name, s in specs.items() if name != "layers"},
    )
    return given, wanted
