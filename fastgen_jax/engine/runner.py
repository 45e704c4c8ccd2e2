"""The compiled programs and their device memory."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from fastgen_jax.core import KVCache, copy_block, stored_head_dim
from fastgen_jax.engine.config import ResolvedConfig
from fastgen_jax.engine.huge_pages import use_huge_pages
from fastgen_jax.engine.packing import Bucket
from fastgen_jax.engine.sampling.processor import LogitsProcessor, LogitsRows
from fastgen_jax.engine.sampling.sampler import MAX_LOGPROBS, SampleOutput, sample
from fastgen_jax.engine.sampling.state import SamplerState, init_state, reset_slot, set_masks
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.decoder import Execution, head, hidden_rows
from fastgen_jax.models.sharding import TENSOR, partition_kv_cache, shardings, tensor_mesh
from fastgen_jax.models.weight_spec import Params
from pallas_kernels.pytree import pytree

# By device kind. On TPU7x the compiler prefers tiles of 16 x 128 16-bit numbers to the 8 x 128 in which arrays arrive,
# and would copy every stack of weights in every step; the products take the same time with either. On a CPU it would
# compute each sum over the vocabulary as a tree of four kernels, after one that writes all summands to memory: sampling
# would take up to twice the time, and its compilation a third more.
_COMPILER_OPTIONS: dict[str, dict[str, bool | str]] = {
    "TPU7x": {"xla_tpu_control_large_2nd_minor_layout_for_x16": False},
    "cpu": {"xla_disable_hlo_passes": "tree_reduction_rewriter"},
}


@pytree
class StepOutput:
    """The results of a step on the device, one entry per sampled row."""

    sampled: SampleOutput
    logits: jax.Array
    """f32[R, V]: raw logits; only the research interface reads them."""
    hidden: jax.Array
    """[R, E]: the inputs of the head, in the dtype of the activations; also only for the research interface."""


class Runner:
    """Runs steps: one program per bucket, compiled ahead of time; owns the KV cache and the sampler's state."""

    def __init__(self, params: Params, model: ModelConfig, config: ResolvedConfig) -> None:
        self.params = params
        self.model = model
        self.config = config
        self._compiled: dict[int, tuple[Bucket, jax.stages.Compiled]] = {}
        self._copy_block: jax.stages.Wrapped | None = None  # compiled by the first fork
        self.mesh = tensor_mesh(jax.local_devices()[: config.tensor_parallel]) if config.tensor_parallel else None
        self._made: list[weakref.ref[jax.Array]] = []
        use_huge_pages(params)
        self._allocate()

    def reset(self, *, keep: bool = False) -> None:
        """Empties the cache and the sampler's state, for an engine that starts over.

        With `keep` they stay as they are, unless they are lost because an exception came between passing them to a
        program and storing the results.
        """
        if keep and not self.memory_is_lost:
            return
        _delete(jax.tree.leaves((self.kv_cache, self.state)))  # before allocating: there may be no room for two
        self._allocate()

    def own_params(self) -> None:
        """Makes this runner the owner of its current weights: `destroy` deletes them."""
        self._made = [weakref.ref(leaf) for leaf in jax.tree.leaves(self.params) if isinstance(leaf, jax.Array)]

    def destroy(self) -> None:
        """Frees the device memory immediately, even if something still refers to it, such as a traceback in a notebook."""
        self._compiled = {}
        made = [array for ref in self._made if (array := ref()) is not None]
        _delete([*jax.tree.leaves((self.kv_cache, self.state)), *made])
        self.params = {}

    def _allocate(self) -> None:
        model, config = self.model, self.config

        def zeros() -> tuple[KVCache, SamplerState]:
            cache = KVCache.zeros(
                num_layers=model.num_layers,
                num_blocks=config.num_blocks,
                num_kv_heads=model.num_kv_heads,
                block_size=config.block_size,
                dtype=jnp.dtype(config.kv_dtype),
                head_dim=stored_head_dim(model.head_dim, jax.default_backend()),
            )
            return cache, init_state(config.max_num_seqs, model.vocab_size)

        self.kv_cache: KVCache
        self.state: SamplerState
        if self.mesh is None:
            self.kv_cache, self.state = zeros()
        else:  # each device allocates its own shard: the whole may not fit on any device
            self.kv_cache, self.state = jax.jit(zeros, out_shardings=memory_shardings(self.mesh, *jax.eval_shape(zeros)))()

    @property
    def budgets(self) -> tuple[int, ...]:
        """Token budgets of the compiled programs, smallest first."""
        return tuple(sorted(self._compiled))

    def bucket(self, num_tokens: int) -> Bucket:
        """The smallest compiled shape for `num_tokens`."""
        for budget in self.budgets:
            if budget >= num_tokens:
                return self._compiled[budget][0]
        raise ValueError(f"a step of {num_tokens} tokens exceeds the largest compiled budget {max(self.budgets)}")

    def compile(self, budgets: Sequence[int], *, on_done: Callable[[int], object] = lambda budget: None) -> None:
        """Compiles a program for each budget that has none yet; calls `on_done(budget)` after each."""
        for budget in budgets:
            if budget not in self._compiled:
                bucket = self._new_bucket(budget)
                program = self.lower(bucket).compile()
                self._compiled[budget] = (bucket, program)
            on_done(budget)

    def lower(self, bucket: Bucket) -> jax.stages.Lowered:
        """The lowered step program of `bucket` for the current device."""
        packed = jax.ShapeDtypeStruct((bucket.layout.size,), jnp.int32)
        program = step_program(
            self.model,
            bucket,
            attention=self.config.choices.attention,
            activation_dtype=self.config.activation_dtype,
            mesh=self.mesh,
            logits_processor=self.config.choices.logits_processor,
        )
        return program.lower(self.params, self.kv_cache, self.state, packed)

    def keep_only(self, budgets: Sequence[int]) -> None:
        """Drops the programs of all other budgets."""
        self._compiled = {budget: self._compiled[budget] for budget in budgets}

    def run(self, packed: np.ndarray, bucket: Bucket) -> StepOutput:
        """Dispatches a step and returns immediately; reading the output waits for it."""
        program = self._compiled[bucket.num_tokens][1]
        output, self.kv_cache, self.state = program(self.params, self.kv_cache, self.state, packed)
        return output

    @property
    def memory_is_lost(self) -> bool:
        """Whether a step took the KV cache or the sampler's state and its results were lost, so that a `reset` is needed."""
        return any(leaf.is_deleted() for leaf in jax.tree.leaves((self.kv_cache, self.state)))

    def replace_params(self, params: Params) -> None:
        """Computes with `params` from the next step on; they must have the shapes and dtypes that the programs expect."""
        use_huge_pages(params)
        self.params = params

    def copy_block(self, source: int, target: int) -> None:
        """Copies KV block `source` to block `target` in all layers. One small program serves all blocks."""
        if self._copy_block is None:
            placed = None if self.mesh is None else jax.tree.map(lambda leaf: leaf.sharding, self.kv_cache)
            copy = partial(copy_block, num_blocks=self.config.num_blocks)
            self._copy_block = jax.jit(copy, donate_argnums=0, out_shardings=placed)
        self.kv_cache = self._copy_block(self.kv_cache, np.int32(source), np.int32(target))

    def reset_slot(self, slot: int, **tables: Any) -> None:
        """Sets the token history for penalties and the logit bias of a slot; see `sampling.state.reset_slot`."""
        self.state = reset_slot(self.state, slot, **tables)

    def set_masks(self, slots: Sequence[int], masks: np.ndarray) -> None:
        """Limits the next tokens of some slots to those in their masks i32[n, ceil(V / 32)]."""
        self.state = set_masks(self.state, slots, masks)

    def warm_up(self) -> None:
        """Runs every program once, so that no first call delays the first request."""
        for bucket, _ in self._compiled.values():
            jax.block_until_ready(self.run(bucket.new_buffer()[0], bucket))
        self.reset_slot(0, prompt_ids=(), output_ids=(), logit_bias=())
        self.set_masks([0], np.zeros((1, -(-self.model.vocab_size // 32)), np.int32))

    def measure(self, budget: int, *, num_tokens: int | None = None, repeats: int = 5, at_least: float = 0.4) -> float:
        """Seconds of a step of `num_tokens` (default: all) in the program of `budget`.

        The step is one prompt chunk at the start of its sequence. The result is the minimum of `repeats` runs, or of
        more if these take less than `at_least` seconds, because other load on the machine can only add to it. Overwrites
        the first blocks of the cache.
        """
        bucket, _ = self._compiled[budget]
        used = budget if num_tokens is None else num_tokens
        times: list[float] = []
        while len(times) <= repeats or sum(times[1:]) < at_least:  # the first run pays for page faults
            buffer, views = bucket.new_buffer()
            views["query_starts"][1:] = used
            views["context_lens"][0] = used
            blocks = -(-used // self.config.block_size)
            views["block_tables"][0, :blocks] = np.arange(blocks)
            views["positions"][:used] = views["kv_slots"][:used] = np.arange(used)
            views["sample_rows"][0] = used - 1
            views["num_sample_rows"][...] = 1
            start = time.perf_counter()
            jax.block_until_ready(self.run(buffer, bucket))
            times.append(time.perf_counter() - start)
        return min(times[1:])

    def _new_bucket(self, budget: int) -> Bucket:
        config = self.config
        return Bucket(
            budget,
            max_num_seqs=config.max_num_seqs,
            max_blocks=config.max_blocks,
            num_slots=config.num_blocks * config.block_size,
            vocab_size=self.model.vocab_size,
        )


def _delete(arrays: Sequence[jax.Array]) -> None:
    for array in arrays:
        array.delete()  # no effect if it was deleted before


def step_program(
    model: ModelConfig,
    bucket: Bucket,
    *,
    attention: str | None = None,
    activation_dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    logits_processor: LogitsProcessor | None = None,
) -> jax.stages.Wrapped:
    """The jitted step: (params, kv_cache, state, packed i32) -> (StepOutput, kv_cache, state), the middle two donated.

    `attention` names an implementation of `ragged_attention`; `activation_dtype` is that of `forward`. With `mesh`,
    weights and cache are sharded over it as in `models.sharding`; everything else, including results, is replicated.
    """
    step = partial(
        _step,
        bucket=bucket,
        config=model,
        attention=attention,
        activation_dtype=activation_dtype,
        mesh=mesh,
        logits_processor=logits_processor,
    )
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    jit = partial(jax.jit, donate_argnums=(1, 2), compiler_options=_COMPILER_OPTIONS.get(device.device_kind))
    if mesh is None:
        return jit(step)
    whole = NamedSharding(mesh, PartitionSpec())
    cache = NamedSharding(mesh, PartitionSpec(None, TENSOR))
    return jit(step, out_shardings=(whole, cache, whole))


def memory_shardings(mesh: Mesh, cache: KVCache, state: SamplerState) -> tuple[KVCache, SamplerState]:
    """Shardings of the KV cache and the sampler's state, arrays or shapes, on the devices of `mesh`."""
    whole = NamedSharding(mesh, PartitionSpec())
    return shardings(mesh, partition_kv_cache(cache)), jax.tree.map(lambda _: whole, state)


def _step(
    params: Params,
    kv_cache: KVCache,
    state: SamplerState,
    packed: jax.Array,
    *,
    bucket: Bucket,
    config: ModelConfig,
    attention: str | None,
    activation_dtype: DTypeLike | None,
    mesh: Mesh | None,
    logits_processor: LogitsProcessor | None,
) -> tuple[StepOutput, KVCache, SamplerState]:
    batch, sampling = bucket.unpack(packed)
    last_tokens = jnp.take(state.last_tokens, batch.token_slots, mode="clip")
    on_device = batch.token_slots < state.last_tokens.shape[0]
    batch = replace(batch, token_ids=jnp.where(on_device, last_tokens, batch.token_ids))
    hidden, kv_cache = hidden_rows(
        params,
        kv_cache,
        batch,
        config=config,
        execution=Execution(attention=attention, activation_dtype=activation_dtype, mesh=mesh),
    )
    logits = head(hidden, params, batch.num_sample_rows, config=config)
    if mesh is not None:  # every device samples all rows; sharded sampling would need a hundred small collectives
        logits = jax.lax.with_sharding_constraint(logits, NamedSharding(mesh, PartitionSpec()))
    process = None
    if logits_processor is not None:
        last_tokens = jnp.take(batch.token_ids, batch.sample_rows)
        rows = LogitsRows(positions=sampling.positions, last_tokens=last_tokens, seeds=sampling.seeds)
        process = lambda logits: logits_processor(logits, rows)  # noqa: E731
    sampled, state = sample(logits, state, sampling, max_logprobs=MAX_LOGPROBS, process=process)
    return StepOutput(sampled=sampled, logits=logits, hidden=hidden), kv_cache, state
