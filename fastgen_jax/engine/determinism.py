"""What `EngineConfig.deterministic` changes: one step size, and chunks of prompts that depend on their own request alone.

A row of a program is computed the same way whatever the other rows hold; programs of other sizes, and attention to chunks of
other lengths, round differently. Several devices add up their parts of a row in the same order for all rows, see
`models.sharding`. If images are read, every step runs the program that takes them. With native kernels on one CPU no result
depends on any of this, so nothing changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.vision.config import ImagesConfig
from fastgen_jax.scheduling import NEED_PROMISE
from pallas_kernels.ragged_attention import QUANTIZED_DTYPES

if TYPE_CHECKING:
    from fastgen_jax.engine.config import EngineConfig, KVDType

_ROUND = 64  # rows of a tile of a product


def has_fixed_chunks(config: EngineConfig, *, packs: bool, kv_dtype: KVDType) -> bool:
    """Whether the option changes anything: with native kernels (`packs`) and their attention all results are exact."""
    is_native = packs and kv_dtype not in QUANTIZED_DTYPES and config.attention in (None, "cpu")
    return config.deterministic and not is_native


def check(config: EngineConfig, model: ModelConfig, *, block_size: int) -> None:
    """ValueError for what would make a result depend on other requests in spite of fixed chunks."""
    name = "deterministic=True"
    if config.budget_ladder:
        raise ValueError(f"{name} with budget_ladder={config.budget_ladder}: all steps have one size; omit budget_ladder")
    if config.remeasure:
        raise ValueError(f"{name} with remeasure: a measurement would choose another step size; pass token_budget")
    if config.policy in NEED_PROMISE:
        raise ValueError(f"{name} with policy={config.policy!r}, which shortens chunks; choose policy='splitfuse'")
    images = config.vision
    least = _least_budget(config.max_num_seqs, block_size, images)
    if config.token_budget is not None and config.token_budget < least:
        is_whole = images is not None and images.is_whole
        what, remedy = ("the blocks of an image", ", or images=False") if is_whole else ("a block of prompt", "")
        raise ValueError(
            f"{name} with token_budget={config.token_budget}: a step must hold {what} beside max_num_seqs="
            f"{config.max_num_seqs} sequences; choose at least {least}, or a smaller max_num_seqs{remedy}"
        )


def candidates(
    sizes: Sequence[int], *, max_num_seqs: int, block_size: int, images: ImagesConfig | None = None
) -> tuple[int, ...]:
    """Those of `sizes`, in tokens, that hold a chunk beside all sequences; if there is none, one that does.

    A chunk is at least a block, and holds the largest of `images` whose tokens one step must compute.
    """
    least = _least_budget(max_num_seqs, block_size, images)
    return tuple(size for size in sizes if size >= least) or (-(-least // _ROUND) * _ROUND,)


def choose(sizes: Sequence[int], *, knee: float, max_num_seqs: int) -> int:
    """The step size, of `candidates`: the largest whose products take no longer than reading the weights.

    A step with a single token costs as much as a full one, so a larger size would make a lightly loaded engine slower; but
    half of a step is left for prompts. `knee` is that of a `CostModel`.
    """
    return max((size for size in sizes if size <= max(knee, 2 * max_num_seqs)), default=min(sizes))


def _least_budget(max_num_seqs: int, block_size: int, images: ImagesConfig | None) -> int:
    tokens = images.most_tokens if images is not None and images.is_whole else 1
    return max_num_seqs - 1 + -(-tokens // block_size) * block_size
