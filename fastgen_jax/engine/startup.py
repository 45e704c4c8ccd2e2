"""Starting an engine: loading weights, choosing step sizes, compiling programs."""

from __future__ import annotations

import concurrent.futures
import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Literal

import jax

from fastgen_jax.checkpoint import (
    Checkpoint,
    SnapshotCheckpoint,
    images_of,
    load_params,
    load_tower,
    open_checkpoint,
    quantized_weights,
    resolve_model,
)
from fastgen_jax.checkpoint.huggingface import HuggingFaceCheckpoint
from fastgen_jax.core import environment
from fastgen_jax.core.devices import supports_bfloat16
from fastgen_jax.core.progress import Phases
from fastgen_jax.engine import compile_cache, determinism, executables, fit, kept_forms, ladder, saved_choices
from fastgen_jax.engine.config import EngineConfig, default_dtype, formats_of, quantize_of_snapshot
from fastgen_jax.engine.footprint import typical_bytes
from fastgen_jax.engine.generation import defaults_of_model
from fastgen_jax.engine.kept_forms import Stored
from fastgen_jax.engine.machine import Machine
from fastgen_jax.engine.programs import devices_of, saved_in
from fastgen_jax.engine.refinement import Refinement
from fastgen_jax.engine.resolve import ResolvedConfig, resolve
from fastgen_jax.engine.runner import Runner
from fastgen_jax.engine.sampling.sampler import Work
from fastgen_jax.engine.tower import Tower
from fastgen_jax.engine.weights import prepare_leaf, prepare_params
from fastgen_jax.images.decode import pillow
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.vision.read import limited
from fastgen_jax.models.weight_spec import Params
from fastgen_jax.text import Tokenizer, load_tokenizer
from pallas_kernels import native
from pallas_kernels.folders import Folder

log = logging.getLogger(__name__)

BUILDING = "building C++ kernels"  # those that are not ready when the weights are loaded, once per machine
PHASES = ("opening the model", "loading weights", BUILDING, "allocating memory", "compiling")
STARTS_FILE = "starts.json"  # how long the phases took, and the program that was needed first
BLOCKS_FILE = "num_blocks.json"  # with the compiled programs, whose shapes depend on it


def load(
    model: str | os.PathLike[str], config: EngineConfig, *, phases: Phases
) -> tuple[Params, ModelConfig, Tokenizer, EngineConfig, Path, Tower | None]:
    """Prepared weights, the model's config, its tokenizer, `config` with the settings that the checkpoint determines, where
    the checkpoint is, and its vision tower if it has one and reads images.

    A snapshot that was quantized runs so. Raises ValueError as `resolve_model`, `open_checkpoint` and `load_params` do: the
    checkpoint is missing, damaged or unsupported.
    """
    with phases.phase(PHASES[0]):
        environment.warn_about_accelerators()
        with concurrent.futures.ThreadPoolExecutor(1) as beside:
            if jax.default_backend() == "cpu":
                beside.submit(native.available)  # asks the compiler for its version, once per process
            checkpoint = open_checkpoint(resolve_model(os.fspath(model)), strict_config=config.strict_config)
        if isinstance(checkpoint, SnapshotCheckpoint):
            config = _as_in_snapshot(config, checkpoint)
        if config.generation_config == "auto":
            config = replace(config, generation_config=defaults_of_model(checkpoint.generation_config, checkpoint.path))
        tower = _tower(checkpoint, config)  # before it is decided what fits into the memory that it leaves
        config = replace(config, vision=None if tower is None else tower.config)
        # First, so that mistakes, and a model that does not fit, are reported before the weights are loaded.
        folder = compile_cache.use(config.compile_cache_dir, group(config, checkpoint.config))
        config = fit.with_formats(config, checkpoint.config, folder, stored=stored_in(checkpoint))
        resolved = resolve(config, checkpoint.config)
        if kept := kept_weights(checkpoint.config, resolved):
            log.info("%s: %s", checkpoint.path, kept)
        _prepare_as_before(phases, folder, checkpoint.config, resolved)
        builds = _prefetch_kernels(checkpoint.config) if jax.default_backend() == "cpu" else ()
        if not builds:
            phases.names = [name for name in PHASES if name != BUILDING]
        tokenizer = load_tokenizer(checkpoint.tokenizer_source).with_template(config.chat_template)
        if tokenizer.vocab_size > checkpoint.config.vocab_size:  # e.g. an image placeholder that only the vision part uses
            log.warning(
                "%s: the tokenizer has %s tokens but the embedding only %s rows; prompts with one of the others are refused",
                checkpoint.path,
                f"{tokenizer.vocab_size:,}",
                f"{checkpoint.config.vocab_size:,}",
            )
    params = _read_weights(checkpoint, resolved, progress=phases)
    if builds:
        with phases.phase(BUILDING, total=len(builds), unit="kernel") as advance:
            for build in builds:
                concurrent.futures.wait([build.path])
                advance()
    return params, checkpoint.config, tokenizer, config, checkpoint.path, tower


