"""DeepSeek V2: latent attention, dense layers first, then experts chosen from the best groups.

deepseek_v3.py reads V3 with the same functions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from fastgen_jax.models.config import ModelConfig, RopeConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import ModelFields, Source
from fastgen_jax.models.families.experts import expert_names
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary
from fastgen_jax.models.moe_config import IndexerConfig, MLAConfig, MoEConfig

ARCHITECTURES = ("DeepseekV2ForCausalLM",)
FEATURES = "latent attention (latents are cached); dense layers first; experts in groups; shared experts; YaRN"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    common.refuse_unsupported(hf, {"topk_method": ("greedy", "group_limited_greedy"), "scoring_func": ("softmax",)})
    hf.ignore("scoring_func")
    in_groups = hf.get("topk_method") == "group_limited_greedy"
    if hf.get("norm_topk_prob"):  # transformers never normalizes the weights of the chosen experts
        hf.have_no_effect(norm_topk_prob=True)
    num_groups, groups_per_token = hf.get("n_group") or 1, hf.get("topk_group") or 1
    return ModelConfig(
        family="deepseek_v2",
        **latent_model(hf, max_context_len=2048),
        moe=MoEConfig(
            **experts(hf, num_dense=0, num_shared=2, scale=1.0),
            num_groups=num_groups if in_groups else 1,
            groups_per_token=groups_per_token if in_groups else 1,
        ),
    )


def latent_model(
    hf: Fields, *, max_context_len: int, q_rank: int = 1536, indexer: IndexerConfig | None = None
) -> ModelFields:
    """Everything except the experts, as keyword arguments of `ModelConfig`; `max_context_len` and `q_rank` are defaults."""
    common.refuse_unsupported(hf, {"mlp_bias": (False,), "moe_layer_freq": (1,)})
    # The others follow from the sizes, or concern training and multi-token prediction.
    hf.ignore(
        "mlp_bias",
        "moe_layer_freq",
        "head_dim",
        "qk_head_dim",
        "num_key_value_heads",
        "num_local_experts",
        "aux_loss_alpha",
        "seq_aux",
        "ep_size",
        "num_nextn_predict_layers",
        "num_mtp_layers",
    )
    nope_dim, rope_dim, kv_rank = hf["qk_nope_head_dim"], hf["qk_rope_head_dim"], hf["kv_lora_rank"]
    positions = rotary(hf, max_context_len=max_context_len)
    positions["rope"] = dataclasses.replace(positions["rope"], dim=rope_dim)
    bias = hf.get("attention_bias", False)
    mla = MLAConfig(
        kv_rank=kv_rank,
        rope_dim=rope_dim,
        nope_dim=nope_dim,
        v_dim=hf["v_head_dim"],
        q_rank=hf.get("q_lora_rank", q_rank) or None,
        rope_interleaved=hf.get("rope_interleave", True),
        kv_bias=bias,
        indexer=indexer,
    )
    return {
        "vocab_size": hf["vocab_size"],
        "num_layers": hf["num_hidden_layers"],
        "embed_dim": hf["hidden_size"],
        "num_heads": hf["num_attention_heads"],
        "num_kv_heads": 1,
        "head_dim": kv_rank + mla.beside_latent,
        "mlp_dim": hf["intermediate_size"],
        **positions,
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "attention_scale": _attention_scale(nope_dim + rope_dim, positions["rope"]),
        "o_bias": bias,
        "mla": mla,
        "activation": common.activation(hf, default="silu"),
        "tie_embeddings": hf.get("tie_word_embeddings", False),
        **common.special_tokens(hf),
    }


def experts(hf: Fields, *, num_dense: int, num_shared: int, scale: float) -> ModelFields:
    """The expert fields that V2 and V3 share, as keyword arguments of `MoEConfig`; the arguments are defaults."""
    return {
        "num_experts": hf["n_routed_experts"],
        "experts_per_token": hf["num_experts_per_tok"],
        "expert_dim": hf["moe_intermediate_size"],
        "layers": tuple(range(hf.get("first_k_dense_replace", num_dense), hf["num_hidden_layers"])),
        "scale": hf.get("routed_scaling_factor", scale),
        "activation": common.activation(hf, default="silu"),
        "shared_dim": hf["moe_intermediate_size"] * (hf.get("n_shared_experts", num_shared) or 0),
    }


def _attention_scale(qk_dim: int, rope: RopeConfig) -> float:
    """1 / sqrt(D), multiplied by the square of YaRN's mscale if `mscale_all_dim` is set."""
    scale = qk_dim**-0.5
    if rope.kind == "default" or not rope.mscale_all_dim or rope.factor <= 1.0:
        return scale
    return scale * (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0) ** 2


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    attention = "model.layers.{layer}.self_attn"
    mla = config.mla
    assert mla is not None, "this family has latent attention"
    paired = {}
    if mla.rope_interleaved:
        per_head = mla.nope_dim + mla.rope_dim
        paired = {
            "layers.q": _pairs_to_halves(config.num_heads, per_head, mla.rope_dim),
            "layers.q_b": _pairs_to_halves(config.num_heads, per_head, mla.rope_dim),
            "layers.kv_a": _pairs_to_halves(1, mla.kv_rank + mla.rope_dim, mla.rope_dim),
        }
    if mla.indexer is not None and mla.indexer.rope_interleaved:
        # The rotated dimensions are the first ones; the norm of keys comes before the rotation.
        dim, heads = mla.indexer.head_dim, mla.indexer.num_heads
        one = common.rope_pairs_to_halves(dim, 1, dim=mla.rope_dim)
        paired["layers.index_q"] = common.rope_pairs_to_halves(dim, heads, dim=mla.rope_dim)
        paired |= {"layers.index_k": one, "layers.index_k_norm": one}
    return common.sources_from(
        config,
        {
            **common.LLAMA_NAMES,
            **expert_names(config, shared="shared_experts"),
            "layers.index_q": f"{attention}.indexer.wq_b",
            "layers.index_k": f"{attention}.indexer.wk",
            "layers.index_k_norm": f"{attention}.indexer.k_norm",
            "layers.index_weights": f"{attention}.indexer.weights_proj",
            "layers.q": f"{attention}.q_proj",
            "layers.q_a": f"{attention}.q_a_proj",
            "layers.q_a_norm": f"{attention}.q_a_layernorm",
            "layers.q_b": f"{attention}.q_b_proj",
            "layers.kv_a": f"{attention}.kv_a_proj_with_mqa",
            "layers.kv_a_norm": f"{attention}.kv_a_layernorm",
            "layers.kv_b": f"{attention}.kv_b_proj",
            "layers.choice_bias": Source(("model.layers.{layer}.mlp.gate.e_score_correction_bias",)),
        },
        rearrange=paired,
    )


def _pairs_to_halves(heads: int, head_dim: int, rope_dim: int) -> Callable[[np.ndarray], np.ndarray]:
    """Reorders the last `rope_dim` outputs of each head from x0 y0 x1 y1 ... to x0 x1 ... y0 y1 ..., as `rotate` needs."""

    def rearrange(x: np.ndarray) -> np.ndarray:
        per_head = x.reshape(*x.shape[:-1], heads, head_dim)
        kept, rotated = per_head[..., :-rope_dim], per_head[..., -rope_dim:]
        return np.concatenate([kept, rotated[..., ::2], rotated[..., 1::2]], axis=-1).reshape(x.shape)

    return rearrange
