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
from fastgen_jax.engine.xla_options import product_options
from fastgen_jax.models.vision import towers
from fastgen_jax.models.vision.config import ImagesConfig, TowerConfig
from fastgen_jax.models.weight_spec import Params
from fastgen_jax.scheduling import PromptImage, Step
from pallas_kernels.ragged_attention import SPAN_QUERIES

log = logging.getLogger(__name__)

T = TypeVar("T", StepImages, jax.Array)
# Images whose embeddings stay on the device: those of samples of one prompt, of a sequence that was preempted, and of one
# whose images are cut into chunks. One stays however large it is.
KEPT = 32
KEPT_BYTES = 256 << 20


def embed_program(tower: TowerConfig, device: Any, *, deterministic: bool = False) -> jax.stages.Wrapped:
    """The jitted tower: (weights, inputs of an image) -> rows, as `towers.embed`, for `device`."""
    options = product_options(device, deterministic=deterministic)
    return jax.jit(partial(towers.embed, config=tower), compiler_options=options)


class Tower:
    """The vision tower of an engine. It holds nothing for a request: what a step needs is computed, or was kept, by content.

    `read` loads the weights: at once, and again after `release`. The caller holds the engine's locks. Each image is computed
    by itself, in a program for its size, so that its rows do not depend on other images; if `deterministic`, they do not
    depend on the start either.
    """

    def __init__(self, config: ImagesConfig, read: Callable[[], Params], *, deterministic: bool = False) -> None:
        self.config = config
        self._read = read
        self._params: Params | None = read()
        self._embed = embed_program(config.tower, jax.local_devices()[0], deterministic=deterministic)
        self._dtype = jax.tree.leaves(self._params)[0].dtype
        self._shapes = towers.shape_of_rows(config.tower, self._dtype)  # of each program
        self._compiled: dict[
            int, jax.stages.Compiled
        ] = {}  # by the number of bytes of an image, which differs between shapes
        self._kept: OrderedDict[bytes, jax.Array] = OrderedDict()  # the most recently used last

    def warm_up(self, num_tokens: int, *, mesh: Mesh | None) -> None:
        """Compiles all that a step of `num_tokens` runs besides its own program."""
        tower, indices = self.config.tower, np.full(num_tokens, -1, np.int32)
        for inputs, rows in zip(towers.shapes(tower), self._shapes, strict=True):
            # Not run: a large image takes long on a CPU.
            self._compiled[_num_bytes(inputs)] = self._embed.lower(self._weights, inputs).compile()
            placed = _place(self._no_rows(num_tokens), jnp.zeros(rows.shape, rows.dtype), indices)
            jax.block_until_ready(_on(placed, mesh))

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
        return _on(
            StepImages(
                is_image=jax.device_put(is_image),
                embeddings=embeddings,
                spans=jax.device_put(spans) if self.config.is_whole else None,
            ),
            mesh,
        )

    def no_images(self, num_tokens: int, *, mesh: Mesh | None) -> StepImages:
        """What a program for steps with tokens of images needs for one without any."""
        return _on(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.shapes(num_tokens, mesh=None)), mesh)

    def shapes(self, num_tokens: int, *, mesh: Mesh | None) -> StepImages:
        """The shapes of `images_of`."""
        place = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        shape: Any = partial(jax.ShapeDtypeStruct, sharding=place)
        return StepImages(
            is_image=shape((num_tokens,), jnp.bool_),
            embeddings=shape(self._shape_of_all(num_tokens), self._dtype),
            spans=shape((num_tokens, 4), jnp.int32) if self.config.is_whole else None,
        )

    @property
    def _weights(self) -> Params:
        if self._params is None:
            log.info("loading the weights of the vision tower again")
            self._params = self._read()
        return self._params

    def _shape_of_all(self, num_tokens: int) -> tuple[int, ...]:
        parts, _, width = self._shapes[0].shape
        return parts, num_tokens, width

    def _no_rows(self, num_tokens: int) -> jax.Array:
        return jnp.zeros(self._shape_of_all(num_tokens), self._dtype)

    def _rows(self, image: PromptImage) -> jax.Array:
        """The embeddings of an image, [parts, n, E]."""
        rows = self._kept.pop(image.key, None)
        if rows is None:
            rows = self._compiled[_num_bytes(image.content)](self._weights, image.content)
        self._kept[image.key] = rows
        kept_bytes = sum(kept.nbytes for kept in self._kept.values())
        while len(self._kept) > 1 and (len(self._kept) > KEPT or kept_bytes > KEPT_BYTES):
            kept_bytes -= self._kept.popitem(last=False)[1].nbytes
        return rows


@jax.jit
def _place(embeddings: jax.Array, rows: jax.Array, indices: jax.Array) -> jax.Array:
    """`embeddings` [parts, T, E] with `rows[:, indices[t]]` at each token t whose index is not negative."""
    return jnp.where((indices >= 0)[None, :, None], jnp.take(rows, indices, axis=1, mode="clip"), embeddings)


def _num_bytes(inputs: Any) -> int:
    """Bytes of the arrays, or shapes, that a tower reads."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(inputs))


def _on(images: T, mesh: Mesh | None) -> T:
    """The same on every device of `mesh`."""
    return images if mesh is None else jax.device_put(images, NamedSharding(mesh, PartitionSpec()))
