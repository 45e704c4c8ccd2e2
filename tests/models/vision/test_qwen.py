"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL beside transformers: patches, rows of the tower, and logits of a conversation."""

from __future__ import annotations

import dataclasses
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax.checkpoint import images_of, load_params, load_tower, open_checkpoint
from fastgen_jax.checkpoint.huggingface import HuggingFaceCheckpoint
from fastgen_jax.core import RaggedBatch, StepImages
from fastgen_jax.engine.grids import rope_positions
from fastgen_jax.images import ImagePrompts, PromptParts
from fastgen_jax.images.decode import named
from fastgen_jax.models.cache import empty_cache
from fastgen_jax.models.vision import qwen
from fastgen_jax.models.vision.config import ImagesConfig, QwenVisionConfig
from fastgen_jax.text import load_tokenizer
from tests.models.parity import BLOCK_SIZE, NUM_BLOCKS, Runs, error
from tests.models.vision.reference import NUM_GREEDY, QWEN, expected, pictures

TOLERANCE = 2e-5  # of the largest value: float32, in another order
BFLOAT16_TOLERANCE = 0.03  # on average
IMAGE = 5  # the token of an image
COUNTS = (30, 12)  # tokens of the images

# The slow ones have no code of their own.
every_model = pytest.mark.parametrize(
    "folder",
    [folder if folder in QWEN[1:3] else pytest.param(folder, marks=pytest.mark.slow) for folder in QWEN],
    ids=lambda folder: folder.name,
)


@cache
def checkpoint(folder: Path) -> tuple[HuggingFaceCheckpoint, ImagesConfig]:
    opened = open_checkpoint(folder)
    images = images_of(opened)
    assert isinstance(opened, HuggingFaceCheckpoint)
    assert images is not None
    return opened, images


def tower(folder: Path) -> QwenVisionConfig:
    config = checkpoint(folder)[1].tower
    assert isinstance(config, QwenVisionConfig)
    return config


@cache
def parts(folder: Path) -> PromptParts:
    opened, images = checkpoint(folder)
    prompts = ImagePrompts(images, load_tokenizer(opened.tokenizer_source))
    places = prompts.placeholder
    text = f"<|im_start|>user\nThis{places}and{places}differ.<|im_end|>\n<|im_start|>assistant\n"
    return prompts.parts(text, named(pictures(folder)), add_special_tokens=False)


@cache
def embed(folder: Path) -> Any:
    return jax.jit(partial(qwen.embed, config=tower(folder)))


@cache
def rows(folder: Path, dtype: str = "float32") -> np.ndarray:
    """The rows of both images, [parts, n, E]."""
    params = load_tower(*checkpoint(folder), dtype=dtype)
    found = [embed(folder)(params, image.content) for image in parts(folder).images]
    return np.concatenate([np.asarray(rows)[:, :count] for rows, count in zip(found, COUNTS, strict=True)], axis=1)


def test_patches_are_those_of_the_processor_of_transformers():
    folder = QWEN[1]
    inputs, want = parts(folder).images[0].content, expected(folder)["patches"]
    assert isinstance(inputs, qwen.Inputs)
    squares = inputs.patches.reshape(len(inputs.slots), -1, want.shape[1])  # [slots, m * m, values]
    np.testing.assert_array_equal(squares[inputs.slots[: COUNTS[0]]].reshape(want.shape), want)


@every_model
def test_the_prompt_has_the_tokens_of_transformers(folder):
    assert parts(folder).token_ids == expected(folder)["token_ids"][:-NUM_GREEDY].tolist()
    assert [image.stop - image.start for image in parts(folder).images] == list(COUNTS)


@every_model
def test_rows_of_images_are_those_of_transformers(folder):
    assert error(rows(folder), expected(folder)["rows"]) < TOLERANCE


@pytest.mark.slow
@every_model
def test_rows_in_bfloat16_are_near_those_in_float32(folder):
    want = expected(folder)["rows"]
    got = rows(folder, "bfloat16").astype(np.float32)
    assert np.abs(got - want).mean() < BFLOAT16_TOLERANCE * np.abs(want).max()


