"""GLM-4.5, 4.6 and 4.7: grouped attention with half of each head rotated, and DeepSeek V3's experts."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.deepseek_v2 import experts
from fastgen_jax.models.families.experts import expert_names
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary
from fastgen_jax.models.moe_config import MoEConfig

ARCHITECTURES = ("Glm4MoeForCausalLM",)
FEATURES = "GLM-4.5, Air, 4.6, 4.7; norms on queries and keys; experts in groups; no multi-token prediction"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    common.refuse_unsupported(hf, {"topk_method": ("noaux_tc",), "scoring_func": ("sigmoid",)})
    # The others follow from these, or concern multi-token prediction.
    hf.ignore("topk_method", "scoring_func", "num_local_experts", "num_nextn_predict_layers", "num_mtp_layers")
    sizes = common.sizes(hf, assumed={"num_key_value_heads": 8})
    return ModelConfig(
        family="glm4_moe",
        **sizes,
        **rotary(hf, max_context_len=131_072, head_dim=sizes["head_dim"], partial=0.5),
        norm_eps=hf.get("rms_norm_eps", 1e-5),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=hf.get("attention_bias", False),
        qk_norm="head" if hf.get("use_qk_norm", False) else None,
        activation=common.activation(hf, default="silu"),
        moe=MoEConfig(
            **experts(hf, num_dense=1, num_shared=1, scale=1.0),
            scores="sigmoid",
            choice_bias=True,
            normalize=hf.get("norm_topk_prob", True),
            num_groups=hf.get("n_group", 1) or 1,
            groups_per_token=hf.get("topk_group", 1) or 1,
            group_score="two_best",
        ),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(
        config,
        {
            **common.LLAMA_NAMES,
            **expert_names(config, shared="shared_experts"),
            "layers.choice_bias": Source(("model.layers.{layer}.mlp.gate.e_score_correction_bias",)),
        },
    )
