"""Llama 4, text (Scout, Maverick): attention within chunks in three of four layers, experts that weigh their inputs.

The other layers attend to everything, without positions. Multimodal checkpoints are read without their vision part.
"""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig, QueryGrowth
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.experts import expert_names
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary
from fastgen_jax.models.moe_config import MoEConfig

ARCHITECTURES = ("Llama4ForCausalLM", "Llama4ForConditionalGeneration")
FEATURES = "Scout and Maverick without images; chunks; queries scaled by position; dense layers among those with experts"


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    # With this switch each expert has tensors of its own, which is the layout of the releases in FP8.
    common.refuse_unsupported(hf, {"for_llm_compressor": (False,)})
    hf.ignore(
        "for_llm_compressor", "router_jitter_noise", "nope_layer_interval"
    )  # noise for training; not read by transformers
    count, bias = hf["num_hidden_layers"], hf.get("attention_bias", False)
    positions = rotary(hf, max_context_len=131_072, theta=500_000.0)
    interval, step = hf.get("no_rope_layer_interval", 4), hf.get("interleave_moe_layer_step", 1)
    turns = hf.get("no_rope_layers") or [(layer + 1) % interval != 0 for layer in range(count)]  # true: it rotates
    kinds = hf.get("layer_types") or ["chunked_attention" if turn else "full_attention" for turn in turns]
    if unknown := set(kinds) - {"chunked_attention", "full_attention"}:
        raise ValueError(f"config.json has layer_types with {sorted(unknown)}; supported: chunked_attention, full_attention")
    size = hf.get("attention_chunk_size", 8192)
    with_experts = hf.get("moe_layers")
    growth = QueryGrowth(weight=hf.get("attn_scale", 0.1), length=hf.get("floor_scale", 8192), first=1, unrotated_only=True)
    activation = common.activation(hf, default="silu")
    return ModelConfig(
        family="llama4",
        **common.sizes(hf) | {"mlp_dim": hf.get("intermediate_size_mlp", 16_384)},
        **positions,
        layer_ropes=tuple(positions["rope"] if turn else None for turn in turns),
        layer_windows=tuple(size if kind == "chunked_attention" else None for kind in kinds),
        window_chunks=True,
        norm_eps=hf.get("rms_norm_eps", 1e-5),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="unit" if hf.get("use_qk_norm", True) else None,
        query_growth=growth if hf.get("attn_temperature_tuning", True) else None,
        activation=activation,
        moe=MoEConfig(
            num_experts=hf.first("num_local_experts", "num_experts", default=16),
            experts_per_token=hf.get("num_experts_per_tok", 1),
            expert_dim=hf["intermediate_size"],
            layers=tuple(range(step - 1, count, step) if with_experts is None else with_experts),
            scores="sigmoid_of_chosen",
            weigh_inputs=True,
            activation=activation,
            shared_dim=hf["intermediate_size"],
        ),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    block = "model.layers.{layer}.feed_forward"
    return common.sources_from(
        config,
        {
            **common.LLAMA_NAMES,
            **expert_names(config, block=block, router="router"),
            "layers.gate_up": (f"{block}.gate_proj", f"{block}.up_proj"),
            "layers.down": f"{block}.down_proj",
            "layers.expert_gate_up": Source((f"{block}.experts.gate_up_proj",)),
            "layers.expert_down": Source((f"{block}.experts.down_proj",)),
        },
        rearrange={"layers.qkv": common.adjacent_pairs_to_halves(config)},
    )
