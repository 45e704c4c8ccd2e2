"""The engine's step program, compiled for devices that are not present."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from fastgen_jax.core import KVCache, StepImages
from fastgen_jax.devices import NoCompiler, Topology
from fastgen_jax.engine.config import wide_enough
from fastgen_jax.engine.footprint import quantization_of
from fastgen_jax.engine.kept_forms import Float8Form, Form, Int4Form
from fastgen_jax.engine.packing import Bucket
from fastgen_jax.engine.programs import further_arguments, has_int8, memory_shardings, step_program
from fastgen_jax.engine.sampling.sampler import Work
from fastgen_jax.engine.sampling.state import SamplerState, init_state
from fastgen_jax.models.cache import empty_cache
from fastgen_jax.models.cache_groups import choose_groups
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.division import check_num_devices, divided
from fastgen_jax.models.params import head_spec, init_params, param_specs
from fastgen_jax.models.sharding import partition_params, shardings, tensor_mesh
from fastgen_jax.models.weight_spec import DType, Kind, Leaf, Params, WeightSpec
from fastgen_jax.plan import hlo, thunks
from fastgen_jax.scheduling import BlockGroups
from pallas_kernels.jax_versions import COMMAND_BUFFERS, COMPILE_WITHOUT_DEVICE, AbstractGpu, too_old
from pallas_kernels.matmul import FLOAT8_BLOCK, INT4_BLOCK, INT4_ROWS, Float8Weight, Int4Weight, Int8Weight, halves

# JAX on a v4 chip treats its two cores as one device; without this the compiler assumes two.
_CHIP_CONFIGS = {"v4": "megacore"}
LARGE = 2**20  # bytes of a weight, from which it matters whether a step copies it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What the compiler says about a step; bytes are per device."""

    seconds: float  # to lower and compile
    arguments: int
    aliased: int  # of the arguments: memory that the results reuse
    temporaries: int
    cache: int  # of the KV cache; all of it must be aliased
    collectives: int  # number per layer
    operations: int  # number per layer; on a GPU, kernel launches
    inner_operations: int  # of loops in a layer
    waits: int  # how often a GPU's host has to read a value in the middle of the step
    started: int | None  # what a GPU's host starts: 1 if the step is one CUDA graph; None if that is not known
    copies: list[hlo.Copy]  # weights, keys, values and states that a step writes anew: there should be none
    compiled: jax.stages.Compiled


class DoesNotCompile(Exception):  # noqa: N818 (a result, not a defect)
    """The compiler rejects a program; the message is its reason."""


def deviceless_mesh(topology: Topology, num_devices: int | None = None, *, compute_capability: str | None = None) -> Mesh:
    """A mesh of devices that exist only for a compiler; `compute_capability` replaces that of the GPUs.

    Raises NoCompiler if that compiler is not installed or this jax is too old, ValueError if it does not know the topology.
    """
    if reason := too_old(COMPILE_WITHOUT_DEVICE):
        raise NoCompiler(f"compiling for devices that are not here {reason}, or skip it with --no-compile")
    # Lets two processes compile at the same time: without these libtpu holds a lock, and queries the network for the
    # type of the machine.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # The CUDA plugin only compiles: cuDNN and cuBLAS need not be installed.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    devices = _tpus(topology) if topology.device.platform == "tpu" else _gpus(topology, compute_capability)
    assert len(devices) == topology.num_devices, f"{topology.name} is {len(devices)} devices to the compiler"
    mesh = tensor_mesh(devices[:num_devices])
    if topology.device.platform == "cuda":
        seen = mesh.abstract_mesh.abstract_device
        # A mesh caches the description of its devices; this replaces it with one that has the compute capability, without
        # which Pallas would compile for 9.0.
        mesh.__dict__["abstract_mesh"] = mesh.abstract_mesh.update(
            abstract_device=AbstractGpu(
                device_kind=seen.device_kind,
                num_cores=seen.num_cores,
                compute_capability=devices[0].compute_capability,
            )
        )
    return mesh


