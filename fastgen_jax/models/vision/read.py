"""Finds out from the files of a checkpoint whether the model reads images, and how."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastgen_jax.json_types import JsonFields
from fastgen_jax.models.families.common import activation, refuse_unsupported
from fastgen_jax.models.families.fields import Fields
from fastgen_jax.models.vision.config import ImagesConfig, QwenVisionConfig, SiglipConfig
from fastgen_jax.models.vision.weights import weights

_PREFIXES = re.compile(r"^model\.(?=vision_tower\.|multi_modal_projector\.|visual\.)")
_QWEN = {
    "Qwen2VLForConditionalGeneration": "qwen2",
    "Qwen2_5_VLForConditionalGeneration": "qwen2.5",
    "Qwen3VLForConditionalGeneration": "qwen3",
    "Qwen3VLMoeForConditionalGeneration": "qwen3",
}
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def images_from_hf(hf: JsonFields, preprocessor: JsonFields) -> ImagesConfig | None:
    """How a model with this config.json reads images; None if it does not, or its tower is not supported.

    `preprocessor` holds the fields of preprocessor_config.json; empty if there is none. Raises ValueError, and KeyError for
    a missing field, if the tower is supported in principle.
    """
    name = next(iter(hf.get("architectures") or ()), None)
    if not hf.get("vision_config"):
        return None
    if name == "Gemma3ForConditionalGeneration":
        return _gemma3(hf, preprocessor)
    return _qwen(hf, preprocessor, _QWEN[name]) if name in _QWEN else None


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
        mean=_three(preprocessor.get("image_mean"), (0.5, 0.5, 0.5)),
        std=_three(preprocessor.get("image_std"), (0.5, 0.5, 0.5)),
        rescale=preprocessor.get("rescale_factor", 1 / 255),
    )
    size = preprocessor.get("size")
    if size is not None and (size.get("height"), size.get("width")) != (tower.image_size, tower.image_size):
        raise ValueError(
            f"preprocessor_config.json has size={size}, but the tower reads images of {tower.image_size} pixels"
        )
    start = hf.get("boi_token_index", hf.get("boi_token_id", 255_999))
    return ImagesConfig(
        tower=tower,
        image_token_id=hf.get("image_token_index", hf.get("image_token_id", 262_144)),
        start_token_id=start,
        end_token_id=hf.get("eoi_token_index", hf.get("eoi_token_id", 256_000)),
        marker_token_ids=(start,),
        around="\n\n",
        resample=preprocessor.get("resample", 2),
        is_whole=True,
        in_grid=False,
    )


def _qwen(hf: JsonFields, preprocessor: JsonFields, kind: str) -> ImagesConfig:
    """The tower of Qwen2-VL, Qwen2.5-VL or Qwen3-VL, with or without experts."""
    vision, text = Fields(hf["vision_config"]), Fields(hf.get("text_config", hf))
    refuse_unsupported(vision, {"in_channels": (3, None), "in_chans": (3, None)})
    refuse_unsupported(preprocessor, {"do_resize": (True, None), "do_rescale": (True, None), "do_normalize": (True, None)})
    patch, merge, frames = (
        vision.get("patch_size", 16 if kind == "qwen3" else 14),
        vision.get("spatial_merge_size", 2),
        vision.get("temporal_patch_size", 2),
    )
    for name, value in (("patch_size", patch), ("merge_size", merge), ("temporal_patch_size", frames)):
        if preprocessor.get(name, value) != value:
            raise ValueError(
                f"preprocessor_config.json has {name}={preprocessor[name]}, but the tower in config.json has {value}"
            )
    embed_dim = vision.get("embed_dim", 1280) if kind == "qwen2" else vision["hidden_size"]
    text_dim = text["hidden_size"]
    out_dim = vision.get("hidden_size" if kind == "qwen2" else "out_hidden_size", text_dim)
    if out_dim != text_dim:
        raise ValueError(f"the tower returns rows of {out_dim} numbers, but the text model has embeddings of {text_dim}")
    window, full, depth = None, (), vision.get("depth", 32)
    if kind == "qwen2.5":
        window = vision.get("window_size", 112) // merge // patch
        full = tuple(vision.get("fullatt_block_indexes", (7, 15, 23, 31)))
    positions = vision.get("num_position_embeddings", 2304) if kind == "qwen3" else None
    if positions is not None and math.isqrt(positions) ** 2 != positions:
        raise ValueError(f"num_position_embeddings is {positions}; it must be a square")
    least, most = _pixels(preprocessor)
    defaults = {"qwen2": "quick_gelu", "qwen2.5": "silu", "qwen3": "gelu_pytorch_tanh"}
    start, image, end = (
        hf.get("vision_start_token_id", 151_652),
        hf.get("image_token_id", 151_655),
        hf.get("vision_end_token_id", 151_653),
    )
    return ImagesConfig(
        tower=QwenVisionConfig(
            patch_size=patch,
            merge=merge,
            frames=frames,
            num_layers=depth,
            embed_dim=embed_dim,
            num_heads=vision.get("num_heads", 16),
            mlp_dim=vision.get("mlp_ratio", 4) * embed_dim if kind == "qwen2" else vision["intermediate_size"],
            norm="rms" if kind == "qwen2.5" else "layer",
            activation=activation(vision, default=defaults[kind]),
            is_gated=kind == "qwen2.5",
            patch_bias=kind == "qwen3",
            position_side=None if positions is None else math.isqrt(positions),
            window=window,
            full_layers=full,
            deep_layers=tuple(vision.get("deepstack_visual_indexes", (8, 16, 24))) if kind == "qwen3" else (),
            text_dim=text_dim,
            mean=_three(preprocessor.get("image_mean"), _CLIP_MEAN),
            std=_three(preprocessor.get("image_std"), _CLIP_STD),
            rescale=preprocessor.get("rescale_factor", 1 / 255),
            least_pixels=least,
            most_pixels=most,
        ),
        image_token_id=image,
        start_token_id=start,
        end_token_id=end,
        marker_token_ids=(start, image, end),
        around="",
        resample=preprocessor.get("resample", 3),
        is_whole=False,
        in_grid=True,
    )


def _pixels(preprocessor: JsonFields) -> tuple[int, int]:
    """The least and the most pixels of an image after it is resized, under the names of several versions of the file."""
    size: Mapping[str, Any] = preprocessor.get("size") or {}
    found = []
    for outer, inner, default in (
        ("min_pixels", "shortest_edge", 56 * 56),
        ("max_pixels", "longest_edge", 28 * 28 * 1280),
    ):
        values = (preprocessor.get(outer), size.get(outer), size.get(inner))
        found.append(next((int(value) for value in values if value is not None), default))
    return found[0], found[1]


def limited(images: ImagesConfig, most_tokens: int) -> ImagesConfig:
    """`images` with at most so many tokens for one, if the tower reads several sizes; ValueError if it does not."""
    tower = images.tower
    if most_tokens >= tower.most_tokens:
        return images
    if not isinstance(tower, QwenVisionConfig):
        raise ValueError(
            f"max_image_tokens is {most_tokens}, but every image of this model has {tower.most_tokens} tokens; choose at "
            "least that, or images=False"
        )
    most = most_tokens * tower.token_pixels
    return replace(images, tower=replace(tower, most_pixels=most, least_pixels=min(tower.least_pixels, most)))


def largest(images: ImagesConfig, most_tokens: int) -> ImagesConfig:
    """`images` with so many tokens for the largest one, if the tower reads several sizes: what a checkpoint may allow
    whose preprocessor_config.json is not known."""
    tower = images.tower
    if not isinstance(tower, QwenVisionConfig):
        return images
    return replace(images, tower=replace(tower, most_pixels=most_tokens * tower.token_pixels))


def _three(values: Any, default: tuple[float, float, float]) -> tuple[float, float, float]:
    first, second, third = values or default
    return float(first), float(second), float(third)


def tower_name(name: str) -> str:
    """The name of a tensor as `TowerWeight` has it: prefixes of some versions of transformers are left out."""
    return _PREFIXES.sub("", name).replace("vision_tower.vision_model.", "vision_tower.", 1)


def tower_bytes(images: ImagesConfig, itemsize: int) -> int:
    """Bytes of the weights of the tower with `itemsize` bytes per number."""
    return itemsize * sum(weight.size for weight in weights(images.tower).values())
