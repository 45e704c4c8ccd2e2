"""gpt-oss: attention sinks, a sliding window in every other layer, biases everywhere, experts with a clamped SwiGLU."""

from __future__ import annotations

import numpy as np

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary
from fastgen_jax.models.moe_config import MoEConfig

ARCHITECTURES = ("GptOssForCausalLM",)
FEATURES = "sinks; alternating windows; biases; YaRN; clamped experts, in bfloat16 or in MXFP4 as released"

_YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    }
}


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    common.refuse_unsupported(hf, {"hidden_act": ("silu",), "swiglu_alpha": (1.702,)})
    # The original files also have "initial_context_length" and "experts_per_token", which repeat other fields.
    hf.ignore("hidden_act", "swiglu_alpha", "initial_context_length", "experts_per_token")
    bias = hf.get("attention_bias", True)
    rope = hf if "rope_parameters" in hf or "rope_scaling" in hf else {**hf, **_YARN}
    return ModelConfig(
        family="gpt_oss",
        exceeds_float16=True,
        **common.sizes(hf, head_dim=64, assumed={"num_key_value_heads": 8}),
        **rotary(rope, max_context_len=131_072, theta=150_000.0),
        norm_eps=hf.get("rms_norm_eps", 1e-5),
        layer_windows=common.windows(hf, hf.get("sliding_window", 128), lambda layer: layer % 2 == 0),
        qkv_bias=bias,
        o_bias=bias,
        attention_sinks=True,
        tie_embeddings=hf.get("tie_word_embeddings", False),
        moe=MoEConfig(
            num_experts=hf.first("num_local_experts", "num_experts", default=128),
            experts_per_token=hf.get("num_experts_per_tok", 4),
            expert_dim=hf["intermediate_size"],
            layers=tuple(range(hf["num_hidden_layers"])),
            scores="softmax_of_chosen",
            router_bias=True,
            expert_bias=True,
            swiglu_limit=hf.get("swiglu_limit", 7.0),
        ),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    experts = "model.layers.{layer}.mlp.experts"
    return common.sources_from(
        config,
        {
            **common.LLAMA_NAMES,
            "layers.sinks": Source(("model.layers.{layer}.self_attn.sinks",)),
            "layers.router": "model.layers.{layer}.mlp.router",
            "layers.expert_gate_up": Source((f"{experts}.gate_up_proj",), rearrange=_gate_then_up),
            "layers.expert_gate_up_bias": Source((f"{experts}.gate_up_proj_bias",), rearrange=_gate_then_up),
            "layers.expert_down": Source((f"{experts}.down_proj",)),
            "layers.expert_down_bias": Source((f"{experts}.down_proj_bias",)),
        },
    )


def _gate_then_up(interleaved: np.ndarray) -> np.ndarray:
    return np.concatenate([interleaved[..., ::2], interleaved[..., 1::2]], axis=-1)
