"""The programs of an engine, compiled for devices that are not here, and saved where that engine looks for them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from fastgen_jax.checkpoint.quantized import split_settings
from fastgen_jax.devices import INT8_KINDS, Topology, parse_topology
from fastgen_jax.engine import determinism, executables, fit, footprint, kept_forms, ladder, saved_choices, startup
from fastgen_jax.engine.adapter_stacks import stack_shapes
from fastgen_jax.engine.config import EngineConfig, quantize_of_snapshot
from fastgen_jax.engine.machine import Machine
from fastgen_jax.engine.memory import Memory
from fastgen_jax.engine.packing import Bucket
from fastgen_jax.engine.programs import FOLDER, further_arguments, has_int8, program_name, step_program, works_on
from fastgen_jax.engine.resolve import ResolvedConfig, resolve
from fastgen_jax.engine.sampling.sampler import Work
from fastgen_jax.models.cache_groups import cache_groups
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.division import check_num_devices
from fastgen_jax.models.division import divided as divided_model
from fastgen_jax.models.families import family_of
from fastgen_jax.models.vision.read import images_from_hf, largest, tower_bytes
from fastgen_jax.plan.kernels import int4_kernel_of, multiplies_float8
from fastgen_jax.plan.program import compile_lowered, deviceless_mesh, lowering_for, step_arguments
from fastgen_jax.plan.source import Described
from fastgen_jax.plan.tower import compile_tower, step_images
from pallas_kernels.buckets import Bucket as RemoteFolder
from pallas_kernels.buckets import is_url
from pallas_kernels.folders import Folder

# Of the memory in a data sheet, what JAX reports: 96 to 99 % on a TPU, and by default three quarters of what a GPU has
# (99 % of the data sheet). A start keeps a saved size of the cache if it uses 75 to 90 % of what is reported, so the exact
# share does not matter.
REPORTED_SHARE = {"tpu": 0.97, "gpu": 0.74}


@dataclass(frozen=True, kw_only=True)
class ProgramAhead:
    """One compiled program; bytes are per device."""

    tokens: int
    """Of the step; of a tower the patches of its largest image."""
    work: Work | Literal["images", "tower"]
    """What the sampler can do; or for steps with tokens of images; or the vision tower, which is not saved."""
    trace_seconds: float
    lower_seconds: float
    compile_seconds: float
    arguments: int
    temporaries: int
    saved: int
    """Bytes of the file; 0 if it was not saved."""


def compile_ahead(
    described: Described, choices: EngineConfig, topology: str, *, out: str | None, report: Callable[[ProgramAhead], object]
) -> tuple[ResolvedConfig, str]:
    """Compiles all programs of an engine with these choices on `topology`; returns its config and where they are saved.

    `report` is called after each program. `out` is what `compile_cache_dir` of that engine will be; with None, and for
    GPUs, nothing is saved and the place is "". Raises ValueError if model, choices and topology do not fit together, or
    there is no compiler, and DoesNotCompile.
    """
    target = parse_topology(topology)
    float8 = multiplies_float8(target.device)
    quantize = quantize_of_snapshot(described.quantize, choices.quantize, packs=False, float8=float8)
    choices = replace(choices, quantize=quantize)
    _, fields = split_settings(described.config)
    model: ModelConfig = family_of(fields["architectures"][0]).config_from_hf(fields)
    shown = images_from_hf(fields, {}) if choices.images else None
    if shown is not None:
        choices = replace(choices, vision=largest(shown, choices.max_image_tokens))
    config = startup.with_room_for_images(resolve_for(choices, model, target, stored=described.stored))
    all_devices = list(deviceless_mesh(target).devices.flat)
    mesh = deviceless_mesh(target, config.tensor_parallel or 1)
    # A GPU's own compiler chooses among matmul kernels by timing them, so programs made without the GPU are slower ones.
    saves = out is not None and target.device.platform == "tpu"
    place = saved_choices.elsewhere(all_devices)
    with _place_for(out if saves else None, startup.group(choices, model, place)) as folder:
        for work in works_on("tpu" if target.device.platform == "tpu" else "gpu", config):
            for tokens in config.budget_ladder:
                report(_compile(model, config, mesh, tokens, work, folder))
        if config.images is not None:
            report(_compile(model, config, mesh, config.token_budget, "any", folder, with_images=True))
            report(_compile_tower(config, mesh))
        if folder is not None and choices.num_blocks is None:
            entry = {"model": ladder.describe(model), "num_blocks": config.num_blocks}
            facts = startup.facts_of_cache(config.choices, model, (config.dtype, config.quantize, config.kv_dtype))
            saved_choices.save(folder / startup.BLOCKS_FILE, facts, entry, place)
    return config, out or "" if saves else ""


def resolve_for(
    choices: EngineConfig, model: ModelConfig, target: Topology, *, stored: kept_forms.Stored = ()
) -> ResolvedConfig:
    """What `resolve` chooses on an accelerator for a checkpoint with these quantized weights.

    ValueError if the model does not fit or cannot be divided.
    """
    platform = "tpu" if target.device.platform == "tpu" else "gpu"
    num_devices = choices.tensor_parallel or 1
    if num_devices > target.num_devices:
        raise ValueError(
            f"tensor_parallel={num_devices} but {target.name} has {target.num_devices} devices; choose at most that"
        )
    if choices.stack_layers is False or choices.logits_processor is not None:
        raise ValueError(
            "stack_layers=False and logits_processor are not supported for devices that are not here; omit them"
        )
    check_num_devices(model, num_devices)
    tower = 0 if choices.vision is None else tower_bytes(choices.vision, jnp.dtype(_tower_dtype(choices)).itemsize)
    memory = Memory(limit=int(REPORTED_SHARE[platform] * target.device.memory_bytes) - tower)
    machine = Machine(
        platform=platform,
        kind=target.device.kind,
        memory=memory,
        float8=multiplies_float8(target.device),
        int8=target.device.kind in INT8_KINDS,
        int4=int4_kernel_of(target.device),
        num_devices=target.num_devices,
    )
    if choices.fit:
        formats = fit.choose_formats(choices, model, machine, stored=stored)
    else:
        formats = fit.candidates(choices, machine, model, stored=stored)[0]
    choices = replace(choices, formats=formats)
    itemsize = jnp.dtype(formats.dtype).itemsize
    weights = footprint.weight_bytes(
        model, num_devices, itemsize, quantize=formats.quantize, kept=formats.kept, platform=platform
    )
    config = resolve(choices, model, machine=machine, weights=weights)
    budgets = config.budget_ladder
    if choices.token_budget is None:
        cost = ladder.cost_model(
            model,
            bytes_per_weight=footprint.typical_bytes(model, formats.dtype, formats.quantize, platform, kept=formats.kept),
            device_kind=target.device.reported_as[0],
            skips_padding=False,
        )
        if config.fixed_chunks:
            budgets = (determinism.choose(budgets, knee=cost.knee, max_num_seqs=choices.max_num_seqs),)
        else:
            budgets = tuple(sorted(ladder.modeled_ladder(cost, budgets, max_num_seqs=choices.max_num_seqs)))
    return replace(config, budget_ladder=budgets, generation_config=())


def _tower_dtype(choices: EngineConfig) -> str:
    """The dtype of a vision tower: float16 cannot hold its activations."""
    return "float32" if choices.dtype == "float16" else choices.dtype or "bfloat16"


def _compile_tower(config: ResolvedConfig, mesh: Any) -> ProgramAhead:
    assert config.images is not None
    dtype = jnp.dtype(_tower_dtype(config.choices))
    program = compile_tower(config.images, mesh, dtype=dtype, deterministic=config.fixed_chunks)
    return ProgramAhead(
        tokens=program.patches,
        work="tower",
        trace_seconds=0.0,
        lower_seconds=0.0,
        compile_seconds=program.seconds,
        arguments=program.weights,
        temporaries=program.temporaries,
        saved=0,
    )


def _compile(
    model: ModelConfig,
    config: ResolvedConfig,
    mesh: Any,
    tokens: int,
    work: Work,
    folder: Path | None,
    *,
    with_images: bool = False,
) -> ProgramAhead:
    divided = config.tensor_parallel is not None
    devices = list(mesh.devices.flat)
    bucket = Bucket(
        tokens,
        max_num_seqs=config.max_num_seqs,
        max_blocks=config.max_blocks,
        num_slots=config.num_blocks * config.block_size,
        vocab_size=model.vocab_size,
        groups=config.groups,
        num_adapters=config.num_adapters,
        has_states=model.state is not None,
        has_grids=config.has_grids,
    )
    shown = None
    if with_images:
        assert config.images is not None
        dtype = jnp.dtype(_tower_dtype(config.choices))
        shown = step_images(config.images, tokens, mesh if divided else None, dtype, devices[0])
    stacks = stack_shapes(model, config, mesh if divided else None)
    if stacks is not None and not divided:
        on_device = SingleDeviceSharding(devices[0])
        stacks = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_device), stacks)
    further = further_arguments(stacks, shown)
    arguments = step_arguments(
        model,
        bucket,
        mesh if divided else devices[0],
        num_rows=cache_groups(divided_model(model, config.tensor_parallel or 1), len(config.windows)).num_rows,
        num_blocks=config.num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        dtype=jnp.dtype(config.dtype),
        kv_dtype=jnp.dtype(config.kv_dtype),
        quantize=config.quantize,
        kept=config.kept_forms,
    )
    step = step_program(
        model,
        bucket,
        attention=config.choices.attention,
        activation_dtype=config.activation_dtype,
        mesh=mesh if divided else None,
        has_int8_weights=has_int8(arguments[0]),
        deterministic=config.fixed_chunks,
        cuda_graphs=config.cuda_graphs,
        work=work,
        device=devices[0],
    )
    start = time.perf_counter()
    with lowering_for(mesh):
        traced = step.trace(*arguments, *further)
        traced_at = time.perf_counter()
        lowered = traced.lower()
        lowered_at = time.perf_counter()
        program = compile_lowered(lowered)
    done = time.perf_counter()
    memory = program.memory_analysis()
    assert memory is not None, "the compiler has no memory analysis"
    size = 0
    if folder is not None:
        name = program_name((*arguments[:3], *further), model, config, tokens, work, devices=devices)
        saved = Folder(path=folder / FOLDER, writable=True)
        if executables.save(saved, name, program):
            size = (saved.path / (name + executables.SUFFIX)).stat().st_size
    return ProgramAhead(
        tokens=tokens,
        work="images" if with_images else work,
        trace_seconds=traced_at - start,
        lower_seconds=lowered_at - traced_at,
        compile_seconds=done - lowered_at,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        saved=size,
    )


@contextmanager
def _place_for(out: str | None, group: str) -> Iterator[Path | None]:
    """The folder to save in; for a bucket one whose files are sent at the end. None if nothing is saved."""
    if out is None:
        yield None
    elif not is_url(out):
        folder = Path(out).expanduser()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        yield folder
    else:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
            files = [path for path in Path(name).rglob("*") if path.suffix in (executables.SUFFIX, ".json")]
            contents = {path.relative_to(name).as_posix(): path.read_bytes() for path in files}
            RemoteFolder(f"{out.rstrip('/')}/{group}").write(contents)
