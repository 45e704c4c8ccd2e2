"""The trainable forward pass: the engine's decoder on whole sequences, differentiable, without a KV cache.

It has the engine's numbers. On a CPU the same native kernels compute the results, so in float32 log-probabilities equal
those of a rollout bit for bit, and derivatives are those of the plain products:

                     weights           products, norms, attention         derivatives
    engine, CPU      packed, once      native                             -
    training, CPU    packed in place   native                             XLA
    elsewhere        arrays            XLA                                XLA
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fastgen_jax.core import KVCache
from fastgen_jax.engine.engine import Engine
from fastgen_jax.engine.sampling.token_logprobs import token_logprobs
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.decoder import Execution, head, hidden_rows
from fastgen_jax.models.kept_keys import cache_of_pass
from fastgen_jax.models.layer_loop import Layer
from fastgen_jax.models.mla import Expansions, split_by_head
from fastgen_jax.models.params import all_specs, expert_specs, head_spec
from fastgen_jax.models.sparse import refuse_choice
from fastgen_jax.models.states import refuse_states
from fastgen_jax.models.step import LayerCall
from fastgen_jax.models.weight_spec import Kind, LayerWeights, Leaf, Params, WeightSpec
from fastgen_jax.training.batch import TrainingBatch
from pallas_kernels.grouped_matmul import pair as pair_groups
from pallas_kernels.matmul import pair
from pallas_kernels.packed_attention import packed_attention
from pallas_kernels.ragged_attention import QUANTIZED_DTYPES, CacheLayer, RaggedIndex, Scoring

_NUMBERS_OF_LOGITS = 2**24  # that exist at a time: 64 MiB


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the trainable forward pass runs. The results do not depend on the first three, apart from rounding."""

    remat: bool = True
    """Keep only the input of each layer, and compute the rest again for the derivative."""
    head_rows: int | None = None
    """Rows whose logits exist at the same time; None: as many as take 64 MiB, at least 16."""
    attention: str | None = None
    """A key of `packed_attention.IMPLEMENTATIONS`; None: the best one for the platform."""
    dtype: DTypeLike | None = None
    """Dtype of matrices and tables in products, such as the engine's; None: that of `params`."""
    activation_dtype: DTypeLike | None = None
    """Dtype of the residual stream and of norms and biases; None: that of the embedding."""
    kv_dtype: DTypeLike | None = None
    """Dtype to which keys and values are rounded; None: that of the residual stream."""


DEFAULTS = Options()


def options_of(engine: Engine) -> Options:
    """The options with which the forward pass has the number formats of an engine.

    Not those of weights and caches of 8 bits and less: their rounding has no derivative.
    """
    config = engine.config
    kv_dtype = None if config.kv_dtype in QUANTIZED_DTYPES else config.kv_dtype
    return Options(dtype=config.dtype, activation_dtype=config.activation_dtype, kv_dtype=kv_dtype)


def logits(params: Params, batch: TrainingBatch, *, config: ModelConfig, options: Options = DEFAULTS) -> jax.Array:
    """f32[R, V]: logits of the rows of `batch`; those of padding are finite and have no meaning."""
    params = _in_dtype(params, config, options)
    rows = _hidden_rows(params, batch, config, options)
    return head(rows, _head(params, config), batch.ragged.num_sample_rows, config=config)[:, : config.vocab_size]


