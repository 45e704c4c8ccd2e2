"""GGUF files as checkpoints: their metadata as a `ModelConfig`, their tensors under Hugging Face names."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastgen_jax.checkpoint import gguf_blocks
from fastgen_jax.checkpoint.base import missing_tensor
from fastgen_jax.checkpoint.block_kind import BlockKind, common_kind, side_by_side
from fastgen_jax.checkpoint.gguf_architectures import ARCHITECTURES, Architecture, config_json
from fastgen_jax.checkpoint.gguf_file import GGUFFile, dequantize, read_gguf
from fastgen_jax.checkpoint.gguf_metadata import ROPE_TENSORS
from fastgen_jax.checkpoint.gguf_states import Restored
from fastgen_jax.json_types import JsonFields
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import FAMILIES, family_of
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.params import all_specs
from fastgen_jax.models.weight_spec import Kind

if TYPE_CHECKING:
    from pallas_kernels.matmul import BlockWeight

# Endings of vectors that have the suffix ".bias" in GGUF's table of names.
_SPELLED = {
    "e_score_correction_bias": "e_score_correction.bias",
    ".expert_bias": ".expert_bias.bias",
    ".dt_bias": ".dt_proj.bias",
}

# keys below "general.sampling." -> names in the generation_config.json of Hugging Face
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
    "mirostat": "mirostat",
    "xtc_probability": "xtc_probability",
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a Hugging Face tensor is stored: in one tensor of the file, in one entry of a stack, or in several tensors."""

    names: tuple[str, ...]  # in the file; several are concatenated along the axis after that of the experts
    entry: int | None = None  # of the first axis, if a stack in the file holds separate tensors of Hugging Face
    number: float | None = None  # the only number of a tensor that is in the metadata; it has no names then


_AS_STORED = Restored()


