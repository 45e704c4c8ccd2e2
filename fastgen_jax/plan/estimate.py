"""Estimates of the memory and time that a model needs on devices."""

from __future__ import annotations

import dataclasses
import math

from fastgen_jax.devices import Device, Topology
from fastgen_jax.engine import footprint
from fastgen_jax.engine.footprint import bits_per_value, quantization_of, temporary_bytes, weight_bytes
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.division import divided
from fastgen_jax.models.moe_config import IndexerConfig
from fastgen_jax.models.params import expert_specs
from fastgen_jax.models.sparse import indexer_of
from fastgen_jax.models.weight_spec import DType, Kind, WeightSpec
from fastgen_jax.plan.roofline import StepShape, StepTime, Windows, decode_attended, roofline
from fastgen_jax.scheduling import BlockGroups

RESERVED_SHARE = 0.06  # of a device's memory: the runtime, programs, and gaps between buffers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device."""

    total: int
    reserved: int
    weights: int
    state: int  # the sampler's tables, and what running sequences hold beside KV blocks
    temporaries: int  # of the largest step
    block: int  # one KV block: the layers of a cache group

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


def read_weight_bytes(
    model: ModelConfig,
    num_devices: int,
    itemsize: float,
    *,
    tokens: int,
    quantize: str | None = None,
    kept: tuple[tuple[str, float], ...] = (),
    platform: str = "cpu",
) -> int:
    """The part of `weight_bytes` that a step of `tokens` tokens reads if every expert is chosen equally often.

    A tied head that is among `kept` is read beside the embedding.
    """
    packed = "lm_head" in dict(kept)
    weights = weight_bytes(model, num_devices, itemsize, quantize=quantize, kept=kept, packed=packed, platform=platform)
    model = divided(model, num_devices, platform)
    moe = model.moe
    if moe is None:
        return weights

    def bits(spec: WeightSpec) -> float:
        form = quantization_of(spec, quantize, packed=packed, num_devices=num_devices, platform=platform)
        return bits_per_value(spec, itemsize, form=form, kept=dict(kept), platform=platform)

    one = sum(  # expert of a layer
        math.prod(spec.shape[1:]) * bits(spec) / 8 / num_devices
        for spec in expert_specs(model.embed_dim, moe).values()
        if spec.kind is Kind.EXPERTS
    )
    unread = moe.num_experts * (1 - moe.experts_per_token / moe.num_experts) ** tokens
    return math.ceil(weights - len(moe.layers) * unread * one)


def block_bytes(model: ModelConfig, topology: Topology, *, block_size: int, kv_dtype: DType, num_groups: int) -> int:
    """Bytes of a KV block on one device: keys and values of the heads on it, in the layers of a cache group."""
    whole = footprint.block_bytes(
        model,
        topology.device.platform,
        kv_dtype=kv_dtype,
        block_size=block_size,
        num_groups=num_groups,
        num_devices=topology.num_devices,
    )
    return whole // topology.num_devices


def largest_budget(
    model: ModelConfig,
    topology: Topology,
    memory: Memory,
    *,
    max_num_seqs: int,
    itemsize: int,
    groups: BlockGroups,
    context: int,
) -> int:
    """The largest power of two of tokens per step that leaves room for the KV of one full context; 0 if none does."""
    room = memory.free + memory.temporaries
    budget = 0
    for candidate in (2**i for i in range(17)):
        blocks = dataclasses.replace(groups, token_budget=candidate).blocks_needed(context)
        needed = blocks * memory.block + temporary_bytes(
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
    kept: tuple[tuple[str, float], ...] = (),
    token_bytes: float,
    windows: Windows = (None,),
) -> PlannedStep:
    """A step in which `sequences` of `context` tokens generate and a prompt chunk at the same context fills the rest.

    `windows` are those of the cache groups, and `kept` as for `weight_bytes`.
    """
    cost = roofline(
        model,
        topology.device,
        topology.num_devices,
        weight_bytes=read_weight_bytes(
            model,
            topology.num_devices,
            itemsize,
            tokens=tokens,
            quantize=quantize,
            kept=kept,
            platform=topology.device.platform,
        ),
        kv_bytes_per_token=token_bytes,
        activation_bytes=itemsize,
    )
    prompt = tokens - sequences
    indexer = indexer_of(model)
    if indexer is not None and context > indexer.num_chosen:
        seen, read = indexer.num_chosen, min(context, indexer.num_chosen * prompt)
    else:
        indexer = None
        seen = decode_attended((context,), windows)
        read = decode_attended((context,), [None if window is None else window + prompt - 1 for window in windows])
    shape = StepShape(
        num_tokens=tokens,
        num_sample_rows=sequences + (prompt > 0),
        decode_attended=sequences * seen,
        prompt_attended=prompt * seen,
        prompt_context=read if prompt else 0,
    )
    time = cost.parts(shape)
    if indexer is not None:
        chooses = indexer_time(
            indexer,
            topology.device,
            scored=tokens * context,
            read=(sequences + (prompt > 0)) * context,
            itemsize=itemsize,  # of the cache, which is not in 8 bits here
        )
        time = StepTime(*map(sum, zip(time, chooses, strict=True)))
    return PlannedStep(tokens=tokens, sequences=sequences, **time._asdict())


def indexer_time(indexer: IndexerConfig, device: Device, *, scored: float, read: float, itemsize: float) -> StepTime:
    """Time of an indexer, of which every device computes all heads, at the peak figures.

    `scored` counts pairs of a token and a position before it, and `read` positions whose keys, of `itemsize` bytes per
    number, are read.
    """
    layers = len(indexer.layers)
    compute = 2.0 * scored * layers * indexer.num_heads * indexer.head_dim / device.flops_per_s
    memory = read * layers * indexer.head_dim * itemsize / device.memory_bytes_per_s
    return StepTime(seconds=max(compute, memory), compute=compute, memory=memory, links=0.0)
