"""One view of a checkpoint, whatever its format."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fastgen_jax.models.config import ModelConfig

if TYPE_CHECKING:
    from fastgen_jax.checkpoint.gguf_file import GGUFFile


class Checkpoint(Protocol):
    """A model on disk under the tensor names of Hugging Face; nothing is read before `read` asks for it."""

    @property
    def path(self) -> Path:
        """The directory or file."""
        ...

    @property
    def config(self) -> ModelConfig:
        """What the checkpoint says about its model."""
        ...

    @property
    def tensor_names(self) -> frozenset[str]:
        """All tensors, by their Hugging Face names."""
        ...

    @property
    def tokenizer_source(self) -> Path | GGUFFile:
        """What `fastgen_jax.text.load_tokenizer` reads."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header alone."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor: float32, float16 or bfloat16; a quantised one comes as float32. Matrices are [out, in]."""
        ...


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a directory of Hugging Face safetensors or a GGUF file; ValueError if it is neither or broken.

    Reads headers only. For names of models see `resolve_model`.
    """
    path = Path(path)
    if path.is_dir():
        from fastgen_jax.checkpoint.huggingface import HuggingFaceCheckpoint

        return HuggingFaceCheckpoint.open(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; pass a checkpoint directory or a .gguf file")
    from fastgen_jax.checkpoint.gguf import GGUFCheckpoint

    return GGUFCheckpoint.open(path)


def missing_tensor(name: str, path: Path, names: Iterable[str]) -> ValueError:
    """The error for a tensor that a checkpoint lacks; it names the nearest one that is there."""
    import difflib

    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    hint = f"; the nearest name there is {nearest[0]!r}" if nearest else "; it holds no tensors at all"
    return ValueError(f"{path} has no tensor {name!r}{hint}")
