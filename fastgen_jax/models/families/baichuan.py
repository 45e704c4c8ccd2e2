"""Baichuan 1 and 2: Llama with fused queries, keys and values; the 13B have ALiBi, and version 2 a head of unit vectors."""

from __future__ import annotations

import dataclasses

import numpy as np

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.rope import rotary

ARCHITECTURES = ("BaichuanForCausalLM", "BaiChuanForCausalLM")
FEATURES = "7B (rotary) and 13B (ALiBi), versions 1 and 2"

NAMES = common.LLAMA_NAMES | {"layers.qkv": "model.layers.{layer}.self_attn.W_pack"}
VOCAB_SIZE_2 = 125_696
"""Nothing else in config.json tells the versions apart."""


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    hf.ignore("z_loss_weight", "model_max_length")
    sizes = common.sizes(hf)
    # Only the 7B have this field; their code is another one.
    if hf.get("max_position_embeddings"):
        positions = rotary(hf, max_context_len=4096)
    else:
        positions = {"rope": None, "max_context_len": hf.get("model_max_length", 4096)}
        positions["alibi_slopes"] = common.alibi_slopes(sizes["num_heads"])
    return ModelConfig(
        family="baichuan",
        **sizes,
        **positions,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        activation=common.activation(hf, default="silu"),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    found = common.sources_from(config, NAMES)
    if config.vocab_size == VOCAB_SIZE_2:
        found["lm_head"] = dataclasses.replace(found["lm_head"], rearrange=_of_unit_length, keeps_values=False)
    return found


def _of_unit_length(head: np.ndarray) -> np.ndarray:
    """The head [E, V] with columns of length 1, as the published code normalizes it when it is first used; in float32."""
    if head.ndim != 2:
        raise ValueError("the head of Baichuan 2 is normalized when it is loaded, so it must not be quantized")
    head = head.astype(np.float32)
    return head / np.maximum(np.sqrt(np.sum(np.square(head), axis=0, keepdims=True)), 1e-12)
