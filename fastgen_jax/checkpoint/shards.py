"""Writes safetensors files tensor by tensor; the library's own writer needs all tensors of a file in memory."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastgen_jax.json_types import JsonFields

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # as transformers 4 divides them
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Names in NumPy and in safetensors of the number formats that weights are written in."""
_UNFINISHED = ".incomplete"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Planned(NamedTuple):
    """A tensor before its values are known."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * (4 if self.dtype == "float32" else 2)


def write_directory(
    folder: Path,
    tensors: Sequence[Planned],
    arrays: Iterable[np.ndarray],
    *,
    texts: JsonFields,
    files: dict[str, bytes],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Fills the new or empty `folder`: one safetensors file or shards with an index, then `files`, then the JSON `texts`.

    `arrays` are the values of `tensors`, in this order; only one is in memory at a time. Shards get their names when all of
    them are complete, and config.json, without which nobody takes the folder for a model, is the last of the `texts`. If
    anything fails, what was written is deleted. ValueError if there is not enough room on the disk.
    """
    needed = sum(tensor.num_bytes for tensor in tensors)
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if needed > (free := shutil.disk_usage(existing).free):
        raise ValueError(f"{folder} needs {needed / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB left; free some room")
    shards = _shards(tensors, shard_bytes)
    with _all_or_nothing(folder, needed):
        values = iter(arrays)
        for name, shard in shards.items():
            _write_shard(folder / f"{name}{_UNFINISHED}", shard, values)
        if len(shards) > 1:
            weight_map = {tensor.name: name for name, shard in shards.items() for tensor in shard}
            texts = {INDEX: {"metadata": {"total_size": needed}, "weight_map": weight_map}, **texts}
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        for name in shards:
            (folder / f"{name}{_UNFINISHED}").rename(folder / name)
        for name, fields in texts.items():
            (folder / name).write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _shards(tensors: Sequence[Planned], shard_bytes: int) -> dict[str, list[Planned]]:
    """The files by name, each with its tensors; a file is larger than `shard_bytes` only if its one tensor is."""
    groups: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.num_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.num_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def _write_shard(file: Path, tensors: Sequence[Planned], arrays: Iterator[np.ndarray]) -> None:
    """One file, with the values that `arrays` yields next.

    Source: the layout of safetensors: the length of the header, the header in JSON, padded to 8 bytes, and the data. Tensors
    of float32 come first, so that every tensor is aligned to its numbers.
    """
    offsets: dict[str, int] = {}
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.dtype != "float32"):
        offsets[tensor.name] = end
        end += tensor.num_bytes
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers rejects files that lack it
    for name, dtype, shape in tensors:
        size = math.prod(shape) * (4 if dtype == "float32" else 2)
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [offsets[name], offsets[name] + size]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        start = stream.tell()
        for tensor in tensors:
            stream.seek(start + offsets[tensor.name])
            stream.write(_bytes_of(next(arrays), tensor))


def _bytes_of(array: np.ndarray, tensor: Planned) -> memoryview:
    assert (str(array.dtype), array.shape) == (tensor.dtype, tensor.shape), f"{tensor.name} differs from its plan"
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


@contextlib.contextmanager
def _all_or_nothing(folder: Path, needed: int) -> Iterator[None]:
    """Makes the folder, and empties it (or deletes it if it is new) if what happens inside fails."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException as error:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if is_new:
            folder.rmdir()
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise ValueError(
                f"the disk of {folder} is full: the model needs {needed / 1e9:.1f} GB; nothing was kept, free some room"
            ) from error
        raise
