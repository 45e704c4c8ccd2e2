"""Prints JSON: for some engines the name of a step's program, as the engine computes it and from shapes alone.

    python -m tests.plan.programs.program_names

Needs two devices; without native kernels, so that weights are stored on the CPU as on an accelerator.
"""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fastgen_jax import EngineConfig
from fastgen_jax.core.progress import Phases
from fastgen_jax.engine import fit, kept_forms, machine, startup
from fastgen_jax.engine.adapter_stacks import stack_shapes
from fastgen_jax.engine.programs import Programs, further_arguments, program_name
from fastgen_jax.engine.resolve import ResolvedConfig, resolve
from fastgen_jax.engine.runner import Runner
from fastgen_jax.engine.weights import prepare_params
from fastgen_jax.models.sharding import tensor_mesh
from fastgen_jax.plan.program import step_arguments
from fastgen_jax.plan.source import describe
from tests.checkpoint.quantized_files import write_int4
from tests.checkpoint.tiny_files import write_gguf
from tests.engine.test_blocks import TOKENIZER
from tests.text.vocabularies import write_json
from tests.tiny import tiny_model

OPTIONS = {
    "plain": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantize": "int8"},
    "w8a8": {"dtype": "bfloat16", "quantize": "w8a8"},
    "int8 cache": {"kv_dtype": "int8"},
    "divided": {"dtype": "bfloat16", "tensor_parallel": 2},
    "divided int8": {"quantize": "int8", "tensor_parallel": 2},
    "divided w8a8": {"quantize": "w8a8", "tensor_parallel": 2},
    "adapters": {"dtype": "bfloat16", "max_adapters": 3, "max_adapter_rank": 4},
    "divided adapters": {"dtype": "bfloat16", "max_adapters": 3, "max_adapter_rank": 4, "tensor_parallel": 2},
}


SMALL: dict[str, Any] = {
    "token_budget": 8,
    "budget_ladder": (),
    "max_num_seqs": 4,
    "block_size": 4,
    "num_blocks": 16,
    "stack_layers": True,
}
QUANTIZED = {"kept": {}, "without fit": {"fit": False}, "int4": {"quantize": "int4"}, "divided": {"tensor_parallel": 2}}


def names(variant: str, **options: Any) -> tuple[str, str]:
    params, model = tiny_model(variant, stack_layers=True)
    config = resolve(EngineConfig(**SMALL | options), model)
    return both_names(Runner(prepare_params(params, model, config), model, config).programs, config)


def names_of_file(path: Path, **options: Any) -> tuple[str, str]:
    """As the engine starts from a quantized checkpoint, and from its headers."""
    choices = EngineConfig(**SMALL | {"dtype": "bfloat16"} | options)
    params, model, _, started, *_ = startup.load(path, choices, phases=Phases(logging.getLogger(), bar=False))
    config = resolve(started, model)
    programs = Runner(prepare_params(params, model, config), model, config).programs
    stored = describe(str(path)).stored
    formats = fit.candidates(choices, machine.Machine.here(), model, stored=stored)[0]
    assert bool(formats.choice.kept) == (choices.quantize != "none")
    return both_names(programs, resolve(replace(choices, formats=formats), model))


def both_names(programs: Programs, config: ResolvedConfig) -> tuple[str, str]:
    model = programs.model
    devices, bucket = jax.devices()[: config.tensor_parallel or 1], programs.bucket(8)
    arguments = programs._arguments(bucket, None)
    real = program_name((*arguments[:3], *arguments[4:]), model, programs.config, 8, "any", devices=devices)
    shapes = step_arguments(
        model,
        bucket,
        tensor_mesh(devices) if config.tensor_parallel else jax.devices()[0],
        num_rows=model.num_layers,
        num_blocks=config.num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        dtype=jnp.dtype(config.dtype),
        kv_dtype=jnp.dtype(config.kv_dtype),
        quantize=config.quantize,
        kept=config.kept_forms,
    )
    stacks = stack_shapes(model, config, programs.mesh)
    return real, program_name((*shapes[:3], *further_arguments(stacks)), model, config, 8, "any", devices=devices)


if __name__ == "__main__":
    machine.multiplies_int8 = lambda device: True  # so that this one is not refused
    found = {
        f"{variant}, {name}": names(variant, **o)
        for variant in ("default", "multi_head_tied")
        for name, o in OPTIONS.items()
    }
    machine.int4_kernel = lambda device: "hopper"
    kept_forms.int4_fits = lambda kernel, shape, *, size, dtype: True
    with tempfile.TemporaryDirectory() as folder:
        gguf = Path(folder) / "q4_1.gguf"
        write_gguf(gguf, kind="Q4_1", arrays=TOKENIZER, hidden_size=64, intermediate_size=128)
        paths = [gguf]
        for method in ("gptq", "awq"):
            paths.append(write_json(write_int4(Path(folder) / method, method, symmetric=method == "gptq", group=64)))
        for path in paths:
            found |= {f"{path.name}, {name}": names_of_file(path, **o) for name, o in QUANTIZED.items()}
    print(json.dumps(found))
