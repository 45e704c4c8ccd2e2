"""The settings of a running engine: the operator's choices, and values for what they leave open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import get_args

import jax

from fastgen_jax.engine import determinism, footprint, generation
from fastgen_jax.engine.config import (
    DType,
    EngineConfig,
    KVDType,
    Quantization,
    default_block_size,
    formats_of,
    shown,
    wide_enough,
)
from fastgen_jax.engine.kept_forms import Form
from fastgen_jax.engine.machine import Machine
from fastgen_jax.engine.sampling.processor import check_processor
from fastgen_jax.models.cache_groups import choose_groups
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.division import check_num_devices, divided
from fastgen_jax.models.sparse import check_kv_dtype
from fastgen_jax.models.vision.config import ImagesConfig
from fastgen_jax.scheduling import BlockGroups
from fastgen_jax.scheduling.fixed_chunks import fixed_chunk_size
from pallas_kernels import native
from pallas_kernels.jax_versions import COMMAND_BUFFERS, HOPPER_PRODUCT, too_old

BUDGETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # smaller steps for a token budget without a ladder
NATIVE_BUDGETS = (16, 64)  # the same where native kernels skip padding: few programs serve all sizes
MEASURED_BUDGETS = (1, 4, 16, 64, 128, 256, 512)  # the sizes among which a model or a measurement chooses


@dataclass(frozen=True, kw_only=True, repr=False)
class ResolvedConfig:
    """The settings of a running engine: a value for every field that `EngineConfig` may leave open.

    Fields with the same name as in `EngineConfig` have the same meaning.
    """

    choices: EngineConfig
    """The operator's config. Settings that need no resolving are read from here."""
    dtype: DType
    quantize: Quantization | None
    kv_dtype: KVDType
    block_size: int
    max_context_len: int
    num_blocks: int
    windows: tuple[int | None, ...]
    """The sliding window of each cache group of the model's layers; None: without one. See `models.cache_groups`."""
    stack_layers: bool
    activation_dtype: DType
    """Data type of the residual stream: float32 with the native CPU kernels, which return it, and in float16 for a model
    whose activations exceed its range; otherwise `dtype`."""
    prefix_caching: bool
    budget_ladder: tuple[int, ...]
    """Step sizes in tokens, smallest first; the last is the token budget. Only candidates until some are chosen."""
    fixed_chunks: bool
    """Whether chunks have a `chunk_size`; see `determinism`."""
    generation_config: generation.Pairs
    fitted: str
    """What `fit` chose and why, in one line; empty without it."""

    def __repr__(self) -> str:
        resolved = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "choices"}
        return shown(
            self,
            {**resolved, **{k: v for k, v in self.choices.changed.items() if k not in (*resolved, "formats", "vision")}},
        )

    @property
    def token_budget(self) -> int:
        """Maximum number of tokens per step."""
        return self.budget_ladder[-1]

    @property
    def chunk_size(self) -> int | None:
        """Tokens of a prompt that one step computes, if that does not depend on other requests."""
        if not self.fixed_chunks:
            return None
        return fixed_chunk_size(self.token_budget, max_num_seqs=self.max_num_seqs, block_size=self.block_size)

    @property
    def max_num_seqs(self) -> int:
        """Maximum number of sequences that run at the same time."""
        return self.choices.max_num_seqs

    @property
    def images(self) -> ImagesConfig | None:
        """How images are read; None if they are refused."""
        return self.choices.vision

    @property
    def has_grids(self) -> bool:
        """Whether tokens of images have a row and a column, so that all steps have three streams of positions."""
        return self.images is not None and self.images.in_grid

    @property
    def tensor_parallel(self) -> int | None:
        """Number of devices over which the model is sharded; None: one device, no sharding."""
        return self.choices.tensor_parallel

    @property
    def num_adapters(self) -> int:
        """Places for adapters in every step."""
        return self.choices.num_adapters

    @property
    def max_adapter_rank(self) -> int:
        """Largest rank of an adapter, and the rank of all places."""
        return self.choices.max_adapter_rank

    @property
    def packed_weights(self) -> bool:
        """Whether matrices are packed for the native CPU kernels."""
        return _packs_weights(self.choices)

    @property
    def cuda_graphs(self) -> bool:
        """Whether a step on a GPU is one CUDA graph."""
        return self.choices.cuda_graphs is not False

    @property
    def keeps_blocks(self) -> bool:
        """Whether matrices that a checkpoint holds in blocks of 4 or 8 bits stay in them."""
        return self.choices.quantize is None and self.quantize is None and self.packed_weights

    @property
    def kept_forms(self) -> Mapping[str, Form]:
        """The form of each weight, by path, whose numbers are those of the checkpoint, on an accelerator."""
        return dict(self.choices.formats.choice.kept) if self.choices.formats is not None else {}

    @property
    def kept(self) -> tuple[tuple[str, float], ...]:
        """The weights, by path, that stay in the blocks of the checkpoint, with their bits per value."""
        return self.choices.formats.kept if self.choices.formats is not None else ()

    @property
    def longest_sequence(self) -> int:
        """Tokens that a sequence can actually have: the context limit, or the whole KV cache if that holds less."""
        return self.groups.longest(self.num_blocks, self.max_context_len)

    @property
    def groups(self) -> BlockGroups:
        """How many blocks a sequence holds."""
        return BlockGroups(windows=self.windows, block_size=self.block_size, token_budget=self.token_budget)

    @property
    def cache_tokens(self) -> int:
        """Tokens that the KV cache holds, in sequences of `max_context_len` tokens if the layers have different windows."""
        return self.groups.capacity(self.num_blocks, self.max_context_len)

    @property
    def max_blocks(self) -> int:
        """KV blocks of a sequence as long as the context limit."""
        return -(-self.max_context_len // self.block_size)

    @property
    def max_sample_rows(self) -> int:
        """Rows of logits that the largest program returns."""
        return min(self.token_budget, self.max_num_seqs)


def resolve(
    config: EngineConfig,
    model: ModelConfig,
    *,
    earlier_blocks: int | None = None,
    machine: Machine | None = None,
    weights: int = 0,
) -> ResolvedConfig:
    """Returns `config` with a value for every open field, chosen for this model and device.

    Without a token budget, `budget_ladder` contains the candidates among which to choose. `earlier_blocks` is the
    `num_blocks` of an earlier start; it is kept if it suits the memory that is free now. `machine` is another one, on
    each of whose devices `weights` bytes of weights are still to be loaded. Raises ValueError if the choices are
    incompatible with the model or the free memory.
    """
    is_here = machine is None
    machine = Machine.here() if machine is None else machine
    platform, packs = machine.platform, machine.packs and config.tensor_parallel is None
    if config.logits_processor is not None:
        check_processor(config.logits_processor, model.vocab_size)
    if config.quantize in get_args(Quantization) and platform not in ("cpu", "tpu", "gpu"):
        raise ValueError(f"quantize={config.quantize!r} is not supported on {platform}")
    if config.quantize == "fp8" and not machine.float8:
        raise ValueError(
            f"quantize='fp8' needs an H100 or H200 and jax {'.'.join(map(str, HOPPER_PRODUCT))} or newer, or a TPU7x, but "
            f"this is {machine.kind} and jax {jax.__version__}; use quantize='int8'"
        )
    if config.quantize == "w8a8" and not machine.int8:
        raise ValueError(
            f"quantize='w8a8' needs a TPU v5e or v6e, which multiply int8 by int8, but this is {machine.kind}; use "
            "quantize='int8', whose activations are not rounded"
        )
    if config.cuda_graphs is not None and platform != "gpu":
        raise ValueError(f"cuda_graphs={config.cuda_graphs}, but this is {platform}; omit it, it is for GPUs")
    if config.cuda_graphs is not None and (reason := too_old(COMMAND_BUFFERS)):
        raise ValueError(f"cuda_graphs={config.cuda_graphs} {reason}, or omit it")
    dtype, quantize, kv_dtype = formats_of(config, platform)
    num_devices = config.tensor_parallel or 1
    if config.tensor_parallel is not None:
        if is_here:
            _check_devices(config.tensor_parallel, platform)
        _check_tensor_parallel(config, model, config.tensor_parallel)
    if config.max_context_len is not None and config.max_context_len > model.max_context_len:
        raise ValueError(
            f"max_context_len={config.max_context_len} exceeds the model's {model.max_context_len}; choose at most that"
        )
    max_context_len = config.max_context_len or model.max_context_len
    block_size = config.block_size or default_block_size(platform, kv_dtype)
    fixed_chunks = determinism.has_fixed_chunks(config, packs=packs, kv_dtype=kv_dtype)
    if fixed_chunks:
        determinism.check(config, model, block_size=block_size)
    windows = choose_groups(divided(model, num_devices), max_context_len).windows
    groups = BlockGroups(windows=windows, block_size=block_size, token_budget=largest_budget(config))
    bytes_per_block = footprint.block_bytes(
        model, platform, kv_dtype=kv_dtype, block_size=block_size, num_groups=len(windows), num_devices=num_devices
    )
    num_blocks = config.num_blocks
    if num_blocks is None:
        num_blocks = machine.memory.room(
            weights
            + footprint.adapter_bytes(model, config.num_adapters, config.max_adapter_rank, dtype)
            + footprint.state_bytes(model, platform, config.max_num_seqs)
        ).num_blocks(
            bytes_per_block,
            wanted=blocks_of_sequences(groups, config.max_num_seqs, max_context_len),
            earlier=earlier_blocks,
            share=1 if platform == "cpu" else num_devices,  # CPU devices share the memory of one host
        )
        if num_blocks < 1:
            if weights:
                raise ValueError(
                    f"no memory for a single KV block: the weights take {footprint.size(weights)} of each device, which has "
                    f"{footprint.size(machine.memory.limit)}; choose a larger tensor_parallel than {num_devices}, or "
                    "quantize='int8'"
                )
            raise ValueError(
                f"no memory for a single KV block of {bytes_per_block / 2**20:.1f} MiB; free memory, choose a smaller "
                f"block_size than {block_size}, or a smaller kv_dtype than {kv_dtype}"
            )
        if config.fit and config.max_context_len is None:
            max_context_len = max(groups.longest(num_blocks, max_context_len), 2)  # a prompt and a generated token
    check_kv_dtype(kv_dtype, model, -(-max_context_len // block_size) * block_size)
    # A key rotated for a prompt of one length is wrong for a longer prompt with the same prefix.
    # A state is not kept for the end of each block, only for the last token.
    prefix_caching = config.prefix_caching and not model.rope_depends_on_length and model.state is None
    stack_layers = config.stack_layers
    if stack_layers is None:
        stack_layers = platform != "cpu" or config.tensor_parallel is not None or packs
    return ResolvedConfig(
        choices=config,
        dtype=dtype,
        quantize=quantize,
        kv_dtype=kv_dtype,
        block_size=block_size,
        max_context_len=max_context_len,
        num_blocks=num_blocks,
        windows=windows,
        stack_layers=stack_layers,
        activation_dtype="float32" if packs else wide_enough(dtype, exceeds_float16=model.exceeds_float16),
        prefix_caching=prefix_caching,
        budget_ladder=_step_sizes(
            config,
            longest=min(max_context_len, num_blocks // len(windows) * block_size),
            padding_is_cheap=packs,
            fixed_chunks=fixed_chunks,
            block_size=block_size,
        ),
        fixed_chunks=fixed_chunks,
        generation_config=config.generation_config if isinstance(config.generation_config, tuple) else (),
        fitted=_fitted(
            config,
            model,
            f"{config.formats.of_weights if config.formats else quantize or dtype} weights, "
            f"{footprint.size(num_blocks * bytes_per_block)} of {kv_dtype} KV cache",
            cache_tokens=groups.capacity(num_blocks, max_context_len),
            longest=groups.longest(num_blocks, max_context_len),
        ),
    )


def largest_budget(config: EngineConfig) -> int:
    """Tokens of the largest step that the engine may have; before a choice, of the largest candidate."""
    return config.token_budget or MEASURED_BUDGETS[-1]


def blocks_of_sequences(groups: BlockGroups, count: int, num_tokens: int) -> int:
    """KV blocks that `count` sequences of `num_tokens` tokens use at the same time, one of them still a prompt."""
    return groups.blocks_needed(num_tokens) + (count - 1) * groups.blocks_held(num_tokens)


def _fitted(config: EngineConfig, model: ModelConfig, formats: str, *, cache_tokens: int, longest: int) -> str:
    """What was chosen to fit the memory, and why, in one line; empty without `fit`."""
    if not config.fit:
        return ""
    wanted = config.max_context_len or model.max_context_len
    line = f"{formats} for {cache_tokens:,} tokens, context {longest:,}"
    if longest < wanted:
        line += f" of {wanted:,} tokens because no more fit"
    return f"{line}; {config.formats.why}" if config.formats is not None and config.formats.why else line


def _packs_weights(config: EngineConfig) -> bool:
    """A weight that is divided over CPU devices stays a plain array."""
    return jax.default_backend() == "cpu" and config.tensor_parallel is None and native.available()


def _step_sizes(
    config: EngineConfig, *, longest: int, padding_is_cheap: bool, fixed_chunks: bool, block_size: int
) -> tuple[int, ...]:
    if fixed_chunks:  # one size, of which none is measured
        if config.token_budget is not None:
            return (config.token_budget,)
        sizes = {"max_num_seqs": config.max_num_seqs, "block_size": block_size}
        return determinism.candidates(MEASURED_BUDGETS, **sizes, images=config.vision)
    if config.token_budget is None:  # a step that is measured is one sequence, so it must fit in the cache
        return tuple(budget for budget in MEASURED_BUDGETS if budget <= longest)
    smaller = config.budget_ladder
    if smaller is None:
        smaller = tuple(b for b in (NATIVE_BUDGETS if padding_is_cheap else BUDGETS) if b < config.token_budget)
    return tuple(sorted({*smaller, config.token_budget}))


def _check_devices(num_devices: int, platform: str) -> None:
    """ValueError if this process has fewer devices."""
    here = len(jax.local_devices())
    if here < num_devices:
        remedy = f"; XLA_FLAGS=--xla_force_host_platform_device_count={num_devices} splits a CPU into that many"
        raise ValueError(
            f"tensor_parallel={num_devices} but this process has {here} {platform} device(s); "
            f"choose 1 to {here}" + (remedy if platform == "cpu" else "")
        )


def _check_tensor_parallel(config: EngineConfig, model: ModelConfig, num_devices: int) -> None:
    """ValueError if the model or another choice is incompatible with so many devices."""
    if config.stack_layers is False:
        raise ValueError(f"tensor_parallel={num_devices} with stack_layers=False is not supported; omit stack_layers")
    check_num_devices(model, num_devices)
