"""Gemma 3n, text: Gemma 3 with several residual streams, a low-rank residual, embeddings of tokens for each layer, sparse
gates in the first layers, and last layers that read the keys and values of earlier ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import common
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields, reads_every_field
from fastgen_jax.models.families.gemma2 import NAMES
from fastgen_jax.models.families.rope import ropes_by_layer_type
from fastgen_jax.models.stream_config import AltUp, LayerInputs

ARCHITECTURES = ("Gemma3nForCausalLM", "Gemma3nForConditionalGeneration")
FEATURES = "E2B and E4B without images and audio"
_SIZES = {"vocab_size": 262_400, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 16_384}


@reads_every_field
def config_from_hf(hf: Fields) -> ModelConfig:
    """Reads the fields of a Hugging Face `config.json`."""
    common.refuse_unsupported(hf, {"attention_bias": (False,), "use_bidirectional_attention": (False, None)})
    hf.ignore("attention_bias", "altup_coef_clip", "altup_lr_multiplier")  # these two are for training
    count = hf["num_hidden_layers"]
    windows = common.windows(hf, hf.get("sliding_window", 512), lambda layer: (layer + 1) % 5 != 0)
    context = hf.get("max_position_embeddings", 32_768)
    everywhere, windowed = ropes_by_layer_type(
        hf, max_context_len=context, theta=1_000_000.0, windowed_theta=hf.get("rope_local_base_freq") or 10_000.0
    )
    width = hf.get("intermediate_size", _SIZES["intermediate_size"])
    widths = set(width) if isinstance(width, list | tuple) else {width}
    if len(widths) != 1:
        raise ValueError(f"config.json has intermediate_size={width!r}; supported: the same width in all layers")
    known = hf.get("vocab_size_per_layer_input", 262_144)
    return ModelConfig(
        family="gemma3n",
        exceeds_float16=True,
        **common.sizes(hf, head_dim=256, assumed=_SIZES, mlp_dim=widths.pop()),
        max_context_len=context,
        rope=everywhere,
        layer_ropes=tuple(everywhere if window is None else windowed for window in windows),
        layer_windows=windows,
        kv_sources=kv_sources(windows, hf.get("num_kv_shared_layers", 15)),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        norm_placement="both",
        embed_multiplier=math.sqrt(hf["hidden_size"]),
        tie_embeddings=hf.get("tie_word_embeddings", True),
        logits_soft_cap=hf.get("final_logit_softcapping", 30.0),
        qk_norm="head",
        v_norm=True,
        attention_scale=1.0,
        activation=common.activation(hf, "hidden_activation", default="gelu_pytorch_tanh"),
        gate_cutoffs=_cutoffs(hf.get("activation_sparsity_pattern"), count),
        laurel_rank=hf.get("laurel_rank", 64),
        altup=AltUp(
            num_streams=hf.get("altup_num_inputs", 4),
            active=hf.get("altup_active_idx", 0),
            scaled=hf.get("altup_correct_scale", True),
        ),
        layer_inputs=LayerInputs(dim=hf.get("hidden_size_per_layer_input", 256), vocab_size=known, num_rows=known),
    )


def kv_sources(windows: Sequence[int | None], num_shared: int) -> tuple[int, ...]:
    """`kv_sources` of `ModelConfig` if the last layers read the keys of the last layer before them with the same window."""
    own = len(windows) - num_shared
    if not num_shared:
        return ()
    if missing := set(windows) - set(windows[: max(own, 0)]):
        kinds = " and ".join("full attention" if window is None else "a window" for window in missing)
        raise ValueError(
            f"config.json has num_kv_shared_layers={num_shared}, but no layer before the last {num_shared} of "
            f"{len(windows)} has keys for {kinds}"
        )
    last = {window: layer for layer, window in enumerate(windows[:own])}
    return (*range(own), *(last[window] for window in windows[own:]))


def _cutoffs(sparsity: Sequence[float] | float | None, count: int) -> tuple[float | None, ...]:
    """`gate_cutoffs`: the part of normally distributed gates that is to be 0, as a number of standard deviations."""
    if sparsity is None:
        sparse = 10 if count > 10 else 0
        sparsity = [0.95] * sparse + [0.0] * (count - sparse)
    if not isinstance(sparsity, Sequence):
        sparsity = [sparsity] * count
    if not all(0.0 <= part < 1.0 for part in sparsity):
        raise ValueError(f"config.json has activation_sparsity_pattern={sparsity!r}; each must be at least 0 and below 1")
    if not any(sparsity):
        return ()
    return tuple(NormalDist().inv_cdf(part) if part else None for part in sparsity)


_LAYER = "model.layers.{layer}."
INPUT_NAMES = {
    "layer_embed": "model.embed_tokens_per_layer",
    "layer_inputs_proj": "model.per_layer_model_projection",
    "layer_inputs_norm": "model.per_layer_projection_norm",
    "layers.input_gate": f"{_LAYER}per_layer_input_gate",
    "layers.input_proj": f"{_LAYER}per_layer_projection",
    "layers.input_norm": f"{_LAYER}post_per_layer_input_norm",
}
"""The modules of what is added to the residual stream in each layer."""


def sources(config: ModelConfig) -> dict[str, Source]:
    """The checkpoint tensors of each weight of `param_specs`."""
    assert config.altup is not None, "every Gemma 3n has several streams"
    others = range(config.altup.num_streams - 1)
    return common.sources_from(
        config,
        {
            **NAMES,
            **INPUT_NAMES,
            "layers.q": f"{_LAYER}self_attn.q_proj",
            "layers.laurel_in": f"{_LAYER}laurel.linear_left",
            "layers.laurel_out": f"{_LAYER}laurel.linear_right",
            "layers.laurel_norm": f"{_LAYER}laurel.post_laurel_norm",
            "layers.stream_router": f"{_LAYER}altup.modality_router",
            "layers.stream_router_norm": f"{_LAYER}altup.router_norm",
            "layers.stream_predict": Source((f"{_LAYER}altup.prediction_coefs.weight",), transpose=True),
            "layers.stream_correct": Source((f"{_LAYER}altup.correction_coefs.weight",), transpose=True),
            "layers.stream_scale": Source((f"{_LAYER}altup.correct_output_scale",)),
            "streams_in": [f"model.altup_projections.{i}" for i in others],
            **{f"stream_out_{i + 1}": f"model.altup_unembed_projections.{i}" for i in others},
        },
    )
