"""The feed-forward block of a layer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fastgen_jax.models.adapters import AdaptedWeight, adapted_linear
from fastgen_jax.models.columns import split_columns
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.layers import ACTIVATIONS, norm, project, xielu
from fastgen_jax.models.moe import moe
from fastgen_jax.models.sharding import sum_in_order
from fastgen_jax.models.step import LayerCall
from fastgen_jax.models.weight_spec import LayerWeights
from pallas_kernels.matmul import gated, swiglu

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def mlp(
    x: Float[Array, "T E"],
    w: LayerWeights,
    call: LayerCall,
    *,
    config: ModelConfig,
    num_tokens: Int[Array, ""],
    residual: Float[Array, "T E"] | None,
    mesh: Mesh | None = None,
    in_order: bool = False,
) -> Float[Array, "T E"]:
    """The MLP of `x` [T, E] (+ residual), or its experts if the layer has any instead; see `moe`.

    Tokens from `num_tokens` on are padding. With `mesh` the weights are sharded over it, and sums over devices may be
    `in_order`; see `sharding`.
    """
    if (first := call.first_expert) is not None:
        assert config.moe is not None, "a layer with a first expert has experts"
        if not config.moe.beside_mlp:
            places = {"first_expert": first, "mesh": mesh, "in_order": in_order}
            return moe(x, w, config=config.moe, num_tokens=num_tokens, residual=residual, **places)
    hidden = _hidden(x, w, call, num_tokens, config, mesh, in_order=in_order)
    return project(hidden, w, "down", residual=residual, num_rows=num_tokens)


def beside_mlp(
    y: Float[Array, "T E"],
    x: Float[Array, "T E"],
    w: LayerWeights,
    call: LayerCall,
    *,
    config: ModelConfig,
    num_tokens: Int[Array, ""],
    mesh: Mesh | None = None,
    in_order: bool = False,
) -> Float[Array, "T E"]:
    """The sum of `y`, which the MLP returns, and of what the experts of the layer return for `x`, each normalized.

    Source: Gemma 4, whose router reads `x` in another norm than the experts, divided by the root of E.
    """
    assert config.moe is not None, "the layer has experts"
    assert call.first_expert is not None, "the layer has experts"
    of = partial(norm, w=w, config=config, num_rows=num_tokens)
    experts = moe(
        of(x, name="expert_norm"),
        w,
        config=config.moe,
        num_tokens=num_tokens,
        residual=None,
        first_expert=call.first_expert,
        mesh=mesh,
        in_order=in_order,
        routed_by=of(x, name="router_norm") * config.embed_dim**-0.5,
    )
    return of(y, name="beside_expert_norm") + of(experts, name="post_expert_norm")


def _hidden(
    x: Float[Array, "T E"],
    w: LayerWeights,
    call: LayerCall,
    num_tokens: Int[Array, ""],
    config: ModelConfig,
    mesh: Mesh | None,
    *,
    in_order: bool,
) -> Float[Array, "T F"]:
    """The hidden units, before the projection back to E."""
    num_devices = 1 if mesh is None else mesh.size
    if config.activation == "xielu":
        return xielu(project(x, w, "up", num_rows=num_tokens), w["xielu_above"], w["xielu_below"])
    activation = ACTIVATIONS[config.activation]
    if not config.mlp_gated:
        return activation(project(x, w, "up", num_rows=num_tokens))
    if config.fused_swiglu and isinstance(w["gate_up"], AdaptedWeight):
        return gated(adapted_linear(x, w["gate_up"], num_rows=num_tokens, out_dtype=jnp.float32), num_devices).astype(
            x.dtype
        )
    if config.fused_swiglu:
        return swiglu(x, w["gate_up"], num_rows=num_tokens, shards=num_devices)
    gate, up = split_columns(project(x, w, "gate_up", num_rows=num_tokens), 2 * (config.mlp_dim,), num_devices)
    if config.mlp_multipliers is not None:
        of_gate, of_hidden = config.mlp_multipliers
        return activation(gate * of_gate) * up * of_hidden
    if config.gate_cutoffs:
        gate = _above_cutoff(gate, config, call, mesh if in_order else None)
    return activation(gate) * up


def _above_cutoff(
    gate: Float[Array, "T F"], config: ModelConfig, call: LayerCall, mesh: Mesh | None = None
) -> Float[Array, "T F"]:
    """By how much gates exceed the cutoff of the layer, in standard deviations of the token's gates above their mean.

    With `mesh`, sums over its devices are in order.
    """
    cutoffs = config.gate_cutoffs
    number = call.index if isinstance(call.index, int) else None
    if number is not None and cutoffs[number] is None:
        return gate
    gate32 = gate.astype(jnp.float32)
    if mesh is None:
        mean, deviation = jnp.mean(gate32, axis=-1, keepdims=True), jnp.std(gate32, axis=-1, keepdims=True)
    else:
        mean = sum_in_order(gate32, mesh) / gate.shape[-1]
        deviation = jnp.sqrt(sum_in_order(jnp.square(gate32 - mean), mesh) / gate.shape[-1])
    cutoff = jnp.asarray([c or 0.0 for c in cutoffs], jnp.float32)[call.index]
    cut = jax.nn.relu(gate32 - (mean + deviation * cutoff)).astype(gate.dtype)
    if number is not None or None not in cutoffs:
        return cut
    return jnp.where(jnp.asarray([c is not None for c in cutoffs])[call.index], cut, gate)
