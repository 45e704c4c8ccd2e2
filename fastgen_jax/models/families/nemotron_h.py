"""Nemotron-H: each layer is Mamba 2, attention without positions, or an MLP with a squared ReLU."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.state_layers import state_names
from fastgen_jax.models.state_config import Mamba2

ARCHITECTURES = ("NemotronHForCausalLM",)
FEATURES = "one block per layer: Mamba 2, attention or an MLP; no experts"

_TYPES = {
    "M": "linear_attention",
    "*": "full_attention",
    "-": "mlp",
    "mamba": "linear_attention",
    "attention": "full_attention",
}


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    types = hf.first("layers_block_type", "layer_types", "hybrid_override_pattern")
    types = [_TYPES.get(kind, kind) for kind in types]
    unknown = set(types) - set(_TYPES.values())
    if unknown:
        raise ValueError(
            f"config.json has layers of type {', '.join(map(repr, sorted(unknown)))}, which are not supported; supported: "
            "Mamba 2 (M), attention (*) and MLP (-)"
        )
    common.refuse_unsupported(hf, {"attention_bias": (False,), "mamba_proj_bias": (False,)})
    hf.ignore("attention_bias", "mamba_proj_bias", "mamba_ssm_cache_dtype", "moe_shared_expert_overlap")
    _ignore_experts(hf)
    hf.ignore("expand", "chunk_size", "time_step_limit", "time_step_min", "time_step_max", "time_step_floor", "norm_eps")
    hf.ignore("num_logits_to_keep", "rescale_prenorm_residual", "use_mamba_kernels")
    hf.ignore("num_hidden_layers", "partial_rotary_factor", "rope_theta", "sliding_window", "residual_in_fp32")
    num_heads = hf["num_attention_heads"]

    def having(kind: str) -> tuple[int, ...]:
        return tuple(i for i, other in enumerate(types) if other == kind)

    bias = hf.get("use_bias", False)
    groups = hf.first("n_groups", "mamba_n_groups", default=8)
    return ModelConfig(
        family="nemotron_h",
        vocab_size=hf["vocab_size"],
        num_layers=len(types),
        embed_dim=hf["hidden_size"],
        num_heads=num_heads,
        num_kv_heads=hf.get("num_key_value_heads", 8) or num_heads,
        head_dim=hf.first("attention_head_dim", "head_dim", default=128),
        mlp_dim=hf["intermediate_size"],
        max_context_len=hf.get("max_position_embeddings", 4096),
        **common.special_tokens(hf),
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        rope=None,
        attention_layers=having("full_attention"),
        activation=common.activation(hf, "mlp_hidden_act", default="relu2"),
        mlp_gated=False,
        mlp_bias=hf.get("mlp_bias", False),
        mlp_layers=having("mlp"),
        state=Mamba2(
            layers=having("linear_attention"),
            num_heads=hf.get("mamba_num_heads", 128),
            head_dim=hf.get("mamba_head_dim", 64),
            num_groups=groups,
            state_dim=hf.get("ssm_state_size", 128),
            width=hf.first("conv_kernel", "mamba_d_conv", default=4),
            activation=common.activation(hf, "mamba_hidden_act", default="silu"),
            conv_bias=hf.get("use_conv_bias", True),
            bias=bias,
            norm_groups=groups,
        ),
    )


def _ignore_experts(hf: Fields) -> None:
    """The fields of experts, which configs without experts have as well."""
    hf.ignore("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "routed_scaling_factor", "norm_topk_prob")
    hf.ignore("moe_intermediate_size", "moe_shared_expert_intermediate_size", "moe_latent_size", "n_group", "topk_group")
    hf.ignore("mtp_layers_block_type", "mtp_hybrid_override_pattern", "num_nextn_predict_layers")


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    layer = "backbone.layers.{layer}"
    return common.sources_from(
        config,
        {
            **state_names(f"{layer}.mixer"),
            "embed": "backbone.embeddings",
            "final_norm": "backbone.norm_f",
            "lm_head": "lm_head",
            "layers.attn_norm": f"{layer}.norm",
            "layers.mlp_norm": f"{layer}.norm",
            "layers.mix_in": f"{layer}.mixer.in_proj",
            "layers.qkv": tuple(f"{layer}.mixer.{x}_proj" for x in "qkv"),
            "layers.o": f"{layer}.mixer.o_proj",
            "layers.up": f"{layer}.mixer.up_proj",
            "layers.down": f"{layer}.mixer.down_proj",
        },
    )
