"""Cache groups: which layers share the block tables of a sequence.

A layer with a sliding window needs only the last blocks of a sequence. So the layers are divided into groups of the same
size: those that attend to all tokens, and those with one window, in as many groups as needed. A block holds the keys and
values of B tokens in all layers of one group, so that every group can use every block of one pool:

    layers of Gemma 3        w w w w w F w w w w w F        F: attends to all tokens, w: to a window
    groups of two            F F | w w | w w | w w | w w | w w

Where the layers of a kind do not fill their groups, a part of their blocks is unused. A layer that reads the keys and
values of another one is in the place of that layer. Layers with smaller heads than others may share a row; see `cache_rows`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from fastgen_jax.models.config import ModelConfig, same_for_all

MAX_GROUPS = 12  # each has block tables of its own, which the host fills in every step
_USUAL_CONTEXT = 8192  # tokens of a sequence for which the division takes the least memory
_USUAL_EXCESS = 64  # tokens beyond its window of which a group has blocks


@dataclass(frozen=True, kw_only=True)
class CacheGroups:
    """A division of the layers into groups."""

    windows: tuple[int | None, ...]
    """The sliding window of each group, in tokens; None: its layers need the keys of all tokens. Only the first is None."""
    num_rows: int
    """Layers for which a block has room, if none share a row."""
    places: tuple[tuple[int, int], ...]
    """Group and row of each layer; those of a layer without attention have no meaning."""
    shares: tuple[int, ...]
    """The number of each layer among those that share its row."""


def cache_groups(config: ModelConfig, num_groups: int) -> CacheGroups:
    """The division of the layers into `num_groups` groups that takes the least memory; ValueError if there is none."""
    layers = config.layer_windows or (None,) * config.num_layers
    sources = config.kv_sources or range(config.num_layers)
    if num_groups == 1:
        window = layers[0] if same_for_all(layers) else None
        count, found = _one_after_another(config)
        row_and_share = [found.get(source, (0, 0)) for source in sources]
        return CacheGroups(
            windows=(window,),
            num_rows=count,
            places=tuple((0, row) for row, _ in row_and_share),
            shares=tuple(share for _, share in row_and_share),
        )
    for num_rows in _sizes(config):
        windows = _windows(config, num_rows)
        if len(windows) == num_groups:
            break
    else:
        raise ValueError(f"num_groups is {num_groups}, but the layers cannot be divided into so many cache groups")
    counts: Counter[int | None] = Counter()
    places: list[tuple[int, int]] = []
    shares: list[int] = []
    for layer, window in enumerate(layers):
        if sources[layer] != layer:
            places.append(places[sources[layer]])
            shares.append(shares[sources[layer]])
            continue
        whole, share = divmod(counts[window], config.layers_sharing_row(layer))
        group, row = divmod(whole, num_rows)
        places.append((windows.index(window) + group, row))
        shares.append(share)
        counts[window] += 1
    return CacheGroups(windows=windows, num_rows=num_rows, places=tuple(places), shares=tuple(shares))


def _one_after_another(config: ModelConfig) -> tuple[int, dict[int, tuple[int, int]]]:
    """The number of rows if all layers are in one group, and row and share of each layer with keys of its own."""
    found: dict[int, tuple[int, int]] = {}
    begun: dict[int, tuple[int, int]] = {}  # of each kind of layer: the row that has room, and how many layers are in it
    count = 0
    for layer in config.kv_layers:
        sharing = config.layers_sharing_row(layer)
        row, used = begun.get(sharing, (0, sharing))
        if used == sharing:
            row, used, count = count, 0, count + 1
        found[layer], begun[sharing] = (row, used), (row, used + 1)
    return count, found


def choose_groups(config: ModelConfig, context_len: int) -> CacheGroups:
    """The division with which a sequence of `context_len` tokens, or of a usual length, takes the least memory."""
    length = min(context_len, _USUAL_CONTEXT)

    def tokens(window: int | None) -> int:
        return length if window is None else min(length, window + _USUAL_EXCESS)

    costs = {1: cache_groups(config, 1).num_rows * length}  # in tokens of a layer, by the number of groups
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
    return range(max(1, _rows(config)[None]), len(config.kv_layers) + 1)


def _windows(config: ModelConfig, num_rows: int) -> tuple[int | None, ...]:
    """The windows of the groups of `num_rows` layers: first that without one."""
    counts = _rows(config)
    kinds = sorted(counts, key=lambda window: window is not None)
    return tuple(window for window in kinds for _ in range(-(-counts[window] // num_rows)))


def _rows(config: ModelConfig) -> Counter[int | None]:
    """How many rows the layers of each window need that have keys of their own."""
    rows: Counter[int | None] = Counter()
    for window in set(config.layer_windows):
        layers = [layer for layer in config.kv_layers if config.layer_windows[layer] == window]
        rows[window] = -(-len(layers) // config.layers_sharing_row(layers[0]))
    return rows