@pytest.mark.parametrize("folder", QWEN[1:3], ids=lambda folder: folder.name)
def test_a_larger_program_gives_the_same_rows(folder, monkeypatch):
    image = parts(folder).images[0].content
    assert isinstance(image, qwen.Inputs)
    monkeypatch.setattr(qwen, "num_slots", lambda config: (100,))
    pixels = ImagePrompts(checkpoint(folder)[1], load_tokenizer(folder)).pixels(pictures(folder)[0])
    larger = qwen.inputs(pixels, config=tower(folder))
    assert len(larger.slots) == 100 > len(image.slots)
    params = load_tower(*checkpoint(folder), dtype="float32")
    got = np.asarray(embed(folder)(params, larger))[:, : COUNTS[0]]
    assert error(got, expected(folder)["rows"][:, : COUNTS[0]]) < TOLERANCE


class ImageRuns(Runs):
    """Chunks of a conversation with images."""

    def __init__(self, folder: Path, *, stack_layers: bool = False, **options: Any) -> None:
        params = load_params(checkpoint(folder)[0], dtype="float32", stack_layers=stack_layers)
        super().__init__(params, checkpoint(folder)[0].config, len(expected(folder)["token_ids"]), **options)
        self.folder = folder

    def logits(self, token_ids: np.ndarray, sizes: list[int], *, prompt_length: int) -> np.ndarray:
        """As in `Runs`, with the rows of the tower at the tokens of images."""
        count, start, found = len(token_ids), 0, []
        embeddings = np.zeros((len(rows(self.folder)), count, self.config.embed_dim), np.float32)
        embeddings[:, token_ids == IMAGE] = rows(self.folder)
        kv_cache = empty_cache(
            self.config,
            num_rows=self.config.num_layers,
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            num_slots=2,
            dtype=jnp.float32,
            platform=jax.default_backend(),
        )
        for size in sizes:
            stop = start + size
            shown, is_image = np.zeros_like(embeddings), np.zeros(count, np.bool_)
            shown[:, :size], is_image[:size] = embeddings[:, start:stop], (token_ids == IMAGE)[start:stop]
            images = StepImages(is_image=jnp.asarray(is_image), embeddings=jnp.asarray(shown), spans=None)
            batch = self._batch(token_ids, start, size, prompt_length)
            logits, kv_cache = self.program(self.params, kv_cache, batch, images=images)
            found.append(np.asarray(logits)[:size])
            start = stop
        return np.concatenate(found)

    def _batch(self, token_ids: np.ndarray, start: int, size: int, prompt_length: int) -> RaggedBatch:
        positions = np.zeros((3, self.num_tokens), np.int32)
        positions[:, :size] = rope_positions(parts(self.folder).images, start, start + size)
        batch = super()._batch(token_ids, start, size, prompt_length)
        return dataclasses.replace(batch, rope_positions=jnp.asarray(positions))


@cache
def runs(folder: Path) -> ImageRuns:
    return ImageRuns(folder)


@pytest.mark.parametrize("cut", ["whole", "within images", "generation"])
@every_model
def test_logits_of_a_conversation_with_images_are_those_of_transformers(folder, cut):
    tokens, want = expected(folder)["token_ids"], expected(folder)["logits"]
    first, second = parts(folder).images
    count = len(tokens)
    sizes = {
        "whole": [count],
        "within images": [first.start + 7, 9, second.start + 3 - first.start - 16, count - second.start - 3],
        "generation": [count - NUM_GREEDY] + [1] * NUM_GREEDY,
    }[cut]
    got = runs(folder).logits(tokens, sizes, prompt_length=count - NUM_GREEDY)
    assert error(got, want) < TOLERANCE


@pytest.mark.parametrize("folder", QWEN[2:], ids=lambda folder: folder.name)
@pytest.mark.slow
def test_scanned_layers_add_the_same_rows(folder):
    tokens, want = expected(folder)["token_ids"], expected(folder)["logits"]
    scanned = ImageRuns(folder, stack_layers=True)
    assert error(scanned.logits(tokens, [len(tokens)], prompt_length=len(tokens) - NUM_GREEDY), want) < TOLERANCE
