"""DeepSeek V3.2 and GLM-5: V3 with sparse attention, in which an indexer chooses the tokens that a query attends to."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.deepseek_v2 import experts, latent_model, sources
from fastgen_jax.models.families.experts import layers_of_type
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.moe_config import IndexerConfig, MoEConfig

__all__ = ["ARCHITECTURES", "FEATURES", "config_from_hf", "sources"]

ARCHITECTURES = ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM")
FEATURES = "DeepSeek V3.2, GLM-5; sparse attention to the index_topk tokens that an indexer chooses; FP8 as released"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    common.refuse_unsupported(hf, {"topk_method": ("noaux_tc",), "scoring_func": ("sigmoid",)})
    hf.ignore("topk_method", "scoring_func", "layer_types")
    is_glm = "GlmMoeDsaForCausalLM" in (hf.get("architectures") or ())
    model = latent_model(
        hf,
        max_context_len=202_752 if is_glm else 163_840,
        q_rank=2048 if is_glm else 1536,
        indexer=IndexerConfig(
            num_heads=hf.get("index_n_heads", 32 if is_glm else 64),
            head_dim=hf.get("index_head_dim", 128),
            num_chosen=hf.get("index_topk", 2048),
            layers=_choosing(hf) if is_glm else tuple(range(hf["num_hidden_layers"])),
            rope_interleaved=hf.get("indexer_rope_interleave", is_glm),
        ),
    )
    model["norm_eps"] = hf.get("rms_norm_eps", 1e-5 if is_glm else 1e-6)
    of_experts = experts(hf, num_dense=3, num_shared=1, scale=2.5)
    of_experts["layers"] = layers_of_type(hf, of_experts["layers"])
    return ModelConfig(
        family="deepseek_v32",
        **model,
        moe=MoEConfig(
            **of_experts,
            scores="sigmoid",
            choice_bias=True,
            normalize=hf.get("norm_topk_prob", True),
            num_groups=hf.get("n_group", 1 if is_glm else 8) or 1,
            groups_per_token=hf.get("topk_group", 1 if is_glm else 4) or 1,
            group_score="two_best",
        ),
    )


def _choosing(hf: Fields) -> tuple[int, ...]:
    """The layers of a GLM that have an indexer: "full" in `indexer_types`, or else by a pattern or a frequency."""
    count = hf["num_hidden_layers"]
    pattern, frequency = hf.get("index_topk_pattern"), max(hf.get("index_topk_freq", 1), 1)
    first = hf.get("index_skip_topk_offset", 2) - 1
    types = hf.get("indexer_types") or pattern
    if types is None:
        return tuple(i for i in range(count) if max(i - first, 0) % frequency == 0)
    if len(types) != count or set(types) - {"full", "shared", "F", "S"}:
        raise ValueError(
            f"config.json has indexer_types={types!r}; supported: 'full' or 'shared' for each of the {count} layers"
        )
    return tuple(i for i, kind in enumerate(types) if kind in ("full", "F"))
