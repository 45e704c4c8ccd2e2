"""Inference snapshots: weights as the model computes with them, with their config and tokenizer.

    config.json             the fields of a Hugging Face config.json
    generation_config.json  the model's sampling defaults, if any
    fastgen.json            the format, dtype and quantization of this snapshot, and how weights are stored in blocks
    tokenizer/              the tokenizer's own files
    params/                 an Orbax checkpoint of a flat dict: "embed", "layers.qkv.0", "layers.qkv.1", ...

Loading one does not concatenate, transpose, decompress or dequantize anything: each weight is read directly into the
requested sharding and dtype, independent of the mesh that wrote it. Weights in blocks are as `snapshot_blocks` says, for
devices of any kind; where they are not multiplied as such, they are dequantized.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from fastgen_jax.checkpoint import snapshot_blocks
from fastgen_jax.checkpoint.base import missing_tensor
from fastgen_jax.checkpoint.block_kind import BlockKind
from fastgen_jax.checkpoint.huggingface import GENERATION_FILE, model_config, read_generation_config, read_json
from fastgen_jax.checkpoint.orbax_arrays import open_arrays, place_array, read_array
from fastgen_jax.json_types import JsonFields, JsonObject
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families.common import Source
from fastgen_jax.models.params import all_specs
from fastgen_jax.models.weight_spec import DType, Kind, Leaf, Params

if TYPE_CHECKING:
    from jax.sharding import Sharding
    from tensorstore import TensorStore

    from pallas_kernels.matmul import BlockFormat, BlockWeight

    StoredWeight = TensorStore | dict[str, TensorStore]

FORMAT, FORMAT_WITH_BLOCKS = 1, 2
MARKER = "fastgen.json"
_INT8_FIELDS = ("values", "scales")
_BUCKETS = {"gs": "gcsfs", "s3": "s3fs"}  # packages with which etils lists and reads small files in a bucket
_CHUNK = 16 << 20  # bytes of a stored piece; small enough that a device does not read much of what others need


@dataclass(frozen=True, kw_only=True)
class SnapshotCheckpoint:
    """See `Checkpoint`; its tensors are the weights of `param_specs`, those of a layer end with its number."""

    path: Path
    config: ModelConfig
    config_json: JsonFields
    quantize: str | None
    """What the conversion quantized to: with "int8", matrices are `Int8Weight`s, with "int4" and "fp8" some are in blocks.
    None: nothing; those of a quantized original are in its blocks."""
    arrays: Mapping[str, StoredWeight]  # by name: an open array, or those of an Int8Weight, or of a weight in blocks
    formats: Mapping[str, BlockFormat]
    """The weights in blocks, by path."""

    @classmethod
    def open(cls, path: Path) -> SnapshotCheckpoint:
        """Reads the metadata; ValueError if the snapshot is incomplete, damaged or of a later format."""
        marker = read_marker(path)
        hf = read_json(path / "config.json")
        if not (path / "params").exists():
            raise ValueError(f"{path} has no params: its conversion was interrupted; convert the original again")
        try:
            found = open_arrays(str(_absolute(path) / "params"))
        except ValueError as error:
            remedy = "check that you may read it, or " if _is_remote(path) else ""
            raise ValueError(
                f"{path / 'params'} is damaged ({_first_line(error)}); {remedy}convert the original again"
            ) from error
        arrays: dict[str, StoredWeight] = {}
        for name, array in found.items():
            stem, _, field = name.rpartition(".")
            if field in _INT8_FIELDS or field.startswith(snapshot_blocks.PREFIX):
                arrays.setdefault(stem, {})[field] = array
            else:
                arrays[name] = array
        found_here = cls(
            path=path,
            config=model_config(hf, path / "config.json"),
            config_json=hf,
            quantize=marker["quantize"],
            arrays=arrays,
            formats=marker["blocks"],
        )
        found_here._check_blocks()
        return found_here

    def _check_blocks(self) -> None:
        """ValueError unless the weights in blocks have the arrays of their formats."""
        for name, stored in self.arrays.items():
            arrays = stored if isinstance(stored, dict) else {}
            shapes = {
                field.removeprefix(snapshot_blocks.PREFIX): tuple(array.shape)
                for field, array in arrays.items()
                if field.startswith(snapshot_blocks.PREFIX)
            }
            if problem := snapshot_blocks.problem_of(self.formats.get(_path_of(name)), shapes):
                raise ValueError(f"{self.path}: the weight {name!r} has {problem}; convert the original again")

    @property
    def generation_config(self) -> JsonFields:
        # Older snapshots have the file next to the tokenizer, if at all.
        return read_generation_config(self.path) or read_generation_config(self.path / "tokenizer")

    @property
    def quantization(self) -> str:
        return self.quantize or ""

    @property
    def tensor_names(self) -> frozenset[str]:
        return frozenset(self.arrays)

    @property
    def sources(self) -> Mapping[str, Source]:
        return {
            path: Source((f"{path}.{{layer}}" if spec.per_layer else path,)) for path, spec in all_specs(self.config).items()
        }

    @property
    def tokenizer_source(self) -> Path:
        """The tokenizer's files; those of a remote snapshot are copied into a temporary folder."""
        folder = self.path / "tokenizer"
        if not folder.exists():
            raise ValueError(f"{self.path} has no tokenizer; convert the original again, or use token ids")
        return folder if isinstance(folder, Path) and not _is_remote(folder) else _local_copy(folder)

    def shape(self, name: str) -> tuple[int, ...]:
        stored, format = self._stored(name), self.formats.get(_path_of(name))
        if format is not None and isinstance(stored, dict):
            *experts, outputs, width = stored[snapshot_blocks.PREFIX + "numbers"].shape
            inputs = width * (2 if format.bits == 4 else 1)
            return (outputs, inputs) if self._is_table(name) else (*experts, inputs, outputs)
        return tuple((stored["values"] if isinstance(stored, dict) else stored).shape)

    def dtype(self, name: str) -> str:
        stored, kind = self._stored(name), self.block_kind(name)
        if kind is not None:
            return kind.name
        return str((stored["values"] if isinstance(stored, dict) else stored).dtype.numpy_dtype)

    def block_kind(self, name: str) -> BlockKind | None:
        format = self.formats.get(_path_of(name))
        return None if format is None else snapshot_blocks.kind_of(format)

    def read_blocks(self, name: str, entry: int | None = None) -> BlockWeight:
        stored = self._stored(name)
        assert isinstance(stored, dict), "it has a block_kind"

        def read(field: str) -> np.ndarray:
            array = stored[snapshot_blocks.PREFIX + field]
            return read_array(array if entry is None else array[entry])

        try:
            return snapshot_blocks.read_stored(self.formats[_path_of(name)], read)
        except ValueError as error:
            raise self._damaged(name, error) from error

    def read(self, name: str) -> Leaf:
        """One weight on the host, as stored: an array, or an `Int8Weight` of arrays; the values of one in blocks."""
        return self.restore(name)

    def _values(self, name: str) -> np.ndarray:
        """float32: the values of a weight in blocks."""
        if self._is_table(name):
            return self.read_blocks(name).dequantize().T
        shape = self.shape(name)
        if len(shape) == 2:
            return self.read_blocks(name).dequantize()
        return np.stack([self.read_blocks(name, number).dequantize() for number in range(shape[0])])

    def _is_table(self, name: str) -> bool:
        return all_specs(self.config)[_path_of(name)].kind is Kind.TABLE

    def _damaged(self, name: str, error: Exception) -> ValueError:
        return ValueError(
            f"{self.path}: the weight {name!r} cannot be read ({_first_line(error)}); the snapshot is "
            "damaged, convert the original again"
        )

    def restore(self, name: str, *, dtype: DType | None = None, sharding: Sharding | None = None) -> Leaf:
        """One weight, in `dtype` (int8 is not converted) and, with a `sharding`, directly on its devices.

        Each device reads its own part. The scales of an `Int8Weight` follow the columns of its values.
        """
        from pallas_kernels.matmul import Int8Weight

        stored = self._stored(name)
        if _path_of(name) in self.formats:
            values = self._values(name)
            values = values if dtype is None else values.astype(np.dtype(dtype))
            return values if sharding is None else place_array(values, sharding)
        try:
            if not isinstance(stored, dict):
                return read_array(stored, dtype=dtype, sharding=sharding)
            places = {"values": sharding, "scales": _of_columns(sharding)}
            return Int8Weight(**{field: read_array(stored[field], sharding=place) for field, place in places.items()})
        except ValueError as error:
            raise self._damaged(name, error) from error

    def _stored(self, name: str) -> StoredWeight:
        if name not in self.arrays:
            raise missing_tensor(name, self.path, self.arrays)
        return self.arrays[name]


