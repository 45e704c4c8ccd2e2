"""Locates tensors in safetensors files and in PyTorch's pickled .bin files, without PyTorch.

Both formats store each tensor as one contiguous array, so reading one maps only its own pages.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_SAFETENSORS_DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "U8": "uint8",  # this and the following are parts of quantized matrices
    "U32": "uint32",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
}
_TORCH_STORAGES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
}
_ZIP_ENTRY_HEADER = 30  # bytes of a local file header before the name and the extra field
_OLD_FORMAT = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # torch.save before PyTorch 1.6 starts with this number


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a file: row-major numbers of `dtype` (a NumPy name, or that of the file if NumPy has none)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    def map(self) -> np.ndarray:
        """The tensor, memory-mapped; its pages are released with the array."""
        dtype = number_type(self.dtype)
        if not math.prod(self.shape):  # an empty file range cannot be mapped
            return np.zeros(self.shape, dtype)
        return np.memmap(self.file, dtype=dtype, mode="r", offset=self.offset, shape=self.shape)


def number_type(name: str) -> np.dtype:
    """The type with this name in NumPy or ml_dtypes."""
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name, name))


def read_safetensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, from its header; ValueError if it is truncated or corrupt."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):  # the library checks the header and the size of the file
            pass
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or corrupt ({error}); download it again") from error
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    return {
        name: StoredTensor(
            file=file,
            dtype=str(_SAFETENSORS_DTYPES.get(entry["dtype"], entry["dtype"])),
            shape=tuple(entry["shape"]),
            offset=8 + length + entry["data_offsets"][0],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def read_torch(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a `torch.save`d state dict; ValueError if it is damaged or holds anything but tensors.

    The unpickler supports only tensors, so no code in the file runs.
    Source: the zip layout of torch.serialization (PyTorch 1.6 and later).
    """
    with file.open("rb") as stream:
        if stream.read(len(_OLD_FORMAT)) == _OLD_FORMAT:
            raise ValueError(f"{file} is in the format before PyTorch 1.6; load it with torch and save it as safetensors")
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {info.filename: info for info in archive.infolist()}
            pickled = next(name for name in entries if name.endswith("/data.pkl"))
            root = pickled.removesuffix("data.pkl")
            if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
                raise ValueError("it was written on a big-endian machine")
            found = _StateDict(archive.read(pickled)).load()
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, not a dict of tensors")
        tensors = {name: value for name, value in found.items() if isinstance(value, _Tensor)}
        if len(tensors) != len(found):
            other = next(name for name in found if name not in tensors)
            raise ValueError(f"its entry {other!r} is not a tensor")
        return {name: _place(file, tensor, entries[f"{root}data/{tensor.storage.key}"]) for name, tensor in tensors.items()}
    except (zipfile.BadZipFile, pickle.UnpicklingError, StopIteration, KeyError, EOFError, struct.error) as error:
        raise ValueError(f"{file} is truncated or not a PyTorch file ({error!r}); download it again") from error
    except ValueError as error:
        raise ValueError(f"{file} cannot be read ({error}); load it with torch and save it as safetensors") from error


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str
    size: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    start: int
    shape: tuple[int, ...]


class _Dict(dict):
    """In the place of an OrderedDict; unlike a plain dict, it may have attributes, such as a state dict's `_metadata`."""


class _StateDict(pickle.Unpickler):
    """Reads a state dict with replacements for the few names that it may refer to; any other name is an error."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("collections", "OrderedDict"):
            return _Dict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, requires_grad, hooks: tensor
        if module == "torch" and name.endswith("Storage"):
            return _TORCH_STORAGES.get(name, name)
        raise ValueError(f"it refers to {module}.{name}, which is not part of a dict of tensors")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _device, size = pid
        if kind != "storage":
            raise ValueError(f"it refers to a {kind!r}")
        return _Storage(dtype, key, size)


def _rebuild(storage: _Storage, start: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: object) -> _Tensor:
    row_major = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    if any(size > 1 and ours != theirs for size, ours, theirs in zip(shape, row_major, strides, strict=True)):
        raise ValueError(f"a tensor of shape {shape} is not stored row by row but with strides {strides}")
    if start + math.prod(shape) > storage.size:
        raise ValueError(f"a tensor of shape {shape} exceeds its storage of {storage.size} numbers")
    return _Tensor(storage, start, shape)


def _place(file: Path, tensor: _Tensor, entry: zipfile.ZipInfo) -> StoredTensor:
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{entry.filename} is compressed")
    with file.open("rb") as stream:
        stream.seek(entry.header_offset)
        header = stream.read(_ZIP_ENTRY_HEADER)
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    start = entry.header_offset + _ZIP_ENTRY_HEADER + name_length + extra_length
    known = tensor.storage.dtype in _TORCH_STORAGES.values()
    itemsize = number_type(tensor.storage.dtype).itemsize if known else 1
    if entry.file_size < tensor.storage.size * itemsize:
        raise ValueError(f"{entry.filename} has {entry.file_size} bytes, fewer than its {tensor.storage.size} numbers")
    return StoredTensor(file=file, dtype=tensor.storage.dtype, shape=tensor.shape, offset=start + tensor.start * itemsize)
