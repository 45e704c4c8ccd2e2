"""The step programs: what they compute, and how they are compiled, without the memory that they run on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from fastgen_jax.core import KVCache, StepImages
from fastgen_jax.engine import executables
from fastgen_jax.engine.adapter_stacks import Stacks
from fastgen_jax.engine.packing import Bucket
from fastgen_jax.engine.resolve import ResolvedConfig
from fastgen_jax.engine.sampling.processor import LogitsProcessor, LogitsRows
from fastgen_jax.engine.sampling.sampler import MAX_LOGPROBS, SampleOutput, Work, sample
from fastgen_jax.engine.sampling.state import SamplerState, init_state
from fastgen_jax.engine.sampling.tables import SamplingBatch
from fastgen_jax.engine.xla_options import step_options
from fastgen_jax.models.cache import empty_cache
from fastgen_jax.models.cache_groups import cache_groups
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.decoder import Execution, head, hidden_rows
from fastgen_jax.models.division import divided
from fastgen_jax.models.params import head_spec
from fastgen_jax.models.sharding import TENSOR, in_place, partition_kv_cache, partition_states, shardings
from fastgen_jax.models.states import state_shapes
from fastgen_jax.models.weight_spec import Params
from fastgen_jax.version import VERSION
from pallas_kernels.folders import Folder
from pallas_kernels.matmul import Int4Weight, Int8Weight, ScaledWeight, inputs_last
from pallas_kernels.pytree import pytree

FOLDER = "executables"  # within the cache folder


@pytree
class StepOutput:
    """The results of a step on the device, one entry per sampled row."""

    sampled: SampleOutput
    logits: jax.Array
    """f32[R, V]: raw logits; only the research interface reads them."""
    hidden: jax.Array
    """[R, E]: the inputs of the head, in the dtype of the activations; also only for the research interface."""
    last_tokens: jax.Array | None
    """i32[R]: the token before the one that each row predicts; None without a logits processor."""


class Program(NamedTuple):
    """A compiled step."""

    bucket: Bucket
    run: jax.stages.Compiled
    work: Work = "any"


@dataclass(frozen=True, kw_only=True)
class Programs:
    """Everything that determines the step programs of an engine. Holds shapes, not arrays: any thread may compile."""

    model: ModelConfig
    config: ResolvedConfig
    mesh: Mesh | None
    params: Any
    """The weights as a pytree of `jax.ShapeDtypeStruct`."""
    adapters: Any = None
    """The stacks of adapters in the same form; None without places for adapters."""
    folder: Folder | None
    """The cache folder with programs of earlier starts; None: nothing is kept."""

    def bucket(self, budget: int) -> Bucket:
        """The shape of a step of `budget` tokens."""
        config = self.config
        return Bucket(
            budget,
            max_num_seqs=config.max_num_seqs,
            max_blocks=config.max_blocks,
            num_slots=config.num_blocks * config.block_size,
            vocab_size=self.model.vocab_size,
            groups=config.groups,
            num_adapters=config.num_adapters,
            has_states=self.model.state is not None,
            has_grids=config.has_grids,
        )

    def zeros(self) -> tuple[KVCache, SamplerState]:
        """A cache of zeros and the state of idle slots."""
        model, config = self.model, self.config
        platform = jax.default_backend()
        own = divided(model, config.tensor_parallel or 1, platform)
        cache = empty_cache(
            own,
            num_rows=cache_groups(own, len(config.windows)).num_rows,
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            num_slots=config.max_num_seqs,
            dtype=jnp.dtype(config.kv_dtype),
            platform=platform,
        )
        return cache, self.idle_state()

    def idle_state(self, *, on_host: bool = False) -> SamplerState:
        """The state of idle slots; see `init_state`."""
        return init_state(self.config.max_num_seqs, self.model.vocab_size, on_host=on_host)

    def memory(self) -> tuple[KVCache, SamplerState]:
        """The shapes of `zeros`, with their shardings if there is a mesh."""
        shapes = jax.eval_shape(self.zeros)
        return shapes if self.mesh is None else abstract(shapes, memory_shardings(self.mesh, *shapes))

    @property
    def works(self) -> tuple[Work, ...]:
        """What the programs of one budget can do; "any" suffices for all steps."""
        return works_on(jax.default_backend(), self.config)

    def lower(self, bucket: Bucket, work: Work = "any", images: StepImages | None = None) -> jax.stages.Lowered:
        """The lowered step program of `bucket` for the current device; with `images`, shapes, one for steps with images."""
        program = step_program(
            self.model,
            bucket,
            attention=self.config.choices.attention,
            activation_dtype=self.config.activation_dtype,
            mesh=self.mesh,
            logits_processor=self.config.choices.logits_processor,
            has_int8_weights=has_int8(self.params),
            work=work,
            deterministic=self.config.fixed_chunks,
            cuda_graphs=self.config.cuda_graphs,
        )
        return program.lower(*self._arguments(bucket, images))

    def compile(self, budget: int, work: Work = "any", images: StepImages | None = None) -> Program:
        """A program for steps of `budget` tokens: loaded if an earlier start saved it, else compiled and saved.

        With `images`, shapes, it is for steps with tokens of images.
        """
        bucket, name = self.bucket(budget), self.saved_name(budget, work, images)
        run = load_or_compile(self.folder, name, self.config, lambda: self.lower(bucket, work, images))
        return Program(bucket, run, work)

    def saved_name(self, budget: int, work: Work = "any", images: StepImages | None = None) -> str | None:
        """The name under which a program for steps of `budget` tokens is saved; None if it is not."""
        if self.folder is None or self.config.choices.logits_processor is not None:  # which has no name to look up
            return None
        params, cache, state, _, *further = self._arguments(self.bucket(budget), images)
        arguments = (params, cache, state, *further)
        return program_name(arguments, self.model, self.config, budget, work, devices=devices_of(self.config))

    def _arguments(self, bucket: Bucket, images: StepImages | None) -> tuple[Any, ...]:
        packed = jax.ShapeDtypeStruct((bucket.layout.size,), jnp.int32)
        return self.params, *self.memory(), packed, *further_arguments(self.adapters, images)


def further_arguments(adapters: Any, images: StepImages | None = None) -> tuple[Any, ...]:
    """The arguments of a step program after the packed array; none without places for adapters and tokens of images."""
    if images is not None:
        return adapters, images
    return () if adapters is None else (adapters,)


def load_or_compile(
    folder: Folder | None, name: str | None, config: ResolvedConfig, lower: Callable[[], jax.stages.Lowered]
) -> jax.stages.Compiled:
    """The program called `name` from the cache folder; else what `lower` returns, compiled and, with both, saved there."""
    if folder is None or name is None:
        return lower().compile()
    saved = saved_in(folder)
    program = executables.load(saved, name, devices=devices_of(config))
    return program or executables.compile_and_save(lower(), saved, name)


def has_int8(params: Any) -> bool:
    """Whether some of the weights, arrays or shapes, have to be converted by XLA where no kernel of ours multiplies them."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, ScaledWeight))
    return any(isinstance(leaf, Int8Weight | Int4Weight) and not inputs_last(leaf) for leaf in leaves)


