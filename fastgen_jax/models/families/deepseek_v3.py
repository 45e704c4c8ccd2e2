"""DeepSeek V3 and R1: V2 with sigmoid scores for experts and a learned bias that balances their choice.

Kimi K2 is a DeepSeek V3 of another size. Multimodal checkpoints of Kimi are read without their vision part.
"""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.deepseek_v2 import experts, latent_model, sources
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.moe_config import MoEConfig

__all__ = ["ARCHITECTURES", "FEATURES", "config_from_hf", "sources"]

ARCHITECTURES = ("DeepseekV3ForCausalLM", "KimiVLForConditionalGeneration", "KimiK25ForConditionalGeneration")
FEATURES = (
    "as DeepSeek V2, with sigmoid scores and a bias for the choice; FP8 as released; no multi-token prediction; Kimi K2; "
    "Kimi-VL and Kimi K2.5 without images"
)


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    common.refuse_unsupported(hf, {"topk_method": ("noaux_tc",), "scoring_func": ("sigmoid",)})
    hf.ignore("topk_method", "scoring_func")
    return ModelConfig(
        family="deepseek_v3",
        **latent_model(hf, max_context_len=4096),
        moe=MoEConfig(
            **experts(hf, num_dense=3, num_shared=1, scale=2.5),
            scores="sigmoid",
            choice_bias=True,
            normalize=hf.get("norm_topk_prob", True),
            num_groups=hf.get("n_group", 8) or 1,
            groups_per_token=hf.get("topk_group", 4) or 1,
            group_score="two_best",
        ),
    )
