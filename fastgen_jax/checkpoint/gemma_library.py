"""Checkpoints of the `gemma` library (`gemma.gm`), in its four layouts.

    nested     layer_0.attn.q_einsum.w                                            [H, E, D]
    flat       transformer/layer_0/attn/q_einsum.w
    stacked    transformer/stacked_layers/attention_type_0/attn/q_einsum.w        [L', H, E, D]
    kauldron   params.layer_0.attn.q_einsum.w, beside the state of the optimizer

A stack holds the layers of one place in the pattern of windows: `attention_type_0` of Gemma 3 the layers 0, 6, 12 ... The
weights have the values of transformers: norms are stored without their 1, and nothing includes a scale.
Source: the modules and layouts of gemma (Apache-2.0), gemma/gm/nn and gemma/gm/ckpts.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fastgen_jax.checkpoint.maxtext import items_folder
from fastgen_jax.checkpoint.trained_trees import Layout, Part, TreeCheckpoint, open_tree
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.weight_spec import WeightSpec

_FAMILIES = ("gemma", "gemma2", "gemma3")
_EMBEDDING = "embedder.input_embedding"
_OUTSIDE = {"embed": _EMBEDDING, "final_norm": "final_norm.scale"}
_NORMS = {
    "attn_norm": "pre_attention_norm.scale",
    "post_attn_norm": "post_attention_norm.scale",
    "mlp_norm": "pre_ffw_norm.scale",
    "post_mlp_norm": "post_ffw_norm.scale",
    "q_norm": "attn._query_norm.scale",
    "k_norm": "attn._key_norm.scale",
}
_OF_MODEL = ("layer_", "stacked_layers.", *_OUTSIDE.values())  # others are those of images


def open_gemma(path: str | Path, base: str | Path) -> TreeCheckpoint:
    """Opens a checkpoint of the `gemma` library with the config.json and the tokenizer of the directory `base`.

    Reads headers only. ValueError if the family is not Gemma 1, 2 or 3, or if arrays and config do not match.
    """
    path = Path(path)
    return open_tree(path, Path(base), items_folder(path), layout)


def layout(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    if config.family not in _FAMILIES:
        raise ValueError(
            f"checkpoints of the gemma library are supported for {', '.join(_FAMILIES)}, not for {config.family!r}; pass "
            "the config.json of a Gemma model"
        )
    found = [name.removesuffix(_EMBEDDING) for name in shapes if name.endswith(_EMBEDDING)]
    prefix = min((name for name in found if not name.startswith("opt_state")), key=len, default=None)
    if prefix is None:
        raise ValueError(f"it has no array {_EMBEDDING!r}; this is not a checkpoint of the gemma library")
    types = {int(match[1]) for name in shapes if (match := re.search(r"stacked_layers\.attention_type_(\d+)\.", name))}

    def parts(spec: WeightSpec, layer: int | None) -> Sequence[Part]:
        if layer is None:
            return [Part(f"{prefix}{_OUTSIDE[spec.name]}", spec.shape, np.asarray)]
        place, row = f"layer_{layer}", None
        if types:
            row, kind = divmod(layer, len(types))
            place = f"stacked_layers.attention_type_{kind}"
        return _of_layer(spec, config, shapes, f"{prefix}{place}.", row)

    return Layout(parts, lambda name: name.startswith(tuple(f"{prefix}{part}" for part in _OF_MODEL)))


def _of_layer(
    spec: WeightSpec, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], place: str, row: int | None
) -> list[Part]:
    h, k, d, e, f = config.num_heads, config.num_kv_heads, config.head_dim, config.embed_dim, config.mlp_dim

    def part(name: str, shape: tuple[int, ...], inputs: int) -> Part:
        """An array whose axis number `inputs` are the inputs; the others, in their order, are the outputs."""
        for full in (f"{place}{name}", f"{place}{name}.w"):
            if full in shapes:
                return Part(full, shape, functools.partial(_as_matrix, inputs=inputs), row, axis=0)
        return Part(f"{place}{name}", shape, np.asarray, row, axis=0)  # which is missing

    if spec.name in _NORMS:
        return [Part(f"{place}{_NORMS[spec.name]}", spec.shape, np.asarray, row, axis=0)]
    if spec.name == "qkv":
        if h == k:
            return [part("attn.qkv_einsum", (3, h, e, d), 2)]
        return [part("attn.q_einsum", (h, e, d), 1), part("attn.kv_einsum", (2, k, e, d), 2)]
    if spec.name == "o":
        name = f"{place}attn.attn_vec_einsum.w"
        return [Part(name, (h, d, e), lambda array: array.reshape(h * d, e), row, axis=0)]
    if spec.name == "gate_up":
        of_layer = next((shape for name, shape in shapes.items() if name.startswith(f"{place}mlp.gating_einsum")), ())[-2:]
        # Gemma 1 and Gemma 2 2B have the inputs first.
        has_inputs_first = of_layer == (e, f) and e != f
        return [part("mlp.gating_einsum", (2, e, f) if has_inputs_first else (2, f, e), 1 if has_inputs_first else 2)]
    if spec.name == "down":
        return [part("mlp.linear", (f, e), 0)]
    raise ValueError(f"the config has the weight {spec.path!r}, which no model of the gemma library has")


def _as_matrix(array: np.ndarray, *, inputs: int) -> np.ndarray:
    return np.moveaxis(array, inputs, 0).reshape(array.shape[inputs], -1)
