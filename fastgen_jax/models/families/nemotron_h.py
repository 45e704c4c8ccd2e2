"""Nemotron-H and Nemotron 3: each layer is Mamba 2, attention without positions, an MLP with a squared ReLU, or experts."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.experts import expert_names
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.state_layers import state_names
from fastgen_jax.models.moe_config import Activation, MoEConfig
from fastgen_jax.models.state_config import Mamba2

ARCHITECTURES = ("NemotronHForCausalLM",)
FEATURES = (
    "one block per layer: Mamba 2, attention, an MLP or experts; experts of the width of the model or of a latent one; "
    "no multi-token prediction"
)

_TYPES = {
    "M": "linear_attention",
    "*": "full_attention",
    "-": "mlp",
    "E": "moe",
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
            "Mamba 2 (M), attention (*), MLP (-) and experts (E)"
        )
    common.refuse_unsupported(hf, {"attention_bias": (False,), "mamba_proj_bias": (False,)})
    hf.ignore("attention_bias", "mamba_proj_bias", "mamba_ssm_cache_dtype", "moe_shared_expert_overlap")
    hf.ignore("expand", "chunk_size", "time_step_limit", "time_step_min", "time_step_max", "time_step_floor", "norm_eps")
    hf.ignore("num_logits_to_keep", "rescale_prenorm_residual", "use_mamba_kernels")
    hf.ignore("num_hidden_layers", "partial_rotary_factor", "rope_theta", "sliding_window", "residual_in_fp32")
    num_heads = hf["num_attention_heads"]

    def having(kind: str) -> tuple[int, ...]:
        return tuple(i for i, other in enumerate(types) if other == kind)

    activation = common.activation(hf, "mlp_hidden_act", default="relu2")
    moe = _experts(hf, having("moe"), activation)
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
        activation=activation,
        mlp_gated=False,
        mlp_bias=hf.get("mlp_bias", False),
        moe=moe,
        mlp_layers=tuple(sorted((*having("mlp"), *having("moe")))),
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


def _experts(hf: Fields, layers: tuple[int, ...], activation: Activation) -> MoEConfig | None:
    """The experts of the layers that have them. Configs of models without experts have these fields as well."""
    hf.ignore("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "routed_scaling_factor", "norm_topk_prob")
    hf.ignore("moe_intermediate_size", "moe_shared_expert_intermediate_size", "moe_latent_size", "n_group", "topk_group")
    hf.ignore("mtp_layers_block_type", "mtp_hybrid_override_pattern", "num_nextn_predict_layers", "num_local_experts")
    if not layers:
        return None
    common.refuse_unsupported(hf, {"mlp_bias": (False,), "n_shared_experts": (1,)})
    return MoEConfig(
        num_experts=hf.get("n_routed_experts", 8),
        experts_per_token=hf.get("num_experts_per_tok", 2),
        expert_dim=hf.get("moe_intermediate_size", 7688),
        layers=layers,
        scores="sigmoid",
        choice_bias=True,
        normalize=hf.get("norm_topk_prob", True),
        scale=hf.get("routed_scaling_factor", 1.0),
        num_groups=hf.get("n_group", 1) or 1,
        groups_per_token=hf.get("topk_group", 1) or 1,
        group_score="two_best",
        activation=activation,
        gated=False,
        shared_dim=hf.get("moe_shared_expert_intermediate_size", 7688),
        latent_dim=hf.get("moe_latent_size"),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    layer = "backbone.layers.{layer}"
    return common.sources_from(
        config,
        {
            **state_names(f"{layer}.mixer"),
            **(expert_names(config, block=f"{layer}.mixer", shared="shared_experts") if config.moe is not None else {}),
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
            "layers.choice_bias": Source((f"{layer}.mixer.gate.e_score_correction_bias",)),
            "layers.latent_in": f"{layer}.mixer.fc1_latent_proj",
            "layers.latent_out": f"{layer}.mixer.fc2_latent_proj",
        },
    )
