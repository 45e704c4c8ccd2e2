"""Finds out from the files of a checkpoint whether the model reads images, and how."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from fastgen_jax.json_types import JsonFields
from fastgen_jax.models.families.common import activation, refuse_unsupported
from fastgen_jax.models.families.fields import Fields
from fastgen_jax.models.vision.config import ImagesConfig, SiglipConfig, TowerWeight
from fastgen_jax.models.vision.weights import siglip_weights

_PREFIXES = re.compile(r"^model\.(?=vision_tower\.|multi_modal_projector\.)")


def images_from_hf(hf: JsonFields, preprocessor: JsonFields) -> ImagesConfig | None:
    """How a model with this config.json reads images; None if it does not, or its tower is not supported.

    `preprocessor` holds the fields of preprocessor_config.json; empty if there is none. Raises ValueError, and KeyError for
    a missing field, if the tower is supported in principle.
    """
    if hf.get("architectures") == ["Gemma3ForConditionalGeneration"] and hf.get("vision_config"):
        return _gemma3(hf, preprocessor)
    return None


def _gemma3(hf: JsonFields, preprocessor: JsonFields) -> ImagesConfig:
    vision, text = Fields(hf["vision_config"]), Fields(hf["text_config"])
    refuse_unsupported(vision, {"model_type": ("siglip_vision_model",), "num_channels": (3,)})
    # With pan-and-scan, parts of a picture would be further images.
    refuse_unsupported(
        preprocessor,
        {
            "do_resize": (True, None),
            "do_rescale": (True, None),
            "do_normalize": (True, None),
            "do_pan_and_scan": (False, None),
        },
    )
    tower = SiglipConfig(
        image_size=vision.get("image_size", 224),
        patch_size=vision.get("patch_size", 16),
        num_layers=vision.get("num_hidden_layers", 12),
        embed_dim=vision.get("hidden_size", 768),
        num_heads=vision.get("num_attention_heads", 12),
        mlp_dim=vision.get("intermediate_size", 3072),
        norm_eps=vision.get("layer_norm_eps", 1e-6),
        activation=activation(vision, default="gelu_pytorch_tanh"),
        tokens_per_image=hf.get("mm_tokens_per_image", 256),
        text_dim=text.get("hidden_size", 2304),
        mean=_three(preprocessor.get("image_mean"), 0.5),
        std=_three(preprocessor.get("image_std"), 0.5),
        rescale=preprocessor.get("rescale_factor", 1 / 255),
    )
    size = preprocessor.get("size")
    if size is not None and (size.get("height"), size.get("width")) != (tower.image_size, tower.image_size):
        raise ValueError(
            f"preprocessor_config.json has size={size}, but the tower reads images of {tower.image_size} pixels"
        )
    return ImagesConfig(
        tower=tower,
        image_token_id=hf.get("image_token_index", hf.get("image_token_id", 262_144)),
        start_token_id=hf.get("boi_token_index", hf.get("boi_token_id", 255_999)),
        end_token_id=hf.get("eoi_token_index", hf.get("eoi_token_id", 256_000)),
        resample=preprocessor.get("resample", 2),
        is_whole=True,
    )


def _three(values: Any, default: float) -> tuple[float, float, float]:
    first, second, third = values or 3 * (default,)
    return float(first), float(second), float(third)


def tower_name(name: str) -> str:
    """The name of a tensor as `TowerWeight` has it: prefixes of some versions of transformers are left out."""
    return _PREFIXES.sub("", name).replace("vision_tower.vision_model.", "vision_tower.", 1)


def tower_weights(images: ImagesConfig) -> dict[str, TowerWeight]:
    """The weights of the tower of a model, by their paths."""
    return siglip_weights(images.tower)


def tower_bytes(images: ImagesConfig, itemsize: int) -> int:
    """Bytes of these weights with `itemsize` bytes per number."""
    layers = images.tower.num_layers
    found: Mapping[str, TowerWeight] = tower_weights(images)
    return itemsize * sum(math.prod(w.shape) * (layers if w.per_layer else 1) for w in found.values())
