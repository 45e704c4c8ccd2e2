"""Estimates of the memory and time that a model needs on devices."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from fastgen_jax.core import scale_bytes, stored_head_dim
from fastgen_jax.devices import Topology
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.params import layers_with, param_specs
from fastgen_jax.models.sharding import DIVIDED_AXES
from fastgen_jax.models.weight_spec import DType, WeightSpec
from fastgen_jax.plan.roofline import StepShape, roofline

RESERVED_SHARE = 0.06  # of a device's memory: the runtime, programs, and gaps between buffers
SAMPLER_COPIES = 4  # f32[R, V] arrays that the sampler holds at the same time: logits, their order, probabilities, noise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device."""

    total: int
    reserved: int
    weights: int
    state: int  # the sampler's tables
    temporaries: int  # of the largest step
    block: int  # one KV block, all layers

    @property
    def free(self) -> int:
        """What remains for the KV cache; negative if the rest does not fit."""
        return self.total - self.reserved - self.weights - self.state - self.temporaries

    @property
    def num_blocks(self) -> int:
        """KV blocks that fit into the free memory."""
        return max(0, self.free // self.block)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """A step on the roofline, at the peak figures of the devices; times in seconds, see `StepTime`."""

    tokens: int
    sequences: int  # that generate one token each; the other tokens are a prompt chunk
    seconds: float
    compute: float
    memory: float
    links: float

    @property
    def bound(self) -> str:
        """What limits the step: "compute" or "memory"."""
        return "compute" if self.compute >= self.memory else "memory"


def weight_bytes(model: ModelConfig, num_devices: int, itemsize: float, *, quantize: str | None = None) -> int:
    """Bytes of the weights on one device: weights with a divided axis are divided, the others are on every device."""
    specs, having = param_specs(model), layers_with(model)

    def held(spec: WeightSpec, copies: int = 1) -> float:
        divided = num_devices if DIVIDED_AXES & set(spec.axes) else 1
        if quantize is None or not spec.quantizable:
            return copies * math.prod(spec.shape) * itemsize / divided
        scales = 4 * math.prod(spec.shape) / spec.shape[-2] / (num_devices if spec.axes[-1] in DIVIDED_AXES else 1)
        return copies * (math.prod(spec.shape) / divided + scales)

    layer = sum(held(spec, len(having[name])) for name, spec in specs["layers"].items())
    rest = sum(held(spec) for name, spec in specs.items() if name != "layers")
    if quantize is not None and "lm_head" not in specs and num_devices == 1:
        rest += model.vocab_size * (model.embed_dim + 4)  # a tied head is stored separately, as int8
    return math.ceil(layer + rest)


def read_weight_bytes(
    model: ModelConfig, num_devices: int, itemsize: float, *, tokens: int, quantize: str | None = None
) -> int:
    """The part of `weight_bytes` that a step of `tokens` tokens reads if every expert is chosen equally often."""
    weights = weight_bytes(model, num_devices, itemsize, quantize=quantize)
    moe = model.moe
    if moe is None:
        return weights
    one = 3 * model.embed_dim * moe.expert_dim * (itemsize if quantize is None else 1) / num_devices
    unread = moe.num_experts * (1 - moe.experts_per_token / moe.num_experts) ** tokens
    return math.ceil(weights - len(moe.layers) * unread * one)


def block_bytes(model: ModelConfig, topology: Topology, *, block_size: int, kv_dtype: DType) -> int:
    """Bytes of a KV block on one device: keys and values of the heads on it, all layers."""
    head_dim = stored_head_dim(model.head_dim, topology.device.platform)
    bytes_per_token = model.kv_bytes_per_token(
        np.dtype(kv_dtype).itemsize, stored_head_dim=head_dim, scale_bytes=scale_bytes(kv_dtype)
    )
    return block_size * bytes_per_token // topology.num_devices


def temporary_bytes(model: ModelConfig, num_devices: int, *, token_budget: int, max_num_seqs: int, itemsize: int) -> int:
    """An estimate of the bytes that a step needs besides its arguments; the compile check knows the real number."""
    h, k, d = model.num_heads, model.num_kv_heads, model.head_dim
    bytes_per_token = (
        itemsize * (4 * model.embed_dim + (2 * h + 4 * k) * d / num_devices) + 4 * 3 * model.mlp_dim / num_devices
    )
    rows = min(token_budget, max_num_seqs)
    return math.ceil(token_budget * bytes_per_token + SAMPLER_COPIES * 4 * rows * model.vocab_size)


def sampler_bytes(model: ModelConfig, max_num_seqs: int) -> int:
    """Bytes of the tables that the sampler keeps for each sequence, on every device."""
    import jax

    from fastgen_jax.engine.sampling.state import init_state

    state = jax.eval_shape(lambda: init_state(max_num_seqs, model.vocab_size))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def largest_budget(
    model: ModelConfig, topology: Topology, memory: Memory, *, max_num_seqs: int, itemsize: int, blocks_per_sequence: int
) -> int:
    """The largest power of two of tokens per step that leaves room for the KV of one full context; 0 if none does."""
    room = memory.free + memory.temporaries - blocks_per_sequence * memory.block
    budget = 0
    for candidate in (2**i for i in range(17)):
        needed = temporary_bytes(
            model, topology.num_devices, token_budget=candidate, max_num_seqs=max_num_seqs, itemsize=itemsize
        )
        if needed <= room:
            budget = candidate
    return budget


def planned_step(
    model: ModelConfig,
    topology: Topology,
    *,
    tokens: int,
    sequences: int,
    context: int,
    itemsize: int,
    quantize: str | None = None,
    block_bytes: int,
    block_size: int,
) -> PlannedStep:
    """A step in which `sequences` of `context` tokens generate and a prompt chunk at the same context fills the rest."""
    cost = roofline(
        model,
        topology.device,
        topology.num_devices,
        weight_bytes=read_weight_bytes(model, topology.num_devices, itemsize, tokens=tokens, quantize=quantize),
        kv_bytes_per_token=block_bytes / block_size,
        activation_bytes=itemsize,
    )
    prompt = tokens - sequences
    shape = StepShape(
        num_tokens=tokens,
        num_sample_rows=sequences + (prompt > 0),
        decode_attended=sequences * context,
        prompt_attended=prompt * context,
        prompt_context=context if prompt else 0,
    )
    return PlannedStep(tokens=tokens, sequences=sequences, **cost.parts(shape)._asdict())
