"""Which towers are found in a checkpoint, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fastgen_jax.checkpoint import images_of, load_tower, open_checkpoint
from fastgen_jax.checkpoint.huggingface import HuggingFaceCheckpoint
from fastgen_jax.models.vision.read import images_from_hf, tower_bytes, tower_name, tower_weights
from tests.models.vision.reference import GEMMA3

RELEASED = Path(__file__).parents[2] / "reference" / "released" / "checkpoints.jsonl"


def released(name: str) -> dict[str, Any]:
    """The config.json of a release."""
    return next(entry["config"] for entry in map(json.loads, RELEASED.read_text().splitlines()) if entry["model"] == name)


def checkpoint() -> HuggingFaceCheckpoint:
    opened = open_checkpoint(GEMMA3)
    assert isinstance(opened, HuggingFaceCheckpoint)
    return opened


def test_the_tower_of_a_release_has_its_tensors():
    images = images_from_hf(released("google/medgemma-27b-it"), {})
    assert images is not None
    assert (images.tower.image_size, images.most_tokens, images.image_token_id) == (896, 256, 262_144)
    tensors = [
        weight.tensor.format(layer=layer)
        for weight in tower_weights(images).values()
        for layer in (range(images.tower.num_layers) if weight.per_layer else [0])
    ]
    assert len(set(tensors)) == 439  # in its model.safetensors.index.json, under these names
    assert tower_bytes(images, 2) == 846_120_672


@pytest.mark.parametrize("prefix", ["vision_tower.vision_model.", "model.vision_tower.vision_model.", "model.vision_tower."])
def test_names_of_every_version_of_transformers_mean_the_same(prefix):
    assert tower_name(f"{prefix}post_layernorm.bias") == "vision_tower.post_layernorm.bias"
    assert tower_name("model.multi_modal_projector.x") == "multi_modal_projector.x"


@pytest.mark.parametrize("name", ["gghfez/gemma-3-4b-novision", "Qwen/Qwen2.5-VL-7B-Instruct"])
def test_other_models_have_no_tower_that_is_read(name):
    assert images_from_hf(released(name), {}) is None


@pytest.mark.parametrize(
    ("preprocessor", "vision", "message"),
    [
        ({"do_pan_and_scan": True}, {}, "do_pan_and_scan=True, which is not supported"),
        ({"do_rescale": False}, {}, "do_rescale=False, which is not supported"),
        ({"size": {"height": 224, "width": 224}}, {}, "the tower reads images of 896 pixels"),
        ({}, {"num_channels": 1}, "num_channels=1, which is not supported"),
        ({}, {"patch_size": 15}, "image_size is 896; it must be a multiple of patch_size=15"),
        ({}, {"num_attention_heads": 7}, "hidden_size is 1152; it must be a multiple of num_attention_heads=7"),
        ({}, {"patch_size": 128}, "mm_tokens_per_image is 256; it must be a square whose side divides the 7 patches"),
    ],
)
def test_what_the_tower_does_not_compute_is_refused(preprocessor, vision, message):
    hf = released("google/medgemma-27b-it")
    with pytest.raises(ValueError, match=message):
        images_from_hf(hf | {"vision_config": hf["vision_config"] | vision}, preprocessor)


def test_a_missing_or_unknown_tensor_of_the_tower_is_an_error():
    whole = checkpoint()
    images = images_of(whole)
    assert images is not None
    name = next(name for name in whole.around_text if name.endswith("fc1.bias"))
    without = {other: tensor for other, tensor in whole.around_text.items() if other != name}
    with pytest.raises(ValueError, match=r"has no tensor 'vision_tower\.encoder.*fc1\.bias'; the nearest name"):
        load_tower(dataclasses.replace(whole, around_text=without), images, dtype="float32")
    more = {**whole.around_text, "vision_tower.vision_model.head.probe": whole.around_text[name]}
    with pytest.raises(ValueError, match="1 tensors of the vision tower that are not known"):
        load_tower(dataclasses.replace(whole, around_text=more), images, dtype="float32")
    swapped = {**whole.around_text, name: whole.around_text[name.replace("fc1.bias", "fc2.bias")]}
    with pytest.raises(ValueError, match=r"has shape \(24,\), but the config requires \(36,\)"):
        load_tower(dataclasses.replace(whole, around_text=swapped), images, dtype="float32")


def test_a_checkpoint_without_the_tensors_of_a_tower_is_a_text_model():
    assert images_of(dataclasses.replace(checkpoint(), around_text={})) is None
