"""Shared code for families with a state in some layers: which layers they are, and the names of their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fastgen_jax.models.families.common import Source
from fastgen_jax.models.families.fields import Fields
from fastgen_jax.models.state_config import DeltaNet

ATTENTION = ("attention", "full_attention")


def split_layers(hf: Fields, types: Sequence[str], names: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The layers with attention, and those with a state, whose type is one of `names`; ValueError for any other type."""
    count = hf["num_hidden_layers"]
    unknown = set(types) - {*ATTENTION, *names}
    if unknown or len(types) != count:
        raise ValueError(
            f"config.json has layer_types={list(types)!r}; supported: {', '.join(map(repr, (*ATTENTION, *names)))} for each "
            f"of the {count} layers"
        )
    attention = tuple(i for i, kind in enumerate(types) if kind in ATTENTION)
    return attention, tuple(i for i in range(count) if i not in attention)


def state_names(module: str, *, norm: str = "norm") -> dict[str, str | Source]:
    """The names of the weights of a state, other than its projections, in a module of each layer."""
    return {
        "layers.conv": f"{module}.conv1d",
        "layers.mix_norm": f"{module}.{norm}",
        "layers.mix_out": f"{module}.out_proj",
        "layers.a_log": Source((f"{module}.A_log",)),
        "layers.dt_bias": Source((f"{module}.dt_bias",)),
        "layers.d": Source((f"{module}.D",)),
    }


def split_key_heads(state: DeltaNet, widths: Sequence[int]) -> Callable[[np.ndarray], np.ndarray]:
    """Reorders [..., key heads * sum(widths)] from all parts of each key head to each part of all key heads."""

    def rearrange(fused: np.ndarray) -> np.ndarray:
        lead = fused.shape[:-1]
        parts = np.split(fused.reshape(*lead, state.num_key_heads, -1), np.cumsum(widths)[:-1], axis=-1)
        return np.concatenate([part.reshape(*lead, -1) for part in parts], axis=-1)

    return rearrange


def queries_and_gates(num_heads: int, head_dim: int) -> Callable[[np.ndarray], np.ndarray]:
    """Reorders a `qkv` whose queries and gates alternate by heads: the gates come last."""

    def rearrange(fused: np.ndarray) -> np.ndarray:
        lead, size = fused.shape[:-1], 2 * num_heads * head_dim
        heads = fused[..., :size].reshape(*lead, num_heads, 2, head_dim)
        queries, gates = (heads[..., i, :].reshape(*lead, -1) for i in range(2))
        return np.concatenate([queries, fused[..., size:], gates], axis=-1)

    return rearrange
