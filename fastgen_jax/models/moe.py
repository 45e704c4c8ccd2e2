"""The feed-forward block of a layer with experts: route, sort tokens by expert, multiply, and sum with weights.

    tokens          t0    t1    t2    (padding)
    choice          2 0   1 2   0 2   - -                     two experts per token
    sorted rows   | t0 t2 | t1 | t0 t1 t2 | - - |             by expert: sizes 2, 1, 3; padding comes last
    back            t0 = weight * row of expert 2 + weight * row of expert 0, ...

Work is proportional to the number of tokens that are not padding. The result of a token does not depend on the others:
rows of one expert are multiplied independently, and the results of a token are summed in the order of its chosen experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fastgen_jax.models.layers import ACTIVATIONS
from fastgen_jax.models.moe_config import MoEConfig
from fastgen_jax.models.params import expert_specs
from fastgen_jax.models.sharding import divide_experts
from fastgen_jax.models.weight_spec import LayerWeights
from pallas_kernels import gpu_target
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_swiglu
from pallas_kernels.matmul import linear, swiglu

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

_SWIGLU_ALPHA = 1.702  # sigmoid(1.702 x) approximates the normal CDF, so x * sigmoid(1.702 x) approximates GELU


def moe(
    x: Float[Array, "T E"],
    w: LayerWeights,
    *,
    config: MoEConfig,
    num_tokens: Int[Array, ""],
    residual: Float[Array, "T E"] | None,
    first_expert: Int[Array, ""] | int = 0,
    mesh: Mesh | None = None,
    in_order: bool = False,
    routed_by: Float[Array, "T E"] | None = None,
) -> Float[Array, "T E"]:
    """The output of the experts for `x` (+ residual), in the dtype of `x`; sums are in float32.

    The router reads `routed_by`, or else `x`. Tokens from `num_tokens` on are padding: no expert computes them, and their
    results are finite. `w` holds the weights of the layer. Its stacks of experts may be those of all layers, [L*X, ...]; the
    experts of this layer then begin at `first_expert`. With `mesh` each device has its share of the hidden units of every
    expert, and one sum over devices follows, `in_order` or not; see `sharding`.
    """
    weights, chosen = route(x if routed_by is None else routed_by, w, config=config, num_tokens=num_tokens)
    answer: Callable[..., jax.Array] = partial(_weighted_experts, config=config)
    specs = expert_specs(x.shape[1], config)
    if mesh is not None:
        answer = divide_experts(answer, mesh, specs, in_order=in_order)
    first = jnp.asarray(first_expert, jnp.int32)
    y = answer({name: w[name] for name in specs}, x, weights, chosen, num_tokens, first)
    return (y if residual is None else y + residual.astype(jnp.float32)).astype(x.dtype)


def route(
    x: Float[Array, "T E"], w: LayerWeights, *, config: MoEConfig, num_tokens: Int[Array, ""] | None = None
) -> tuple[Float[Array, "T k"], Int[Array, "T k"]]:
    """The weights, in float32, and the numbers of the k experts that each token is routed to."""
    # In float32, since scores of similar rank are close. x stays as it is: products of 16 bits are exact, and with two
    # dtypes XLA would convert the matrix.
    logits = linear(x, w["router"], num_rows=num_tokens, out_dtype=jnp.float32)
    if config.router_bias:
        if gpu_target.is_gpu():  # as in `linear`: XLA would slice the matrix out of its stack to add the bias in the product
            logits = jax.lax.optimization_barrier(logits)
        logits = logits + w["router_bias"].astype(jnp.float32)[None, :]
    k = config.experts_per_token
    if config.scores in ("softmax_of_chosen", "sigmoid_of_chosen"):
        best, chosen = jax.lax.top_k(logits, k)
        weights = _softmax(best) if config.scores == "softmax_of_chosen" else jax.nn.sigmoid(best)
    elif config.scores == "sparse_mixer":
        weights, chosen = sparse_mixer(logits, k, tolerance=config.mixer_tolerance)
    else:
        scores = _softmax(logits) if config.scores == "softmax" else jax.nn.sigmoid(logits)
        merits = scores + w["choice_bias"].astype(jnp.float32)[None, :] if config.choice_bias else scores
        weights, chosen = jax.lax.top_k(_within_best_groups(merits, config), k)
        if config.choice_bias:
            weights = jnp.take_along_axis(scores, chosen, axis=-1, mode="clip")
    if config.normalize:
        weights = weights / (_sum(weights)[:, None] + 1e-20)
    if config.expert_scale:
        weights = weights * jnp.take(w["expert_scale"].astype(jnp.float32), chosen)
    return weights * config.scale, chosen


def sparse_mixer(logits: Float[Array, "T X"], k: int, *, tolerance: float) -> tuple[Float[Array, "T k"], Int[Array, "T k"]]:
    """The weights and numbers of the k best experts, chosen one after another.

    The weight of each is its softmax over the experts that are not chosen yet and whose logit is at most 2 * `tolerance`
    smaller, relative to the larger of the best logit and the absolute value of theirs. Source: GRIN (arXiv:2409.12136).
    """
    weights, chosen, rest = [], [], logits
    for _ in range(k):
        best, expert = jnp.max(rest, axis=-1, keepdims=True), jnp.argmax(rest, axis=-1).astype(jnp.int32)
        is_near = (best - logits) / jnp.maximum(jnp.abs(logits), best) <= 2.0 * tolerance
        weights.append(1.0 / _sum(jnp.where(is_near, jnp.exp(rest - best), 0.0)))
        chosen.append(expert)
        rest = jnp.where(jnp.arange(logits.shape[1])[None, :] == expert[:, None], -jnp.inf, rest)
    return jnp.stack(weights, axis=-1), jnp.stack(chosen, axis=-1)


def _softmax(x: Float[Array, "T n"]) -> Float[Array, "T n"]:
    """Softmax along the last axis of f32[T, n]; see `_sum`."""
    powers = jnp.exp(x - jnp.max(x, axis=-1, keepdims=True))
    return powers / _sum(powers)[:, None]


def _sum(x: Float[Array, "*rows n"]) -> Float[Array, "*rows"]:
    """The sum of each row, in a fixed order (pairwise): a compiler might choose the order by the number of rows."""
    while (n := x.shape[-1]) > 1:
        low, high = x[..., : n - n // 2], x[..., n - n // 2 :]
        x = low + jnp.pad(high, [(0, 0)] * (x.ndim - 1) + [(0, n % 2)])
    return jnp.squeeze(x, -1)


def _sum_of(arrays: Sequence[jax.Array]) -> jax.Array:
    """The sum in the order of `_sum`, in one pass: XLA writes a sum of slices that is sliced again to memory."""
    while (n := len(arrays)) > 1:
        low, high = arrays[: n - n // 2], arrays[n - n // 2 :]
        arrays = [a + b for a, b in zip(low, high, strict=False)] + list(low[n // 2 :])
    return arrays[0]


def _within_best_groups(merits: Float[Array, "T X"], config: MoEConfig) -> Float[Array, "T X"]:
    """`merits` with minus infinity outside the groups of experts that each token may choose from."""
    if config.groups_per_token == config.num_groups:
        return merits
    grouped = merits.reshape(merits.shape[0], config.num_groups, -1)
    if config.group_score == "max":
        of_group = jnp.max(grouped, axis=-1)
    else:
        of_group = _sum(jax.lax.top_k(grouped, 2)[0])
    _, best = jax.lax.top_k(of_group, config.groups_per_token)
    allowed = jnp.any(best[:, :, None] == jnp.arange(config.num_groups)[None, None, :], axis=1)  # [T, groups]
    return jnp.where(allowed[:, :, None], grouped, -jnp.inf).reshape(merits.shape)


def _weighted_experts(
    w: LayerWeights,
    x: Float[Array, "T E"],
    weights: Float[Array, "T k"],
    chosen: Int[Array, "T k"],
    num_tokens: Int[Array, ""],
    first: Int[Array, ""],
    *,
    config: MoEConfig,
) -> Float[Array, "T E"]:
    """In float32: the weighted sum of the experts that each token has chosen, plus the shared expert."""
    k = config.experts_per_token
    used = jnp.arange(x.shape[0]) < num_tokens
    expert = jnp.where(used[:, None], chosen, config.num_experts).reshape(-1)  # [T * k]
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.sum(expert[:, None] == jnp.arange(config.num_experts)[None, :], axis=0, dtype=jnp.int32)
    read = x if config.latent_dim is None else linear(x, w["latent_in"], num_rows=num_tokens)
    take = partial(jnp.take, axis=0, mode="clip")  # by default JAX would replace rows out of range in one more pass
    rows = take(read, order // k)  # [T * k, E]
    if config.weigh_inputs:
        rows = (rows.astype(jnp.float32) * take(weights.reshape(-1), order)[:, None]).astype(x.dtype)
        weights = jnp.ones_like(weights)
    rows = _experts(rows, w, sizes, take(expert, order), first, config=config)
    # A gather restores the order of the tokens: a scatter-add would be slow on accelerators, and its order of summation
    # is not defined. All first choices come first, then all second ones: on a TPU an axis of k next to the columns would be
    # another layout.
    place = jnp.argsort(order).reshape(-1, k).T
    mine = take(rows, place.reshape(-1)).reshape(k, x.shape[0], -1)
    y = _sum_of([jnp.where(used[:, None], mine[i] * weights[:, i, None], 0.0) for i in range(k)])
    width = config.latent_dim or x.shape[1]
    if y.shape[1] != width:
        y = y[:, :width]  # the rest is zeros: see `MoEConfig.down_dim`
    if config.latent_dim is not None:
        y = linear(y.astype(x.dtype), w["latent_out"], num_rows=num_tokens, out_dtype=jnp.float32)
    return y + _shared_expert(x, w, num_tokens, config=config) if config.shared_dim else y


def _experts(
    rows: Float[Array, "Tk E"],
    w: LayerWeights,
    sizes: Int[Array, " X"],
    expert: Int[Array, " Tk"],
    first: Int[Array, ""],
    *,
    config: MoEConfig,
) -> Float[Array, "Tk _"]:
    """In float32: every row through its expert. Rows are sorted by `expert`; `sizes` counts the rows of each expert.

    The result has as many columns as the down matrices: see `MoEConfig.down_dim`.
    """
    down = partial(grouped_matmul, w=w["expert_down"], group_sizes=sizes, first_group=first, out_dtype=jnp.float32)
    if config.fused_swiglu:
        return down(grouped_swiglu(rows, w["expert_gate_up"], sizes, first_group=first))
    name = "expert_gate_up" if config.gated else "expert_up"
    # Padding has expert number X, one past the last bias; any bias will do.
    hidden = grouped_matmul(rows, w[name], sizes, first_group=first)
    if config.expert_bias:
        hidden = hidden + jnp.take(w[f"{name}_bias"], expert, axis=0, mode="clip")
    if not config.gated:
        y = down(ACTIVATIONS[config.activation](hidden))
    else:
        gate, up = jnp.split(hidden, 2, axis=-1)
        if config.swiglu_limit is None:
            hidden = ACTIVATIONS[config.activation](gate) * up
        else:
            hidden = clamped_swiglu(gate, up, limit=config.swiglu_limit)
        y = down(hidden)
    if not config.expert_bias:
        return y
    return y + jnp.take(w["expert_down_bias"], expert, axis=0, mode="clip").astype(jnp.float32)


def clamped_swiglu(gate: Float[Array, "*rows F"], up: Float[Array, "*rows F"], *, limit: float) -> Float[Array, "*rows F"]:
    """gate * sigmoid(1.702 gate) * (up + 1), with both inputs clamped first. Source: gpt-oss."""
    dtype = gate.dtype
    gate, up = jnp.minimum(gate.astype(jnp.float32), limit), jnp.clip(up.astype(jnp.float32), -limit, limit)
    return (gate * jax.nn.sigmoid(_SWIGLU_ALPHA * gate) * (up + 1.0)).astype(dtype)


def _shared_expert(
    x: Float[Array, "T E"], w: LayerWeights, num_tokens: Int[Array, ""], *, config: MoEConfig
) -> Float[Array, "T E"]:
    """In float32."""
    if not config.gated:
        hidden = ACTIVATIONS[config.activation](linear(x, w["shared_up"], num_rows=num_tokens))
    elif config.activation == "silu":
        hidden = swiglu(x, w["shared_gate_up"], num_rows=num_tokens)
    else:
        gate, up = jnp.split(linear(x, w["shared_gate_up"], num_rows=num_tokens), 2, axis=-1)
        hidden = ACTIVATIONS[config.activation](gate) * up
    y = linear(hidden, w["shared_down"], num_rows=num_tokens, out_dtype=jnp.float32)
    if not config.shared_gate:
        return y
    gate = w["shared_gate"]
    if isinstance(gate, jax.Array):
        # Not as a product: one of a single column may sum each row in an order that depends on its place among the rows.
        opened = jnp.sum(x.astype(jnp.float32) * gate.astype(jnp.float32).T, axis=-1, keepdims=True)
    else:
        opened = linear(x, gate, num_rows=num_tokens, out_dtype=jnp.float32)
    return y * jax.nn.sigmoid(opened)
