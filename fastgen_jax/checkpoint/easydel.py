"""Checkpoints of EasyDeL, as its models' `save_pretrained` writes them: config.json, and one zarr array for each weight.

    model/model/layers/0/self_attn/q_proj/kernel     [in, out]
    model/model/layers/0/input_layernorm/kernel      [E]
    model/model/embed_tokens/embedding               [V, E]
    tensorstore_index.json

Its modules have the names of transformers, and their weights the same values; matrices are transposed.
Source: EasyDeL (Apache-2.0), easydel/infra/mixins/bridge.py and easydel/layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastgen_jax.checkpoint.base import missing_tensor
from fastgen_jax.checkpoint.huggingface import config_json, model_config
from fastgen_jax.checkpoint.orbax_arrays import open_arrays, read_array
from fastgen_jax.checkpoint.trained_trees import OfTrainer
from fastgen_jax.json_types import JsonFields
from fastgen_jax.models.families import FAMILIES
from fastgen_jax.models.families.common import Source

if TYPE_CHECKING:
    from tensorstore import TensorStore

INDEX = "tensorstore_index.json"
_OF_PROGRAMS = ("moe_method", "moe_tiling_size_", "moe_force_xla_gmm")
_WEIGHTS = ("kernel", "embedding", "scale")  # what a module calls what is `weight` in transformers


@dataclass(frozen=True, kw_only=True)
class EasyDelCheckpoint(OfTrainer):
    """See `Checkpoint`; `arrays` have the names of transformers."""

    matrices: frozenset[str]
    """Those that are stored [in, out]."""

    @property
    def tensor_names(self) -> frozenset[str]:
        return frozenset(self.arrays)

    @property
    def sources(self) -> Mapping[str, Source]:
        return FAMILIES[self.config.family].sources(self.config)

    @property
    def tokenizer_source(self) -> Path:
        return self.base

    def shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(self._stored(name).shape)
        return shape[::-1] if name in self.matrices else shape

    def dtype(self, name: str) -> str:
        return str(self._stored(name).dtype.numpy_dtype)

    def read(self, name: str) -> np.ndarray:
        array = read_array(self._stored(name))
        assert isinstance(array, np.ndarray), "it is not sharded"
        return array.T if name in self.matrices else array

    def _stored(self, name: str) -> TensorStore:
        if name not in self.arrays:
            raise missing_tensor(name, self.path, self.arrays)
        return self.arrays[name]


def is_easydel(path: Path) -> bool:
    """Whether a directory is a checkpoint of EasyDeL."""
    return (path / INDEX).exists()


def _published(hf: JsonFields) -> JsonFields:
    """The config without the fields by which EasyDeL chooses how to compute the same."""
    found = {name: value for name, value in hf.items() if not name.startswith(_OF_PROGRAMS)}
    if set(found.get("layer_types") or ()) == {"full_attention"}:  # it is written for every family
        del found["layer_types"]
    return found


def open_easydel(path: str | Path, base: str | Path | None = None) -> EasyDelCheckpoint:
    """Opens a checkpoint of EasyDeL with its own config.json, or with that and the tokenizer of the directory `base`.

    Reads headers only. ValueError if it is none, or has experts or states, which EasyDeL stores in another way.
    """
    path = Path(path)
    base = path if base is None else Path(base)
    if not is_easydel(path):
        raise ValueError(f"{path} has no {INDEX}; pass the directory that save_pretrained of EasyDeL has written")
    hf = _published(config_json(base))
    config = model_config(hf, base / "config.json")
    if config.moe is not None or config.state is not None:
        raise ValueError(
            f"checkpoints of EasyDeL with experts or states are not supported, and this is a {config.family!r}; load it in "
            "EasyDeL and save it with to_torch().save_pretrained"
        )
    try:
        found = open_arrays(str((path / "model").absolute()))
    except ValueError as error:
        raise ValueError(f"{path / 'model'} cannot be read as arrays of EasyDeL ({str(error).splitlines()[0]})") from error
    arrays: dict[str, TensorStore] = {}
    matrices: set[str] = set()
    for key, array in found.items():
        if config.tie_embeddings and key.startswith("lm_head"):  # EasyDeL saves one that it does not use
            continue
        module, _, leaf = key.replace("/", ".").rpartition(".")
        if leaf.startswith("quant_"):
            raise ValueError(f"the weight {module!r} of {path} is quantized; save it with dequantized weights")
        name = f"{module}.weight" if leaf in _WEIGHTS else f"{module}.{leaf}"
        arrays[name] = array
        if leaf == "kernel" and array.ndim == 2:
            matrices.add(name)
    return EasyDelCheckpoint(
        path=path, config=config, config_json=hf, base=base, arrays=arrays, matrices=frozenset(matrices)
    )
