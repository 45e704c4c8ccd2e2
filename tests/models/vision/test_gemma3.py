"""Gemma 3 with images, beside transformers: rows of the tower, and logits of a conversation with two images."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax.checkpoint import images_of, load_params, load_tower, open_checkpoint
from fastgen_jax.checkpoint.huggingface import HuggingFaceCheckpoint
from fastgen_jax.core import KVCache, StepImages
from fastgen_jax.images import ImagePrompts, open_image
from fastgen_jax.models.vision import towers
from fastgen_jax.models.vision.config import ImagesConfig
from fastgen_jax.text import load_tokenizer
from tests.models.parity import BLOCK_SIZE, NUM_BLOCKS, Runs, error
from tests.models.vision.reference import GEMMA3, IMAGE, NUM_GREEDY, PHOTO, TOKENS, expected, pictures, starts

TOLERANCE = 2e-5  # of the largest value: float32, in another order
BFLOAT16_TOLERANCE = 0.03  # on average


@cache
def checkpoint() -> tuple[HuggingFaceCheckpoint, ImagesConfig]:
    opened = open_checkpoint(GEMMA3)
    images = images_of(opened)
    assert isinstance(opened, HuggingFaceCheckpoint)
    assert images is not None
    return opened, images


@cache
def rows(dtype: str = "float32") -> np.ndarray:
    """The embeddings of both images, [2 n, E]."""
    opened, images = checkpoint()
    params = load_tower(opened, images, dtype=dtype)
    embed = jax.jit(partial(towers.embed, config=images.tower))
    prompts = ImagePrompts(images, load_tokenizer(opened.tokenizer_source))
    return np.concatenate([embed(params, prompts.pixels(picture))[0] for picture in pictures(GEMMA3)])


def test_pixels_are_those_of_the_processor_of_transformers():
    opened, images = checkpoint()
    prompts = ImagePrompts(images, load_tokenizer(opened.tokenizer_source))
    np.testing.assert_array_equal(prompts.pixels(open_image(PHOTO)), expected()["pixels"])


def test_rows_of_an_image_are_those_of_transformers():
    assert error(rows()[:TOKENS], expected()["rows"]) < TOLERANCE


@pytest.mark.slow
def test_rows_in_bfloat16_are_near_those_in_float32():
    want = expected()["rows"]
    got = rows("bfloat16")[:TOKENS].astype(np.float32)
    assert np.abs(got - want).mean() < BFLOAT16_TOLERANCE * np.abs(want).max()


class ImageRuns(Runs):
    """Chunks of a conversation with images."""

    def logits(self, token_ids: np.ndarray, sizes: list[int], *, prompt_length: int) -> np.ndarray:
        """As in `Runs`, with the rows of the tower at the tokens of images."""
        config, where = self.config, np.flatnonzero(token_ids == IMAGE)
        cache = KVCache.zeros(
            num_layers=config.num_layers,
            num_blocks=NUM_BLOCKS,
            num_kv_heads=config.num_kv_heads,
            block_size=BLOCK_SIZE,
            head_dim=config.head_dim,
            dtype=jnp.float32,
        )
        embeddings = np.zeros((len(token_ids), config.embed_dim), np.float32)
        embeddings[where] = rows()
        found, start = [], 0
        for size in sizes:
            batch, stop = self._batch(token_ids, start, size, prompt_length), start + size
            shown, is_image = np.zeros_like(embeddings), np.zeros(len(token_ids), np.bool_)
            shown[:size], is_image[:size] = embeddings[start:stop], (token_ids == IMAGE)[start:stop]
            spans = np.zeros((8, 4), np.int32)
            inside = [(max(first, start), min(first + TOKENS, stop), first + TOKENS) for first in starts()]
            for row, (first, last, end) in enumerate([span for span in inside if span[0] < span[1]]):
                spans[row] = 0, first - start, last - first, end - first
            images = StepImages(
                is_image=jnp.asarray(is_image), embeddings=jnp.asarray(shown)[None], spans=jnp.asarray(spans)
            )
            logits, cache = self.program(self.params, cache, batch, images=images)
            found.append(np.asarray(logits)[:size])
            start = stop
        return np.concatenate(found)


@cache
def runs() -> ImageRuns:
    params = load_params(checkpoint()[0], dtype="float32", stack_layers=False)
    return ImageRuns(params, checkpoint()[0].config, len(expected()["token_ids"]))


@pytest.mark.parametrize("cut", ["whole", "at the images", "generation"])
def test_logits_of_a_conversation_with_images_are_those_of_transformers(cut):
    tokens, want = expected()["token_ids"], expected()["logits"]
    first, second = starts()
    count = len(tokens)
    sizes = {
        "whole": [count],
        "at the images": [first, TOKENS + 3, second - first - TOKENS - 3, count - second],
        "generation": [count - NUM_GREEDY] + [1] * NUM_GREEDY,
    }[cut]
    got = runs().logits(tokens, sizes, prompt_length=count - NUM_GREEDY)
    assert error(got, want) < TOLERANCE


def test_without_attention_in_both_directions_the_logits_differ():
    """So that the test above shows something, also for layers with a window."""
    tokens, want = expected()["token_ids"], expected()["logits"]
    first = starts()[0]
    got = runs().logits(tokens, [first + 5, len(tokens) - first - 5], prompt_length=len(tokens) - NUM_GREEDY)
    assert error(got[: first + 1], want[: first + 1]) > 100 * TOLERANCE


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.slow
def test_every_implementation_of_attention_serves_images(implementation):
    tokens, want = expected()["token_ids"], expected()["logits"]
    with_other = ImageRuns(runs().params, runs().config, len(tokens), attention=implementation)
    assert error(with_other.logits(tokens, [len(tokens)], prompt_length=len(tokens) - NUM_GREEDY), want) < TOLERANCE
