"""MiniMax M2: grouped attention, half of each head rotated, norms over all heads, and DeepSeek V3's choice of experts."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.experts import expert_names
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary
from fastgen_jax.models.moe_config import MoEConfig

ARCHITECTURES = ("MiniMaxM2ForCausalLM",)
FEATURES = "M2, M2.1 and M2.5; part of each head rotated; norms over all heads; FP8 as released; no multi-token prediction"

_PREDICTION = ("use_mtp", "num_mtp_modules", "mtp_transformer_layers")  # multi-token prediction, which is not used


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    supported = {
        "use_qk_norm": (True,),
        "qk_norm_type": ("per_layer",),
        "use_routing_bias": (True,),
        "scoring_func": ("sigmoid",),
        "shared_intermediate_size": (0,),
    }
    common.refuse_unsupported(hf, supported)
    if set(hf.get("attn_type_list") or ()) - {1}:
        raise ValueError(
            "config.json has an attn_type_list with other values than 1 (softmax attention), which is not supported"
        )
    hf.ignore(*supported, *_PREDICTION, "router_jitter_noise")  # the last one is noise for training
    sizes = common.sizes(hf, head_dim=128, assumed={"num_key_value_heads": 8})
    rotated = hf.get("rotary_dim") or sizes["head_dim"]
    activation = common.activation(hf, default="silu")
    return ModelConfig(
        family="minimax_m2",
        **sizes,
        **rotary(
            hf,
            max_context_len=196_608,
            theta=5_000_000.0,
            head_dim=sizes["head_dim"],
            partial=rotated / sizes["head_dim"],
        ),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qk_norm="row",
        activation=activation,
        moe=MoEConfig(
            num_experts=hf.first("num_local_experts", "num_experts", default=256),
            experts_per_token=hf.get("num_experts_per_tok", 8),
            expert_dim=hf["intermediate_size"],
            layers=tuple(range(hf["num_hidden_layers"])),
            scores="sigmoid",
            choice_bias=True,
            normalize=True,
            activation=activation,
        ),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    block = "model.layers.{layer}.block_sparse_moe"
    return common.sources_from(
        config,
        {
            **common.LLAMA_NAMES,
            **expert_names(config, block=block, gate="w1", up="w3", down="w2"),
            "layers.choice_bias": Source((f"{block}.e_score_correction_bias",)),
        },
    )
