"""How the tokens of a sequence are mixed in a layer: by attention, by a state, or by both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastgen_jax.core import KVCache
from fastgen_jax.models.attention import attention
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.layers import project
from fastgen_jax.models.states import with_state
from fastgen_jax.models.step import LayerCall, Step, take_rows
from fastgen_jax.models.weight_spec import LayerWeights

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def mix(
    x: Float[Array, "T E"],
    w: LayerWeights,
    cache: KVCache,
    step: Step,
    call: LayerCall,
    *,
    config: ModelConfig,
    residual: Float[Array, "rows E"] | None,
) -> tuple[Float[Array, "rows E"], KVCache]:
    """The sum of what the layer has: attention and state of `x` (+ residual), and the cache after this step.

    The rows are all tokens, or those that the layer is called for.
    """
    if call.state_row is None:
        return attention(x, w, cache, step, call, config=config, residual=residual)
    y, cache = with_state(x, w, cache, step, call, config=config)
    y = project(take_rows(y, call.rows), w, "mix_out", residual=residual, num_rows=step.num_rows(call.rows))
    if not call.has_attention:
        return y, cache
    return attention(x, w, cache, step, call, config=config, residual=y)
