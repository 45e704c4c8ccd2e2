"""ERNIE 4.5 MoE: the dense ERNIE 4.5 with experts, a learned bias that balances their choice, and shared ones."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.experts import expert_names
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary
from fastgen_jax.models.moe_config import MoEConfig

ARCHITECTURES = ("Ernie4_5_MoeForCausalLM",)
FEATURES = "21B-A3B and 300B-A47B; dense layers first; shared experts; no multi-token prediction"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    common.refuse_unsupported(hf, {"use_bias": (False,), "moe_gate": ("topk",), "moe_use_aux_free": (True,)})
    # The first ones are checked above, the others concern training and multi-token prediction. moe_norm_min guards against
    # a division by zero, as the decoder does.
    hf.ignore("use_bias", "moe_gate", "moe_use_aux_free", "moe_capacity", "moe_norm_min", "num_nextn_predict_layers")
    width, count = hf["moe_intermediate_size"], hf["num_hidden_layers"]
    last = hf.get("moe_layer_end_index")
    first, step = hf.get("moe_layer_start_index", 1), hf.get("moe_layer_interval", 1)
    layers = range(first, count if last in (None, -1) else min(last + 1, count))
    return ModelConfig(
        family="ernie4_5_moe",
        **common.sizes(hf, assumed={"num_key_value_heads": 4}),
        **rotary(hf, max_context_len=131_072, theta=500_000.0),
        norm_eps=hf.get("rms_norm_eps", 1e-5),
        tie_embeddings=hf.get("tie_word_embeddings", True),
        activation=common.activation(hf, default="silu"),
        moe=MoEConfig(
            num_experts=hf.get("moe_num_experts", 64),
            experts_per_token=hf.get("moe_k", 6),
            expert_dim=width,
            layers=tuple(layer for layer in layers if (layer + 1) % step == 0),
            choice_bias=True,
            normalize=True,
            activation=common.activation(hf, default="silu"),
            shared_dim=width * (hf.get("moe_num_shared_experts", 2) or 0),
        ),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(
        config,
        {
            **common.LLAMA_NAMES,
            **expert_names(config, shared="shared_experts"),
            "layers.choice_bias": Source(("model.layers.{layer}.mlp.moe_statics.e_score_correction_bias",), is_row=True),
        },
        rearrange={"layers.qkv": common.adjacent_pairs_to_halves(config)},
    )
