"""Gemma 4, text: Gemma 3 with larger and fewer heads in layers without a window, normalized values, learned scales of
layers, and, by model: embeddings of tokens for each layer, last layers that read the keys of earlier ones, or experts beside
the MLPs."""

from __future__ import annotations

import math
from typing import Any

from fastgen_jax.json_types import JsonFields
from fastgen_jax.models.config import Activation, FullHeads, ModelConfig, RopeConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.gemma2 import NAMES
from fastgen_jax.models.families.gemma3n import INPUT_NAMES, kv_sources
from fastgen_jax.models.families.rope import rope_from_fields
from fastgen_jax.models.moe_config import MoEConfig
from fastgen_jax.models.stream_config import LayerInputs

ARCHITECTURES = ("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration")
FEATURES = "E2B, E4B, 31B and 26B-A4B, which has experts beside its MLPs, without images and audio"
_SIZES = {"vocab_size": 262_144, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 9216}


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    common.refuse_unsupported(
        hf,
        {
            "attention_bias": (False,),
            "use_bidirectional_attention": ("vision", None),  # between the tokens of an image
        },
    )
    hf.ignore("attention_bias", "use_bidirectional_attention")
    windows = common.windows(hf, hf.get("sliding_window", 512), lambda layer: (layer + 1) % 6 != 0)
    windows = (*windows[:-1], None)  # as in transformers
    sizes = common.sizes(hf, head_dim=256, assumed=_SIZES, mlp_dim=hf.get("intermediate_size", _SIZES["intermediate_size"]))
    heads = _full_heads(hf, windows, sizes)
    context = hf.get("max_position_embeddings", 131_072)
    ropes = hf.get("rope_parameters") or {}
    if unknown := ropes.keys() - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"rope_parameters has the fields {sorted(unknown)}; supported in this family: 'full_attention' and "
            "'sliding_attention', each with the settings of those layers"
        )
    assumed = {"rope_type": "proportional", "partial_rotary_factor": 0.25}
    everywhere = _rope(ropes.get("full_attention") or assumed, heads.head_dim, context=context, theta=1_000_000.0)
    windowed = _rope(ropes.get("sliding_attention") or {}, sizes["head_dim"], context=context, theta=10_000.0)
    sources = kv_sources(windows, hf.get("num_kv_shared_layers", 0))
    activation = common.activation(hf, "hidden_activation", default="gelu_pytorch_tanh")
    width, known = hf.get("hidden_size_per_layer_input", 256), hf.get("vocab_size_per_layer_input", 262_144)
    return ModelConfig(
        family="gemma4",
        exceeds_float16=True,
        **sizes,
        max_context_len=context,
        rope=everywhere,
        layer_ropes=tuple(everywhere if window is None else windowed for window in windows),
        layer_windows=windows,
        full_heads=heads,
        kv_sources=sources,
        reader_mlp_dim=2 * sizes["mlp_dim"] if hf.get("use_double_wide_mlp", False) and sources else None,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        norm_placement="both",
        embed_multiplier=math.sqrt(hf["hidden_size"]),
        tie_embeddings=hf.get("tie_word_embeddings", True),
        logits_soft_cap=hf.get("final_logit_softcapping"),
        qk_norm="head",
        v_norm=True,
        attention_scale=1.0,
        activation=activation,
        moe=_experts(hf, activation),
        layer_scale=True,
        layer_inputs=LayerInputs(dim=width, vocab_size=known, num_rows=known) if width else None,
    )


