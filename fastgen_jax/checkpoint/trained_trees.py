"""Orbax checkpoints of JAX trainers, as checkpoints under the weight names of this project.

Every layout (`maxtext`, `gemma_library`) says which arrays make a weight; finding, checking and reading them is the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastgen_jax.checkpoint.base import missing_tensor
from fastgen_jax.checkpoint.huggingface import config_json, model_config, read_generation_config
from fastgen_jax.checkpoint.orbax_arrays import open_arrays, read_array
from fastgen_jax.checkpoint.snapshot import MARKER
from fastgen_jax.json_types import JsonFields
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.params import all_specs, layer_specs, model_specs
from fastgen_jax.models.weight_spec import WeightSpec

if TYPE_CHECKING:
    from tensorstore import TensorStore


class Part(NamedTuple):
    """An array that makes a weight, or its columns from some place on."""

    name: str
    shape: tuple[int, ...]
    """Of a single layer. A vocabulary may be longer, because trainers pad it."""
    make: Callable[[np.ndarray], np.ndarray]
    """The weight's columns [..., in, out], from an array of this shape."""
    row: int | None = None
    """Which layer of an array that has several; None: it has one."""
    axis: int = 1
    """Which axis the layers are, if the shape of the array leaves a choice."""


class Layout(NamedTuple):
    """How a trainer stores the weights of a model."""

    parts: Callable[[WeightSpec, int | None], Sequence[Part]]
    """The arrays of a weight (of a layer), which are concatenated along the last axis."""
    is_weight: Callable[[str], bool]
    """Whether an array of this name is a weight of the text model; others are those of optimizers and of images."""


@dataclass(frozen=True, kw_only=True)
class OfTrainer:
    """What checkpoints of trainers have in common: arrays at `path`, config and tokenizer in another place, or there too."""

    path: Path
    config: ModelConfig
    config_json: JsonFields
    base: Path
    """The directory of the config and the tokenizer."""
    arrays: Mapping[str, TensorStore]

    @property
    def generation_config(self) -> JsonFields:
        return read_generation_config(self.base)

    @property
    def quantization(self) -> str:
        return ""


@dataclass(frozen=True, kw_only=True)
class TreeCheckpoint(OfTrainer):
    """See `Checkpoint`; its tensors are the weights of `param_specs`, those of a layer end with its number.

    An array of several layers is read whole, and kept until all of its layers were read: trainers store the layers of a
    weight in common chunks.
    """

    parts: Mapping[str, Sequence[Part]]
    _kept: dict[str, tuple[np.ndarray, set[int]]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def tensor_names(self) -> frozenset[str]:
        return frozenset(self.parts)

    @property
    def sources(self) -> Mapping[str, Source]:
        return {
            path: Source((f"{path}.{{layer}}" if spec.per_layer else path,)) for path, spec in all_specs(self.config).items()
        }

    @property
    def tokenizer_source(self) -> Path:
        return self.base / "tokenizer" if (self.base / MARKER).exists() else self.base

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that the config requires; `open_tree` has compared the arrays with it."""
        path, _, layer = name.rpartition(".")
        return all_specs(self.config)[path if layer.isdigit() else name].shape

    def dtype(self, name: str) -> str:
        return str(self.arrays[self._parts(name)[0].name].dtype.numpy_dtype)

    def read(self, name: str) -> np.ndarray:
        parts = [part.make(self._values(part)) for part in self._parts(name)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)

    def _parts(self, name: str) -> Sequence[Part]:
        if name not in self.parts:
            raise missing_tensor(name, self.path, self.parts)
        return self.parts[name]

    def _values(self, part: Part) -> np.ndarray:
        array = self.arrays[part.name]
        if part.row is None:
            return _cropped(read_array(array), part.shape)
        axis = _layer_axis(tuple(array.shape), part)
        assert axis is not None, "compared when it was opened"
        with self._lock:
            if part.name not in self._kept:
                self._kept[part.name] = (read_array(array), set(range(array.shape[axis])))
            values, unread = self._kept[part.name]
            unread.discard(part.row)
            if not unread:
                del self._kept[part.name]
        return np.take(values, part.row, axis=axis)


LayoutOf = Callable[[ModelConfig, Mapping[str, tuple[int, ...]]], Layout]
"""The layout of a model, given its config and the shapes of the arrays by name."""


def open_tree(path: Path, base: Path, folder: Path, layout: LayoutOf) -> TreeCheckpoint:
    """Opens the Orbax arrays in `folder` of the checkpoint `path`; config and tokenizer are those of the directory `base`.

    ValueError names an array that is missing, of another shape than the config says, or left over.
    """
    try:
        arrays = open_arrays(str(folder.absolute()))
    except ValueError as error:
        raise ValueError(f"{folder} cannot be read as an Orbax checkpoint ({str(error).splitlines()[0]})") from error
    return from_arrays(path, base, arrays, layout)


def from_arrays(path: Path, base: Path, arrays: Mapping[str, TensorStore], layout: LayoutOf) -> TreeCheckpoint:
    """`open_tree` of arrays that are open."""
    hf = config_json(base)
    config = model_config(hf, base / "config.json")
    arrays = {name.replace("/", "."): array for name, array in arrays.items()}
    parts_of, is_weight = layout(config, {name: tuple(array.shape) for name, array in arrays.items()})
    parts = {spec.path: parts_of(spec, None) for spec in model_specs(config).values()}
    for layer in range(config.num_layers):
        parts |= {f"{spec.path}.{layer}": parts_of(spec, layer) for spec in layer_specs(config, layer).values()}
    for needed in parts.values():
        for part in needed:
            _check(part, arrays, path)
    used = {part.name for needed in parts.values() for part in needed}
    if unknown := sorted(name for name in arrays if name not in used and is_weight(name)):
        raise ValueError(
            f"{path} has {len(unknown)} arrays that the config does not explain ({', '.join(unknown[:3])}); pass the "
            "config.json of the model that was trained"
        )
    return TreeCheckpoint(path=path, config=config, config_json=hf, base=base, parts=parts, arrays=arrays)


def _check(part: Part, arrays: Mapping[str, TensorStore], path: Path) -> None:
    if part.name not in arrays:
        raise missing_tensor(part.name, path, arrays)
    shape = tuple(arrays[part.name].shape)
    if part.row is None:
        fits = len(shape) == len(part.shape) and shape[1:] == part.shape[1:] and shape[0] >= part.shape[0]
        fits = fits or (len(shape) == len(part.shape) and shape[:-1] == part.shape[:-1] and shape[-1] >= part.shape[-1])
        is_padded = "embed" in part.name or "logits" in part.name
        fits = fits if is_padded else shape == part.shape
    else:
        axis = _layer_axis(shape, part)
        fits = axis is not None and part.row < shape[axis]
    if not fits:
        rows = "" if part.row is None else f", with an axis of at least {part.row + 1} layers"
        raise ValueError(
            f"{path}: the array {part.name!r} has shape {shape}, but the config requires {part.shape}{rows}; pass the "
            "config.json of the model that was trained"
        )


def _layer_axis(shape: tuple[int, ...], part: Part) -> int | None:
    """Which axis of an array are its layers; None: without any axis, it would have another shape."""
    fitting = [axis for axis in range(len(shape)) if shape[:axis] + shape[axis + 1 :] == part.shape]
    return part.axis if part.axis in fitting else next(iter(fitting), None)


def _cropped(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return array[tuple(slice(size) for size in shape)]
