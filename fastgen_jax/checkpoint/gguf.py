"""GGUF files as checkpoints: their metadata as a `ModelConfig`, their tensors under Hugging Face names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgen_jax.checkpoint.base import missing_tensor
from fastgen_jax.checkpoint.gguf_architectures import ARCHITECTURES, ROPE_TENSORS, Architecture, config_json
from fastgen_jax.checkpoint.gguf_file import GGUFFile, dequantize, read_gguf
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import FAMILIES, family_of
from fastgen_jax.models.families.common import Source


@dataclass(frozen=True, kw_only=True)
class GGUFCheckpoint:
    """See `Checkpoint`."""

    file: GGUFFile
    config: ModelConfig
    config_json: Mapping[str, Any]
    architecture: Architecture
    stored_names: Mapping[str, str]  # Hugging Face name -> name in the file

    @classmethod
    def open(cls, path: Path) -> GGUFCheckpoint:
        """Reads the header; ValueError if it is corrupt or the architecture is not supported."""
        file = read_gguf(path)
        hf = config_json(file)
        kind = file.metadata["general.architecture"]
        try:
            config = family_of(hf["architectures"][0]).config_from_hf(hf)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        wanted = [name.format(layer=layer) for source in FAMILIES[config.family].sources(config).values()
                  for name in source.names for layer in range(config.num_layers)]
        return cls(file=file, config=config, config_json=hf, architecture=ARCHITECTURES[kind],
                   stored_names=stored_names(file, kind, wanted, num_layers=config.num_layers))

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def tensor_names(self) -> frozenset[str]:
        return frozenset(self.stored_names)

    @property
    def sources(self) -> Mapping[str, Source]:
        return FAMILIES[self.config.family].sources(self.config)

    @property
    def tokenizer_source(self) -> GGUFFile:
        return self.file

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.file.tensors[self._stored(name)].shape
        return shape[::-1] if self._is_transposed(name) else shape

    def dtype(self, name: str) -> str:
        import gguf

        kind = gguf.GGMLQuantizationType(self.file.tensors[self._stored(name)].type_id).name
        return {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(kind, kind)

    def read(self, name: str) -> np.ndarray:
        stored = self._stored(name)
        tensor, rows = self.file.tensors[stored], self.file.rows(stored)
        heads = {"attn_q": self.config.num_heads, "attn_k": self.config.num_kv_heads}.get(stored.split(".")[-2], 0)
        if heads and self.architecture.halves_interleaved:
            if len(tensor.shape) == 1:  # a bias is a single row, whose values change places
                return undo_permutation(dequantize(rows, tensor.type_id, tensor.shape), num_heads=heads)
            rows = undo_permutation(rows, num_heads=heads)
        values = dequantize(rows, tensor.type_id, tensor.shape)
        if self.architecture.stored_norm_offset and stored.endswith("norm.weight"):
            return values - np.asarray(self.architecture.stored_norm_offset, values.dtype)
        return values.T if self._is_transposed(name) else values

    def _stored(self, name: str) -> str:
        if name not in self.stored_names:
            raise missing_tensor(name, self.path, self.tensor_names)
        return self.stored_names[name]

    def _is_transposed(self, name: str) -> bool:
        return name.removesuffix(".weight").endswith(self.architecture.transposed or "\0")


def stored_names(file: GGUFFile, kind: str, wanted: Iterable[str], *, num_layers: int) -> dict[str, str]:
    """Hugging Face name -> name in the file, by the gguf library's own table, for the wanted names that are there.

    The other tensors keep the names that they have, so that they are refused when loading.
    """
    import gguf

    architecture = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    table = gguf.get_tensor_name_map(architecture, num_layers)
    found = {}
    for name in wanted:
        stored = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored in file.tensors:
            found[name] = stored
    others = file.tensors.keys() - set(found.values()) - ROPE_TENSORS
    return found | {name: name for name in others}


def undo_permutation(rows: np.ndarray, *, num_heads: int) -> np.ndarray:
    """Rows of q or k in Hugging Face's order: each head's first half, then its second half.

    llama.cpp rotates neighbouring rows (0,1), (2,3), ..., Hugging Face rows i and i + D/2; its converter interleaves
    the halves for some architectures. Stored bytes can be permuted: a quantised block lies in one row.
    """
    if rows.shape[0] % (2 * num_heads):
        raise ValueError(f"{rows.shape[0]} rows do not divide into {num_heads} heads of even size")
    pairs = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
