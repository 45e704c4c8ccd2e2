"""The programs of an engine, compiled for devices that are not here, and saved where that engine looks for them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from fastgen_jax.core import scale_bytes, stored_head_dim
from fastgen_jax.devices import Topology, parse_topology
from fastgen_jax.engine import executables, ladder, saved_choices, startup
from fastgen_jax.engine.config import BUDGETS, MEASURED_BUDGETS, EngineConfig, ResolvedConfig
from fastgen_jax.engine.memory import round_down
from fastgen_jax.engine.packing import Bucket
from fastgen_jax.engine.programs import FOLDER, program_name, step_program
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import family_of
from fastgen_jax.models.sharding import check_divisible
from fastgen_jax.plan.estimate import weight_bytes
from fastgen_jax.plan.program import compile_lowered, deviceless_mesh, lowering_for, step_arguments
from fastgen_jax.plan.source import Described
from pallas_kernels.buckets import Bucket as RemoteFolder
from pallas_kernels.buckets import is_url
from pallas_kernels.folders import Folder
from pallas_kernels.ragged_attention import QUANTIZED_DTYPES

# Of a device's memory, for weights and KV cache. A start keeps a saved size of the cache if 75 to 90 % of what the runtime
# reports are in use with it, and runtimes report up to 4 % less than data sheets.
MEMORY_SHARE = 0.81


@dataclass(frozen=True, kw_only=True)
class ProgramAhead:
    """One compiled program; bytes are per device."""

    tokens: int
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
    if described.quantize is not None:
        choices = replace(choices, quantize="int8")
    model: ModelConfig = family_of(described.config["architectures"][0]).config_from_hf(described.config)
    config = resolve_for(choices, model, target)
    all_devices = list(deviceless_mesh(target).devices.flat)
    mesh = deviceless_mesh(target, config.tensor_parallel or 1)
    # A GPU's own compiler chooses among matmul kernels by timing them, so programs made without the GPU are slower ones.
    saves = out is not None and target.device.platform == "tpu"
    place = saved_choices.elsewhere(all_devices)
    with _place_for(out if saves else None, startup.group(choices, model, place)) as folder:
        for tokens in config.budget_ladder:
            report(_compile(model, config, mesh, tokens, folder))
        if folder is not None and choices.num_blocks is None:
            entry = {"model": ladder.describe(model), "num_blocks": config.num_blocks}
            facts = startup.facts_of_cache(choices, model, (config.dtype, config.quantize, config.kv_dtype))
            saved_choices.save(folder / startup.BLOCKS_FILE, facts, entry, place)
    return config, out or "" if saves else ""


def resolve_for(choices: EngineConfig, model: ModelConfig, target: Topology) -> ResolvedConfig:
    """What `resolve` chooses on an accelerator; ValueError if the model does not fit or cannot be divided."""
    num_devices = choices.tensor_parallel or 1
    if num_devices > target.num_devices:
        raise ValueError(
            f"tensor_parallel={num_devices} but {target.name} has {target.num_devices} devices; choose at most that"
        )
    if choices.stack_layers is False or choices.logits_processor is not None:
        raise ValueError(
            "stack_layers=False and logits_processor are not supported when compiling for other devices; omit them"
        )
    check_divisible(model, num_devices)
    dtype = choices.dtype or "bfloat16"
    kv_dtype = choices.kv_dtype or dtype
    block_size = choices.block_size or (128 if kv_dtype in QUANTIZED_DTYPES else 32)
    context = choices.max_context_len or model.max_context_len
    num_blocks = choices.num_blocks
    if num_blocks is None:
        weights = weight_bytes(model, num_devices, jnp.dtype(dtype).itemsize, quantize=choices.quantize)
        room = int(MEMORY_SHARE * target.device.memory_bytes) - weights
        block = block_size * model.kv_bytes_per_token(
            jnp.dtype(kv_dtype).itemsize,
            stored_head_dim=stored_head_dim(model.head_dim, "tpu" if target.device.platform == "tpu" else "gpu"),
            scale_bytes=scale_bytes(kv_dtype),
        )
        num_blocks = min(
            round_down(max(room * num_devices // block, 0), 6), choices.max_num_seqs * -(-context // block_size)
        )
        if num_blocks < 1:
            raise ValueError(
                f"no memory for a single KV block: the weights take {weights / 2**30:.1f} GiB of each device, which has "
                f"{target.device.memory_bytes / 2**30:.0f} GiB; choose a larger tensor_parallel than {num_devices}, or "
                "quantize='int8'"
            )
    if choices.token_budget is None:
        budgets: tuple[int, ...] = MEASURED_BUDGETS
    else:
        smaller = BUDGETS if choices.budget_ladder is None else choices.budget_ladder
        budgets = (*(budget for budget in smaller if budget < choices.token_budget), choices.token_budget)
    return ResolvedConfig(
        choices=choices,
        dtype=dtype,
        quantize=choices.quantize,
        kv_dtype=kv_dtype,
        block_size=block_size,
        max_context_len=context,
        num_blocks=num_blocks,
        stack_layers=True,
        activation_dtype="float32" if dtype == "float16" and model.exceeds_float16 else dtype,
        prefix_caching=choices.prefix_caching and not model.rope_depends_on_length,
        budget_ladder=tuple(sorted(set(budgets))),
        generation_config=(),
        fitted="",
    )


def _compile(model: ModelConfig, config: ResolvedConfig, mesh: Any, tokens: int, folder: Path | None) -> ProgramAhead:
    divided = config.tensor_parallel is not None
    devices = list(mesh.devices.flat)
    bucket = Bucket(
        tokens,
        max_num_seqs=config.max_num_seqs,
        max_blocks=config.max_blocks,
        num_slots=config.num_blocks * config.block_size,
        vocab_size=model.vocab_size,
    )
    arguments = step_arguments(
        model,
        bucket,
        mesh if divided else devices[0],
        num_blocks=config.num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        dtype=jnp.dtype(config.dtype),
        kv_dtype=jnp.dtype(config.kv_dtype),
        quantize=config.quantize,
    )
    step = step_program(
        model,
        bucket,
        attention=config.choices.attention,
        activation_dtype=config.activation_dtype,
        mesh=mesh if divided else None,
        device_kind=devices[0].device_kind,
    )
    start = time.perf_counter()
    with lowering_for(mesh):
        lowered = step.lower(*arguments)
        lowered_at = time.perf_counter()
        program = compile_lowered(lowered)
    done = time.perf_counter()
    memory = program.memory_analysis()
    assert memory is not None, "the compiler has no memory analysis"
    size = 0
    if folder is not None:
        name = program_name(arguments[:3], model, config, tokens, devices=devices)
        saved = Folder(path=folder / FOLDER, writable=True)
        if executables.save(saved, name, program):
            size = (saved.path / (name + executables.SUFFIX)).stat().st_size
    return ProgramAhead(
        tokens=tokens,
        lower_seconds=lowered_at - start,
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