def logprobs(
    params: Params,
    batch: TrainingBatch,
    *,
    config: ModelConfig,
    options: Options = DEFAULTS,
    temperature: float = 1.0,
) -> jax.Array:
    """f32[R]: the log-probability of each target of `batch`; 0 for padding.

    They are those of logits divided by `temperature`: at 1 the engine's raw ones, otherwise its processed ones without
    top-k, top-p and min-p. Logits exist for a few rows at a time: see `Options.head_rows`.
    """
    params = _in_dtype(params, config, options)
    rows, targets = _hidden_rows(params, batch, config, options), batch.targets
    weights, count = _head(params, config), batch.ragged.num_sample_rows
    size = options.head_rows or max(16, _NUMBERS_OF_LOGITS // config.vocab_size)
    size = min(size, targets.shape[0])
    pieces = -(-targets.shape[0] // size)
    padding = pieces * size - targets.shape[0]

    def of_piece(piece: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        rows, targets, first = piece
        scores = head(rows, weights, jnp.clip(count - first, 0, size), config=config)[:, : config.vocab_size]
        # One divisor per row, as in the engine: XLA divides by a constant in another way, which rounds differently.
        return token_logprobs(scores, targets, jnp.where(targets < 0, 1.0, jnp.float32(temperature)))

    firsts = jnp.arange(pieces, dtype=jnp.int32) * size
    rows = jnp.pad(rows, ((0, padding), (0, 0))).reshape(pieces, size, -1)
    targets = jnp.pad(targets, (0, padding)).reshape(pieces, size)
    values = jax.lax.map(jax.checkpoint(of_piece, prevent_cse=False), (rows, targets, firsts)).reshape(-1)
    return jnp.where(batch.is_used, values[: batch.targets.shape[0]], 0.0)


def _hidden_rows(params: Params, batch: TrainingBatch, config: ModelConfig, options: Options) -> jax.Array:
    refuse_states(config, "training")
    refuse_choice(config, batch.ragged.token_ids.shape[0], "training")
    specs = all_specs(config)
    layers = params["layers"]
    outside = {
        name: _paired(specs.get(name), leaf, config) for name, leaf in params.items() if name not in ("layers", "lm_head")
    }

    def wrapped(layer: Layer) -> Layer:
        def run(x: jax.Array, cache: KVCache, weights: LayerWeights, call: LayerCall) -> tuple[jax.Array, KVCache]:
            def compute(x: jax.Array, cache: KVCache, weights: LayerWeights) -> tuple[jax.Array, KVCache]:
                weights, own_call = _own_experts(weights, call, config)
                pairs = {name: _paired(specs[f"layers.{name}"], leaf, config) for name, leaf in weights.items()}
                return layer(x, cache, pairs, own_call)

            # The layers are the body of a loop, in which nothing can be merged with the first computation.
            compute = jax.checkpoint(compute, prevent_cse=not isinstance(layers, Mapping)) if options.remat else compute
            return compute(x, cache, weights)

        return run

    def attend(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        k_cache: Any,
        v_cache: Any,
        index: RaggedIndex,
        layer: CacheLayer,
        scoring: Scoring,
    ) -> tuple[jax.Array, Any, Any]:
        if options.kv_dtype is not None:
            k, v = k.astype(options.kv_dtype), v.astype(options.kv_dtype)
        return packed_attention(q, k, v, index.query_starts, scoring, implementation=options.attention), k_cache, v_cache

    nothing = cache_of_pass(config, batch.ragged.token_ids.shape[0])
    execution = Execution(attention=attend, activation_dtype=options.activation_dtype, wrap_layer=wrapped)
    return hidden_rows({**outside, "layers": layers}, nothing, batch.ragged, config=config, execution=execution)[0]


def _paired(spec: WeightSpec | None, leaf: Leaf, config: ModelConfig) -> Leaf:
    """The form of a weight in which products have the engine's bits; see `pallas_kernels.matmul.pair`."""
    platform, kind = jax.default_backend(), None if spec is None else spec.kind
    if spec is not None and kind is Kind.MATRIX:
        return pair(leaf, platform=platform, gated=spec.gated)
    if spec is not None and kind is Kind.EXPERTS:
        return pair_groups(leaf, platform=platform, gated=spec.gated)
    if kind is Kind.HEADS:
        assert config.mla is not None, "only latent attention has one matrix per head"
        k_up, v_up = split_by_head(leaf, config.mla, config.num_heads)
        return Expansions(k_up=pair_groups(k_up, platform=platform), v_up=pair_groups(v_up, platform=platform))
    return leaf


def _own_experts(weights: LayerWeights, call: LayerCall, config: ModelConfig) -> tuple[LayerWeights, LayerCall]:
    """The weights and the call of a layer whose stacks of experts may be those of all layers: with its own on a CPU.

    Panels are made of what a layer gets. Elsewhere a slice would be a copy without a use.
    """
    if config.moe is None or call.first_expert is None or jax.default_backend() != "cpu":
        return weights, call
    first, count = call.first_expert, config.moe.num_experts
    own = {
        name: jax.lax.dynamic_slice_in_dim(weights[name], first, count)
        for name, spec in expert_specs(config.embed_dim, config.moe).items()
        if spec.kind is Kind.EXPERTS
    }
    return {**weights, **own}, replace(call, first_expert=0)


def _head(params: Params, config: ModelConfig) -> Params:
    """What `head` reads of `params`."""
    weight = params["lm_head"] if "lm_head" in params else params["embed"].T
    return {**params, "lm_head": _paired(head_spec(config), weight, config)}


def _in_dtype(params: Params, config: ModelConfig, options: Options) -> Params:
    """`params` in the dtypes of the options."""
    if not isinstance(params.get("embed"), jax.Array):
        raise ValueError(
            "params must be arrays of a program or a device, as load_params(..., prepare=None) and init_params return them"
        )
    if options.dtype is None and options.activation_dtype is None:
        return params
    specs = {head_spec(config).path: head_spec(config)} | all_specs(config)
    dtypes = {"weights": options.dtype, "activations": options.activation_dtype, "float32": jnp.float32}

    def cast(path: str, leaf: Leaf) -> Leaf:
        dtype = dtypes[specs[path].dtype]
        return leaf if dtype is None else leaf.astype(dtype)

    def cast_layer(layer: LayerWeights) -> LayerWeights:
        return {name: cast(f"layers.{name}", leaf) for name, leaf in layer.items()}

    layers = params["layers"]
    rest = {name: cast(name, leaf) for name, leaf in params.items() if name != "layers"}
    return {**rest, "layers": cast_layer(layers) if isinstance(layers, Mapping) else tuple(map(cast_layer, layers))}
