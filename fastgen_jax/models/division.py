"""A model in the form that a number of devices can divide evenly: heads are repeated, and widths are filled up with zeros.

    3 KV heads of 2 query heads each, on 2 devices                       one KV head of 6 query heads, on 4 devices

    KV       k0      k1     |  k2      -                                 KV       k0   |  k0   |  k0   |  k0
    queries  q0 q1   q2 q3  |  q4 q5   - -                               queries  q0 q1|  q2 q3|  q4 q5|  - -

A head that is only padding (-) has queries, keys and values of zero, and the output projection multiplies its result by
zero. The same is true of the additional columns of an MLP and of the vocabulary, so the logits are those of the model. On an
accelerator the vocabulary is filled up on a single device, too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.state_division import AXES as STATE_AXES
from fastgen_jax.models.state_division import check_state, divided_state, state_sources
from fastgen_jax.models.weight_spec import FULL, WeightSpec

if TYPE_CHECKING:
    from jaxtyping import Shaped


DIVIDED_AXES = frozenset({"HD", "KD", "F", "V"}) | STATE_AXES
"""Logical axes of `WeightSpec` that are divided over devices; all others are replicated."""
_TILE = 64  # rows and columns of an expert's matrices that the kernels of accelerators multiply
_LANES = 128  # of a TPU: arrays whose rows are no multiple of it are stored in another order of axes, and then copied


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """The heads of a divided model, in the order of the devices: numbers of heads of the model, None for padding."""

    query: tuple[int | None, ...]
    kv: tuple[int | None, ...]


def check_num_devices(config: ModelConfig, num_devices: int) -> None:
    """Raises ValueError if a device would have no attention head, or the model cannot be divided."""
    check_state(config, num_devices)
    if num_devices > config.num_heads:
        raise ValueError(
            f"a model of {config.num_heads} attention heads cannot be divided over {num_devices} devices: each computes at "
            f"least one head; choose at most {config.num_heads} devices"
        )
    if config.full_heads is not None:
        kinds = (config.num_kv_heads, config.full_heads.num_kv_heads)
        counts = {len(divided_heads(config.num_heads, heads, num_devices).query) for heads in kinds}
        if len(counts) > 1:
            raise ValueError(
                f"{config.num_heads} attention heads, for {kinds[0]} KV heads in some layers and {kinds[1]} in others, "
                f"cannot be divided over {num_devices} devices: some layers would have more heads than others; choose a "
                f"divisor of {config.num_heads}"
            )
    if config.gate_cutoffs and _wide(config.mlp_dim, num_devices) != config.mlp_dim:
        raise ValueError(
            f"an MLP of width {config.mlp_dim} whose gates have a cutoff cannot be divided over {num_devices} devices: "
            "columns that are added would count in the mean; choose a number of devices whose shares are whole tiles of "
            f"{_TILE}"
        )


@functools.lru_cache(maxsize=64)
def divided_heads(num_heads: int, num_kv_heads: int, num_devices: int) -> Heads:
    """The fewest KV heads, and among those the fewest query heads, that `num_devices` divide."""
    group = num_heads // num_kv_heads

    def size(repeats: int) -> tuple[int, int]:
        """KV heads, and query heads, if each KV head is repeated and serves its share of the queries of its group."""
        kv = -(-num_kv_heads * repeats // num_devices) * num_devices
        return kv, kv * -(-group // repeats)

    repeats = min(range(group, 0, -1), key=size)  # of equal sizes the first, which has the least padding
    share = -(-group // repeats)
    kv: list[int | None] = [head for head in range(num_kv_heads) for _ in range(repeats)]
    query: list[int | None] = []
    for head in range(num_kv_heads):
        own: list[int | None] = list(range(head * group, (head + 1) * group))
        query += own + [None] * (repeats * share - group)
    padding = size(repeats)[0] - len(kv)
    return Heads(query=(*query, *[None] * (padding * share)), kv=(*kv, *[None] * padding))


@functools.lru_cache(maxsize=64)
def divided(config: ModelConfig, num_devices: int, platform: str = "cpu") -> ModelConfig:
    """The model that the devices compute; `config` itself if they divide it as it is.

    Of what depends on the `platform` only weights and cache know: the vocabulary, the widths of experts, and of what states
    keep.
    """
    heads = divided_heads(config.num_heads, config.num_kv_heads, num_devices)
    moe, inputs, full = config.moe, config.layer_inputs, config.full_heads
    if full is not None:
        kv_heads = len(divided_heads(config.num_heads, full.num_kv_heads, num_devices).kv)
        full = dataclasses.replace(full, num_kv_heads=kv_heads, num_devices=num_devices)
    slopes = config.alibi_slopes and tuple(0.0 if head is None else config.alibi_slopes[head] for head in heads.query)
    return dataclasses.replace(
        config,
        num_heads=len(heads.query),
        num_kv_heads=len(heads.kv),
        full_heads=full,
        mlp_dim=_wide(config.mlp_dim, num_devices),
        reader_mlp_dim=config.reader_mlp_dim and _wide(config.reader_mlp_dim, num_devices),
        embed_columns=_whole_lanes(config.embed_proj_dim or config.embed_dim, platform),
        vocab_size=_vocabulary(config.vocab_size, num_devices, platform),
        layer_inputs=inputs and dataclasses.replace(inputs, num_rows=_vocabulary(inputs.num_rows, num_devices, platform)),
        alibi_slopes=slopes,
        state=config.state and divided_state(config.state, num_devices, platform),
        moe=moe
        and dataclasses.replace(
            moe,
            expert_dim=_expert_width(moe.expert_dim, num_devices, platform, gated=moe.gated),
            down_dim=_whole_lanes(moe.latent_dim or config.embed_dim, platform),
            shared_dim=_wide(moe.shared_dim, num_devices),
        ),
    )


def _wide(size: int, num_devices: int) -> int:
    """The number of columns, of an MLP, an expert or the vocabulary, that a divided model has for `size`.

    On several devices each share of 64 and more is a multiple of 64, so that the kernels of accelerators read the weights
    where they are; otherwise each step would copy them: 2,880 on eight devices are 360 each, and become 384.
    """
    share = -(-size // num_devices)
    if num_devices > 1 and share > _TILE:
        share = -(-share // _TILE) * _TILE
    return share * num_devices


def _vocabulary(size: int, num_devices: int, platform: str) -> int:
    """The number of tokens that a divided model has for `size`: that of `_wide` or, on accelerators, whole tiles also on a
    single device: 50,257 become 50,304."""
    width = _wide(size, num_devices)
    return width if num_devices > 1 or platform == "cpu" else -(-width // _TILE) * _TILE


def _expert_width(size: int, num_devices: int, platform: str, *, gated: bool) -> int:
    """The width of the experts of a divided model: that of `_wide` or, on TPUs, whole tiles also on a single device.

    Gate and up lie side by side, so that two of their tiles fill the lanes; without a gate, a tile must.
    """
    if platform != "tpu":
        return _wide(size, num_devices)
    tile = _TILE if gated else _LANES
    return -(-size // (num_devices * tile)) * tile * num_devices


def _whole_lanes(embed_dim: int, platform: str) -> int | None:
    """Columns of the embedding and of the down matrices of experts, if they are more than E: on a TPU a multiple of its
    lanes, as it otherwise stores them transposed and copies them in every step."""
    width = -(-embed_dim // _LANES) * _LANES
    return width if platform == "tpu" and width != embed_dim else None


def row_norm_heads(config: ModelConfig, num_devices: int) -> tuple[int, int]:
    """Over how many heads a norm over all query heads, and all key heads, averages: without padding, with repetitions."""
    heads = divided_heads(config.num_heads, config.num_kv_heads, num_devices)
    return sum(head is not None for head in heads.query), sum(head is not None for head in heads.kv)


def divided_parts(spec: WeightSpec, config: ModelConfig, num_devices: int, platform: str = "cpu") -> tuple[int, ...]:
    """The widths of the projections that are side by side in the weight in the divided model; () for a single one."""
    found = _sources(spec, -1, config, num_devices, platform)
    return tuple(map(len, found)) if len(found) > 1 else ()


def divided_shape(spec: WeightSpec, config: ModelConfig, num_devices: int, platform: str = "cpu") -> tuple[int, ...]:
    """`spec.shape` of the weight in the divided model."""
    return tuple(sum(map(len, _sources(spec, axis, config, num_devices, platform))) for axis in range(-len(spec.axes), 0))


def keeps_blocks(spec: WeightSpec, size: int, config: ModelConfig, num_devices: int, platform: str = "cpu") -> bool:
    """Whether the inputs of a weight stay as they are, and each device has whole blocks of `size` of them, or all."""
    inputs = np.concatenate(_sources(spec, -2, config, num_devices, platform))
    if len(inputs) != spec.shape[-2] or (inputs != np.arange(len(inputs))).any():
        return False
    return len(inputs) % (size * (num_devices if spec.axes[-2] in DIVIDED_AXES else 1)) == 0


def divided_array(
    spec: WeightSpec,
    array: Shaped[np.ndarray, "*shape"],
    config: ModelConfig,
    num_devices: int,
    *,
    axes: Sequence[int],
    fill: int,
    platform: str = "cpu",
) -> Shaped[np.ndarray, "*_"]:
    """`array` as a weight of the divided model: heads repeated, and everything that is added equal to `fill`.

    Its last axes are those of `spec` that `axes` lists, counted from the end; axes before them are those of a stack.
    """
    for place, axis in enumerate(reversed(axes), 1):
        size = array.shape[-place]
        sources = np.concatenate(_sources(spec, axis, config, num_devices, platform))
        if len(sources) == size and (sources == np.arange(size)).all():
            continue
        added = [(0, 0)] * array.ndim
        added[-place] = (0, 1)
        array = np.take(np.pad(array, added, constant_values=fill), sources, axis=-place)
    return array


def _sources(spec: WeightSpec, axis: int, config: ModelConfig, num_devices: int, platform: str) -> list[np.ndarray]:
    """For each part of an axis, the entries of the axis that the divided model has; one past the end for padding."""
    size, letter = spec.shape[axis], spec.axes[axis]
    parts = spec.parts if axis == -1 and len(spec.parts) > 1 else (size,)
    if config.attention_gate and len(parts) == 3 and letter == "HD":  # the gates, of the size of the queries, come last
        queries = parts[0] // 2
        parts = (queries, *parts[1:], queries)
    starts = np.cumsum((0, *parts[:-1]))
    if letter in ("F", "V"):
        gated = config.moe is not None and config.moe.gated
        is_expert = letter == "F" and spec.axes[0] == "X"
        if is_expert:
            widths = [_expert_width(part, num_devices, platform, gated=gated) for part in parts]
        elif letter == "V":
            widths = [_vocabulary(part, num_devices, platform) for part in parts]
        else:
            widths = [_wide(part, num_devices) for part in parts]
        wide = [np.arange(width) for width in widths]
        return [np.where(i < part, start + i, size) for i, part, start in zip(wide, parts, starts, strict=True)]
    if letter in STATE_AXES and config.state is not None:
        return state_sources(spec.bias_of or spec.name, size, config.state, num_devices, platform)
    if letter not in ("HD", "H", "KD", "K"):
        is_wide = letter == "E" and axis == -1 and (spec.axes[0] == "X" or spec.name == "embed")
        width = (_whole_lanes(size, platform) if is_wide else None) or size
        return [np.minimum(np.arange(width), size)]
    num_kv_heads = config.num_kv_heads
    if config.full_heads is not None and (spec.bias_of or spec.name).startswith(FULL):
        num_kv_heads = config.full_heads.num_kv_heads
    heads = divided_heads(config.num_heads, num_kv_heads, num_devices)
    # The parts of a fused axis are queries, keys, values and gates.
    alone = heads.query if letter[0] == "H" else heads.kv
    of_parts = (heads.query, heads.kv, heads.kv, heads.query)[: len(parts)] if len(parts) > 1 else (alone,)
    found = []
    for own, part, start in zip(of_parts, parts, starts, strict=True):
        width = part // (config.num_heads if own is heads.query else num_kv_heads)
        found.append(
            np.concatenate(
                [np.full(width, size) if head is None else start + head * width + np.arange(width) for head in own]
            )
        )
    return found
