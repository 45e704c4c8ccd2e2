"""Starting an engine: loading weights, choosing step sizes, compiling programs."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import jax

from fastgen_jax.checkpoint import Checkpoint, SnapshotCheckpoint, load_params, open_checkpoint, resolve_model
from fastgen_jax.core.progress import shown
from fastgen_jax.engine import compile_cache, fit, ladder, saved_choices
from fastgen_jax.engine.config import EngineConfig, ResolvedConfig, formats_of, resolve
from fastgen_jax.engine.generation import defaults_of_model
from fastgen_jax.engine.runner import Runner
from fastgen_jax.engine.weights import prepare_leaf, prepare_params
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.weight_spec import Params
from fastgen_jax.text import Tokenizer, load_tokenizer
from pallas_kernels import native
from pallas_kernels.folders import Folder

log = logging.getLogger(__name__)

BLOCKS_FILE = "num_blocks.json"  # with the compiled programs, whose shapes depend on it


def load(
    model: str | os.PathLike[str], config: EngineConfig, *, progress: bool
) -> tuple[Params, ModelConfig, Tokenizer, EngineConfig, Path]:
    """Prepared weights, the model's config, its tokenizer, `config` with the settings that the checkpoint determines, and
    where the checkpoint is.

    An int8 snapshot runs as int8. Raises ValueError as `resolve_model`, `open_checkpoint` and `load_params` do: the
    checkpoint is missing, damaged or unsupported.
    """
    checkpoint = open_checkpoint(resolve_model(os.fspath(model)))
    if isinstance(checkpoint, SnapshotCheckpoint) and checkpoint.quantize:
        config = replace(config, quantize="int8")
    if config.generation_config == "auto":
        config = replace(config, generation_config=defaults_of_model(checkpoint.generation_config, checkpoint.path))
    # First, so that mistakes, and a model that does not fit, are reported before the weights are loaded.
    config = fit.with_formats(config, checkpoint.config, compile_cache.use(config.compile_cache_dir))
    resolved = resolve(config, checkpoint.config)
    tokenizer = load_tokenizer(checkpoint.tokenizer_source)
    if tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise ValueError(
            f"{checkpoint.path}: the tokenizer has {tokenizer.vocab_size:,} tokens but the embedding only "
            f"{checkpoint.config.vocab_size:,} rows; they do not belong together, or tokens were added to the tokenizer "
            "that the model was not trained with: use the tokenizer of this checkpoint"
        )
    with compile_cache.failures_logged():
        params = _read_weights(checkpoint, resolved, progress=progress)
    return params, checkpoint.config, tokenizer, config, checkpoint.path


def reload(path: Path, model: ModelConfig, config: ResolvedConfig) -> Params:
    """The weights of a checkpoint that was loaded before, in the form that its engine computes with.

    Raises ValueError if it is gone, or no longer a checkpoint of this model.
    """
    checkpoint = open_checkpoint(path)
    if checkpoint.config != model:
        raise ValueError(f"{path} now holds another model than the one that was loaded from it")
    return prepare_params(_read_weights(checkpoint, config, progress=False), model, config)


def _read_weights(checkpoint: Checkpoint, config: ResolvedConfig, *, progress: bool) -> Params:
    return load_params(
        checkpoint,
        dtype=config.dtype,
        stack_layers=config.stack_layers,
        prepare=lambda spec, array: prepare_leaf(spec, array, checkpoint.config, config),
        progress=progress,
    )


def start(params: Params, model: ModelConfig, choices: EngineConfig, *, progress: bool) -> tuple[ResolvedConfig, Runner]:
    """The resolved config, and a runner whose programs are compiled and warm."""
    folder = compile_cache.use(choices.compile_cache_dir)
    with compile_cache.failures_logged():
        config = _resolve_as_before(choices, model, folder)
        runner = Runner(prepare_params(params, model, config), model, config)
        if choices.token_budget is None:
            config = _choose_budgets(runner, config, model, folder, progress=progress)
        _compile(runner, config.budget_ladder, progress=progress)
        runner.keep_only(config.budget_ladder)
        runner.warm_up()
    if config.fitted:
        log.info("fit: %s", config.fitted)
    log.info("engine ready: %s", config)
    return config, runner


def _resolve_as_before(choices: EngineConfig, model: ModelConfig, folder: Folder | None) -> ResolvedConfig:
    """`resolve` with the number of KV blocks of an earlier start with these options if it fits; a new number is saved."""
    if choices.num_blocks is not None or folder is None:
        return resolve(choices, model)
    path = folder.path / BLOCKS_FILE
    facts = (
        asdict(model),
        [
            getattr(choices, name)
            for name in ("dtype", "quantize", "kv_dtype", "tensor_parallel", "max_num_seqs", "max_context_len", "block_size")
        ],
        formats_of(choices, jax.default_backend()),
    )
    earlier = (saved_choices.load(path, facts) or {}).get("num_blocks")
    config = resolve(choices, model, earlier_blocks=earlier if isinstance(earlier, int) else None)
    if config.num_blocks != earlier and folder.writable:
        saved_choices.save(path, facts, {"model": ladder.describe(model), "num_blocks": config.num_blocks})
    return config


def _choose_budgets(
    runner: Runner, config: ResolvedConfig, model: ModelConfig, folder: Folder | None, *, progress: bool
) -> ResolvedConfig:
    candidates = config.budget_ladder
    path = folder.path / ladder.FILE if folder else None
    facts = _facts(config, model, candidates)
    chosen = ladder.load_choice(path, facts) if path and not config.choices.remeasure else None
    if chosen is None or not set(chosen) <= set(candidates):
        _compile(runner, candidates, progress=progress)
        costs = {budget: runner.measure(budget) for budget in candidates}
        log.info("measured step costs: %s", ", ".join(f"{t} tokens {1e3 * s:.1f} ms" for t, s in costs.items()))
        chosen = ladder.choose_ladder(
            costs,
            ladder.choose_budget(costs, max_num_seqs=config.max_num_seqs),
            seconds_within=lambda budget, num_tokens: runner.measure(budget, num_tokens=num_tokens),
        )
        if path and folder and folder.writable:
            ladder.save_choice(path, facts, chosen, costs, model=ladder.describe(model))
    return replace(config, budget_ladder=chosen)


def _compile(runner: Runner, budgets: Sequence[int], *, progress: bool) -> None:
    missing = [budget for budget in budgets if budget not in runner.budgets]
    if missing:
        with shown(log, "compiling", total=len(missing), unit="program", bar=progress) as advance:
            runner.compile(missing, on_done=lambda budget: advance())


def _facts(config: ResolvedConfig, model: ModelConfig, candidates: Sequence[int]) -> tuple[object, ...]:
    """What the cost of a step depends on besides machine and versions: the model and the choices that shape a step."""
    return (
        asdict(model),
        config.dtype,
        config.quantize,
        config.kv_dtype,
        config.tensor_parallel,
        config.block_size,
        config.max_num_seqs,
        config.choices.attention,
        config.stack_layers,
        config.max_context_len,
        list(candidates),
        native.available(),
    )
