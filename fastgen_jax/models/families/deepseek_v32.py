"""DeepSeek V3.2 and GLM-5: V3 with sparse attention, for contexts in which that is the same as attention to every token.

An indexer chooses the `index_topk` tokens (2,048 in all releases) that each query attends to. Up to that many tokens it
chooses all of them. Longer contexts are refused, and the weights of the indexer are not loaded.
"""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.deepseek_v2 import experts, latent_model, sources
from fastgen_jax.models.families.experts import layers_of_type
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.moe_config import MoEConfig

__all__ = ["ARCHITECTURES", "FEATURES", "config_from_hf", "sources"]

ARCHITECTURES = ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM")
FEATURES = (
    "DeepSeek V3.2, GLM-5; contexts up to index_topk (2,048 tokens), in which sparse attention is dense; FP8 as released"
)


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    common.refuse_unsupported(hf, {"topk_method": ("noaux_tc",), "scoring_func": ("sigmoid",)})
    hf.ignore(
        "topk_method",
        "scoring_func",
        "index_head_dim",
        "index_n_heads",
        "indexer_rope_interleave",
        "indexer_types",
        "layer_types",
    )
    is_glm = "GlmMoeDsaForCausalLM" in hf.get("architectures", ())
    model = latent_model(hf, max_context_len=202_752 if is_glm else 163_840)
    of_experts = experts(hf, num_dense=3, num_shared=1, scale=2.5)
    return ModelConfig(
        family="deepseek_v32",
        **model
        | {
            "max_context_len": min(model["max_context_len"], hf.get("index_topk", 2048)),
            "norm_eps": hf.get("rms_norm_eps", 1e-5 if is_glm else 1e-6),
        },
        moe=MoEConfig(
            **of_experts | {"layers": layers_of_type(hf, of_experts["layers"])},
            scores="sigmoid",
            choice_bias=True,
            normalize=hf.get("norm_topk_prob", True),
            num_groups=hf.get("n_group", 1 if is_glm else 8) or 1,
            groups_per_token=hf.get("topk_group", 1 if is_glm else 4) or 1,
            group_score="two_best",
        ),
    )
