"""Training with the engine's own model: the forward pass, losses, and reinforcement learning with the engine's rollouts.

    pack, padded_batch      token sequences as a batch
    logits, logprobs        the trainable forward pass, with the engine's numbers
    make_update             a compiled optimizer step of any loss; optax
    sft_loss, dpo_loss      supervised fine-tuning, direct preference optimization
    GRPO                    rollouts, rewards, updates and new weights for the engine, step by step
    lora_params, merge_lora adapters as the leaves to train
    as_nnx, params_of       the same model as a module of flax.nnx

Names are imported at their first use: only `make_update`, `GRPO` and `as_nnx` need the extra `train` (optax, flax).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgen_jax.training.batch import TrainingBatch, pack, padded_batch, per_row
    from fastgen_jax.training.dpo import dpo_loss
    from fastgen_jax.training.forward import DEFAULTS, Options, logits, logprobs, options_of
    from fastgen_jax.training.grpo import GRPO, grpo_loss
    from fastgen_jax.training.lora import lora_params, merge_lora
    from fastgen_jax.training.module import as_nnx, params_of
    from fastgen_jax.training.settings import Settings
    from fastgen_jax.training.sft import sft_loss
    from fastgen_jax.training.update import make_update

_EXPORTS = {
    "batch": ("TrainingBatch", "pack", "padded_batch", "per_row"),
    "dpo": ("dpo_loss",),
    "forward": ("DEFAULTS", "Options", "logits", "logprobs", "options_of"),
    "grpo": ("GRPO", "grpo_loss"),
    "lora": ("lora_params", "merge_lora"),
    "module": ("as_nnx", "params_of"),
    "settings": ("Settings",),
    "sft": ("sft_loss",),
    "update": ("make_update",),
}
_HOMES = {name: module for module, names in _EXPORTS.items() for name in names}
__all__ = [  # a literal, which type checkers can read
    "DEFAULTS",
    "GRPO",
    "Options",
    "Settings",
    "TrainingBatch",
    "as_nnx",
    "dpo_loss",
    "grpo_loss",
    "logits",
    "logprobs",
    "lora_params",
    "make_update",
    "merge_lora",
    "options_of",
    "pack",
    "padded_batch",
    "params_of",
    "per_row",
    "sft_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
