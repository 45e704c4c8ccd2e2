"""The images among the tokens of a step: computing their embeddings, and putting them where the step needs them."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fastgen_jax.core import StepImages
from fastgen_jax.models.vision import siglip
from fastgen_jax.models.vision.config import ImagesConfig
from fastgen_jax.models.weight_spec import Params
from fastgen_jax.scheduling import PromptImage, Step
from pallas_kernels.ragged_attention import SPAN_QUERIES

log = logging.getLogger(__name__)

T = TypeVar("T", StepImages, jax.Array)
KEPT = 32  # images whose embeddings stay on the device: those of samples of one prompt, or of a sequence that was preempted


class Tower:
    """The vision tower of an engine. It holds nothing for a request: what a step needs is computed, or was kept, by content.

    `read` loads the weights: at once, and again after `release`. The caller holds the engine's locks.
    """

    def __init__(self, config: ImagesConfig, read: Callable[[], Params]) -> None:
        self.config = config
        self._read = read
        self._params: Params | None = read()
        self._embed = jax.jit(partial(siglip.embed, config=config.tower))
        self._kept: OrderedDict[bytes, jax.Array] = OrderedDict()  # the most recently used last

    def warm_up(self, num_tokens: int, *, mesh: Mesh | None) -> None:
        """Compiles all that a step of `num_tokens` runs besides its own program."""
        side = self.config.tower.image_size
        image = PromptImage(start=0, stop=1, key=b"", is_whole=True, content=np.zeros((side, side, 3), np.uint8))
        place = _place(self._no_rows(num_tokens), self._rows(image), np.full(num_tokens, -1, np.int32))
        jax.block_until_ready(_on(place, mesh))
        self._kept.clear()

    def release(self) -> None:
        """Frees the memory of the weights and of kept embeddings; the next image takes it again."""
        params, self._params = self._params, None  # first: an interrupt leaves nothing that is deleted in use
        self._kept.clear()
        for leaf in jax.tree.leaves(params):
            leaf.delete()

    def images_of(self, step: Step, num_tokens: int, *, mesh: Mesh | None) -> StepImages | None:
        """What a step in a program for `num_tokens` needs for the tokens of images in it; None if it has none."""
        first, row = 0, 0  # of a chunk, among the tokens and the sequences of the step
        found: list[tuple[PromptImage, int, int, int, int]] = []
        for row, chunk in enumerate(step.chunks):
            stop = chunk.start + chunk.length
            for image in chunk.sequence.request.images:
                start, end = max(chunk.start, image.start), min(stop, image.stop)
                if start < end:
                    found.append((image, row, first + start - chunk.start, start, end))
            first += chunk.length
        if not found:
            return None
        embeddings = self._no_rows(num_tokens)
        is_image, spans = np.zeros(num_tokens, np.bool_), np.zeros((num_tokens, 4), np.int32)
        num_spans = 0
        for image, row, token, start, end in found:
            rows = np.full(num_tokens, -1, np.int32)
            rows[token : token + end - start] = np.arange(start - image.start, end - image.start)
            embeddings = _place(embeddings, self._rows(image), rows)
            is_image |= rows >= 0
            for offset in range(0, end - start if image.is_whole else 0, SPAN_QUERIES):
                count = min(SPAN_QUERIES, end - start - offset)
                spans[num_spans] = row, token + offset, count, image.stop - start - offset
                num_spans += 1
        return _on(StepImages(is_image=jax.device_put(is_image), embeddings=embeddings, spans=jax.device_put(spans)), mesh)

    def shapes(self, num_tokens: int, *, mesh: Mesh | None) -> StepImages:
        """The shapes of `images_of`."""
        place = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        shape: Any = partial(jax.ShapeDtypeStruct, sharding=place)
        return StepImages(
            is_image=shape((num_tokens,), jnp.bool_),
            embeddings=shape((num_tokens, self.config.tower.text_dim), self._dtype),
            spans=shape((num_tokens, 4), jnp.int32),
        )

    @property
    def _weights(self) -> Params:
        if self._params is None:
            log.info("loading the weights of the vision tower again")
            self._params = self._read()
        return self._params

    @property
    def _dtype(self) -> np.dtype:
        return self._weights["projector"].dtype

    def _no_rows(self, num_tokens: int) -> jax.Array:
        return jnp.zeros((num_tokens, self.config.tower.text_dim), self._dtype)

    def _rows(self, image: PromptImage) -> jax.Array:
        """The embeddings of an image, [n, E]."""
        rows = self._kept.pop(image.key, None)
        if rows is None:
            rows = self._embed(self._weights, image.content)
        self._kept[image.key] = rows
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return rows


@jax.jit
def _place(embeddings: jax.Array, rows: jax.Array, indices: jax.Array) -> jax.Array:
    """`embeddings` [T, E] with `rows[indices[t]]` at each token t whose index is not negative."""
    return jnp.where((indices >= 0)[:, None], jnp.take(rows, indices, axis=0, mode="clip"), embeddings)


def _on(images: T, mesh: Mesh | None) -> T:
    """The same on every device of `mesh`."""
    return images if mesh is None else jax.device_put(images, NamedSharding(mesh, PartitionSpec()))