def _tpus(topology: Topology) -> list[Any]:  # of jax.Device, which type checkers do not accept as a type
    kind = topology.device.kind
    name = f"{kind}:{'x'.join(map(str, topology.shape))}"
    options: dict[str, Any] = {"chip_config_name": _CHIP_CONFIGS[kind]} if kind in _CHIP_CONFIGS else {}
    if math.prod(topology.shape) < 4:  # less than a whole host
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as error:  # libtpu raises errors of several types
        if any(words in str(error) for words in ("libtpu", "Unknown backend", "not found", "not installed")):
            raise NoCompiler(
                f"no TPU compiler here ({error}); pip install 'fastgen_jax[tpu]', or skip it with --no-compile"
            ) from error
        raise ValueError(f"the TPU compiler does not know the topology {name}: {error}") from error


def _gpus(
    topology: Topology, compute_capability: str | None
) -> list[Any]:  # of jax.Device, which type checkers do not accept as a type
    target = (Path(__file__).parent / "targets" / f"{topology.device.kind}.txtpb").read_text()
    if compute_capability is not None:
        major, minor = compute_capability.split(".")
        target = re.sub(r"(?<=cuda_compute_capability { )major: \d+ minor: \d+", f"major: {major} minor: {minor}", target)
    try:
        return topologies.get_topology_desc(
            platform="cuda", topology_name="", topology=f"1x1x{topology.num_devices}", target_config=target
        ).devices
    except Exception as error:  # of several types, none of them public
        reason = str(error).splitlines()[0]
        raise NoCompiler(
            f"no CUDA compiler here ({reason}); pip install 'fastgen_jax[cuda]', or skip it with --no-compile"
        ) from error


