"""Qwen3-Next: gated delta nets in three of four layers, gated attention in the fourth, and many small experts."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.experts import expert_names, sparse_layers
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary
from fastgen_jax.models.families.state_layers import queries_and_gates, split_key_heads, split_layers, state_names
from fastgen_jax.models.moe_config import MoEConfig
from fastgen_jax.models.state_config import DeltaNet

ARCHITECTURES = ("Qwen3NextForCausalLM",)
FEATURES = "gated delta nets and gated attention; experts in all or some layers, with a gated shared one"
LAYER = "model.layers.{layer}"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    activation = common.activation(hf, default="silu")
    return ModelConfig(
        family="qwen3_next",
        **common.sizes(hf, head_dim=256, mlp_dim=hf.get("intermediate_size", 5632)),
        **delta_net_model(hf),
        moe=MoEConfig(
            num_experts=hf.get("num_experts", 512),
            experts_per_token=hf.get("num_experts_per_tok", 10),
            expert_dim=hf.get("moe_intermediate_size", 512),
            layers=sparse_layers(
                hf["num_hidden_layers"],
                step=hf.get("decoder_sparse_step", 1),
                dense=hf.get("mlp_only_layers") or (),
            ),
            normalize=hf.get("norm_topk_prob", True),
            shared_dim=hf.get("shared_expert_intermediate_size", 512),
            shared_gate=True,
            activation=activation,
        ),
    )


def delta_net_model(hf: Fields) -> common.ModelFields:
    """What Qwen3-Next and Qwen3.5 have in common, as keyword arguments of `ModelConfig`."""
    count, interval = hf["num_hidden_layers"], hf.get("full_attention_interval", 4)
    types = hf.get("layer_types") or ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(count)]
    common.refuse_unsupported(hf, {"attn_output_gate": (True,)})
    hf.ignore("attn_output_gate", "mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
    attention, layers = split_layers(hf, types, ("linear_attention",))
    head_dim = hf.get("head_dim") or 256
    activation = common.activation(hf, default="silu")
    bias = hf.get("attention_bias", False)
    return {
        **rotary(hf, max_context_len=32_768, head_dim=head_dim, partial=0.25),
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "norm_offset": 1.0,
        "tie_embeddings": hf.get("tie_word_embeddings", False),
        "activation": activation,
        "qkv_bias": bias,
        "o_bias": bias,
        "qk_norm": "head",
        "attention_gate": True,
        "attention_layers": attention,
        "state": DeltaNet(
            layers=layers,
            num_heads=hf.get("linear_num_value_heads", 32),
            num_key_heads=hf.get("linear_num_key_heads", 16),
            key_dim=hf.get("linear_key_head_dim", 128),
            value_dim=hf.get("linear_value_head_dim", 128),
            width=hf.get("linear_conv_kernel_dim", 4),
            activation=activation,
        ),
    }


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    state, module = config.state, f"{LAYER}.linear_attn"
    assert isinstance(state, DeltaNet)
    share = state.num_heads // state.num_key_heads
    values = share * state.value_dim
    return common.sources_from(
        config,
        {
            **common.LLAMA_NAMES,
            **expert_names(config),
            **state_names(module),
            "layers.mix_in": f"{module}.in_proj_qkvz",
            "layers.mix_gates": f"{module}.in_proj_ba",
        },
        rearrange={
            "layers.qkv": queries_and_gates(config.num_heads, config.head_dim),
            "layers.mix_in": split_key_heads(state, (state.key_dim, state.key_dim, values, values)),
            "layers.mix_gates": split_key_heads(state, (share, share)),
        },
    )