def _as_in_snapshot(config: EngineConfig, checkpoint: SnapshotCheckpoint) -> EngineConfig:
    machine = Machine.here()
    packs = machine.packs and config.tensor_parallel is None
    chosen = quantize_of_snapshot(checkpoint.quantize, config.quantize, packs=packs, float8=machine.float8)
    return replace(config, quantize=chosen)


def _tower(checkpoint: Checkpoint, config: EngineConfig) -> Tower | None:
    """The vision tower with its weights; None if the checkpoint has none that is supported, or images are not wanted."""
    found = images_of(checkpoint) if config.images else None
    if found is None or not isinstance(checkpoint, HuggingFaceCheckpoint):
        return None
    found = limited(found, config.max_image_tokens)
    try:
        pillow()
    except ValueError as error:
        log.warning("%s: %s; until then only its text model is used", checkpoint.path, error)
        return None
    dtype = config.dtype or default_dtype(jax.default_backend(), bfloat16=supports_bfloat16(jax.local_devices()[0]))
    # float16 cannot hold all activations of a tower.
    read = partial(load_tower, checkpoint, found, dtype="float32" if dtype == "float16" else dtype)
    return Tower(found, read, deterministic=config.deterministic)


def reload(path: Path, model: ModelConfig, config: ResolvedConfig) -> Params:
    """The weights of a checkpoint in the form that an engine of this model computes with.

    Raises ValueError if there is none, or it is one of another model.
    """
    checkpoint = open_checkpoint(path)
    if checkpoint.config != model:
        raise ValueError(f"{path} holds another model than this engine's")
    return prepare_params(_read_weights(checkpoint, config, progress=False), model, config)


def stored_in(checkpoint: Checkpoint) -> Stored:
    """The quantized weights of a checkpoint."""
    return tuple(quantized_weights(checkpoint).items())


def kept_weights(model: ModelConfig, config: ResolvedConfig) -> str:
    """How many quantized weights stay as they are on an accelerator, and why others do not; empty without any."""
    if config.choices.formats is None:
        return ""
    return kept_forms.described(config.choices.formats.choice, model, config.dtype, config.quantize)


def _kept_forms(config: ResolvedConfig) -> bool | Literal["fp8"] | Collection[str]:
    """Which matrices in blocks stay as the checkpoint holds them."""
    if config.quantize == "fp8":
        return "fp8"
    return config.keeps_blocks or config.kept_forms.keys()


def _read_weights(checkpoint: Checkpoint, config: ResolvedConfig, *, progress: bool | Phases) -> Params:
    return load_params(
        checkpoint,
        dtype=config.dtype,
        stack_layers=config.stack_layers,
        prepare=lambda spec, array: prepare_leaf(spec, array, checkpoint.config, config),
        keep_blocks=_kept_forms(config),
        progress=progress,
    )


def _prefetch_kernels(model: ModelConfig) -> Sequence[native.Build]:
    """Starts to compile the C++ kernels that a model needs, if they have to be, while its weights are being read."""
    experts = ("grouped_matmul",) if model.moe is not None else ()
    states = () if model.state is None else ("recurrence",)
    return native.prefetch(("ragged_attention", "matmul", *experts, "norm", "rotary", "draw", *states, "unfilled"))