def save_snapshot(
    out: str | Path,
    params: Params,
    config_json: JsonFields,
    *,
    tokenizer_files: Mapping[str, bytes],
    generation_config: JsonFields | None = None,
    dtype: DType | None = None,
    quantize: str | None = None,
) -> None:
    """Writes a snapshot into the new directory `out`, local or gs://; ValueError if it already has contents.

    `params` may be stacked or not, on the host or on any mesh; matrices may be `Int8Weight`s or, on the host and not
    stacked, `StoredBlocks`. `dtype` converts floating-point weights (but not scales); None keeps them. `quantize` is "int4"
    or "fp8" if blocks were made from floating point. `config_json` has the fields of a Hugging Face config.json,
    `generation_config` those of a generation_config.json, and `tokenizer_files` the files that
    `load_tokenizer` reads from a directory.
    """
    import jax

    folder = as_path(out)
    model_config(config_json, "config_json")
    check_target(out)
    tree: dict[str, Leaf] = {}
    formats: dict[str, BlockFormat] = {}
    for name, leaf in _flat(params, dtype):
        if isinstance(leaf, snapshot_blocks.StoredBlocks):
            if formats.setdefault(_path_of(name), leaf.format) != leaf.format:
                raise ValueError(f"{name} has {leaf.format}, but other layers {formats[_path_of(name)]}; they must be equal")
            leaf = {snapshot_blocks.PREFIX + field: array for field, array in leaf.arrays.items()}
        tree[name] = leaf
    has_int8 = any(isinstance(leaf, Mapping) and "values" in leaf for leaf in tree.values())
    dtypes = {str(leaf.dtype) for leaf in tree.values() if not isinstance(leaf, Mapping)}
    marker: JsonObject = {
        "format": FORMAT_WITH_BLOCKS if formats or quantize else FORMAT,
        "dtype": "/".join(sorted(dtypes)),
        "quantize": quantize or ("int8" if has_int8 else None),
    }
    if formats:
        marker["blocks"] = snapshot_blocks.as_json(formats)
    if jax.process_index() == 0:
        (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
        for name, content in tokenizer_files.items():
            target = folder / "tokenizer" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        (folder / "config.json").write_text(json.dumps(config_json, indent=2) + "\n")
        if generation_config:
            (folder / GENERATION_FILE).write_text(json.dumps(generation_config, indent=2) + "\n")
        (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n")
    _require_orbax()
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs every array
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Orbax warns that host arrays have no sharding
        # Weights hardly compress (except float32 converted from bfloat16), and decompression is slower than a disk.
        checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False))
        how = jax.tree.map(lambda leaf: ocp.SaveArgs(chunk_byte_size=_CHUNK), tree)
        checkpointer.save(_absolute(folder) / "params", args=ocp.args.PyTreeSave(tree, save_args=how))


