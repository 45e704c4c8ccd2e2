"""The program of a vision tower, compiled for devices that are not present, and what it needs."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from fastgen_jax.core import StepImages
from fastgen_jax.engine.tower import embed_program
from fastgen_jax.models.vision import towers
from fastgen_jax.models.vision.attention import score_bytes
from fastgen_jax.models.vision.config import ImagesConfig, SiglipConfig, TowerConfig
from fastgen_jax.models.weight_spec import DType
from fastgen_jax.plan import hlo
from fastgen_jax.plan.program import compile_lowered, lowering_for, matrix_shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerProgram:
    """What the compiler says about a tower and its largest image; bytes are per device."""

    seconds: float  # to lower and compile
    patches: int
    weights: int
    temporaries: int  # with the rows of the image
    operations: int  # number per layer; on a GPU, kernel launches
    waits: int  # how often a GPU's host has to read a value
    copies: list[hlo.Copy]  # weights that are written anew for an image


def num_patches(tower: TowerConfig) -> int:
    """Patches of the largest image, with those that only fill its windows."""
    return tower.patches_per_side**2 if isinstance(tower, SiglipConfig) else towers.shapes(tower)[-1].places.shape[0]


def temporary_bytes(images: ImagesConfig, itemsize: int) -> int:
    """An estimate of what the largest image needs while its rows are computed; the compiler knows the real number."""
    tower, patches = images.tower, num_patches(images.tower)
    numbers = patches * (4 * tower.embed_dim + 2 * tower.mlp_dim)  # queries, keys, values, and hidden units twice
    return 2 * score_bytes(patches, tower.num_heads) + itemsize * numbers


def compile_tower(
    images: ImagesConfig, mesh: Mesh, *, dtype: DType = jnp.bfloat16, deterministic: bool = False
) -> TowerProgram:
    """The tower, compiled for its largest image and the first device of `mesh`. Raises DoesNotCompile."""
    device = mesh.devices.flat[0]
    shape: Any = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    leaves = towers.weight_shapes(images.tower, device.platform)
    params = towers.tree_of({path: shape(sizes, dtype) for path, sizes in leaves.items()})
    largest = jax.tree.map(lambda x: shape(x.shape, x.dtype), towers.shapes(images.tower)[-1])
    start = time.perf_counter()
    with lowering_for(mesh):
        compiled = compile_lowered(embed_program(images.tower, device, deterministic=deterministic).lower(params, largest))
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None, "the compiler has no memory analysis"
    assert text is not None, "the compiler does not show its program"
    patches = num_patches(images.tower)
    return TowerProgram(
        seconds=time.perf_counter() - start,
        patches=patches,
        weights=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)),
        temporaries=memory.temp_size_in_bytes + memory.output_size_in_bytes,
        operations=hlo.operations_per_layer(text),
        waits=hlo.waits(text),
        copies=hlo.copied_weights(text, matrix_shapes(params, patches)),
    )


def step_images(images: ImagesConfig, num_tokens: int, mesh: Mesh | None, dtype: DType, device: Any = None) -> StepImages:
    """The shapes of what a step of `num_tokens` gets for tokens of images, on every device of `mesh` or on `device`."""
    place = SingleDeviceSharding(device) if mesh is None else NamedSharding(mesh, PartitionSpec())
    shape: Any = functools.partial(jax.ShapeDtypeStruct, sharding=place)
    parts, _, width = towers.shape_of_rows(images.tower, dtype)[0].shape
    return StepImages(
        is_image=shape((num_tokens,), jnp.bool_),
        embeddings=shape((parts, num_tokens, width), dtype),
        spans=shape((num_tokens, 4), jnp.int32) if images.is_whole else None,
    )
