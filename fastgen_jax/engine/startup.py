"""From a name to an engine that is ready: weights loaded, step sizes chosen, programs compiled."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax

from fastgen_jax.checkpoint import SnapshotCheckpoint, load_params, open_checkpoint, resolve_model
from fastgen_jax.core.progress import shown
from fastgen_jax.engine import ladder
from fastgen_jax.engine.config import MEASURED_BUDGETS, EngineConfig, ResolvedConfig, resolve
from fastgen_jax.engine.generation import defaults_of_model
from fastgen_jax.engine.runner import Runner
from fastgen_jax.engine.weights import prepare_leaf, prepare_params
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.params import Params
from fastgen_jax.text import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)


def load(
    model: str | os.PathLike[str], config: EngineConfig, *, progress: bool
) -> tuple[Params, ModelConfig, Tokenizer, EngineConfig]:
    """Weights in the form of `config`, the facts of the model, its tokenizer, and `config` with what the checkpoint decides.

    An int8 snapshot runs as int8. Raises ValueError as `resolve_model`, `open_checkpoint` and `load_params` do: nothing
    there, damaged, unsupported.
    """
    checkpoint = open_checkpoint(resolve_model(os.fspath(model)))
    if isinstance(checkpoint, SnapshotCheckpoint) and checkpoint.quantize:
        config = replace(config, quantize="int8")
    if config.generation_config == "auto":
        config = replace(config, generation_config=defaults_of_model(checkpoint.generation_config, checkpoint.path))
    resolved = resolve(config, checkpoint.config)  # before the long part: a mistake should show at once
    tokenizer = load_tokenizer(checkpoint.tokenizer_source)
    if tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise ValueError(
            f"{checkpoint.path}: the tokenizer has {tokenizer.vocab_size:,} tokens but the embedding only "
            f"{checkpoint.config.vocab_size:,} rows; they do not belong together, or the tokenizer got tokens that the "
            "model never learned: take the tokenizer of this very checkpoint"
        )
    params = load_params(
        checkpoint,
        dtype=resolved.dtype,
        stack_layers=bool(resolved.stack_layers),
        prepare=lambda path, array: prepare_leaf(path, array, checkpoint.config, resolved),
        progress=progress,
    )
    return params, checkpoint.config, tokenizer, config


def start(
    params: Params, model: ModelConfig, open_config: EngineConfig, *, progress: bool
) -> tuple[ResolvedConfig, Runner]:
    """The config with every choice made, and a runner whose programs are compiled and warm."""
    config = resolve(open_config, model)
    folder = _use_compile_cache(config)
    runner = Runner(prepare_params(params, model, config), model, config)
    if config.token_budget is None:
        config = _choose_budgets(runner, config, model, folder, progress=progress)
    assert config.budget_ladder is not None
    _compile(runner, config.budget_ladder, progress=progress)
    runner.keep_only(config.budget_ladder)
    runner.warm_up()
    log.info("engine ready: %s", config)
    return config, runner


def _choose_budgets(
    runner: Runner, config: ResolvedConfig, model: ModelConfig, folder: Path | None, *, progress: bool
) -> ResolvedConfig:
    path = folder / "budgets.json" if folder else None
    key = _measurement_key(config, model)
    chosen = ladder.load_choice(path, key) if path else None
    if chosen is None:
        candidates = [budget for budget in MEASURED_BUDGETS if runner.can_hold(budget)]
        _compile(runner, candidates, progress=progress)
        costs = {budget: runner.measure(budget) for budget in candidates}
        log.info("measured step costs: %s", ", ".join(f"{t} tokens {1e3 * s:.1f} ms" for t, s in costs.items()))
        chosen = ladder.choose_ladder(
            costs, ladder.choose_budget(costs, max_num_seqs=config.max_num_seqs),
            seconds_within=lambda budget, num_tokens: runner.measure(budget, num_tokens=num_tokens),
        )
        if path:
            ladder.save_choice(path, key, chosen, costs)
    return replace(config, token_budget=chosen[-1], budget_ladder=chosen)


def _compile(runner: Runner, budgets: Any, *, progress: bool) -> None:
    missing = [budget for budget in budgets if budget not in runner.budgets]
    if missing:
        with shown(log, "compiling", total=len(missing), unit="program", bar=progress) as advance:
            runner.compile(missing, on_done=lambda budget: advance())


def _use_compile_cache(config: EngineConfig) -> Path | None:
    """The folder for compiled programs and measurements, JAX's persistent cache pointed there unless the user has one."""
    if config.compile_cache_dir == "":
        return None
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgen_jax"
    folder = Path(config.compile_cache_dir) if config.compile_cache_dir else base
    if getattr(jax.config, "jax_compilation_cache_dir") is None:  # noqa: B009 (defined at run time)
        jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
        # The default skips programs that compile within a second; here each one delays the first token.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder


def _measurement_key(config: ResolvedConfig, model: ModelConfig) -> str:
    """Names what step costs depend on: device, versions, model and the choices that shape a step."""
    device = jax.devices()[0].device_kind
    if device == "cpu":
        device = f"cpu {platform.machine()} x{os.cpu_count()}"
    facts = repr((asdict(model), config.dtype, config.quantize, config.kv_dtype, config.tensor_parallel, config.block_size,
                  config.max_num_seqs, config.attention, config.stack_layers, config.max_context_len))
    digest = hashlib.sha256(facts.encode()).hexdigest()[:16]
    return f"{device}, jax {jax.__version__}, {model.family} {digest}"
