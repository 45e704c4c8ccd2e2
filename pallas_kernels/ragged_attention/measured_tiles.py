"""Measured tile sizes in a JSON file: one entry per kind of device and class of shapes."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pallas_kernels.buckets import Bucket, BucketError, is_url
from pallas_kernels.folders import cache_dir, replace_file

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The call that tiles are chosen for."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    num_tokens: int
    num_sequences: int
    dtype: str

    def key(self, kind: str) -> str:
        """Key of its class in the file: tokens and sequences are rounded up to powers of two."""
        tokens, sequences = (1 << (n - 1).bit_length() for n in (self.num_tokens, self.num_sequences))
        return (
            f"{kind} {self.dtype} heads={self.num_heads}/{self.num_kv_heads}x{self.head_dim} block={self.block_size} "
            f"tokens<={tokens} sequences<={sequences}"
        )


def measured_file() -> Path | str:
    """The file that `autotune` writes: the value of PALLAS_KERNELS_TILES, or `tiles.json` in the cache folder.

    A string is the URL of an object in a bucket.
    """
    named = os.environ.get("PALLAS_KERNELS_TILES")
    if named and is_url(named):
        return named
    return Path(named) if named else cache_dir() / "tiles.json"


def measured(shape: Shape, kind: str, tiles: type[T]) -> T | None:
    """The tiles measured for `shape` on a kind of device, as an instance of the dataclass `tiles`; None if there are none.

    A damaged entry is ignored, with a warning in the log.
    """
    path = measured_file()
    key = shape.key(kind)
    entry = entries(path).get(key)
    if entry is None:
        return None
    try:
        sizes = {field.name: int(entry[field.name]) for field in dataclasses.fields(tiles)}
        if min(sizes.values()) < 1:
            raise ValueError("a size below 1")
    except (ValueError, KeyError, TypeError) as error:
        _complain(path, f"entry {key!r}: {error!r}")
        return None
    return tiles(**sizes)


@functools.cache
def entries(path: Path | str) -> dict[str, Any]:
    """Contents of the file, read once per process; {} if it is missing or damaged. Damage is logged."""
    try:
        text = path.read_bytes() if isinstance(path, Path) else _read_object(path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        _complain(path, str(error) if isinstance(error, BucketError) else repr(error))
        return {}
    return _parsed(path, text)


def save(shape: Shape, kind: str, tiles: DataclassInstance, *, seconds: float, path: Path | str | None = None) -> None:
    """Adds an entry to the file: the tiles and their microseconds. Raises OSError if the file cannot be written."""
    path = path or measured_file()
    entry = {shape.key(kind): dataclasses.asdict(tiles) | {"microseconds": round(1e6 * seconds, 1)}}
    entries.cache_clear()
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, _text(entries(path) | entry))
    else:
        folder, _, name = path.rpartition("/")
        Bucket(folder).update(name, lambda text: _text(_parsed(path, text) | entry))
    entries.cache_clear()


def _read_object(url: str) -> bytes | None:
    folder, _, name = url.rpartition("/")
    return Bucket(folder).read([name]).get(name)


def _parsed(path: Path | str, text: bytes | None) -> dict[str, Any]:
    try:
        contents = {} if text is None else json.loads(text)
    except ValueError as error:
        _complain(path, repr(error))
        return {}
    if isinstance(contents, dict):
        return contents
    _complain(path, f"it holds a {type(contents).__name__}")
    return {}


def _text(contents: dict[str, Any]) -> bytes:
    return (json.dumps(contents, indent=1, sort_keys=True) + "\n").encode()


@functools.cache
def _complain(path: Path | str, problem: str) -> None:
    _log.warning(
        "%s does not hold measured tiles (%s), so modeled ones are used; delete it, or run autotune again", path, problem
    )