def start(
    params: Params, model: ModelConfig, choices: EngineConfig, *, phases: Phases, tower: Tower | None = None
) -> tuple[ResolvedConfig, Runner, Refinement | None]:
    """The resolved config, a runner with warm programs, and what to do about the step sizes while the engine is idle.

    The programs are all, or with `background_compile` that of a full step.
    """
    choices = replace(choices, vision=None if tower is None else tower.config)
    folder = compile_cache.use(choices.compile_cache_dir, group(choices, model))
    config = _resolve_as_before(choices, model, folder)
    candidates, measured, cost = config.budget_ladder, None, _cost_model(config, model)
    if config.fixed_chunks:
        size = determinism.choose(candidates, knee=cost.knee, max_num_seqs=config.max_num_seqs)
        config = replace(config, budget_ladder=(size,))
    elif choices.token_budget is None and not choices.remeasure:
        measured = _measured_before(config, model, folder)
        sizes = measured or ladder.modeled_ladder(cost, candidates, max_num_seqs=config.max_num_seqs)
        config = replace(config, budget_ladder=sizes)
    config = with_room_for_images(config)
    with phases.phase("allocating memory"):
        runner = Runner(prepare_params(params, model, config), model, config, folder=folder)
    if choices.remeasure:
        config = replace(config, budget_ladder=_measured_ladder(runner, config, model, folder, phases=phases))
        config = with_room_for_images(config)
    largest_first = runner.missing(config.budget_ladder[::-1])
    _compile(runner, largest_first[:1] if choices.background_compile else largest_first, phases=phases)
    if tower is not None:
        with phases.phase("compiling for images"):
            runner.add_tower(tower, config.token_budget)
    runner.warm_up()
    _save_start(phases, folder, runner, config)
    executables.forget_prefetched()
    compile_cache.send_soon(folder)
    if config.fitted:
        log.info("fit: %s", config.fitted)
    log.info("engine ready: %s", config)
    modeled = choices.token_budget is None and not (choices.remeasure or config.fixed_chunks) and measured is None
    if not (modeled and choices.refine_ladder and folder and folder.writable):
        return config, runner, None
    save = partial(
        ladder.save_choice, folder.path / ladder.FILE, _facts(config, model, candidates), model=ladder.describe(model)
    )
    return config, runner, Refinement(runner, cost, candidates, save=save)


def with_room_for_images(config: ResolvedConfig) -> ResolvedConfig:
    """`config` with steps that hold the tokens of an image beside one of each other sequence, so that none waits forever.

    Raises ValueError if the operator chose smaller steps.
    """
    images = config.images
    if images is None or not images.is_whole:
        return config
    if config.choices.promise is not None:
        raise ValueError(
            "a policy with a promise keeps steps short, but this model computes all tokens of an image in one step; choose "
            "policy='splitfuse', or images=False"
        )
    needed = images.most_tokens + config.max_num_seqs
    if config.token_budget >= needed or config.fixed_chunks:  # whose size `determinism` chose for them
        return config
    if config.choices.token_budget is not None:
        raise ValueError(
            f"token_budget={config.token_budget} is too small for the {images.most_tokens} tokens of an image beside "
            f"max_num_seqs={config.max_num_seqs} sequences; choose at least {needed}, or images=False"
        )
    return replace(config, budget_ladder=(*config.budget_ladder, needed))


def group(choices: EngineConfig, model: ModelConfig, place: saved_choices.Place | None = None) -> str:
    """A name for the starts that run the same programs: those with equal choices, except for these, which shape none.

    `place` is where the engine runs; None: here.
    """
    other = (
        "policy",
        "overlap",
        "background_compile",
        "prefix_caching",
        "generation_config",
        "chat_template",
        "compile_cache_dir",
        "remeasure",
        "refine_ladder",
        "logits_processor",
        "formats",
        "strict_config",
        "adapters",
        "images",
        "max_image_tokens",
        "vision",
    )
    shaping = {name: value for name, value in choices.changed.items() if name not in other and "promise" not in name}
    return f"{model.family}-{saved_choices.group((asdict(model), sorted(shaping.items())), place)}"


def facts_of_cache(choices: EngineConfig, model: ModelConfig, formats: tuple[str | None, ...]) -> tuple[object, ...]:
    """What the size of the KV cache depends on besides the machine's memory; `formats` as `formats_of`."""
    names = ("dtype", "quantize", "kv_dtype", "tensor_parallel", "max_num_seqs", "max_context_len", "block_size")
    kept = choices.formats.kept if choices.formats is not None else ()
    return asdict(model), [getattr(choices, name) for name in names], formats, kept


