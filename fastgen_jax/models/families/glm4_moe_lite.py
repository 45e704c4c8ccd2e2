"""GLM-4.7-Flash: the latent attention and the experts of DeepSeek V3, with the names of GLM."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.deepseek_v2 import experts, latent_model, sources
from fastgen_jax.models.families.experts import layers_of_type
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.moe_config import MoEConfig

__all__ = ["ARCHITECTURES", "FEATURES", "config_from_hf", "sources"]

ARCHITECTURES = ("Glm4MoeLiteForCausalLM",)
FEATURES = "GLM-4.7-Flash; latent attention; experts in groups; dense layers among them; no multi-token prediction"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    common.refuse_unsupported(hf, {"topk_method": ("noaux_tc",), "scoring_func": ("sigmoid",)})
    hf.ignore("topk_method", "scoring_func")
    model = latent_model(hf, max_context_len=202_752)
    of_experts = experts(hf, num_dense=1, num_shared=1, scale=1.8)
    return ModelConfig(
        family="glm4_moe_lite",
        **model | {"norm_eps": hf.get("rms_norm_eps", 1e-5)},
        moe=MoEConfig(
            **of_experts | {"layers": layers_of_type(hf, of_experts["layers"])},
            scores="sigmoid",
            choice_bias=True,
            normalize=hf.get("norm_topk_prob", True),
            num_groups=hf.get("n_group", 1) or 1,
            groups_per_token=hf.get("topk_group", 1) or 1,
            group_score="two_best",
        ),
    )
