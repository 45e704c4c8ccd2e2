"""GPT-BigCode (SantaCoder, StarCoder 1): GPT-2 with one key-value head, and matrices stored [out, in]."""

from __future__ import annotations

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.gpt2 import NAMES, gpt2_like

ARCHITECTURES = ("GPTBigCodeForCausalLM",)
FEATURES = "SantaCoder, StarCoder, StarCoderBase, StarChat; multi-query or multi-head; n_inner"

_OF_ITS_CODE = (
    "n_ctx",
    "num_key_value_heads",
    "attention_softmax_in_fp32",
    "scale_attention_softmax_in_fp32",
    "inference_runner",
    "max_batch_size",
    "max_sequence_length",
    "pad_key_length",
    "pre_allocate_kv_cache",
    "validate_runner_input",
)  # these affect how it runs, or follow from other fields


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    common.refuse_unsupported(hf, {"add_cross_attention": (False,)})
    hf.ignore(*_OF_ITS_CODE)
    return ModelConfig(
        family="gpt_bigcode",
        **gpt2_like(hf, activation="gelu_pytorch_tanh"),
        num_kv_heads=1 if hf.get("multi_query", True) else hf["n_head"],
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    return common.sources_from(config, NAMES, rearrange={"layers.qkv": common.split_kv_groups(config)})
