"""The tiny random checkpoints of tests/reference/tiny, as engines."""

from __future__ import annotations

import threading
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgen_jax import Engine, EngineConfig, RequestOutput, SamplingParams
from fastgen_jax.api.async_engine import AsyncEngine
from fastgen_jax.checkpoint import load_params, open_checkpoint
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.params import init_params
from fastgen_jax.models.weight_spec import Params

HOME = Path(__file__).parent / "reference" / "tiny"
VARIANTS = sorted(path.name for path in HOME.iterdir() if path.is_dir())


@cache
def tiny_model(variant: str = "default", *, stack_layers: bool = False) -> tuple[Params, ModelConfig]:
    """Float32 weights and config of a variant."""
    checkpoint = open_checkpoint(HOME / variant)
    params = load_params(checkpoint, dtype="float32", stack_layers=stack_layers, prepare=None, progress=False)
    return params, checkpoint.config


def random_params(config: ModelConfig, *, seed: int = 0) -> Params:
    """Random weights in the stacked form; biases and norms are random too. NumPy makes them, so that nothing is compiled."""
    rng, shapes = np.random.default_rng(seed), jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype), shapes)


def weights_config(quantize: str) -> Any:
    """What preparing a weight reads of the config of an engine on one accelerator."""
    return SimpleNamespace(
        num_adapters=0,
        dtype="bfloat16",
        activation_dtype="bfloat16",
        tensor_parallel=None,
        quantize=quantize,
        packed_weights=False,
        kept_forms={},
    )


def expected(variant: str = "default") -> dict[str, np.ndarray]:
    """What transformers computed: token_ids, logits, greedy."""
    return dict(np.load(HOME / variant / "expected.npz"))


def tiny_engine(variant: str = "default", **options: Any) -> Engine:
    """A small engine: budget 32, 8 sequences, 64 blocks of 4 tokens, unless `options` say otherwise.

    Engines are kept, because compiling one takes longer than most tests; a test leaves its engine idle.
    """
    settings = {"token_budget": 32, "budget_ladder": (8,), "max_num_seqs": 8, "block_size": 4, "num_blocks": 64, **options}
    engine = _tiny_engine(variant, tuple(sorted(settings.items())))
    assert not engine.has_work, "another test left requests behind"
    assert not len(engine.manual_sequences), "another test left sequences of put behind"
    return engine


@cache
def _tiny_engine(variant: str, settings: tuple[tuple[str, Any], ...]) -> Engine:
    params, model = tiny_model(variant)
    return Engine(params, model, EngineConfig(**dict(settings)))


def greedy(max_new_tokens: int, **options: Any) -> SamplingParams:
    """Greedy decoding of exactly so many tokens."""
    return SamplingParams(max_new_tokens=max_new_tokens, do_sample=False, ignore_eos=True, **options)


def drain(engine: Engine) -> dict[str, list[RequestOutput]]:
    """Steps until nothing is left; every request's outputs in order."""
    outputs: dict[str, list[RequestOutput]] = {}
    for _ in range(10_000):
        if not engine.has_work:
            return outputs
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    raise AssertionError("the engine did not finish in 10,000 steps")


def tokens_of(outputs: list[RequestOutput]) -> list[int]:
    """All tokens that a request generated."""
    return [token for output in outputs for token in output.new_token_ids]


def pause_after_outputs(engine: AsyncEngine) -> threading.Event:
    """Makes the engine's thread stand still behind every delivery of outputs until the event that is returned is set."""
    resume, hand_over = threading.Event(), engine._thread._deliver

    def deliver(events):
        hand_over(events)
        resume.wait(60)

    engine._thread._deliver = deliver
    return resume
