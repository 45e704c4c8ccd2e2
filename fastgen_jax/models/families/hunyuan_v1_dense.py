"""HunYuan, dense: Llama with a norm on each query and key head after the rotation, and a rotary base that is scaled once."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig, RopeConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import ModelFields, Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary

ARCHITECTURES = ("HunYuanDenseV1ForCausalLM",)
FEATURES = "0.5B to 7B; norms on queries and keys; biases"

_SUPPORTED = {"use_qk_norm": (True,), "use_cla": (False,), "use_rotary_pos_emb": (True,), "norm_type": ("rms",)}


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    common.refuse_unsupported(hf, _SUPPORTED)
    sizes, bias = common.sizes(hf), hf.get("attention_bias", False)
    common.refuse_unsupported(hf, {"attention_head_dim": (sizes["head_dim"],)})  # a copy
    # The last ones concern classification and cross-layer attention, or are numbers of tokens.
    hf.ignore(
        *_SUPPORTED, "attention_head_dim", "cla_share_factor", "eod_token_id", "org_vocab_size", "dense_list", "pool_type"
    )
    return ModelConfig(
        family="hunyuan_v1_dense",
        **sizes,
        **_positions(hf, sizes["head_dim"]),
        norm_eps=hf.get("rms_norm_eps", 1e-5),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
        qk_norm_rotated=True,
        activation=common.activation(hf, default="silu"),
    )


def _positions(hf: Fields, head_dim: int) -> ModelFields:
    """The rotary settings. A dynamic scaling with an `alpha` is a fixed factor of theta, whatever the length."""
    fields = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    alpha = fields.get("alpha")
    if not alpha or (fields.get("rope_type") or fields.get("type")) != "dynamic":
        return rotary(hf, max_context_len=2048)
    theta = float(fields.get("rope_theta") or hf.get("rope_theta") or 10_000.0)
    rope = RopeConfig(theta=theta * alpha ** (head_dim / (head_dim - 2)))
    return {"rope": rope, "max_context_len": hf.get("max_position_embeddings") or 2048}


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    attention = "model.layers.{layer}.self_attn."
    norms = {"layers.q_norm": f"{attention}query_layernorm", "layers.k_norm": f"{attention}key_layernorm"}
    return common.sources_from(config, common.LLAMA_NAMES | norms)
