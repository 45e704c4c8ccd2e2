"""Shared code for reading a Hugging Face `config.json` and naming the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from fastgen_jax.json_types import JsonFields
from fastgen_jax.models.config import Activation, ModelConfig
from fastgen_jax.models.families.fields import Fields
from fastgen_jax.models.params import all_specs

BFLOAT16 = ml_dtypes.bfloat16

ModelFields: TypeAlias = dict[str, Any]
"""Keyword arguments of `ModelConfig`."""


def refuse_unsupported(hf: JsonFields, supported: Mapping[str, tuple[object, ...]]) -> None:
    """Raises ValueError if a field has a value that is not supported; absent fields are accepted."""
    for name, values in supported.items():
        if name in hf and hf[name] not in values:
            raise ValueError(
                f"config.json has {name}={hf[name]!r}, which is not supported; supported: {', '.join(map(repr, values))}"
            )


def sizes(hf: Fields, *, head_dim: int | None = None, assumed: Mapping[str, int] = MappingProxyType({})) -> ModelFields:
    """The fields that most families name as Llama does, as keyword arguments of `ModelConfig`.

    `head_dim` is the family's default; None: the width of the model divided by the number of heads. `assumed` holds defaults
    of further fields, by their names in config.json.
    """
    num_heads = _given(hf, "num_attention_heads", assumed)
    return {
        "vocab_size": _given(hf, "vocab_size", assumed),
        "num_layers": hf["num_hidden_layers"],
        "embed_dim": hf["hidden_size"],
        "num_heads": num_heads,
        "num_kv_heads": hf.get("num_key_value_heads", assumed.get("num_key_value_heads")) or num_heads,
        "head_dim": hf.get("head_dim") or head_dim or hf["hidden_size"] // num_heads,
        "mlp_dim": hf["intermediate_size"],
        **special_tokens(hf),
    }


def _given(hf: Fields, name: str, assumed: Mapping[str, int]) -> int:
    return hf[name] if name in hf or name not in assumed else assumed[name]


def special_tokens(hf: JsonFields) -> ModelFields:
    """`bos_token_id` and `eos_token_ids` as keyword arguments of `ModelConfig`."""
    return {"bos_token_id": hf.get("bos_token_id"), "eos_token_ids": eos_ids(hf)}


def eos_ids(hf: JsonFields) -> tuple[int, ...]:
    """End-of-sequence ids: none, one or several."""
    eos = hf.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (eos,)


# By their names in transformers, without the two that have learned parameters (prelu, xielu).
_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_10": "gelu_clipped",
    "quick_gelu": "gelu_quick",
    "relu": "relu",
    "relu2": "relu2",
    "relu6": "relu6",
    "leaky_relu": "leaky_relu",
    "hardswish": "hard_swish",
    "mish": "mish",
    "sigmoid": "sigmoid",
    "sqrtsoftplus": "sqrt_softplus",
    "tanh": "tanh",
    "laplace": "laplace",
    "linear": "linear",
}


def activation(hf: Fields, name: str = "hidden_act", *, default: str) -> Activation:
    """The field `name` as an `activation` of `ModelConfig`; ValueError if it is not supported."""
    value = hf.get(name) or default
    if value not in _ACTIVATIONS:
        raise ValueError(f"config.json has {name}={value!r}, which is not supported; supported: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[value]


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """The geometric slopes of ALiBi. If `num_heads` is not a power of two, the rest come from twice as many heads."""
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * i / power) for i in range(1, power + 1)]
    between = [2.0 ** (-4.0 * i / power) for i in range(1, 2 * power, 2)]
    return tuple((slopes + between)[:num_heads])


def windows(hf: Fields, size: int | None, is_sliding: Callable[[int], bool]) -> tuple[int | None, ...]:
    """`layer_windows` of `ModelConfig`: `size` for the layers that `layer_types`, or else `is_sliding`, selects."""
    types = hf.get("layer_types")
    count = hf["num_hidden_layers"]
    if size is None:
        return ()
    if types is None:
        types = ["sliding_attention" if is_sliding(i) else "full_attention" for i in range(count)]
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown or len(types) != count:
        raise ValueError(
            f"config.json has layer_types={types!r}; supported: 'sliding_attention' or 'full_attention' for "
            f"each of the {count} layers"
        )
    return tuple(size if kind == "sliding_attention" else None for kind in types)


@dataclass(frozen=True)
class Source:
    """The checkpoint tensors that make one weight.

    They are transposed from [out, in] if `transpose`, and concatenated along the output axis (the last one). If `stacked`,
    the names of row 0 of the first axis come first, then those of row 1, and so on. `rearrange` reorders the output axis of
    the result. If `is_row`, a vector [n] is stored as [1, n].
    """

    names: tuple[str, ...]
    _: KW_ONLY
    transpose: bool = False
    stacked: bool = False
    is_row: bool = False
    rearrange: Callable[[np.ndarray], np.ndarray] | None = None
    keeps_values: bool = True
    """False if `rearrange` computes other values, once: it leaves its own results as they are, up to rounding."""
    constants: tuple[tuple[str, float], ...] = ()
    """Scalars that transformers stores beside these tensors, by name. They are not read, but exported."""


LLAMA_NAMES: dict[str, str | Sequence[str]] = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
    "layers.attn_norm": "model.layers.{layer}.input_layernorm",
    "layers.mlp_norm": "model.layers.{layer}.post_attention_layernorm",
    "layers.qkv": tuple(f"model.layers.{{layer}}.self_attn.{x}_proj" for x in "qkv"),
    "layers.q_norm": "model.layers.{layer}.self_attn.q_norm",
    "layers.k_norm": "model.layers.{layer}.self_attn.k_norm",
    "layers.o": "model.layers.{layer}.self_attn.o_proj",
    "layers.gate_up": ("model.layers.{layer}.mlp.gate_proj", "model.layers.{layer}.mlp.up_proj"),
    "layers.down": "model.layers.{layer}.mlp.down_proj",
}
"""The modules of a Llama checkpoint for each weight; most families differ in a few lines."""


def sources_from(
    config: ModelConfig,
    names: Mapping[str, str | Sequence[str] | Source],
    *,
    conv1d: Sequence[str] = (),
    rearrange: Mapping[str, Callable[[np.ndarray], np.ndarray]] | None = None,
) -> dict[str, Source]:
    """The source of each weight of `param_specs(config)`; `{layer}` stands for the number of the layer.

    `names` maps the path of a weight to the module, or the modules to concatenate, whose `.weight` it is; the bias of the
    weight is the `.bias` of the module. A `Source` is used as it is. Matrices are stored [out, in], as `torch.nn.Linear`
    does, except those in `conv1d`, which are [in, out] as in GPT-2. `rearrange` reorders the outputs of a weight and of its
    bias.
    """
    found = {}
    for path, spec in all_specs(config).items():
        given = names.get(path)
        if isinstance(given, Source):
            found[path] = given
            continue
        owner = spec.owner_path
        module = names[owner]
        assert not isinstance(module, Source), f"{owner} is named by a Source, so {path} needs one as well"
        modules = [module] if isinstance(module, str) else module
        found[path] = Source(
            tuple(f"{module}.{'weight' if spec.bias_of is None else 'bias'}" for module in modules),
            transpose=spec.is_product and path not in conv1d,
            stacked=spec.is_stack and len(modules) > 1,
            rearrange=(rearrange or {}).get(owner),
        )
    return found


def split_kv_groups(config: ModelConfig) -> Callable[[np.ndarray], np.ndarray]:
    """Reorders a fused [..., K * (G + 2) * D] from the q, k and v of each KV head to all q, then all k, then all v."""
    k, d, group = config.num_kv_heads, config.head_dim, config.num_heads // config.num_kv_heads

    def rearrange(fused: np.ndarray) -> np.ndarray:
        lead = fused.shape[:-1]
        grouped = fused.reshape(*lead, k, group + 2, d)
        parts = grouped[..., :group, :], grouped[..., group, :], grouped[..., group + 1, :]
        return np.concatenate([part.reshape(*lead, -1) for part in parts], axis=-1)

    return rearrange


def adjacent_pairs_to_halves(config: ModelConfig) -> Callable[[np.ndarray], np.ndarray]:
    """Reorders the queries and keys of a `qkv` that rotates pairs (2i, 2i + 1); see `rope_pairs_to_halves`."""
    dim = config.ropes[0].dim if config.ropes else None
    return rope_pairs_to_halves(config.head_dim, config.num_heads + config.num_kv_heads, dim=dim)


def rope_pairs_to_halves(head_dim: int, num_heads: int, *, dim: int | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """Reorders the first `num_heads` heads of an axis so that rotated pairs (2i, 2i + 1) become (i, i + dim/2).

    The first `dim` dimensions of a head are rotated; None: all. Dot products do not change if queries and keys are reordered
    alike, and `rotate` then has to support only one order.
    """
    dim = head_dim if dim is None else dim

    def rearrange(x: np.ndarray) -> np.ndarray:
        moved, rest = np.split(x, [num_heads * head_dim], axis=-1)
        rotated, kept = np.split(moved.reshape(*x.shape[:-1], num_heads, head_dim), [dim], axis=-1)
        heads = np.concatenate([rotated[..., ::2], rotated[..., 1::2], kept], axis=-1)
        return np.concatenate([heads.reshape(moved.shape), rest], axis=-1)

    return rearrange