def read_marker(path: Path) -> JsonObject:
    """fastgen.json of a snapshot: its `quantize`, and as `blocks` the formats of weights by path.

    ValueError if it is of a later version or damaged.
    """
    marker = read_json(path / MARKER)
    if marker.get("format") not in (FORMAT, FORMAT_WITH_BLOCKS):
        raise ValueError(
            f"{path / MARKER} has format {marker.get('format')!r}, but this version reads {FORMAT} and "
            f"{FORMAT_WITH_BLOCKS}; convert the original checkpoint again"
        )
    quantize = marker.get("quantize")
    if quantize not in (None, "int8", "int4", "fp8"):
        raise ValueError(
            f"{path / MARKER} has quantize={quantize!r}, but this version reads null, int8, int4 and fp8; convert the "
            "original checkpoint again"
        )
    try:
        blocks = snapshot_blocks.from_json(marker.get("blocks") or {})
    except ValueError as error:
        raise ValueError(f"{path / MARKER}: {error}; convert the original checkpoint again") from error
    return {**marker, "quantize": quantize, "blocks": blocks}


def _path_of(name: str) -> str:
    """The path of a weight, given its name in a snapshot, which for a layer's ends with the number of the layer."""
    stem, _, number = name.rpartition(".")
    return stem if number.isdecimal() else name


