"""Latents are cached once: their values are the first numbers of their keys."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest

from fastgen_jax import Engine, EngineConfig
from fastgen_jax.checkpoint import open_checkpoint
from fastgen_jax.core import KVCache
from fastgen_jax.engine.footprint import block_bytes, token_bytes
from fastgen_jax.models.cache import empty_cache
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import family_of
from tests.engine.test_engine import PROMPTS, generate
from tests.gate.models import DEEPSEEK_V3_5_LAYERS, released
from tests.models.parity import folder, load

NUM_BLOCKS = 6


def config_of(hf: dict) -> ModelConfig:
    return family_of(hf["architectures"][0]).config_from_hf(hf)


def shapes(config: ModelConfig, platform: str, dtype: str) -> KVCache:
    sizes = {"num_rows": config.num_layers, "num_blocks": NUM_BLOCKS, "block_size": 128, "num_slots": 2}
    return jax.eval_shape(lambda: empty_cache(config, **sizes, dtype=jnp.dtype(dtype), platform=platform))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize(
    ("family", "variant", "values_in_keys"),
    [
        ("deepseek_v2", "lite", True),
        ("deepseek_v3", "default", True),
        ("glm4_moe_lite", "default", True),
        ("deepseek_v32", "sparse", False),
        ("llama", "default", False),
    ],
)
def test_a_cache_takes_the_bytes_that_are_planned_for_it(
    family: str, variant: str, values_in_keys: bool, platform: str, dtype: str
) -> None:
    config = open_checkpoint(folder(family, variant)).config
    cache = shapes(config, platform, dtype)
    num_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert num_bytes == NUM_BLOCKS * block_bytes(config, platform, kv_dtype=dtype, block_size=128, num_groups=1)
    assert cache.values_in_keys == values_in_keys
    assert cache.packed == (platform == "tpu" and not values_in_keys)  # these heads have up to 64 numbers
    assert (cache.v is None) == (cache.packed or values_in_keys)
    assert cache.head_dim == {"cpu": config.head_dim, "tpu": 128 if values_in_keys else 64}[platform]


def test_a_token_of_deepseek_v3_takes_576_numbers_a_layer_and_one_of_v32_1280() -> None:
    config = config_of(DEEPSEEK_V3_5_LAYERS)
    assert token_bytes(config, "gpu", kv_dtype="bfloat16") == 5 * 2 * 576
    assert token_bytes(config, "tpu", kv_dtype="bfloat16") == 5 * 2 * 640  # a multiple of 128
    assert token_bytes(config, "tpu", kv_dtype="int8") == 5 * (640 + 4)
    assert token_bytes(config, "gpu", kv_dtype="bfloat16", num_devices=8) == 8 * 5 * 2 * 576  # a copy on each
    sparse = config_of(released("deepseek-ai/DeepSeek-V3.2"))
    assert token_bytes(sparse, "gpu", kv_dtype="bfloat16") == 61 * 2 * 2 * 640


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_preemption_and_cached_prefixes_do_not_change_the_tokens_of_latents(kv_dtype: str) -> None:
    params, config = load("deepseek_v3", "default")
    prompts = [tuple(3 + token % (config.vocab_size - 3) for token in prompt) for prompt in PROMPTS]

    def engine(num_blocks: int, **options: bool) -> Engine:
        sizes = {"token_budget": 32, "budget_ladder": (), "max_num_seqs": 8, "block_size": 4, "num_blocks": num_blocks}
        return Engine(params, config, EngineConfig(**sizes, **options, dtype="float32", kv_dtype=kv_dtype))

    alone = engine(64, prefix_caching=False)
    expected = [generate(alone, [prompt])[0] for prompt in prompts]
    tight = engine(18)
    assert generate(tight, prompts) == expected
    assert tight.scheduler.stats.num_preemptions > 0
    assert generate(tight, prompts[6:8]) == expected[6:8]  # their prefixes are cached by now
    assert tight.runner.kv_cache.v is None
