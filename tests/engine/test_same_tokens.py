"""Same request, same tokens, to the last bit, with native kernels."""

from __future__ import annotations

import pytest

from fastgen_jax import Engine, EngineConfig
from pallas_kernels import native
from tests.engine.same_tokens import LADDERS, different
from tests.models.parity import load
from tests.tiny import tiny_engine

pytestmark = pytest.mark.skipif(not native.available(), reason="plain XLA picks the order of a sum by the number of rows")


def make(**settings):
    return tiny_engine(**{"num_blocks": 256, "max_num_seqs": 16, "block_size": 4, **settings})


def test_batching_scoring_preemption_and_program_shape_do_not_change_a_bit() -> None:
    found = different(make, 16, ["odd sizes, preempted"])
    assert found == dict.fromkeys(found, 0)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"quantize": "int8"}, {"kv_dtype": "bfloat16"}], ids=str)
def test_batching_does_not_change_a_bit_with_narrow_weights_or_cache(options) -> None:
    found = different(lambda **settings: make(**settings, **options), 60, ["small programs", "odd sizes, preempted"])
    assert found == dict.fromkeys(found, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "variant"),
    [("mixtral", "default"), ("deepseek_v3", "default"), ("deepseek_v32", "sparse"), ("deepseek_v32", "glm5_sparse")],
)
def test_batching_does_not_change_a_bit_of_experts_and_latents(family, variant) -> None:
    params, config = load(family, variant, stack_layers=True)
    shape = {"dtype": "float32", "max_num_seqs": 16, "block_size": 4}
    engines = lambda **settings: Engine(params, config, EngineConfig(**{**shape, "num_blocks": 256, **settings}))  # noqa: E731
    found = different(engines, 32, ["small programs", "odd sizes, preempted"])
    assert found == dict.fromkeys(found, 0)


@pytest.mark.slow
def test_batching_does_not_change_a_bit_for_thousands_of_seeds() -> None:
    found = different(make, 3000, list(LADDERS))
    assert found == dict.fromkeys(found, 0)
