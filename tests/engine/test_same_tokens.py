"""Same request, same tokens: nothing but the request decides, to the last bit, where the native kernels run."""

from __future__ import annotations

import pytest

from pallas_kernels import native
from tests.engine.same_tokens import LADDERS, different
from tests.tiny import tiny_engine

pytestmark = pytest.mark.skipif(not native.available(), reason="plain XLA picks the order of a sum by the number of rows")


def make(**settings):
    return tiny_engine(**{"num_blocks": 256, "max_num_seqs": 16, "block_size": 4, **settings})


def test_company_scoring_preemption_and_the_shape_of_the_program_do_not_change_a_bit() -> None:
    found = different(make, 30, ["small programs", "odd sizes, preempted"])
    assert found == dict.fromkeys(found, 0)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"quantize": "int8"}, {"kv_dtype": "bfloat16"}], ids=str)
def test_nor_do_they_with_weights_or_a_cache_of_fewer_bits(options) -> None:
    found = different(lambda **settings: make(**settings, **options), 60, ["small programs", "odd sizes, preempted"])
    assert found == dict.fromkeys(found, 0)


@pytest.mark.slow
def test_nor_do_they_for_thousands_of_seeds() -> None:
    found = different(make, 3000, list(LADDERS))
    assert found == dict.fromkeys(found, 0)
