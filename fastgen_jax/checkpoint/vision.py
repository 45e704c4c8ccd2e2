"""The vision tower of a checkpoint: how it reads images, and its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastgen_jax.checkpoint.base import Checkpoint, missing_tensor
from fastgen_jax.checkpoint.huggingface import HuggingFaceCheckpoint, read_json
from fastgen_jax.json_types import JsonFields
from fastgen_jax.models.vision.config import ImagesConfig, TowerWeight
from fastgen_jax.models.vision.read import images_from_hf, tower_name
from fastgen_jax.models.weight_spec import DType, Params


def images_of(checkpoint: Checkpoint) -> ImagesConfig | None:
    """How the model reads images; None if it does not, the tower is not supported, or the checkpoint leaves it out.

    Raises ValueError if the description is damaged or of another form.
    """
    if not isinstance(checkpoint, HuggingFaceCheckpoint) or not checkpoint.around_text:
        return None
    try:
        return images_from_hf(checkpoint.config_json, _preprocessor(checkpoint.path))
    except KeyError as error:
        raise ValueError(f"{checkpoint.path}/config.json lacks the field {error} of the vision tower") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{checkpoint.path}: the vision tower: {error}; images=False loads the text model") from error


def load_tower(checkpoint: HuggingFaceCheckpoint, images: ImagesConfig, *, dtype: DType) -> Params:
    """The weights of the tower on the default device, those of its layers stacked, in the shapes for its platform.

    Raises ValueError for a missing or unknown tensor, or one of another shape.
    """
    import jax

    from fastgen_jax.models.vision import towers

    stored = {tower_name(name): name for name in checkpoint.around_text}
    used: set[str] = set()

    def read(weight: TowerWeight, name: str) -> np.ndarray:
        if name not in stored:
            raise missing_tensor(name, checkpoint.path, stored)
        tensor = checkpoint.around_text[stored[name]]
        if tuple(tensor.shape) != weight.shape:
            raise ValueError(
                f"{checkpoint.path}: tensor {stored[name]!r} has shape {tuple(tensor.shape)}, but the config requires "
                f"{weight.shape}; the file and its config do not match"
            )
        used.add(name)
        array = np.asarray(tensor.map())
        return array.reshape(array.shape[0], -1).T if weight.is_matrix else array

    shapes = towers.weight_shapes(images.tower, jax.default_backend())
    leaves: dict[str, Any] = {}
    for path, weight in towers.weights(images.tower).items():
        arrays = [read(weight, name) for name in weight.tensors]
        array = arrays[0] if weight.count is None else np.stack(arrays)
        filled = np.zeros(shapes[path], np.dtype(dtype))
        filled[tuple(slice(size) for size in array.shape)] = array
        leaves[path] = jax.device_put(filled)
    if extra := sorted(stored.keys() - used):
        raise ValueError(
            f"{checkpoint.path} holds {len(extra)} tensors of the vision tower that are not known "
            f"({', '.join(map(repr, extra[:3]))}); images=False loads the text model"
        )
    return towers.tree_of(leaves)


def _preprocessor(path: Path) -> JsonFields:
    """The fields of preprocessor_config.json, or those in the file that newer versions of transformers write."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        file = path / name
        if file.exists():
            fields: Mapping[str, object] = read_json(file)
            inner = fields.get("image_processor", fields) if name == "processor_config.json" else fields
            if isinstance(inner, Mapping) and ("image_mean" in inner or name == "preprocessor_config.json"):
                return dict(inner)
    return {}