def check_target(out: str | Path, *, source: Path | None = None) -> None:
    """Raises ValueError if `out` already exists with contents, or is the checkpoint `source` or inside it."""
    folder = as_path(out)
    if source is not None and not _is_remote(folder) and not _is_remote(source):
        real = folder.resolve()
        if source.resolve() in (real, *real.parents):
            raise ValueError(f"{folder} is in {source}, the checkpoint to convert; choose a directory outside it")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose the name of a new directory")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; choose another directory, or remove it first")


def as_path(path: str | Path) -> Path:
    """A local path, or an `etils` path for URLs such as gs://, which behaves the same."""
    if "://" not in str(path):
        return Path(path)
    _require_orbax()
    from etils import epath

    backend = _BUCKETS.get(str(path).partition("://")[0])
    if backend and not any(importlib.util.find_spec(module) for module in (backend, "tensorflow")):
        raise ValueError(f"{path}: reading and writing it requires {backend}, which is not installed; pip install {backend}")
    try:
        return cast(Path, epath.Path(path))
    except KeyError as error:
        raise ValueError(f"{path}: this kind of URL is not supported; supported: local paths, gs://, s3://") from error


def _flat(params: Params, dtype: DType | None) -> Iterator[tuple[str, Leaf]]:
    """Every weight under its name in the snapshot, with stacked layers separated."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.matmul import Int8Weight

    def stored(leaf: Leaf) -> Leaf:
        if isinstance(leaf, snapshot_blocks.StoredBlocks):
            return leaf
        if isinstance(leaf, Int8Weight):
            values = leaf.values.swapaxes(-1, -2) if leaf.inputs_last else leaf.values
            return {"values": values, "scales": leaf.scales}
        if not isinstance(leaf, jax.Array | np.ndarray):
            raise ValueError(
                f"a {type(leaf).__name__} cannot be saved: prepared weights are specific to one machine; pass the "
                "params of load_params, without prepare"
            )
        return leaf if dtype is None else leaf.astype(jnp.dtype(dtype))

    for name, leaf in params.items():
        if name != "layers":
            yield name, stored(leaf)
    layers = params["layers"]
    if isinstance(layers, dict):
        for name, leaf in layers.items():
            for i in range(leaf.shape[0]):
                yield f"layers.{name}.{i}", stored(jax.tree.map(lambda x, i=i: x[i], leaf))
    else:
        for i, layer in enumerate(layers):
            for name, leaf in layer.items():
                yield f"layers.{name}.{i}", stored(leaf)


def _of_columns(sharding: Sharding | None) -> Sharding | None:
    """The sharding of one number per column, given that of the matrix."""
    import jax

    if isinstance(sharding, jax.sharding.NamedSharding) and len(sharding.spec) > 1:
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[:-2], sharding.spec[-1]))
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return sharding


def _require_orbax() -> None:
    try:
        import orbax.checkpoint  # noqa: F401
    except ImportError as error:
        raise ValueError("snapshots require Orbax, which is not installed; pip install orbax-checkpoint") from error


def _absolute(folder: Path) -> Path:
    return folder.absolute() if isinstance(folder, Path) and not _is_remote(folder) else folder


def _is_remote(path: Path) -> bool:
    return "://" in str(path)


def _local_copy(folder: Path) -> Path:
    target = Path(tempfile.mkdtemp(prefix="fastgen-tokenizer-"))
    for file in _files(folder):
        local = target / file.relative_to(folder)
        local.parent.mkdir(parents=True, exist_ok=True)
        local.write_bytes(file.read_bytes())
    return target


def _files(folder: Path) -> Iterator[Path]:
    for entry in folder.iterdir():  # etils has no recursive glob for buckets
        if entry.is_dir():
            yield from _files(entry)
        else:
            yield entry


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
