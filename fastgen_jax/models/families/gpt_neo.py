"""GPT-Neo: GPT-2 with a sliding window in every other layer, and scores that are not scaled."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common, gpt2
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field

ARCHITECTURES = ("GPTNeoForCausalLM",)
FEATURES = "125M to 2.7B; any pattern of global and local layers"

_ATTENTION = "transformer.h.{layer}.attn.attention."
NAMES = gpt2.NAMES | {
    "layers.qkv": tuple(f"{_ATTENTION}{x}_proj" for x in "qkv"),
    "layers.o": f"{_ATTENTION}out_proj",
}


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    hf.ignore("attention_layers")  # `attention_types`, written out
    num_heads, embed_dim = hf["num_heads"], hf["hidden_size"]
    context = hf.get("max_position_embeddings", 2048)
    return ModelConfig(
        family="gpt_neo",
        vocab_size=hf["vocab_size"],
        num_layers=hf["num_layers"],
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=embed_dim // num_heads,
        mlp_dim=hf.get("intermediate_size") or 4 * embed_dim,
        max_context_len=context,
        norm="layer",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        norm_bias=True,
        learned_positions=context,
        rope=None,
        layer_windows=_windows(hf),
        tie_embeddings=hf.get("tie_word_embeddings", True),
        o_bias=True,
        attention_scale=1.0,
        activation=common.activation(hf, "activation_function", default="gelu_new"),
        mlp_gated=False,
        mlp_bias=True,
        **common.special_tokens(hf),
    )


def _windows(hf: Fields) -> tuple[int | None, ...]:
    """`layer_windows`, from a list of (pattern, repetitions) such as (["global", "local"], 12)."""
    patterns = hf.get("attention_types") or [[["global", "local"], 12]]
    kinds = [kind for pattern, repetitions in patterns for _ in range(repetitions) for kind in pattern]
    if unknown := set(kinds) - {"global", "local"}:
        raise ValueError(f"config.json has attention_types with {sorted(unknown)}; supported: 'global' and 'local'")
    size = hf.get("window_size", 256)
    return tuple(size if kind == "local" else None for kind in kinds)


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, NAMES)
