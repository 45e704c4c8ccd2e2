"""Phi-3.5-MoE: Mixtral with LayerNorms and biases, LongRoPE, and experts that are chosen one after another (SparseMixer)."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import ModelFields, Source
from fastgen_jax.models.families.experts import expert_names
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary, with_settings
from fastgen_jax.models.moe_config import MoEConfig

ARCHITECTURES = ("PhiMoEForCausalLM", "PhimoeForCausalLM")
FEATURES = "Phi-3.5-MoE; LongRoPE; sliding window; biases, also in the head"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    common.refuse_unsupported(hf, {"num_experts_per_tok": (2,)})
    hf.ignore("input_jitter_noise")  # noise for training
    bias, activation = hf.get("attention_bias", False), common.activation(hf, default="silu")
    return ModelConfig(
        family="phimoe",
        **common.sizes(hf, assumed={"num_key_value_heads": 8}),
        **_positions(hf),
        layer_windows=common.windows(hf, hf.get("sliding_window"), lambda layer: True),
        norm="layer",
        norm_bias=True,
        norm_eps=hf.get("rms_norm_eps", 1e-5),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        head_bias=hf.get("lm_head_bias", False),
        qkv_bias=bias,
        o_bias=bias,
        moe=MoEConfig(
            num_experts=hf.first("num_local_experts", "num_experts", default=16),
            experts_per_token=hf.get("num_experts_per_tok", 2),
            expert_dim=hf["intermediate_size"],
            layers=tuple(range(hf["num_hidden_layers"])),
            scores="sparse_mixer",
            mixer_tolerance=hf.get("router_jitter_noise", 0.01),
            activation=activation,
        ),
    )


def _positions(hf: Fields) -> ModelFields:
    """The rotary settings. LongRoPE's scale of cosines and sines is stated for short and long sequences."""
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    stated = {rope.pop(name) for name in ("short_mscale", "long_mscale") if name in rope}
    if len(stated) > 1:
        raise ValueError(
            f"rope_scaling has a short_mscale and a long_mscale that differ ({sorted(stated)}); supported: equal"
        )
    if stated:
        rope["attention_factor"] = stated.pop()
    return rotary(with_settings(hf, rope), max_context_len=131_072, theta=1_000_000.0)


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    block = "model.layers.{layer}.block_sparse_moe"
    experts = expert_names(config, block=block, gate="w1", up="w3", down="w2")
    return common.sources_from(config, {**common.LLAMA_NAMES, **experts})
