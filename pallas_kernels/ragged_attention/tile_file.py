"""Measured tile sizes, in a file that people can read: an entry for each kind of device and class of shapes."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What tiles are chosen for."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    num_tokens: int
    num_sequences: int
    dtype: str

    def key(self, kind: str) -> str:
        """The name of its class in the file: tokens and sequences count by powers of two."""
        tokens, sequences = (1 << (n - 1).bit_length() for n in (self.num_tokens, self.num_sequences))
        return (f"{kind} {self.dtype} heads={self.num_heads}/{self.num_kv_heads}x{self.head_dim} block={self.block_size} "
                f"tokens<={tokens} sequences<={sequences}")  # fmt: skip


def measured_file() -> Path:
    """Where `autotune` writes: PALLAS_KERNELS_TILES, or ~/.cache/pallas_kernels/tiles.json."""
    return Path(os.environ.get("PALLAS_KERNELS_TILES") or Path.home() / ".cache" / "pallas_kernels" / "tiles.json")


def measured(shape: Shape, kind: str, tiles: Any) -> Any:
    """What was measured for `shape` on a kind of device, as `tiles`, a dataclass of integers; None if nothing was.

    ValueError if the file is not what `save` writes.
    """
    path = measured_file()
    try:
        entry = entries(path).get(shape.key(kind))
        names = [field.name for field in dataclasses.fields(tiles)]
        return None if entry is None else tiles(**{name: int(entry[name]) for name in names})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not hold measured tiles ({error!r}); delete it or run autotune again") from error


@functools.cache
def entries(path: Path) -> dict[str, dict[str, int]]:
    """What the file holds, {} if there is none. Read once a process."""
    try:
        text = path.read_text()
    except OSError:
        return {}
    return json.loads(text)


def save(shape: Shape, kind: str, tiles: Any, *, seconds: float, path: Path | None = None) -> None:
    """Adds an entry to the file: the tiles, and the microseconds that they took."""
    path = path or measured_file()
    contents = json.loads(path.read_text()) if path.exists() else {}
    contents[shape.key(kind)] = dataclasses.asdict(tiles) | {"microseconds": round(1e6 * seconds, 1)}
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(contents, indent=1, sort_keys=True) + "\n")
    scratch.replace(path)
    entries.cache_clear()
