"""Checkpoints on disk: finding, opening, loading and converting them. Missing and unknown tensors are both errors."""

from fastgen_jax.checkpoint.base import Checkpoint
from fastgen_jax.checkpoint.built_in import BUILT_IN
from fastgen_jax.checkpoint.easydel import open_easydel
from fastgen_jax.checkpoint.export import export_checkpoint, export_params
from fastgen_jax.checkpoint.gemma_library import open_gemma
from fastgen_jax.checkpoint.load import check_tensors, kept_in_blocks, load_params, quantized_weights
from fastgen_jax.checkpoint.maxtext import open_maxtext
from fastgen_jax.checkpoint.open import open_checkpoint
from fastgen_jax.checkpoint.peft import read_peft, write_peft
from fastgen_jax.checkpoint.resolve import resolve_model
from fastgen_jax.checkpoint.snapshot import SnapshotCheckpoint, save_snapshot
from fastgen_jax.checkpoint.vision import images_of, load_tower

__all__ = [
    "BUILT_IN",
    "Checkpoint",
    "SnapshotCheckpoint",
    "check_tensors",
    "export_checkpoint",
    "export_params",
    "images_of",
    "kept_in_blocks",
    "load_params",
    "load_tower",
    "open_checkpoint",
    "open_easydel",
    "open_gemma",
    "open_maxtext",
    "quantized_weights",
    "read_peft",
    "resolve_model",
    "save_snapshot",
    "write_peft",
]