def works_on(platform: str, config: ResolvedConfig) -> tuple[Work, ...]:
    """What the programs of one budget can do on a platform: see `sampler.Work`."""
    if config.fixed_chunks and config.images is not None:  # steps of requests run the one program that takes images
        return ("any",)
    return ("any", "greedy", "sampled") if platform == "gpu" else ("any",)


def saved_in(folder: Folder) -> Folder:
    """The folder of the programs within a cache folder."""
    return Folder(path=folder.path / FOLDER, writable=folder.writable)


def devices_of(config: ResolvedConfig) -> list[Any]:  # of jax.Device, which type checkers do not accept as a type
    """The devices that an engine runs on."""
    return jax.local_devices()[: config.tensor_parallel or 1]


def program_name(
    arguments: object, model: ModelConfig, config: ResolvedConfig, budget: int, work: Work, *, devices: Sequence[Any]
) -> str:
    """The name under which a step's program is saved.

    `arguments` are weights, KV cache, state and, with places for adapters, their stacks: arrays or shapes.
    """
    shape = (budget, config.max_num_seqs, config.max_blocks, config.num_blocks, config.block_size)
    form = (config.choices.attention, config.activation_dtype, config.tensor_parallel, work)
    if config.fixed_chunks:
        form = (*form, "deterministic")
    if not config.cuda_graphs:
        form = (*form, "no graphs")
    if config.has_grids:  # with other positions in the packed array
        form = (*form, "grids")
    return executables.key(arguments, asdict(model), shape, form, devices=devices)


def abstract(arrays: Any, places: Any = None) -> Any:
    """The shapes and dtypes of a pytree of arrays; with their shardings if they are on a mesh, or with those given."""
    if places is not None:
        return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arrays, places)

    def of(x: jax.Array) -> jax.ShapeDtypeStruct:
        place = x.sharding if isinstance(x.sharding, NamedSharding) else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return jax.tree.map(of, arrays)


