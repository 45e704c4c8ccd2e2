"""Granite 4: Mamba 2 in most layers, attention in a few; experts beside a shared MLP, or that MLP alone."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.granitemoe import multipliers
from fastgen_jax.models.families.rope import rotary
from fastgen_jax.models.families.state_layers import split_layers, state_names
from fastgen_jax.models.moe_config import MoEConfig
from fastgen_jax.models.state_config import Mamba2

ARCHITECTURES = ("GraniteMoeHybridForCausalLM",)
FEATURES = "Mamba 2 and attention; experts or none; multipliers; with or without rotary embedding"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    common.refuse_unsupported(
        hf, {"normalization_function": ("rmsnorm",), "position_embedding_type": (None, "rope", "nope")}
    )
    hf.ignore("normalization_function", "init_method", "mamba_chunk_size")
    bias, count = hf.get("attention_bias", False), hf["num_hidden_layers"]
    types = hf.first("layer_types", "layers_block_type", default=["mamba"] * count)
    attention, layers = split_layers(hf, types, ("mamba", "linear_attention"))
    positions = rotary(hf, max_context_len=2048)
    if hf.get("position_embedding_type") != "rope":
        positions |= {"rope": None}
    mlp_dim, num_experts = hf.get("shared_intermediate_size", 1024), hf.get("num_local_experts", 8)
    activation = common.activation(hf, default="silu")
    inner = hf.get("mamba_expand", 2) * hf["hidden_size"]
    num_heads, head_dim = hf.get("mamba_n_heads", 128), hf.get("mamba_d_head", "auto")
    limits = hf.get("time_step_limit", None)
    if limits is not None and float(limits[0]) != 0.0:
        raise ValueError(f"config.json has time_step_limit={limits!r}, which is not supported; supported: from 0 on")
    if num_experts:
        per_token, expert_dim = hf.get("num_experts_per_tok", 2), hf["intermediate_size"]
    else:
        hf.ignore("num_experts_per_tok", "intermediate_size")
    return ModelConfig(
        family="granitemoehybrid",
        **common.sizes(hf, mlp_dim=mlp_dim),
        **positions,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        qkv_bias=bias,
        o_bias=bias,
        **multipliers(hf),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        activation=activation,
        attention_layers=attention,
        state=Mamba2(
            layers=layers,
            num_heads=num_heads,
            head_dim=inner // num_heads if head_dim == "auto" else head_dim,
            num_groups=hf.get("mamba_n_groups", 1),
            state_dim=hf.get("mamba_d_state", 256),
            width=hf.get("mamba_d_conv", 4),
            activation=activation,
            conv_bias=hf.get("mamba_conv_bias", True),
            bias=hf.get("mamba_proj_bias", False),
        ),
        moe=MoEConfig(
            num_experts=num_experts,
            experts_per_token=per_token,
            expert_dim=expert_dim,
            layers=tuple(range(count)),
            scores="softmax_of_chosen",
            shared_dim=mlp_dim,
            activation=activation,
        )
        if num_experts
        else None,
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    layer = "model.layers.{layer}"
    shared = {"gate_up": f"{layer}.shared_mlp.input_linear", "down": f"{layer}.shared_mlp.output_linear"}
    return common.sources_from(
        config,
        {
            **common.LLAMA_NAMES,
            **state_names(f"{layer}.mamba"),
            "layers.mix_in": f"{layer}.mamba.in_proj",
            "layers.router": f"{layer}.block_sparse_moe.router.layer",
            "layers.expert_gate_up": f"{layer}.block_sparse_moe.input_linear",
            "layers.expert_down": f"{layer}.block_sparse_moe.output_linear",
            **{f"layers.shared_{part}": module for part, module in shared.items()},
            **{f"layers.{part}": module for part, module in shared.items()},
        },
    )
