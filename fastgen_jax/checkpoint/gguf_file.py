"""The GGUF container: its header, and the location of its tensors.

Source: the format's description in ggml (docs/gguf.md). The reader of the `gguf` library makes several NumPy objects
for every string, so a vocabulary of 49,152 takes seconds; this one reads the same header in a tenth of a second.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastgen_jax.checkpoint.gguf_blocks import block_kind, read_blocks
from fastgen_jax.json_types import JsonFields
from pallas_kernels.aligned import aligned_empty

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_RANK = 4  # GGML_MAX_DIMS
_PIECE = 1 << 18  # values dequantized at a time: the temporaries stay in the processor's cache
_DEFAULT_ALIGNMENT = 32  # bytes, if general.alignment is absent
PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, kw_only=True)
class GGUFTensor:
    """The location of one tensor. `shape` is in NumPy's order (rows first), the reverse of the file's."""

    shape: tuple[int, ...]
    type_id: int  # ggml's number of the storage type, see `gguf.GGMLQuantizationType`
    offset: int  # bytes from the start of the file
    file: Path  # that holds it: `GGUFFile.path`, or another part of a split file


@dataclass(frozen=True, kw_only=True)
class GGUFFile:
    """The header of a GGUF file, or of the parts of a split one; tensor data stays on disk until `rows` is indexed."""

    path: Path
    metadata: JsonFields
    tensors: Mapping[str, GGUFTensor]
    metadata_end: int  # bytes from the start of the file: where the list of tensors begins

    def rows(self, name: str) -> np.ndarray:
        """The stored bytes of a tensor, mapped, not read: uint8[..., bytes per row], leading axes as in `shape`.

        Each tensor has its own mapping, so its pages are released with the array.
        """
        tensor = self.tensors[name]
        shape = (*tensor.shape[:-1], row_size(tensor))
        return np.memmap(tensor.file, dtype=np.uint8, mode="r", offset=tensor.offset, shape=shape)


def row_size(tensor: GGUFTensor) -> int:
    """Bytes of one row (the last axis) of a tensor; ValueError for a type that `gguf` does not know."""
    import gguf

    if tensor.type_id not in _known_types():
        raise ValueError(f"storage type {tensor.type_id} is unknown to gguf; known: {_known_types()}")
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.type_id)]
    if tensor.shape[-1] % block:
        raise ValueError(f"a row of {tensor.shape[-1]} values is not a multiple of its type's block of {block}")
    return tensor.shape[-1] // block * block_bytes


def dequantize(rows: np.ndarray, type_id: int, shape: tuple[int, ...]) -> np.ndarray:
    """Values of stored rows: float32, or F16 and BF16 unchanged. `rows` is uint8[..., bytes per row]."""
    import gguf
    import ml_dtypes

    kind = gguf.GGMLQuantizationType(type_id)
    plain = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    if kind.name in plain:
        return np.ascontiguousarray(rows).view(plain[kind.name]).reshape(shape)
    flat = rows.reshape(-1, rows.shape[-1])
    out = aligned_empty((len(flat), shape[-1]), np.float32)
    step = max(1, _PIECE // shape[-1])
    for start in range(0, len(flat), step):
        try:
            # A plain array: arithmetic on a memory map would create more maps.
            piece = np.array(flat[start : start + step], subok=False)
            if block_kind(type_id):
                out[start : start + step] = read_blocks(piece, type_id).dequantize().T
            else:
                out[start : start + step] = gguf.quants.dequantize(piece, kind)
        except NotImplementedError as error:
            known = ", ".join(sorted(kind.name for kind in gguf.quants._type_traits))
            raise ValueError(
                f"storage type {kind.name} cannot be dequantized; requantize the file to one of F32, F16, {known}"
            ) from error
    return out.reshape(shape)


def _known_types() -> list[int]:
    import gguf

    return sorted(kind.value for kind in gguf.GGMLQuantizationType)


def read_gguf(path: str | Path) -> GGUFFile:
    """Reads the header of a GGUF file (version 2 or 3) and checks that every tensor is within the file.

    Of a file in several parts (NAME-00001-of-00003.gguf) any may be passed: all are read. ValueError names the file and what
    is wrong with it: not GGUF, truncated, corrupt, big-endian, or a part that is absent or belongs to another file.
    """
    path = Path(path)
    file = read_header(path)
    if file.metadata.get("split.count", 1) == 1:
        return file
    parts = [read_header(part) for part in parts_of(path, file.metadata["split.count"])]
    tensors: dict[str, GGUFTensor] = {}
    for number, part in enumerate(parts):
        expected = (number, len(parts))
        if (part.metadata.get("split.no"), part.metadata.get("split.count")) != expected:
            raise ValueError(f"{part.path} is not part {number + 1} of {len(parts)}, as its name says; download it again")
        if twice := tensors.keys() & part.tensors.keys():
            raise ValueError(f"{part.path}: the tensor {min(twice)!r} is in another part too; download all parts again")
        tensors |= part.tensors
    total = parts[0].metadata.get("split.tensors.count", len(tensors))
    if len(tensors) != total:
        raise ValueError(f"{parts[0].path}: the parts hold {len(tensors)} of {total} tensors; download all of them again")
    return replace(parts[0], tensors=tensors)


def parts_of(path: Path, count: int | None = None) -> list[Path]:
    """All parts of a split file, in order, from the name of any; ValueError if one is absent.

    `count` is their number according to the metadata. A name of another form is a file that is not split.
    """
    match = PART.fullmatch(path.name)
    if match is None:
        if count is None:
            return [path]
        raise ValueError(
            f"{path} is one of {count} parts, but its name does not say which; rename the parts to "
            f"NAME-00001-of-{count:05}.gguf and so on"
        )
    if count is None:
        count = int(match["count"])
    parts = [path.with_name(f"{match['name']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    if absent := [part.name for part in parts if not part.exists()]:
        raise ValueError(f"{path} is one of {count} parts, of which {', '.join(absent)} is absent; download it too")
    return parts


def read_header(path: Path) -> GGUFFile:
    """The header of one file; see `read_gguf`. Of a split file this is one part, and only the first has all metadata."""
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        raise ValueError(f"{path} is empty; download it again")
    data: Any = np.memmap(path, dtype=np.uint8, mode="r")  # a buffer, which NumPy declares for Python 3.12 and later only
    try:
        return _Header(memoryview(data), path).parse()
    except (struct.error, IndexError, UnicodeDecodeError, OverflowError) as error:
        raise ValueError(
            f"{path} is truncated or corrupt: its header does not parse ({error}); download it again"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def vocabulary_file(file: GGUFFile) -> bytes:
    """A GGUF file with the same metadata and no tensors."""
    with file.path.open("rb") as stream:
        header = stream.read(file.metadata_end)
    return header[:8] + struct.pack("<Q", 0) + header[16:]  # the number of tensors is between magic and metadata


class _Header:
    """A cursor over the bytes of a header."""

    def __init__(self, data: memoryview, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def parse(self) -> GGUFFile:
        if bytes(self.data[:4]) != b"GGUF":
            raise ValueError(f"not a GGUF file: it starts with {bytes(self.data[:4])!r}, not with b'GGUF'")
        self.at = 4
        version = self.scalar("I")
        if version & 0xFFFF == 0:
            raise ValueError("the file is big-endian; convert it with gguf-convert-endian")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version} is not supported; supported: 2, 3")
        num_tensors, num_fields = self.count(24), self.count(13)
        metadata = {}
        for _ in range(num_fields):
            name = self.string()
            metadata[name] = self.value(self.scalar("I"))
        metadata_end = self.at
        found = [self.tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}; it must be an integer of at least 1")
        start = -(-self.at // alignment) * alignment
        tensors = {name: replace(tensor, offset=start + tensor.offset) for name, tensor in found}
        if len(tensors) != num_tensors:
            names = [name for name, _ in found]
            raise ValueError(f"the tensor {next(n for n in names if names.count(n) > 1)!r} occurs twice")
        for name, tensor in tensors.items():
            try:
                end = tensor.offset + math.prod(tensor.shape[:-1]) * row_size(tensor)
            except ValueError as error:
                raise ValueError(f"tensor {name!r}: {error}") from error
            if end > len(self.data):
                raise ValueError(
                    f"truncated: tensor {name!r} ends at byte {end:,}, the file at {len(self.data):,}; download it again"
                )
        return GGUFFile(path=self.path, metadata=metadata, tensors=tensors, metadata_end=metadata_end)

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def count(self, least_bytes: int) -> int:
        """A count of entries of a minimum size in bytes; ValueError if so many cannot fit in the file."""
        number = self.scalar("Q")
        if number * least_bytes > len(self.data) - self.at:
            raise ValueError(
                f"truncated or corrupt: it declares {number:,} entries at byte {self.at - 8:,}, "
                "more than the file holds; download it again"
            )
        return number

    def string(self) -> str:
        length = self.count(1)
        self.at += length
        return str(self.data[self.at - length : self.at], "utf-8")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"corrupt: a metadata value of unknown kind {kind} at byte {self.at:,}")
        kind = self.scalar("I")
        if kind in _SCALARS:
            number = self.count(struct.calcsize("<" + _SCALARS[kind]))
            values = struct.unpack_from(f"<{number}{_SCALARS[kind]}", self.data, self.at)
            self.at += struct.calcsize(f"<{number}{_SCALARS[kind]}")
            return list(values)
        number = self.count(8)
        return self.strings(number) if kind == _STRING else [self.value(kind) for _ in range(number)]

    def strings(self, number: int) -> list[str]:
        """`number` strings; a vocabulary has a hundred thousand, so the loop calls nothing of ours."""
        data, at, size, found = self.data, self.at, len(self.data), []
        length_at = struct.Struct("<Q").unpack_from
        for _ in range(number):
            (length,) = length_at(data, at)
            at += 8 + length
            if at > size:
                raise ValueError(
                    f"truncated or corrupt: a string ends at byte {at:,}, the file at {size:,}; download it again"
                )
            found.append(str(data[at - length : at], "utf-8"))
        self.at = at
        return found

    def tensor(self) -> tuple[str, GGUFTensor]:
        name, rank = self.string(), self.scalar("I")
        if not 1 <= rank <= _MAX_RANK:
            raise ValueError(f"corrupt: tensor {name!r} has {rank} dimensions; it must have 1 to {_MAX_RANK}")
        shape = tuple(self.scalar("Q") for _ in range(rank))[::-1]
        if math.prod(shape) < 1:
            raise ValueError(f"corrupt: tensor {name!r} is empty, its shape is {shape}")
        return name, GGUFTensor(shape=shape, type_id=self.scalar("I"), offset=self.scalar("Q"), file=self.path)