def step_program(
    model: ModelConfig,
    bucket: Bucket,
    *,
    attention: str | None = None,
    activation_dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    logits_processor: LogitsProcessor | None = None,
    has_int8_weights: bool = False,
    work: Work = "any",
    deterministic: bool = False,
    cuda_graphs: bool = True,
    device: Any = None,
) -> jax.stages.Wrapped:
    """The jitted step: (params, kv_cache, state, packed i32) -> (StepOutput, kv_cache, state), the middle two donated.

    An engine with places for adapters passes their stacks as a fifth argument; steps with tokens of images have `StepImages`
    as the sixth. See `further_arguments`.

    `attention` names an implementation of `ragged_attention`; `activation_dtype` is that of `forward`. With `mesh`,
    weights and cache are sharded over it as in `models.sharding`; everything else, including results, is replicated.
    `has_int8_weights` affects only how products are compiled; `work` is what the sampler can do. If `deterministic`, no row
    depends on what the others hold. `device` is one of those to compile for; None: of the mesh, or of this process.
    """
    step = partial(
        _step,
        bucket=bucket,
        config=model,
        attention=attention,
        activation_dtype=activation_dtype,
        mesh=mesh,
        logits_processor=logits_processor,
        work=work,
        deterministic=deterministic,
    )
    device = device or (jax.devices()[0] if mesh is None else mesh.devices.flat[0])
    if device.platform == "cpu":
        # JAX's own cache goes by the name, too. What it has from an older version would load, but could not be saved as an
        # executable, so that every later start would trace this program again.
        step.__name__ = f"step_{VERSION.replace('.', '_')}"  # pyright: ignore[reportAttributeAccessIssue]
    options = step_options(device, has_int8_weights=has_int8_weights, deterministic=deterministic, cuda_graphs=cuda_graphs)
    jit = partial(jax.jit, donate_argnums=(1, 2), compiler_options=options)
    if mesh is None:
        return jit(step)
    whole = NamedSharding(mesh, PartitionSpec())
    blocks = NamedSharding(mesh, PartitionSpec(None, TENSOR))
    states = shardings(mesh, partition_states(state_shapes(model, device.platform).of_layer))
    cache = KVCache(k=blocks, v=blocks, states=states, values_in_keys=model.values_in_keys)  # pyright: ignore[reportArgumentType]
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
    adapters: Stacks | None = None,
    images: StepImages | None = None,
    *,
    bucket: Bucket,
    config: ModelConfig,
    attention: str | None,
    activation_dtype: DTypeLike | None,
    mesh: Mesh | None,
    logits_processor: LogitsProcessor | None,
    work: Work,
    deterministic: bool,
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
        execution=Execution(
            attention=attention,
            activation_dtype=activation_dtype,
            mesh=mesh,
            independent_pieces=deterministic,
            sums_in_order=deterministic,
        ),
        adapters=adapters,
        images=images,
    )
    if "lm_head" in params and (lm_head := in_place(head_spec(config), params["lm_head"], hidden.dtype, mesh)) is not None:
        params = {**params, "lm_head": lm_head}
    logits = head(hidden, params, batch.num_sample_rows, config=config)
    if mesh is not None:  # every device samples all rows; sharded sampling would need a hundred small collectives
        logits = jax.lax.with_sharding_constraint(logits, NamedSharding(mesh, PartitionSpec()))
    logits = logits[:, : config.vocab_size]
    last_tokens = None if logits_processor is None else jnp.take(batch.token_ids, batch.sample_rows)
    sampled, state = sample_rows(logits, last_tokens, state, sampling, logits_processor=logits_processor, work=work)
    return StepOutput(sampled=sampled, logits=logits, hidden=hidden, last_tokens=last_tokens), kv_cache, state


def sample_rows(
    logits: jax.Array,
    last_tokens: jax.Array | None,
    state: SamplerState,
    batch: SamplingBatch,
    *,
    logits_processor: LogitsProcessor | None,
    work: Work,
) -> tuple[SampleOutput, SamplerState]:
    """`sample` of the logits of a step, after the engine's logits processor, which needs `last_tokens`."""
    process = None
    if logits_processor is not None and last_tokens is not None:
        rows = LogitsRows(positions=batch.positions, last_tokens=last_tokens, seeds=batch.seeds)
        process = lambda logits: logits_processor(logits, rows)  # noqa: E731
    return sample(logits, state, batch, max_logprobs=MAX_LOGPROBS, process=process, work=work)
