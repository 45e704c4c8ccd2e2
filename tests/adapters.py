"""Random adapters of the tiny model, and an engine with places for them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from fastgen_jax import Engine, EngineConfig
from fastgen_jax.engine.metrics import compile_count
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.params import layers_with
from fastgen_jax.models.targets import Lora, adaptable
from tests.serving.tiny_server import tokenizer
from tests.tiny import tiny_model

COUNT = 8
RANK = 4
TARGETS = (("qkv",), ("o", "down"), ("gate_up",), None)  # of the adapters in turn; None: all
SCALE = 0.5


def random_lora(model: ModelConfig, seed: int, *, rank: int = RANK, targets: tuple[str, ...] | None = None) -> Lora:
    """Adapters in the form of `lora_params` that change the results visibly."""
    rng, having = np.random.default_rng(seed), layers_with(model)

    def pair(count: int, inputs: int, width: int) -> dict[str, np.ndarray]:
        shapes = (count, inputs, rank), (count, rank, width)
        return {name: 0.3 * rng.standard_normal(shape, np.float32) for name, shape in zip("ab", shapes, strict=True)}

    return {
        "layers": {
            name: tuple(pair(len(having[name]), spec.shape[0], width) for width in spec.parts or spec.shape[-1:])
            for name, spec in adaptable(model).items()
            if targets is None or name in targets
        }
    }


@cache
def tiny_lora(number: int) -> Lora:
    """Adapter a0, a1, ... of `adapter_engine`: of several ranks, and of different matrices."""
    return random_lora(tiny_model()[1], number, rank=1 + number % RANK, targets=TARGETS[number % len(TARGETS)])


def new_engine(**options: Any) -> Engine:
    """An engine with `COUNT` adapters, a0 to a7."""
    params, model = tiny_model()
    settings = {"token_budget": 16, "budget_ladder": (), "max_num_seqs": 12, "block_size": 4, "num_blocks": 128, **options}
    config = EngineConfig(max_adapters=COUNT, max_adapter_rank=RANK, **settings)
    engine = Engine(params, model, config, tokenizer=tokenizer())
    compiles = compile_count()
    for number in range(COUNT):
        engine.load_adapter(f"a{number}", tiny_lora(number), scale=SCALE)
    assert compile_count() == compiles, "loading compiles nothing"
    return engine


@cache
def adapter_engine() -> Engine:
    """The shared engine; a test leaves it idle and with these adapters."""
    return new_engine()
