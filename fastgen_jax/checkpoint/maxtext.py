"""Checkpoints of MaxText: parameters alone, or whole training states, with layers scanned or not.

    token_embedder.embedding                        [V, E]
    decoder.layers.self_attention.query.kernel      [E, L, H, D]   scanned; else decoder.layers_<i>...: [E, H, D]
    decoder.layers.mlp.wi_0.kernel                  [E, L, F]
    decoder.layers.pre_self_attention_layer_norm.scale   [E, L]
    decoder.decoder_norm.scale                      [E]
    decoder.logits_dense.kernel                     [E, V]

Where a model computes what transformers does with other weights, the difference is undone: queries that include the scale
of attention, rotated pairs that are adjacent, embeddings and norms of Gemma that include their factor and offset.
Source: the modules and the conversion of MaxText (Apache-2.0), src/maxtext/models and src/maxtext/checkpoint_conversion.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from fastgen_jax.checkpoint.trained_trees import Layout, Part, TreeCheckpoint, open_tree
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families.common import rope_pairs_to_halves
from fastgen_jax.models.weight_spec import Kind, WeightSpec

_ATTENTION = {
    "qkv": tuple(f"self_attention.{name}.kernel" for name in ("query", "key", "value")),
    "qkv_bias": tuple(f"self_attention.{name}.bias" for name in ("query", "key", "value")),
    "o": ("self_attention.out.kernel",),
    "q_norm": ("self_attention.query_norm.scale",),
    "k_norm": ("self_attention.key_norm.scale",),
    "gate_up": ("mlp.wi_0.kernel", "mlp.wi_1.kernel"),
    "down": ("mlp.wo.kernel",),
}
_LLAMA = _ATTENTION | {
    "attn_norm": ("pre_self_attention_layer_norm.scale",),
    "mlp_norm": ("post_self_attention_layer_norm.scale",),
}
_GEMMA = _ATTENTION | {
    "attn_norm": ("pre_self_attention_norm.scale",),
    "mlp_norm": ("pre_ffw_norm.scale",),
    "post_attn_norm": ("post_self_attention_norm.scale",),
    "post_mlp_norm": ("post_ffw_norm.scale",),
}


def _experts(module: str) -> dict[str, tuple[str, ...]]:
    return {
        "router": (f"{module}.gate.kernel",),
        "expert_gate_up": (f"{module}.wi_0", f"{module}.wi_1"),
        "expert_down": (f"{module}.wo",),
    }


_MODULES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA | _experts("MoeBlock_0"),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _LLAMA | _experts("moe_block"),
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
}
_SCALED_QUERIES = ("llama", "mistral", "mixtral", "gemma", "gemma2")  # others multiply queries by the scale of attention
_OF_MODEL = ("decoder.", "token_embedder.")
_STEP = re.compile(r"(ckpt_)?\d+")  # Kauldron's have a prefix
_EMBEDDING = "token_embedder.embedding"
_GEMMA3_CYCLE = 6  # layers of one scanned block


def open_maxtext(path: str | Path, base: str | Path) -> TreeCheckpoint:
    """Opens a checkpoint of MaxText with the config.json and the tokenizer of the directory `base`.

    `path` is the folder of a run's checkpoints, of which the last step is taken, of one step, or of its `items`. Reads
    headers only. ValueError if the family is none of those whose layout is known, or if arrays and config do not match.
    """
    path = Path(path)
    return open_tree(path, Path(base), items_folder(path), layout)


def items_folder(path: Path) -> Path:
    """The folder of the arrays: that of the last step of a run, or of one step, or `path` itself."""
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory; pass the folder of a checkpoint of MaxText")
    for name in (
        "items",
        "default",
        "checkpoints",
    ):  # of a step, with the names of Orbax's managers, and of a run of Kauldron
        if (path / name).is_dir():
            return path / name if name != "checkpoints" else items_folder(path / name)
    steps = {int(step.name.removeprefix("ckpt_")): step for step in path.iterdir() if _STEP.fullmatch(step.name)}
    if steps:
        return items_folder(steps[max(steps)])
    return path


def layout(config: ModelConfig, names: Collection[str]) -> Layout:
    modules = _MODULES.get(config.family)
    if modules is None:
        raise ValueError(
            f"checkpoints of MaxText are supported for {', '.join(_MODULES)}, not for {config.family!r}; export it to "
            "safetensors with MaxText's own to_huggingface"
        )
    if config.family == "gemma2" and config.attention_scale != config.head_dim**-0.5:
        raise ValueError(
            "config.json has query_pre_attn_scalar other than head_dim (Gemma 2 27B); MaxText trains such models with "
            "another scale than transformers, so their weights cannot be converted exactly"
        )
    prefix, suffix = _around(names)

    def full(name: str) -> str:
        return f"{prefix}{name}{suffix}"

    is_scanned = any(name.startswith(f"{prefix}decoder.layers.") for name in names)

    def parts(spec: WeightSpec, layer: int | None) -> Sequence[Part]:
        change = _change(spec, config)
        if layer is None:
            name = {
                "embed": _EMBEDDING,
                "final_norm": "decoder.decoder_norm.scale",
                "lm_head": "decoder.logits_dense.kernel",
            }
            return [Part(full(name[spec.name]), spec.shape, change)]
        if spec.name not in modules:
            raise ValueError(
                f"the config has the weight {spec.path!r}, which {config.family} has no name for in MaxText; export the "
                "model to safetensors with MaxText's own to_huggingface"
            )
        widths = spec.parts or (spec.shape[-1],)
        place, mark, row = _place(config, layer, is_scanned=is_scanned)
        found = []
        for i, (module, width) in enumerate(zip(modules[spec.name], widths, strict=True)):
            first, _, rest = module.partition(".")
            shape = _array_shape(spec, width, config)
            name = full(f"decoder.{place}{first}{mark}.{rest}" if rest else f"decoder.{place}{first}{mark}")
            as_weight = functools.partial(_reshaped, shape=(*spec.shape[:-1], width))
            found.append(Part(name, shape, _then(as_weight, _change(spec, config, part=i)), row))
        return found

    return Layout(parts, lambda name: name.startswith(tuple(f"{prefix}{part}" for part in _OF_MODEL)))


def _around(names: Collection[str]) -> tuple[str, str]:
    """What stands before and after the names of parameters: `params.params.`, and `.value` for variables of nnx."""
    found = [
        (name[: name.index(_EMBEDDING)], name[name.index(_EMBEDDING) + len(_EMBEDDING) :])
        for name in names
        if _EMBEDDING in name and not name.startswith(("opt_state", "optimizer"))
    ]
    if not found:
        raise ValueError(f"it has no array {_EMBEDDING!r}; this is not a checkpoint of MaxText")
    return min(found, key=lambda around: len(around[0]))


def _place(config: ModelConfig, layer: int, *, is_scanned: bool) -> tuple[str, str, int | None]:
    """Where a layer is: the path before its modules, what follows the name of its module, and its row if it is scanned."""
    if config.family == "gemma2":  # a layer of MaxText is a pair of layers, with a window and without
        pair, mark = layer // 2, ("_local", "_global")[layer % 2]
        return ("layers.", mark, pair) if is_scanned else (f"layers_{pair}.", mark, None)
    if not is_scanned:
        return f"layers_{layer}.", "", None
    if config.family == "gemma3":
        block, inner = divmod(layer, _GEMMA3_CYCLE)
        if block == config.num_layers // _GEMMA3_CYCLE:  # the layers after the last whole block
            return f"layers_remainder.layers_{inner}.", "", None
        return f"layers.layers_{inner}.", "", block
    return "layers.", "", layer


def _array_shape(spec: WeightSpec, width: int, config: ModelConfig) -> tuple[int, ...]:
    """The shape of an array (of one layer): heads have an axis of their own."""
    d = config.head_dim
    if spec.name == "qkv":
        return (spec.shape[0], width // d, d)
    if spec.name == "qkv_bias":
        return (width // d, d)
    if spec.name == "o":
        return (config.num_heads, d, spec.shape[-1])
    return (*spec.shape[:-1], width)


def _change(spec: WeightSpec, config: ModelConfig, *, part: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """What makes the weight of transformers from that of MaxText, which computes the same in another way."""
    d, is_gemma = config.head_dim, config.family.startswith("gemma")
    if spec.kind is Kind.NORM and is_gemma:
        return functools.partial(_in_float32, change=lambda x: x - np.float32(1))
    if spec.name == "embed" and is_gemma:
        factor = np.float32(math.sqrt(config.embed_dim))
        if config.family == "gemma3":  # its code rounds the factor
            factor = np.float32(ml_dtypes.bfloat16(factor))
        return functools.partial(_in_float32, change=lambda x: x / factor)
    changes: list[Callable[[np.ndarray], np.ndarray]] = []
    if spec.name in ("qkv", "qkv_bias") and part < 2 and any(rope.kind == "llama3" for rope in config.ropes):
        changes.append(rope_pairs_to_halves(d, (config.num_heads, config.num_kv_heads)[part]))
    if spec.name == "qkv" and part == 0 and config.family in _SCALED_QUERIES:
        changes.append(functools.partial(_in_float32, change=lambda x: x * np.float32(math.sqrt(d))))
    return _then(*changes)


def _reshaped(array: np.ndarray, *, shape: tuple[int, ...]) -> np.ndarray:
    return array.reshape(shape)


def _in_float32(array: np.ndarray, *, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return change(array.astype(np.float32)).astype(array.dtype)


def _then(*changes: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: functools.reduce(lambda value, change: change(value), changes, array)
