"""Layers with a state on several devices: each computes some of the heads, with their part of every projection.

    one group of keys for 4 heads, on 2 devices          2 groups for 4 heads, on 2 devices

    keys     g0        | g0                              keys     g0        | g1
    heads    h0   h1   | h2   h3                         heads    h0   h1   | h2   h3

Heads are not filled up, unlike those of attention: their number must be a multiple of the number of devices. A group of keys
that serves the heads of several devices is repeated, as a KV head is.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.state_config import Mamba2, ShortConv, StateConfig

_TILE = 64  # columns that a GPU's kernel multiplies
_LANES = 128  # of a TPU: arrays whose rows are no multiple of it are stored in another order of axes, and then copied
AXES = frozenset({"inner", "channels", "heads"})
"""Logical axes of the weights of states that are divided."""


def check_state(config: ModelConfig, num_devices: int) -> None:
    """Raises ValueError if the heads of the states cannot be divided over the devices."""
    state = config.state
    if state is None or num_devices == 1:
        return
    if isinstance(state, ShortConv):
        counts = {"channels": config.embed_dim}
    else:
        counts = {"heads of its states": state.num_heads}
        keys = _num_key_heads(state)
        if num_devices % keys:  # otherwise each is repeated
            counts["key heads of its states"] = keys
        if isinstance(state, Mamba2) and state.norm_groups > 1:
            counts["parts of its states that are normalized"] = state.norm_groups
    for what, count in counts.items():
        if count % num_devices:
            allowed = [n for n in range(1, num_devices) if count % n == 0]
            raise ValueError(
                f"a {config.family} model with {count} {what} cannot be divided over {num_devices} devices: each computes "
                f"the same number; choose a divisor of {count}, for example {allowed[-1]}"
            )


def divided_state(state: StateConfig, num_devices: int, platform: str = "cpu") -> StateConfig:
    """The state that the devices compute together: its groups of keys are repeated.

    On TPUs, each device's part of what would not fill whole rows is filled up, on GPUs that of Mamba's projection, whose
    weights of 8 and 4 bits a kernel reads in tiles.
    """
    state = _with_key_heads(state, _num_key_heads(state) * _repeats(state, num_devices))
    if platform == "cpu" or isinstance(state, ShortConv) or (platform != "tpu" and not isinstance(state, Mamba2)):
        return state
    return dataclasses.replace(state, tile=(_LANES if platform == "tpu" else _TILE) * num_devices)


def state_of_device(state: StateConfig, num_devices: int) -> StateConfig:
    """The part of a divided state that one device computes."""
    if num_devices == 1 or isinstance(state, ShortConv):
        return state
    part = dataclasses.replace(state, num_heads=state.num_heads // num_devices, tile=1)
    if isinstance(part, Mamba2) and part.norm_groups > 1:
        part = dataclasses.replace(part, norm_groups=part.norm_groups // num_devices)
    return _with_key_heads(part, _num_key_heads(state) // num_devices)


def state_sources(name: str, size: int, state: StateConfig, num_devices: int, platform: str) -> list[np.ndarray]:
    """For each part of the columns of the weight `name`, the entries that the divided state has there.

    One past the end stands for padding.
    """
    parts = _parts(name, size, state)
    repeats, keys, found, start = _repeats(state, num_devices), _num_key_heads(state), [], 0
    for width, of_keys in parts:
        columns = np.arange(start, start + width)
        if of_keys and repeats > 1:
            columns = np.repeat(columns.reshape(keys, 1, -1), repeats, axis=1).reshape(-1)
        found.append(columns)
        start += width
    wide = divided_state(state, num_devices, platform)
    if not isinstance(wide, ShortConv) and name == ("mix_in" if isinstance(wide, Mamba2) else "mix_gates"):
        fill = -sum(map(len, found)) % wide.tile
        found += [np.full(fill, size)] if fill else []
    return found


def _parts(name: str, size: int, state: StateConfig) -> list[tuple[int, bool]]:
    """The widths of the projections that are side by side in a weight, and whether they are keys."""
    if isinstance(state, ShortConv):
        return [(size // 3, False)] * 3 if name == "mix_in" else [(size, False)]
    if isinstance(state, Mamba2):
        inner, keys = (state.inner_dim, False), (state.num_groups * state.state_dim, True)
        heads = (state.num_heads, False)
        parts = {"mix_in": [inner, inner, keys, keys, heads], "conv": [inner, keys, keys]}
    else:
        values, keys = (state.num_heads * state.value_dim, False), (state.num_key_heads * state.key_dim, True)
        heads = (state.num_heads, False)
        parts = {
            "mix_in": [keys, keys, values, values],
            "conv": [keys, keys, values],
            "mix_gates": [heads, heads],
        }
    return parts.get(name, [(size, False)])


def _num_key_heads(state: StateConfig) -> int:
    if isinstance(state, ShortConv):
        return 1
    return state.num_groups if isinstance(state, Mamba2) else state.num_key_heads


def _with_key_heads(state: StateConfig, count: int) -> StateConfig:
    if isinstance(state, ShortConv):
        return state
    name = "num_groups" if isinstance(state, Mamba2) else "num_key_heads"
    return dataclasses.replace(state, **{name: count})


def _repeats(state: StateConfig, num_devices: int) -> int:
    """How often each group of keys is repeated."""
    if isinstance(state, ShortConv):
        return 1
    keys = _num_key_heads(state)
    return num_devices // keys if num_devices % keys == 0 else 1
