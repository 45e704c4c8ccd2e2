"""Opens a checkpoint of any format."""

from __future__ import annotations

from pathlib import Path

from fastgen_jax.checkpoint.base import Checkpoint
from fastgen_jax.checkpoint.easydel import is_easydel, open_easydel
from fastgen_jax.checkpoint.gguf import GGUFCheckpoint
from fastgen_jax.checkpoint.huggingface import HuggingFaceCheckpoint
from fastgen_jax.checkpoint.snapshot import MARKER, SnapshotCheckpoint, as_path


def open_checkpoint(path: str | Path, *, strict_config: bool = False) -> Checkpoint:
    """Opens a directory of Hugging Face or EasyDeL, a snapshot or a GGUF file.

    Reads headers only; ValueError if it is something else or damaged. With `strict_config`, fields of config.json that are
    unknown for the architecture are a ValueError instead of a warning. To open a model by name, see `resolve_model`.
    """
    path = as_path(path)
    if path.is_dir():
        if (path / MARKER).exists():
            return SnapshotCheckpoint.open(path)
        if isinstance(path, Path) and is_easydel(path):
            return open_easydel(path)
        return HuggingFaceCheckpoint.open(path, strict_config=strict_config)
    if not path.exists():
        raise ValueError(f"{path} does not exist; pass a checkpoint directory or a .gguf file")
    return GGUFCheckpoint.open(path)
