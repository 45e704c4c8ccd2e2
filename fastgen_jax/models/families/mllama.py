"""Llama 3.2 Vision, text: Llama 3.1 without the layers that attend to images, which text does not pass through."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary

ARCHITECTURES = ("MllamaForConditionalGeneration",)
FEATURES = "11B and 90B without images; the layers of cross-attention are left out and the others renumbered"

_NOT_PREDICTED = 8  # embeddings after those of the vocabulary: <|image|> and 7 that are unused


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    sizes = common.sizes(hf, assumed={"vocab_size": 128_256})
    return ModelConfig(
        family="mllama",
        **sizes | {"num_layers": sizes["num_layers"] - len(hf["cross_attention_layers"])},
        **rotary(hf, max_context_len=131_072, theta=500_000.0),
        norm_eps=hf.get("rms_norm_eps", 1e-5),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        not_predicted=_NOT_PREDICTED,
        activation=common.activation(hf, default="silu"),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`; see `huggingface.decoder_tensors` for the layers' numbers."""
    return common.sources_from(config, common.LLAMA_NAMES)
