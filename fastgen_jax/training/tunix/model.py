"""Models of tunix and of this project: one trained by the other, and weights from there to here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fastgen_jax.core import RaggedBatch
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.params import layers_with, param_specs
from fastgen_jax.models.weight_spec import Params
from fastgen_jax.training.batch import TrainingBatch
from fastgen_jax.training.forward import DEFAULTS, Options, logits
from fastgen_jax.training.module import Decoder, params_of
from pallas_kernels.ragged_attention import RaggedIndex

# For each weight the arrays that it may be made of in tunix' models, with the axis of the inputs of a projection.
_Arrays = tuple[tuple[str, int | None], ...]
_MODEL: dict[str, tuple[_Arrays, ...]] = {
    "embed": ((("embedder.input_embedding", None),),),
    "final_norm": ((("final_norm.w", None),), (("final_norm.scale", None),)),
    "lm_head": ((("lm_head.w", None),),),
}
_LAYER: dict[str, tuple[_Arrays, ...]] = {
    "attn_norm": ((("input_layernorm.w", None),), (("pre_attention_norm.scale", None),)),
    "mlp_norm": ((("post_attention_layernorm.w", None),), (("pre_ffw_norm.scale", None),)),
    "post_attn_norm": ((("post_attention_norm.scale", None),), (("post_attn_norm.scale", None),)),
    "post_mlp_norm": ((("post_ffw_norm.scale", None),),),
    "qkv": (
        (("attn.q_proj.w", 0), ("attn.k_proj.w", 0), ("attn.v_proj.w", 0)),  # [E, H, D]
        (("attn.q_einsum.w", 1), ("attn.kv_einsum.w", 2)),  # [H, E, D] and [2, K, E, D]
        (("attn.qkv_einsum.w", 2),),  # [3, H, E, D]
    ),
    "qkv_bias": ((("attn.q_bias", None), ("attn.k_bias", None), ("attn.v_bias", None)),),
    "q_norm": ((("attn.q_norm.w", None),), (("attn._query_norm.scale", None),)),
    "k_norm": ((("attn.k_norm.w", None),), (("attn._key_norm.scale", None),)),
    "o": ((("attn.o_proj.w", None),), (("attn.attn_vec_einsum.w", None),)),  # [H, D, E]
    "gate_up": ((("mlp.gate_proj.kernel", 0), ("mlp.up_proj.kernel", 0)),),
    "down": ((("mlp.down_proj.kernel", 0),),),
    "router": ((("mlp.router.kernel", 0),),),
    "expert_gate_up": ((("mlp.gate_proj", None), ("mlp.up_proj", None)),),  # [X, E, F]
    "expert_down": ((("mlp.down_proj", None),),),
}


class Model(Decoder):
    """The decoder of this project, called as tunix calls its models; made by `Model(params, config)`.

    Its parameters are the arrays of `params`, which are stacked. It has no cache: generation is the engine's task.
    """

    def __init__(self, params: Params, config: ModelConfig, options: Options = DEFAULTS) -> None:
        super().__init__(params, config, options)

    def __call__(  # type: ignore[override]
        self,
        input_tokens: jax.Array,
        positions: jax.Array,
        cache: None = None,
        attention_mask: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        """f32[B, L, V]: logits of rows of tokens i32[B, L], which are padded on both sides.

        `attention_mask` bool[B, L, L] says what is padding; without it, nothing is. Positions are counted from the first
        token that is not padding, as tunix counts them. ValueError with a cache.
        """
        if cache is not None:
            raise ValueError("this model trains without a cache; generate with the engine (tunix.Rollout)")
        rows, length = input_tokens.shape
        skipped = jnp.zeros(rows, jnp.int32)
        if attention_mask is not None:  # the last token sees all that are not padding
            skipped = jnp.argmax(attention_mask[:, -1, :], axis=-1).astype(jnp.int32)
        batch = _left_padded(input_tokens, skipped)
        values = logits(params_of(self), batch, config=self.config, options=self.options)
        return values.reshape(rows, length, -1), None


def _left_padded(tokens: jax.Array, skipped: jax.Array) -> TrainingBatch:
    """All rows of `tokens` i32[B, L] with every prediction; the first `skipped` i32[B] tokens of each stand alone."""
    count, length = tokens.shape
    firsts = jnp.arange(count, dtype=jnp.int32) * length
    starts = jnp.stack([firsts, firsts + skipped], axis=1).reshape(-1)
    starts = jnp.append(starts, jnp.int32(count * length))
    place = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None, :], tokens.shape)
    positions = jnp.where(place < skipped[:, None], place, place - skipped[:, None]).reshape(-1)
    nothing = jnp.zeros(count * length, jnp.int32)
    ragged = RaggedBatch(
        token_ids=tokens.reshape(-1).astype(jnp.int32),
        token_slots=nothing,
        positions=positions,
        rope_lengths=positions + 1,
        index=RaggedIndex(
            kv_slots=nothing,
            query_starts=starts,
            context_lens=starts[1:] - starts[:-1],
            block_tables=jnp.zeros((2 * count, 0), jnp.int32),
        ),
        sample_rows=jnp.arange(count * length, dtype=jnp.int32),
        num_sample_rows=jnp.asarray(count * length, jnp.int32),
    )
    return TrainingBatch(ragged=ragged, targets=nothing, sequences=nothing)


def params_from_state(state: Any, config: ModelConfig) -> Params:
    """The weights in a state of nnx, in the engine's form.

    Those of a `Model` are returned as they are. Those of tunix' own models are fused and stacked by one compiled program, on
    the devices that they are on. ValueError names the weight for which a state has no arrays.
    """
    arrays = {".".join(map(str, path)): _value(leaf) for path, leaf in nnx.to_flat_state(state)}
    if "embed" in arrays:
        layers = {name.removeprefix("layers."): leaf for name, leaf in arrays.items() if name.startswith("layers.")}
        return {**{name: leaf for name, leaf in arrays.items() if "." not in name}, "layers": layers}
    return _fused(config)(arrays)


def _value(leaf: Any) -> jax.Array:
    return leaf[...] if isinstance(leaf, nnx.Variable) else leaf


@functools.cache
def _fused(config: ModelConfig) -> Callable[[Mapping[str, jax.Array]], Params]:
    return jax.jit(functools.partial(_fuse, config=config))


def _fuse(arrays: Mapping[str, jax.Array], *, config: ModelConfig) -> Params:
    specs, having = param_specs(config), layers_with(config)
    layer_specs = specs.pop("layers")

    def weight(prefix: str, name: str, known: Sequence[_Arrays], shape: tuple[int, ...]) -> jax.Array:
        for alternative in known:
            if all(f"{prefix}{array}" in arrays for array, _ in alternative):
                parts = [_columns(arrays[f"{prefix}{array}"], inputs, shape) for array, inputs in alternative]
                whole = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
                if name == "embed" or name == "lm_head":  # the vocabulary may be padded
                    whole = whole[tuple(slice(size) for size in shape)]
                return whole.reshape(shape)
        raise ValueError(
            f"the state has no arrays for the weight {prefix}{name}; known are the models of tunix for Llama 3, Qwen 2 "
            "and 3 and Gemma, and Model of fastgen_jax.training.tunix. A state of adapters alone must be merged first"
        )

    params: Params = {name: weight("", name, _MODEL.get(name, ()), spec.shape) for name, spec in specs.items()}
    params["layers"] = {
        name: jnp.stack([weight(f"layers.{i}.", name, _LAYER.get(name, ()), spec.shape) for i in having[name]])
        for name, spec in layer_specs.items()
    }
    return params


def _columns(array: jax.Array, inputs: int | None, shape: tuple[int, ...]) -> jax.Array:
    """An array whose axis number `inputs` are the inputs as a matrix [in, out]; others as they are, vectors flat."""
    if inputs is not None:
        return jnp.moveaxis(array, inputs, 0).reshape(array.shape[inputs], -1)
    return array.reshape(-1) if len(shape) == 1 else array
