"""Cache groups: which layers share the block tables of a sequence.

A layer with a sliding window needs only the last blocks of a sequence. So the layers are divided into groups of the same
size: those that attend to all tokens, and those with one window, in as many groups as needed. A block holds the keys and
values of B tokens in all layers of one group, so that every group can use every block of one pool:

    layers of Gemma 3        w w w w w F w w w w w F        F: attends to all tokens, w: to a window
    groups of two            F F | w w | w w | w w | w w | w w

Where the layers of a kind do not fill their groups, a part of their blocks is unused. A layer that reads the keys and
values of another one is in the place of that layer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from fastgen_jax.models.config import ModelConfig, same_for_all

MAX_GROUPS = 8  # each has block tables of its own, which the host fills in every step
_USUAL_CONTEXT = 8192  # tokens of a sequence for which the division takes the least memory
_USUAL_EXCESS = 64  # tokens beyond its window of which a group has blocks


@dataclass(frozen=True, kw_only=True)
class CacheGroups:
    """A division of the layers into groups."""

    windows: tuple[int | None, ...]
    """The sliding window of each group, in tokens; None: its layers need the keys of all tokens. Only the first is None."""
    num_rows: int
    """Layers for which a block has room."""
    places: tuple[tuple[int, int], ...]
    """Group and row of each layer; those of a layer without attention have no meaning."""


def cache_groups(config: ModelConfig, num_groups: int) -> CacheGroups:
    """The division of the layers into `num_groups` groups that takes the least memory; ValueError if there is none."""
    layers = config.layer_windows or (None,) * config.num_layers
    sources = config.kv_sources or range(config.num_layers)
    if num_groups == 1:
        window = layers[0] if same_for_all(layers) else None
        rows = {layer: row for row, layer in enumerate(config.kv_layers)}
        return CacheGroups(windows=(window,), num_rows=len(rows), places=tuple((0, rows.get(i, 0)) for i in sources))
    for num_rows in _sizes(config):
        windows = _windows(config, num_rows)
        if len(windows) == num_groups:
            break
    else:
        raise ValueError(f"num_groups is {num_groups}, but the layers cannot be divided into so many cache groups")
    counts: Counter[int | None] = Counter()
    places: list[tuple[int, int]] = []
    for layer, window in enumerate(layers):
        if sources[layer] != layer:
            places.append(places[sources[layer]])
            continue
        group, row = divmod(counts[window], num_rows)
        places.append((windows.index(window) + group, row))
        counts[window] += 1
    return CacheGroups(windows=windows, num_rows=num_rows, places=tuple(places))


def choose_groups(config: ModelConfig, context_len: int) -> CacheGroups:
    """The division with which a sequence of `context_len` tokens, or of a usual length, takes the least memory."""
    length = min(context_len, _USUAL_CONTEXT)

    def tokens(window: int | None) -> int:
        return length if window is None else min(length, window + _USUAL_EXCESS)

    costs = {1: len(config.kv_layers) * length}  # in tokens of a layer, by the number of groups
    if config.layer_windows and not same_for_all(config.layer_windows):
        for num_rows in _sizes(config):
            windows = _windows(config, num_rows)
            if len(windows) <= MAX_GROUPS:
                costs.setdefault(len(windows), num_rows * sum(map(tokens, windows)))
    best = cache_groups(config, min(costs, key=lambda num_groups: (costs[num_groups], num_groups)))
    if len(best.windows) == 1 and (best.windows[0] or 0) >= context_len:  # no key ever leaves the window
        return replace(best, windows=(None,))
    return best


def _sizes(config: ModelConfig) -> range:
    """Layers per group, fewest first, so that all layers without a window fit into the first group."""
    return range(max(1, _counts(config)[None]), len(config.kv_layers) + 1)


def _windows(config: ModelConfig, num_rows: int) -> tuple[int | None, ...]:
    """The windows of the groups of `num_rows` layers: first that without one."""
    counts = _counts(config)
    kinds = sorted(counts, key=lambda window: window is not None)
    return tuple(window for window in kinds for _ in range(-(-counts[window] // num_rows)))


def _counts(config: ModelConfig) -> Counter[int | None]:
    """How many layers with keys of their own have each window."""
    return Counter(config.layer_windows[layer] for layer in config.kv_layers if config.layer_windows)
