"""Prints JSON: for some engines the name of a step's program, as the engine computes it and from shapes alone.

    python -m tests.plan.programs.program_names

Needs two devices; without native kernels, so that weights are stored on the CPU as on an accelerator.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp

from fastgen_jax import EngineConfig
from fastgen_jax.engine import machine
from fastgen_jax.engine.adapter_stacks import stack_shapes
from fastgen_jax.engine.programs import further_arguments, program_name
from fastgen_jax.engine.resolve import resolve
from fastgen_jax.engine.runner import Runner
from fastgen_jax.engine.weights import prepare_params
from fastgen_jax.models.sharding import tensor_mesh
from fastgen_jax.plan.program import step_arguments
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


def names(variant: str, **options) -> tuple[str, str]:
    params, model = tiny_model(variant, stack_layers=True)
    choices = EngineConfig(token_budget=8, max_num_seqs=4, block_size=4, num_blocks=16, stack_layers=True, **options)
    config = resolve(choices, model)
    programs = Runner(prepare_params(params, model, config), model, config).programs
    devices, bucket = jax.devices()[: config.tensor_parallel or 1], programs.bucket(8)
    arguments = programs._arguments(bucket, None)
    real = program_name((*arguments[:3], *arguments[4:]), model, config, 8, "any", devices=devices)
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
    print(json.dumps(found))