@dataclass(frozen=True, kw_only=True)
class GGUFCheckpoint:
    """See `Checkpoint` and `HoldsBlocks`."""

    file: GGUFFile
    config: ModelConfig
    config_json: JsonFields
    architecture: Architecture
    places: Mapping[str, Place]  # by the Hugging Face name of the tensor
    restored: Mapping[str, Restored]  # by the endings of Hugging Face names
    norm_scales: frozenset[str]  # tensors of the file that scale norms, with an offset

    @classmethod
    def open(cls, path: Path) -> GGUFCheckpoint:
        """Reads the header; ValueError if it is corrupt or the architecture is not supported."""
        file = read_gguf(path)
        hf = config_json(file)
        kind = file.metadata["general.architecture"]
        try:
            config = family_of(hf["architectures"][0]).config_from_hf(hf, strict=True)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        sources = FAMILIES[config.family].sources(config)
        kinds = {
            name.format(layer=layer): spec.kind
            for path, spec in all_specs(config).items()
            for name in sources[path].names
            for layer in range(config.num_layers)
        }
        readers = [layer for layer in config.attending_layers if layer not in config.kv_layers]
        unused = tuple(f"blk.{layer}.{part}" for layer in readers for part in ("attn_k.", "attn_v.", "attn_k_norm."))
        places = find_places(file, kind, kinds, num_layers=config.num_layers, unused=unused)
        plain = ARCHITECTURES[kind].plain_norms
        norms = [name for name, which in kinds.items() if which is Kind.NORM and name in places and not name.endswith(plain)]
        return cls(
            file=file,
            config=config,
            config_json=hf,
            architecture=ARCHITECTURES[kind],
            places=places,
            restored=ARCHITECTURES[kind].restored(config),
            norm_scales=frozenset(stored for name in norms for stored in places[name].names),
        )

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def generation_config(self) -> JsonFields:
        found = {name: self.file.metadata.get(f"general.sampling.{key}") for key, name in _SAMPLING.items()}
        # Stored in float32: 0.6, not 0.6000000238418579.
        return {
            name: round(value, 6) if isinstance(value, float) else value
            for name, value in found.items()
            if value is not None
        }

    @property
    def quantization(self) -> str:
        return ""

    @property
    def tensor_names(self) -> frozenset[str]:
        return frozenset(self.places)

    @property
    def sources(self) -> Mapping[str, Source]:
        return FAMILIES[self.config.family].sources(self.config)

    @property
    def tokenizer_source(self) -> GGUFFile:
        return self.file

    def shape(self, name: str) -> tuple[int, ...]:
        place = self._place(name)
        if place.number is not None:
            return (1,)
        shapes = [self._stored_shape(stored) for stored in place.names]
        shape, axis = shapes[0], self._joined_axis(shapes[0])
        if len(shapes) > 1:
            shape = (*shape[:axis], sum(each[axis] for each in shapes), *shape[axis + 1 :])
        shape = shape if place.entry is None else shape[1:]
        restored = self._restored(name)
        if restored.is_flat:
            return (math.prod(shape),)
        if restored.is_conv:
            return (shape[0], 1, shape[1])
        if self._is_flattened(name):
            return (math.prod(shape[:-1]), shape[-1])
        return (*shape[:-2], shape[-1], shape[-2]) if self._is_transposed(name) else shape

    def dtype(self, name: str) -> str:
        import gguf

        if self._place(name).number is not None:
            return "float32"
        kind = gguf.GGMLQuantizationType(self.file.tensors[self._place(name).names[0]].type_id).name
        return {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(kind, kind)

    def block_kind(self, name: str) -> BlockKind | None:
        place = self._place(name)
        if self._is_flattened(name) or any(map(self._is_swapped, place.names)) or self._restored(name).values:
            return None
        return common_kind([gguf_blocks.block_kind(self.file.tensors[stored].type_id) for stored in place.names])

    def read_blocks(self, name: str, entry: int | None = None) -> BlockWeight:
        place, kind = self._place(name), self.block_kind(name)
        assert kind is not None, "it has a block_kind"
        entry = entry if place.entry is None else place.entry
        whole = side_by_side([self._blocks(stored, entry) for stored in place.names], kind)
        reorder = self._restored(name).rows or (self._regroup if len(place.names) > 1 else None)
        if reorder is not None:
            return whole.columns(reorder(np.arange(whole.shape[1])))
        if len(place.names) == 1 or not self.architecture.alternating:
            return whole
        return whole.columns(np.arange(whole.shape[1]).reshape(len(place.names), -1).T.reshape(-1))

    def _blocks(self, stored: str, entry: int | None) -> BlockWeight:
        rows, reorder = self.file.rows(stored), self._reordering(stored)
        rows = rows if entry is None else rows[entry]
        return gguf_blocks.read_blocks(reorder(rows) if reorder else rows, self.file.tensors[stored].type_id)

    def read(self, name: str) -> np.ndarray:
        place = self._place(name)
        if place.number is not None:
            return np.full(1, place.number, np.float32)
        values = [self._values(stored, place.entry) for stored in place.names]
        if len(values) == 1:
            (whole,) = values
        elif self.architecture.alternating:
            whole = np.stack(values, axis=2).reshape(len(values[0]), -1, *values[0].shape[2:])
        else:
            whole = np.concatenate(values, axis=self._joined_axis(values[0].shape))
            whole = whole if self._regroup is None else self._regroup(whole)
        restored = self._restored(name)
        if restored.is_flat or restored.is_conv:
            whole = whole.reshape(self.shape(name))
        for change in (restored.rows, restored.values):
            whole = whole if change is None else change(whole)
        if self._is_flattened(name):
            return whole.reshape(-1, whole.shape[-1])
        return whole.swapaxes(-1, -2) if self._is_transposed(name) else whole

    def _values(self, stored: str, entry: int | None) -> np.ndarray:
        """One tensor of the file, or an entry of its first axis, with its rows in the order of Hugging Face."""
        tensor, rows = self.file.tensors[stored], self.file.rows(stored)
        if entry is not None:
            return dequantize(rows[entry], tensor.type_id, tensor.shape[1:])
        reorder = self._reordering(stored)
        if reorder and len(tensor.shape) == 1:  # in a bias, the values are permuted instead of rows
            return reorder(dequantize(rows, tensor.type_id, tensor.shape))
        values = dequantize(reorder(rows) if reorder else rows, tensor.type_id, tensor.shape)
        if self._is_swapped(stored):
            return values.swapaxes(-1, -2)
        if self.architecture.stored_norm_offset and stored in self.norm_scales:
            return values - np.asarray(self.architecture.stored_norm_offset, values.dtype)
        return values

    def _reordering(self, stored: str) -> Callable[[np.ndarray], np.ndarray] | None:
        """The function that puts the rows of a tensor into the order of Hugging Face; None: they are."""
        config = self.config
        heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(stored.split(".")[-2], 0)
        if heads and self.architecture.halves_interleaved:
            return functools.partial(undo_permutation, num_heads=heads)
        return self._regroup if ".attn_qkv." in stored else None

    @property
    def _regroup(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """The function that puts the rows of q, k and v into the order of Hugging Face; None: they are."""
        if not self.architecture.qkv_by_kind:
            return None
        config = self.config
        return functools.partial(head_by_head, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads)

    def _joined_axis(self, shape: tuple[int, ...]) -> int:
        return 0 if self.architecture.joined_rows and len(shape) == 2 else 1

    def _restored(self, name: str) -> Restored:
        return next((restored for ending, restored in self.restored.items() if name.endswith(ending)), _AS_STORED)

    def _place(self, name: str) -> Place:
        if name not in self.places:
            raise missing_tensor(name, self.path, self.tensor_names)
        return self.places[name]

    def _stored_shape(self, stored: str) -> tuple[int, ...]:
        shape = self.file.tensors[stored].shape
        return (*shape[:-2], shape[-1], shape[-2]) if self._is_swapped(stored) else shape

    def _is_swapped(self, stored: str) -> bool:
        return stored.endswith(self.architecture.swapped)

    def _is_transposed(self, name: str) -> bool:
        return name.removesuffix(".weight").endswith(self.architecture.transposed)

    def _is_flattened(self, name: str) -> bool:
        return name.removesuffix(".weight").endswith(self.architecture.flattened)


def find_places(
    file: GGUFFile, kind: str, wanted: Iterable[str], *, num_layers: int, unused: tuple[str, ...] = ()
) -> dict[str, Place]:
    """The places of those `wanted` Hugging Face tensors that the file holds, by the name table of the gguf library.

    All other tensors keep their names, so that loading reports them as unknown, but those that begin with `unused`.
    """
    import gguf

    architecture = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    table = gguf.get_tensor_name_map(architecture, num_layers)

    # In DeepSeek files from before April 2025 this projection is one tensor.
    joined = {} if "blk.0.attn_kv_b.weight" in file.tensors else ARCHITECTURES[kind].joined

    def stored(name: str) -> str | None:
        spellings = (name, name.partition(".")[2])  # the table has some modules without the prefix of the model
        found = next(
            (
                each
                for each in (table.get_name(spelling, try_suffixes=(".weight", ".bias")) for spelling in spellings)
                if each
            ),
            None,
        )
        return (
            f"{found}.weight" if found and f"{found}.weight" in file.tensors else found
        )  # attention sinks have no ".weight" in their names

    def place(name: str) -> Place | None:
        for ending, key in ARCHITECTURES[kind].of_metadata.items():
            if name.endswith(ending) and (values := file.metadata.get(key)):
                return Place(names=(), number=float(values[int(name.split(".layers.")[1].split(".")[0])]))
        for ending, spelled in _SPELLED.items():
            name = name.removesuffix(ending) + spelled if name.endswith(ending) else name
        if ".mixer.experts." in name:  # of Nemotron 3
            name = name.replace("backbone.", "model.").replace(".mixer.", ".mlp.")
        for ending, parts in joined.items():
            if name.endswith(ending):
                layer = re.search(r"\.(\d+)\.", name)
                found = [f"blk.{layer.group(1)}.{part}" for part in parts] if layer else []
                # Without routed experts, Granite 4's shared one is an MLP.
                found = [each if each in file.tensors else each.replace("_shexp", "") for each in found]
                return Place(names=tuple(found)) if found else None
        # Experts, StableLM's norms of single heads, or Gemma 3n's projections to and from streams.
        one_of_many = re.search(r"\.(experts|norms|altup_projections|altup_unembed_projections)\.(\d+)\.", name)
        if one_of_many is None:
            found = stored(name)
            return None if found is None else Place(names=(found,))
        of_all = one_of_many.group(1)
        found = stored(name.replace(one_of_many.group(), "." if of_all == "norms" else f".{of_all}."))
        return None if found is None else Place(names=(found,), entry=int(one_of_many.group(2)))

    found: dict[str, Place] = {}
    for name in wanted:
        where = place(name)
        if where and all(stored in file.tensors and not stored.startswith(unused) for stored in where.names):
            found[name] = where
    entries = Counter(where.names[0] for where in found.values() if where.entry is not None)
    for stored_name, count in entries.items():
        if file.tensors[stored_name].shape[0] != count:
            raise ValueError(
                f"{file.path}: {stored_name!r} holds {file.tensors[stored_name].shape[0]} entries, but the "
                f"metadata says {count}; the file is corrupt, convert it again"
            )
    others = file.tensors.keys() - {stored for where in found.values() for stored in where.names} - ROPE_TENSORS
    further = file.metadata.get(f"{kind}.nextn_predict_layers", 0)  # multi-token prediction, which is not used
    predictors = tuple(f"blk.{layer}." for layer in range(num_layers, num_layers + further))
    return found | {name: Place(names=(name,)) for name in others if not name.startswith((*predictors, *unused))}


def head_by_head(rows: np.ndarray, *, num_heads: int, num_kv_heads: int) -> np.ndarray:
    """Rows of a fused projection [q, k, v] in the order of Hugging Face: q, k and v of each KV head together."""
    d = rows.shape[0] // (num_heads + 2 * num_kv_heads)
    parts = np.split(rows, [num_heads * d, (num_heads + num_kv_heads) * d])
    groups = [part.reshape(num_kv_heads, -1, *rows.shape[1:]) for part in parts]
    return np.concatenate(groups, axis=1).reshape(rows.shape)


def undo_permutation(rows: np.ndarray, *, num_heads: int) -> np.ndarray:
    """Rows of q or k in the order of Hugging Face: for each head, the first half and then the second half.

    llama.cpp rotates adjacent rows (0,1), (2,3), ..., Hugging Face rows i and i + D/2, so its converter interleaves the
    halves for some architectures. The stored bytes can be permuted, because a quantized block is within one row.
    """
    if rows.shape[0] % (2 * num_heads):
        raise ValueError(f"{rows.shape[0]} rows do not divide into {num_heads} heads of even size")
    pairs = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