def _full_heads(hf: Fields, windows: tuple[int | None, ...], sizes: dict[str, Any]) -> FullHeads:
    """The heads of layers without a window, of releases, or as transformers saves them: by number of the layer."""
    shared = hf.get("attention_k_eq_v", False)
    hf.ignore("per_layer_config", "global_head_dim", "num_global_key_value_heads")
    count = sizes["num_kv_heads"]
    if "per_layer_config" not in hf:
        count = (hf.get("num_global_key_value_heads") if shared else None) or count
        return FullHeads(num_kv_heads=count, head_dim=hf.get("global_head_dim", 512), keys_are_values=shared)
    given: dict[int, JsonFields] = {int(layer): fields for layer, fields in (hf["per_layer_config"] or {}).items()}
    full = {layer for layer, window in enumerate(windows) if window is None}
    settings = [given.get(layer, {}) for layer in sorted(full)]
    names = {name for fields in settings for name in fields}
    if given.keys() - full or names - {"head_dim", "num_key_value_heads"} or any(one != settings[0] for one in settings):
        raise ValueError(
            f"config.json has per_layer_config={given!r}; supported: the same head_dim and num_key_value_heads for all "
            "layers with full attention, and nothing for the others"
        )
    return FullHeads(
        num_kv_heads=settings[0].get("num_key_value_heads", count),
        head_dim=settings[0].get("head_dim", sizes["head_dim"]),
        keys_are_values=shared,
    )


def _experts(hf: Fields, activation: Activation) -> MoEConfig | None:
    if not hf.get("enable_moe_block", False):
        hf.ignore("num_experts", "top_k_experts", "moe_intermediate_size")
        return None
    return MoEConfig(
        num_experts=hf["num_experts"],
        experts_per_token=hf["top_k_experts"],
        expert_dim=hf["moe_intermediate_size"],
        layers=tuple(range(hf["num_hidden_layers"])),
        scores="softmax_of_chosen",
        expert_scale=True,
        beside_mlp=True,
        activation=activation,
    )


def _rope(fields: JsonFields, head_dim: int, *, context: int, theta: float) -> RopeConfig:
    """The rotation of heads of `head_dim`. The proportional kind rotates only the first pairs, at the speeds of all."""
    fields = dict(fields)
    part = fields.pop("partial_rotary_factor", None)
    is_proportional = fields.get("rope_type") == "proportional"
    if is_proportional:
        fields["rope_type"] = "default"
        if fields.pop("factor", None) not in (None, 1.0):
            raise ValueError("config.json has rope_type='proportional' with a factor, which is not supported; remove it")
    elif part not in (None, 1.0):
        raise ValueError(f"config.json has partial_rotary_factor={part}; supported only with rope_type='proportional'")
    theta = float(fields.pop("rope_theta", None) or theta)
    rope = rope_from_fields(fields, max_context_len=context, theta=theta, dim=head_dim)
    if not is_proportional:
        return rope
    rotated = int((1.0 if part is None else part) * head_dim // 2)
    return RopeConfig(theta=rope.theta, dim=head_dim, unrotated=head_dim // 2 - rotated)


_ATTENTION = "model.layers.{layer}.self_attn."
_LAYER = "model.layers.{layer}."
_EXPERTS = {
    "layers.router": f"{_LAYER}router.proj",
    "layers.router_norm": Source((f"{_LAYER}router.scale",)),
    "layers.expert_scale": Source((f"{_LAYER}router.per_expert_scale",)),
    "layers.expert_norm": f"{_LAYER}pre_feedforward_layernorm_2",
    "layers.post_expert_norm": f"{_LAYER}post_feedforward_layernorm_2",
    "layers.beside_expert_norm": f"{_LAYER}post_feedforward_layernorm_1",
    "layers.expert_gate_up": Source((f"{_LAYER}experts.gate_up_proj",), transpose=True),
    "layers.expert_down": Source((f"{_LAYER}experts.down_proj",), transpose=True),
}


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    assert config.full_heads is not None, "layers without a window have heads of their own"
    parts = "qk" if config.full_heads.keys_are_values else "qkv"
    names = {**NAMES, **INPUT_NAMES, **_EXPERTS, "layers.q": f"{_ATTENTION}q_proj"}
    for name in ("q", "o", "q_norm", "k_norm"):
        names[f"layers.full_{name}"] = names[f"layers.{name}"]
    for name in ("gate_up", "down"):
        names[f"layers.wide_{name}"] = names[f"layers.{name}"]
    return common.sources_from(
        config,
        {
            **names,
            "layers.full_qkv": tuple(f"{_ATTENTION}{part}_proj" for part in parts),
            "layers.layer_scale": Source(("model.layers.{layer}.layer_scalar",)),
        },
    )