def _resolve_as_before(choices: EngineConfig, model: ModelConfig, folder: Folder | None) -> ResolvedConfig:
    """`resolve` with the number of KV blocks of an earlier start with these options if it fits; a new number is saved."""
    if choices.num_blocks is not None or folder is None:
        return resolve(choices, model)
    path = folder.path / BLOCKS_FILE
    facts = facts_of_cache(choices, model, formats_of(choices, jax.default_backend()))
    earlier = (saved_choices.load(path, facts) or {}).get("num_blocks")
    config = resolve(choices, model, earlier_blocks=earlier if isinstance(earlier, int) else None)
    if config.num_blocks != earlier and folder.writable:
        saved_choices.save(path, facts, {"model": ladder.describe(model), "num_blocks": config.num_blocks})
    return config


def _measured_before(config: ResolvedConfig, model: ModelConfig, folder: Folder | None) -> tuple[int, ...] | None:
    """The step sizes that were measured here for such a model and config; None if none were."""
    candidates = config.budget_ladder
    measured = ladder.load_choice(folder.path / ladder.FILE, _facts(config, model, candidates)) if folder else None
    return measured if measured is not None and set(measured) <= set(candidates) else None


def _cost_model(config: ResolvedConfig, model: ModelConfig) -> ladder.CostModel:
    device = jax.devices()[0]
    return ladder.cost_model(
        model,
        bytes_per_weight=typical_bytes(model, config.dtype, config.quantize, device.platform, kept=config.kept),
        device_kind=None if device.platform == "cpu" else device.device_kind,
        skips_padding=config.packed_weights,
    )


def _measured_ladder(
    runner: Runner, config: ResolvedConfig, model: ModelConfig, folder: Folder | None, *, phases: Phases
) -> tuple[int, ...]:
    """Compiles and times every candidate; only the programs of the chosen sizes are kept."""
    candidates = config.budget_ladder
    _compile(runner, runner.missing(candidates), phases=phases)
    costs = {budget: runner.measure(budget) for budget in candidates}
    log.info("measured step costs: %s", ", ".join(f"{t} tokens {1e3 * s:.1f} ms" for t, s in costs.items()))
    chosen = ladder.choose(
        costs,
        max_num_seqs=config.max_num_seqs,
        seconds_within=lambda budget, num_tokens: runner.measure(budget, num_tokens=num_tokens),
    )
    runner.keep_only(chosen)
    if folder and folder.writable:
        path, facts = folder.path / ladder.FILE, _facts(config, model, candidates)
        ladder.save_choice(path, facts, chosen, costs, model=ladder.describe(model))
    return chosen


def _prepare_as_before(phases: Phases, folder: Folder | None, model: ModelConfig, config: ResolvedConfig) -> None:
    """Tells the display how long the last start of such a model took, and begins to load the program that it needed."""
    saved = saved_choices.load(folder.path / STARTS_FILE, _start_facts(model, config)) if folder else None
    seconds, program = (saved.get("seconds"), saved.get("program")) if saved else (None, None)
    if folder is not None and isinstance(program, str):
        executables.prefetch(saved_in(folder), program, devices=devices_of(config))
    if isinstance(seconds, dict):
        phases.expected = {name: float(took) for name, took in seconds.items() if isinstance(took, int | float)}


def _save_start(phases: Phases, folder: Folder | None, runner: Runner, config: ResolvedConfig) -> None:
    model = runner.model
    if folder and folder.writable and "loading weights" in phases.seconds:
        seconds = {name: round(took, 3) for name, took in phases.seconds.items()}
        program = runner.programs.saved_name(config.token_budget)
        entry = {"model": ladder.describe(model), "seconds": seconds, "program": program}
        saved_choices.save(folder.path / STARTS_FILE, _start_facts(model, config), entry)


def _start_facts(model: ModelConfig, config: ResolvedConfig) -> object:
    return asdict(model), config.dtype, config.quantize, config.kept, config.tensor_parallel


def _compile(runner: Runner, missing: Sequence[tuple[int, Work]], *, phases: Phases) -> None:
    if missing:
        with phases.phase("compiling", total=len(missing), unit="program") as advance:
            runner.compile(missing, on_done=advance)


def _facts(config: ResolvedConfig, model: ModelConfig, candidates: Sequence[int]) -> tuple[object, ...]:
    """What the cost of a step depends on besides machine and versions: the model and the choices that shape a step."""
    return (
        asdict(model),
        config.dtype,
        config.quantize,
        config.kept,
        config.kv_dtype,
        config.tensor_parallel,
        config.block_size,
        config.max_num_seqs,
        config.choices.attention,
        config.stack_layers,
        config.max_context_len,
        list(candidates),
        native.origin(),
    )