@contextlib.contextmanager
def lowering_for(mesh: Mesh) -> Iterator[None]:
    """Selects kernels and tile sizes for the devices of `mesh` instead of those of this process."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def compile_step(
    model: ModelConfig,
    mesh: Mesh,
    *,
    token_budget: int,
    max_num_seqs: int,
    max_context_len: int,
    block_size: int,
    num_blocks: int,
    dtype: DType = jnp.bfloat16,
    kv_dtype: DType | None = None,
    quantize: str | None = None,
    in_blocks: bool = False,
    kept: Mapping[str, Form] = MappingProxyType({}),
    attention: str | None = None,
    work: Work = "any",
    deterministic: bool = False,
    cuda_graphs: bool = True,
    images: StepImages | None = None,
    has_grids: bool = False,
) -> Program:
    """The whole step of `token_budget` tokens, tensor-parallel over `mesh`: layers, logits, sampling.

    With `in_blocks`, 8-bit floats have a scale for every 128 inputs. `kept` are the forms of weights, by path, whose numbers
    are those of a checkpoint. With `images`, shapes from `plan.tower`, it is the one
    for steps with tokens of images; `has_grids` as for `Bucket`.
    Raises DoesNotCompile with the compiler's message, ValueError if the model cannot be divided.
    """
    check_num_devices(model, mesh.size)
    groups = choose_groups(divided(model, mesh.size), max_context_len)
    bucket = Bucket(
        token_budget,
        max_num_seqs=max_num_seqs,
        max_blocks=-(-max_context_len // block_size),
        num_slots=num_blocks * block_size,
        vocab_size=model.vocab_size,
        groups=BlockGroups(windows=groups.windows, block_size=block_size, token_budget=token_budget),
        has_states=model.state is not None,
        has_grids=has_grids,
    )
    arguments = step_arguments(
        model,
        bucket,
        mesh,
        num_rows=groups.num_rows,
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        dtype=dtype,
        kv_dtype=kv_dtype or dtype,
        quantize=quantize,
        in_blocks=in_blocks,
        kept=kept,
    )
    cache = arguments[1]
    cache_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)) // mesh.size
    step = step_program(
        model,
        bucket,
        attention=attention,
        activation_dtype=wide_enough(jnp.dtype(dtype).name, exceeds_float16=model.exceeds_float16),  # pyright: ignore[reportArgumentType]
        mesh=mesh,
        has_int8_weights=has_int8(arguments[0]),
        work=work,
        deterministic=deterministic,
        cuda_graphs=cuda_graphs,
    )
    start = time.perf_counter()
    with lowering_for(mesh), tempfile.TemporaryDirectory() as dump:
        lowered = step.lower(*arguments, *further_arguments(None, images))
        lists = mesh.devices.flat[0].platform == "gpu" and too_old(COMMAND_BUFFERS) is None
        compiled = compile_lowered(lowered, {"xla_dump_to": dump} if lists else None)
        listing = thunks.find_listing(Path(dump))
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None, "the compiler has no memory analysis"
    assert text is not None, "the compiler does not show its program"
    return Program(
        seconds=time.perf_counter() - start,
        arguments=memory.argument_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        cache=cache_bytes,
        collectives=hlo.count_in_loops(text),
        operations=hlo.operations_per_layer(text),
        inner_operations=hlo.operations_of_inner_loops(text),
        waits=0 if thunks.is_one_graph(listing) else hlo.waits(text),
        started=thunks.started_by_host(listing) or None,
        copies=hlo.copied_weights(text, matrix_shapes(arguments[0], token_budget))
        + hlo.copied_arrays(text, {x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(cache)}),
        compiled=compiled,
    )


def matrix_shapes(params: Params, num_tokens: int) -> set[tuple[int, ...]]:
    """The shapes on one device of the large weights, of one layer and of all; without those that activations may have.

    Experts of all layers are also one stack, as grouped products read them. Of int4 also the shapes of the numbers: of
    matrices, and of the halves of bytes.
    """
    shapes = set()

    def add(shape: tuple[int, ...], itemsize: int) -> None:
        while math.prod(shape) * itemsize >= LARGE and len(shape) >= 2:
            if not any(num_tokens in form for form in hlo.forms(shape)):
                shapes.add(shape)
                if len(shape) == 4:
                    shapes.add((shape[0] * shape[1], *shape[2:]))
            shape = shape[1:]

    for leaf in jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Int4Weight)):
        for part in jax.tree.leaves(leaf):
            add(tuple(part.sharding.shard_shape(part.shape)), part.dtype.itemsize)
        if isinstance(leaf, Int4Weight):
            *stack, num_bytes, columns = leaf.values.sharding.shard_shape(leaf.values.shape)
            for inputs in ((2 * num_bytes,), (num_bytes // INT4_ROWS, 2, INT4_ROWS)):
                add((*stack, *inputs, columns), 1)
    return shapes


def step_arguments(
    model: ModelConfig,
    bucket: Bucket,
    place: Any,  # a Mesh, or a jax.Device, which type checkers do not accept as a type
    *,
    num_rows: int,
    num_blocks: int,
    block_size: int,
    max_num_seqs: int,
    dtype: DType,
    kv_dtype: DType,
    quantize: str | None,
    in_blocks: bool = False,
    kept: Mapping[str, Form] = MappingProxyType({}),
) -> tuple[Params, KVCache, SamplerState, jax.ShapeDtypeStruct]:
    """Shapes of what an engine passes to `step_program`: divided over a mesh as it divides them, or on one device.

    `num_rows` are the layers of a cache group; `in_blocks` and `kept` as for `compile_step`.
    """
    mesh, device = (place, place.devices.flat[0]) if isinstance(place, Mesh) else (None, place)
    vocab_size = model.vocab_size
    model = divided(model, 1 if mesh is None else mesh.size, device.platform)
    params = jax.eval_shape(lambda key: init_params(model, key, dtype=dtype), jax.random.key(0))
    as_stored = functools.partial(
        _as_stored,
        quantize=quantize,
        in_blocks=in_blocks,
        kept=kept,
        num_devices=1 if mesh is None else mesh.size,
        platform=device.platform,
        capability=str(getattr(device, "compute_capability", "")),
    )
    params = jax.tree.map(as_stored, param_specs(model), params)
    if quantize is not None and mesh is None and "lm_head" not in params:  # a tied head is stored separately
        head = head_spec(model)
        tied = jax.ShapeDtypeStruct(head.shape, params["embed"].dtype)
        params = {**params, "lm_head": as_stored(head, tied)}
    cache = jax.eval_shape(
        lambda: empty_cache(
            model,
            num_rows=num_rows,
            num_blocks=num_blocks,
            block_size=block_size,
            num_slots=max_num_seqs,
            dtype=kv_dtype,
            platform=device.platform,
        )
    )
    state = jax.eval_shape(lambda: init_state(max_num_seqs, vocab_size))
    packed = jax.ShapeDtypeStruct((bucket.layout.size,), jnp.int32)
    arguments = (params, cache, state, packed)
    if mesh is None:
        kinds = jax.tree.map(lambda _: SingleDeviceSharding(device), arguments)
    else:
        parts = shardings(mesh, partition_params(model, params))
        kinds = (parts, *memory_shardings(mesh, cache, state), NamedSharding(mesh, PartitionSpec()))
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments, kinds)


def _as_stored(
    spec: WeightSpec,
    weight: jax.ShapeDtypeStruct,
    *,
    quantize: str | None,
    in_blocks: bool,
    kept: Mapping[str, Form],
    num_devices: int,
    platform: str,
    capability: str,
) -> Leaf:
    """The shapes of a weight of the divided model in the form that the engine stores."""
    if spec.path in kept:
        found = kept[spec.path]
        if isinstance(found, Float8Form):
            return _float8_shapes(weight.shape, in_blocks=found.in_blocks)
        return _int4_shapes(weight.shape, found)
    form = quantization_of(spec, quantize, packed=False, num_devices=num_devices, platform=platform)
    if form is None:
        return weight
    shape = weight.shape
    if form == "int4":
        return _int4_shapes(shape, Int4Form(INT4_BLOCK, False, "float32" if platform == "tpu" else "float16"))
    if form == "fp8":
        return _float8_shapes(shape, in_blocks=in_blocks and shape[-2] % FLOAT8_BLOCK == 0)
    scales = jax.ShapeDtypeStruct((*shape[:-2], shape[-1]), jnp.float32)
    if spec.kind is Kind.MATRIX and halves.is_used(shape, capability):
        values = jax.ShapeDtypeStruct((*shape[:-2], shape[-1], shape[-2]), jnp.int8)
        return Int8Weight(values=values, scales=scales, inputs_last=True)  # pyright: ignore[reportArgumentType] (shapes)
    values = jax.ShapeDtypeStruct(shape, jnp.int8)
    return Int8Weight(values=values, scales=scales, rounds_rows=form == "w8a8")  # pyright: ignore[reportArgumentType] (shapes)


def _float8_shapes(shape: tuple[int, ...], *, in_blocks: bool) -> Float8Weight:
    *layers, inputs, outputs = shape
    blocks = (inputs // FLOAT8_BLOCK,) if in_blocks else ()
    return Float8Weight(
        values=jax.ShapeDtypeStruct((*layers, outputs, inputs), jnp.float8_e4m3fn),  # pyright: ignore[reportArgumentType] (shapes)
        scales=jax.ShapeDtypeStruct((*layers, *blocks, outputs), jnp.float32),  # pyright: ignore[reportArgumentType]
    )


def _int4_shapes(shape: tuple[int, ...], form: Int4Form) -> Int4Weight:
    *layers, inputs, outputs = shape
    scales = jax.ShapeDtypeStruct((*layers, inputs // form.size, outputs), jnp.dtype(form.scale_dtype))
    return Int4Weight(
        values=jax.ShapeDtypeStruct((*layers, inputs // 2, outputs), jnp.uint8),  # pyright: ignore[reportArgumentType] (shapes)
        scales=scales,  # pyright: ignore[reportArgumentType]
        offsets=scales if form.has_offsets else None,  # pyright: ignore[reportArgumentType]
    )


def compile_lowered(lowered: jax.stages.Lowered, options: dict[str, bool | str] | None = None) -> jax.stages.Compiled:
    """The program compiled with further options; DoesNotCompile with the first lines of the compiler's reason."""
    try:
        return lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        raise DoesNotCompile("\n".join(str(error).splitlines()[:12])[:1500]) from error
