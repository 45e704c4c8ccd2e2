"""Which towers are found in a checkpoint, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fastgen_jax.checkpoint import images_of, load_tower, open_checkpoint
from fastgen_jax.checkpoint.huggingface import HuggingFaceCheckpoint
from fastgen_jax.models.vision import qwen, towers
from fastgen_jax.models.vision.config import ImagesConfig, QwenVisionConfig, SiglipConfig
from fastgen_jax.models.vision.read import images_from_hf, limited, tower_bytes, tower_name
from tests.models.vision.reference import GEMMA3

RELEASED = Path(__file__).parents[2] / "reference" / "released" / "checkpoints.jsonl"


def released(name: str) -> dict[str, Any]:
    """The config.json of a release."""
    return next(entry["config"] for entry in map(json.loads, RELEASED.read_text().splitlines()) if entry["model"] == name)


def tensors_of(images: ImagesConfig) -> set[str]:
    return {name for weight in towers.weights(images.tower).values() for name in weight.tensors}


def checkpoint() -> HuggingFaceCheckpoint:
    opened = open_checkpoint(GEMMA3)
    assert isinstance(opened, HuggingFaceCheckpoint)
    return opened


def test_the_tower_of_a_release_has_its_tensors():
    images = images_from_hf(released("google/medgemma-27b-it"), {})
    assert images is not None
    assert isinstance(images.tower, SiglipConfig)
    assert (images.tower.image_size, images.most_tokens, images.image_token_id) == (896, 256, 262_144)
    assert len(tensors_of(images)) == 439  # in its model.safetensors.index.json, under these names
    assert tower_bytes(images, 2) == 846_120_672


@pytest.mark.parametrize(
    ("name", "count", "num_params", "most_tokens"),
    [
        # The tensors in model.safetensors.index.json, and its total_size less the bytes of the text model.
        ("Qwen/Qwen2.5-VL-7B-Instruct", 390, 676_550_144, 16_384),
        ("Qwen/Qwen3-VL-8B-Instruct", 351, 576_388_336, 16_384),
    ],
)
def test_the_towers_of_qwen_have_the_tensors_of_the_releases(name, count, num_params, most_tokens):
    kind = {"max_pixels": 12_845_056} if "2.5" in name else {"size": {"longest_edge": 16_777_216, "shortest_edge": 65_536}}
    images = images_from_hf(released(name), kind)
    assert images is not None
    assert len(tensors_of(images)) == count
    assert tower_bytes(images, 1) == num_params
    assert images.most_tokens == most_tokens


def test_few_programs_serve_all_sizes_of_images():
    images = images_from_hf(released("Qwen/Qwen2.5-VL-7B-Instruct"), {"max_pixels": 12_845_056})
    assert images is not None
    tower = limited(images, 4096).tower
    assert isinstance(tower, QwenVisionConfig)
    sizes = qwen.num_slots(tower)
    assert sizes == (64, 128, 256, 512, 1024, 2048, 4096, 6560)
    assert tower.resized(4032, 3024) == (2044, 1540)  # 4015 tokens, 55 x 73, which take 56 x 76 slots in windows of 4 x 4
    assert tower.resized(20, 4) == (140, 28)
    with pytest.raises(ValueError, match="has 3000 x 10 pixels; the longer side may be at most 200 times the other"):
        tower.resized(3000, 10)
    assert limited(images, 20_000) == images
    gemma = images_from_hf(released("google/medgemma-27b-it"), {})
    assert gemma is not None
    with pytest.raises(ValueError, match="max_image_tokens is 100, but every image of this model has 256 tokens"):
        limited(gemma, 100)


@pytest.mark.parametrize(
    ("preprocessor", "vision", "message"),
    [
        ({"patch_size": 16}, {}, "has patch_size=16, but the tower in config.json has 14"),
        ({"do_resize": False}, {}, "do_resize=False, which is not supported"),
        ({"min_pixels": 9000, "max_pixels": 8000}, {}, "images have 9000 to 8000 pixels"),
        ({}, {"out_hidden_size": 8}, "rows of 8 numbers, but the text model has embeddings of 3584"),
        ({}, {"window_size": 14}, "window_size is less than a token of 2 x 2 patches"),
        ({}, {"num_heads": 128}, "must be a multiple of 4"),
    ],
)
def test_what_a_tower_of_qwen_does_not_compute_is_refused(preprocessor, vision, message):
    hf = released("Qwen/Qwen2.5-VL-7B-Instruct")
    with pytest.raises(ValueError, match=message):
        images_from_hf(hf | {"vision_config": hf["vision_config"] | vision}, preprocessor)


@pytest.mark.parametrize("prefix", ["vision_tower.vision_model.", "model.vision_tower.vision_model.", "model.vision_tower."])
def test_names_of_every_version_of_transformers_mean_the_same(prefix):
    assert tower_name(f"{prefix}post_layernorm.bias") == "vision_tower.post_layernorm.bias"
    assert tower_name("model.multi_modal_projector.x") == "multi_modal_projector.x"


@pytest.mark.parametrize("name", ["gghfez/gemma-3-4b-novision", "meta-llama/Llama-3.2-90B-Vision-Instruct"])
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
