"""Number formats with which a model fits the free memory, chosen before its weights are loaded.

Quality comes first. The KV cache gets what the weights leave; if that is little, the cache holds fewer sequences, then a
shorter context. Only if fewer than `USABLE_CONTEXT` tokens would fit (or the model's own limit, if that is less) are
smaller number formats tried, in the order of `candidates`. A context below that is the last resort. What the operator
chose is never changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Literal

import jax.numpy as jnp

from fastgen_jax.checkpoint.block_kind import BlockKind
from fastgen_jax.engine import footprint, ladder, saved_choices
from fastgen_jax.engine.config import EngineConfig, Formats, default_block_size, default_dtype, quantization, wide_enough
from fastgen_jax.engine.kept_forms import Stored, choose_forms
from fastgen_jax.engine.machine import Machine
from fastgen_jax.engine.resolve import blocks_of_sequences, largest_budget
from fastgen_jax.models.cache_groups import choose_groups
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.division import divided
from fastgen_jax.scheduling import BlockGroups
from pallas_kernels.folders import Folder

FILE = "formats.json"  # with the compiled programs, which are made for these formats
USABLE_CONTEXT = 4096  # tokens: formats are not changed while a context of this length fits
LEAST_CONTEXT = 256  # tokens: a model for which fewer fit is refused
# Of the host's free memory, at most, for the weights and what is read ahead of them: for a new choice, or to replace one.
HOST_WEIGHTS = {"usual": 0.9, "least": 0.85, "most": 0.95}
WEIGHTS_AHEAD = 2  # weights of the largest kind that the host holds while loading, besides the model
DEVICE_REST = 0.1  # of an accelerator's memory, which no cache takes: temporaries and sampler tables of usual sizes
USUAL_BUDGET = 512  # tokens: the largest step, where it is measured later

_Share = Literal["usual", "least", "most"]


def with_formats(config: EngineConfig, model: ModelConfig, folder: Folder | None, *, stored: Stored = ()) -> EngineConfig:
    """`config` with the formats for a checkpoint of `model` on this machine.

    Without `fit`, they are the defaults. `stored` are the quantized weights of the checkpoint.
    The formats of an earlier start are kept while they suit what is free now: `folder` remembers them. Raises ValueError
    if the model fits in no format.
    """
    if not config.fit:
        return replace(config, formats=candidates(config, Machine.here(), model, stored=stored)[0]) if stored else config
    options = ("dtype", "quantize", "kv_dtype", "tensor_parallel", "max_num_seqs", "max_context_len", "block_size")
    facts = (asdict(model), [getattr(config, name) for name in (*options, "num_blocks", "token_budget")], tuple(stored))
    path = folder.path / FILE if folder else None
    earlier = (saved_choices.load(path, facts) if path else None) or {}
    formats = choose_formats(config, model, Machine.here(), earlier=earlier.get("formats"), stored=stored)
    chosen = _names(formats)
    if path and folder and folder.writable and earlier.get("formats") != chosen:
        saved_choices.save(path, facts, {"model": ladder.describe(model), "formats": chosen})
    return replace(config, formats=formats)


def choose_formats(
    config: EngineConfig,
    model: ModelConfig,
    machine: Machine,
    *,
    earlier: object = None,
    stored: Stored = (),
) -> Formats:
    """The first of `candidates` in which a usable context fits, else the smallest if any context does.

    `earlier` are the names of the formats of an earlier start; they are kept while more memory than they need is free, and
    not so much that better ones clearly fit. Raises ValueError, with the numbers, if nothing fits.
    """
    options = candidates(config, machine, model, stored=stored)
    best, least, most = (_first(options, config, model, machine, share) for share in ("usual", "least", "most"))
    unchanged = [i for i, formats in enumerate(options) if _names(formats) == earlier]
    if unchanged and most is not None and most <= unchanged[0] <= (len(options) if least is None else least):
        best = unchanged[0]
    elif best is None:
        best = most
    if best is None:
        raise ValueError(_refusal(options, config, model, machine))
    if best == 0:
        return options[0]
    return replace(options[best], why=_reason(options[0], config, model, machine))


def candidates(config: EngineConfig, machine: Machine, model: ModelConfig, *, stored: Stored = ()) -> list[Formats]:
    """The formats that may be used, best first: those that were chosen or are the default, then

    1. bfloat16 weights and cache instead of float32, on a CPU
    2. an int8 KV cache, on a TPU or GPU, whose kernels read it
    3. int8 weights, on a TPU or GPU without those that stay as in the checkpoint
    4. both
    """
    dtype = config.dtype or default_dtype(machine.platform, bfloat16=machine.bfloat16)
    quantize = quantization(config)
    formats = Formats(dtype=dtype, quantize=quantize, kv_dtype=config.kv_dtype or dtype)
    options = [_with_kept(formats, config, machine, model, stored)]
    if machine.platform == "cpu" and config.dtype is None:
        options.append(replace(options[0], dtype="bfloat16", kv_dtype=config.kv_dtype or "bfloat16"))
    narrow_cache = (
        machine.platform in ("tpu", "gpu")
        and config.kv_dtype is None
        and config.num_blocks is None  # blocks of an 8-bit cache have another size
        and config.attention is None
        and model.mla is None
    )
    wide = options[-1]
    if narrow_cache:
        options.append(replace(wide, kv_dtype="int8"))
    if config.quantize is None:
        narrow = replace(wide, quantize="int8", kept=wide.kept if wide.choice.kept else ())
        sizes = [_weight_bytes(formats, config, model, machine) for formats in (wide, narrow)]
        if sizes[1] < sizes[0]:
            options.append(narrow)
            if narrow_cache:
                options.append(replace(narrow, kv_dtype="int8"))
    return options


def _with_kept(formats: Formats, config: EngineConfig, machine: Machine, model: ModelConfig, stored: Stored) -> Formats:
    """`formats` with the weights that stay in the bits of the checkpoint."""
    packs = machine.packs and config.tensor_parallel is None
    if packs and config.quantize is None:
        return replace(formats, kept=tuple((path, kind.bits) for path, kind in stored if isinstance(kind, BlockKind)))
    no_kernel = machine.platform == "cpu" and machine.int4 is None
    if packs or config.quantize not in (None, "int4") or (no_kernel and config.quantize is None):
        return formats
    choice = choose_forms(
        stored,
        model,
        kernel=machine.int4,
        platform=machine.platform,
        activations=wide_enough(formats.dtype, exceeds_float16=model.exceeds_float16),
        num_devices=config.tensor_parallel or 1,
        float8=machine.float8,
        requested=config.quantize == "int4",
    )
    return replace(formats, kept=tuple((path, form.bits) for path, form in choice.kept), choice=choice)


def tokens_that_fit(
    formats: Formats, config: EngineConfig, model: ModelConfig, machine: Machine, *, share: _Share = "usual"
) -> int:
    """Tokens of KV cache that fit with the weights in these formats, at most those that all sequences can use."""
    divided = config.tensor_parallel or 1
    memory, limit = machine.memory, config.max_context_len or model.max_context_len
    weights = _weight_bytes(formats, config, model, machine)
    if memory.is_host and weights + _loading_bytes(formats, model) > HOST_WEIGHTS[share] * memory.limit:
        return 0
    groups = _groups(formats, config, model, machine)
    block = _block_bytes(groups, formats, config, model, machine)
    held = weights + _excess_bytes(formats, config, model, machine) + _state_bytes(config, model, machine)
    sharing = 1 if machine.platform == "cpu" else divided
    if config.num_blocks is not None:  # the cache has this size, so the question is whether it fits
        room = HOST_WEIGHTS[share] * memory.free(held) if memory.is_host else getattr(memory.room(held), share)
        return groups.capacity(config.num_blocks, limit) if config.num_blocks * block <= sharing * room else 0
    num_blocks = max(sharing * getattr(memory.room(held), share), 0) // block
    return groups.capacity(min(num_blocks, blocks_of_sequences(groups, config.max_num_seqs, limit)), limit)


def _groups(formats: Formats, config: EngineConfig, model: ModelConfig, machine: Machine) -> BlockGroups:
    return BlockGroups(
        windows=choose_groups(
            divided(model, config.tensor_parallel or 1), config.max_context_len or model.max_context_len
        ).windows,
        block_size=config.block_size or default_block_size(machine.platform, formats.kv_dtype),
        token_budget=largest_budget(config),
    )


def _block_bytes(groups: BlockGroups, formats: Formats, config: EngineConfig, model: ModelConfig, machine: Machine) -> int:
    return footprint.block_bytes(
        model,
        machine.platform,
        kv_dtype=formats.kv_dtype,
        block_size=groups.block_size,
        num_groups=groups.num_groups,
        num_devices=config.tensor_parallel or 1,
    )


def _first(
    options: Sequence[Formats], config: EngineConfig, model: ModelConfig, machine: Machine, share: _Share
) -> int | None:
    """The first option in which a usable context fits, else the last one if some context does; None if nothing fits."""
    tokens = [tokens_that_fit(formats, config, model, machine, share=share) for formats in options]
    usable, least = (_needed(config, model, tokens) for tokens in (USABLE_CONTEXT, LEAST_CONTEXT))
    enough = [i for i, fitting in enumerate(tokens) if fitting >= usable]
    if enough:
        return enough[0]
    return len(options) - 1 if tokens[-1] >= least else None


def _needed(config: EngineConfig, model: ModelConfig, tokens: int) -> int:
    """`tokens`, or fewer if no sequence, or the cache that the operator chose, has so many."""
    limit = min(tokens, config.max_context_len or model.max_context_len)
    return limit if config.num_blocks is None else 1


def _weight_bytes(formats: Formats, config: EngineConfig, model: ModelConfig, machine: Machine) -> int:
    itemsize = jnp.dtype(formats.dtype).itemsize
    packed = machine.packs and config.tensor_parallel is None
    if packed and formats.dtype == "float16":
        itemsize = 4  # packed matrices are bfloat16 or float32
    divided = config.tensor_parallel or 1
    weights = footprint.weight_bytes(
        model, divided, itemsize, quantize=formats.quantize, packed=packed, kept=formats.kept, platform=machine.platform
    )
    weights += footprint.adapter_bytes(model, config.num_adapters, config.max_adapter_rank, formats.dtype)
    return weights * divided if machine.platform == "cpu" else weights  # CPU devices share the memory of one host


def _loading_bytes(formats: Formats, model: ModelConfig) -> int:
    return WEIGHTS_AHEAD * footprint.largest_weight(model, jnp.dtype(formats.dtype).itemsize, kept=formats.kept)


def _excess_bytes(formats: Formats, config: EngineConfig, model: ModelConfig, machine: Machine) -> int:
    """What temporaries and sampler tables take of an accelerator beyond the share that is always left to them."""
    if machine.memory.is_host:
        return 0
    rest = footprint.sampler_bytes(model, config.max_num_seqs) + footprint.temporary_bytes(
        model,
        config.tensor_parallel or 1,
        token_budget=config.token_budget or USUAL_BUDGET,
        max_num_seqs=config.max_num_seqs,
        itemsize=jnp.dtype(formats.dtype).itemsize,
    )
    return max(0, rest - int(DEVICE_REST * machine.memory.limit))


def _state_bytes(config: EngineConfig, model: ModelConfig, machine: Machine) -> int:
    return footprint.state_bytes(model, machine.platform, config.max_num_seqs)


def _names(formats: Formats) -> list[str | None]:
    return [formats.dtype, formats.quantize, formats.kv_dtype]


def _reason(formats: Formats, config: EngineConfig, model: ModelConfig, machine: Machine) -> str:
    """Why these formats do not fit."""
    weights = footprint.size(_weight_bytes(formats, config, model, machine))
    needed = f"smaller formats because {formats.of_weights} weights of {weights} leave too little of {_memory(machine)}"
    if config.num_blocks is not None:
        return f"{needed} for {config.num_blocks} KV blocks"
    tokens = _needed(config, model, USABLE_CONTEXT)
    groups = _groups(formats, config, model, machine)
    cache = groups.blocks_needed(tokens) * _block_bytes(groups, formats, config, model, machine)
    return f"{needed} for {tokens:,} tokens of {formats.kv_dtype} KV cache ({footprint.size(cache)})"


def _memory(machine: Machine) -> str:
    memory = machine.memory
    if memory.is_host:
        return f"the {footprint.size(memory.limit)} that are free"
    return f"the {footprint.size(memory.free())} that are free on {machine.kind}"


def _refusal(options: Sequence[Formats], config: EngineConfig, model: ModelConfig, machine: Machine) -> str:
    smallest, memory = options[-1], machine.memory
    weights = _weight_bytes(smallest, config, model, machine)
    states = _state_bytes(config, model, machine)
    groups = _groups(smallest, config, model, machine)
    cache_tokens = _needed(config, model, LEAST_CONTEXT)
    num_blocks = groups.blocks_needed(cache_tokens)
    if config.num_blocks is not None:
        num_blocks = config.num_blocks
        cache_tokens = groups.capacity(num_blocks, config.max_context_len or model.max_context_len)
    cache = num_blocks * _block_bytes(groups, smallest, config, model, machine)
    if machine.platform != "cpu":
        cache //= config.tensor_parallel or 1
    if memory.is_host:
        needed, usable = weights + _loading_bytes(smallest, model) + cache + states, int(HOST_WEIGHTS["most"] * memory.limit)
    else:
        needed = weights + cache + states + _excess_bytes(smallest, config, model, machine)
        usable = memory.room().most
    return (
        f"the model does not fit: {smallest.of_weights} weights take {footprint.size(weights)} and "
        f"{cache_tokens:,} tokens of {smallest.kv_dtype} KV cache {footprint.size(cache)}, together "
        f"{footprint.size(needed)} with what else is needed, but of {_memory(machine)} "
        f"{footprint.size(max(usable, 0))} can be used; " + ", ".join(_remedies(needed, config, model, machine))
    )


def _remedies(needed: int, config: EngineConfig, model: ModelConfig, machine: Machine) -> list[str]:
    chosen = [
        f"omit {name}={getattr(config, name)}"
        for name in ("dtype", "kv_dtype", "num_blocks", "token_budget")
        if getattr(config, name) is not None
    ]
    remedies = [*chosen, "free memory", "choose a smaller model"]
    divided = config.tensor_parallel or 1
    for more in (2, 4, 8, 16, 32, 64):
        if more > divided and not machine.memory.is_host and more <= model.num_heads:
            wider = replace(config, tensor_parallel=more)
            if _first(candidates(wider, machine, model), wider, model, machine, "usual") is not None:
                have = f" (this machine has {machine.num_devices})" if machine.num_devices < more else ""
                remedies.insert(len(chosen), f"tensor_parallel={more} with {more} such devices{have}")
                break
    if machine.platform == "gpu":
        remedies.append("give JAX more than its 75 % of the GPU with XLA_PYTHON_CLIENT_MEM_FRACTION=0.9")
    return remedies
