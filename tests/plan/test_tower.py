"""What a vision tower needs beside the weights and the cache, estimated and compiled."""

from __future__ import annotations

import json

import jax
import pytest

from fastgen_jax.models.sharding import tensor_mesh
from fastgen_jax.models.vision.read import images_from_hf, largest
from fastgen_jax.plan import tower
from fastgen_jax.plan.hlo import copied_arrays
from fastgen_jax.plan.report import make_plan
from tests.models.vision.reference import QWEN

PROGRAM = """
%body (p: bf16[8,4]) -> bf16[8,4] {
  %inside = f32[64,16,128]{2,1,0} copy(%p)
  %smaller = f32[64,16]{1,0} copy(%p)
  %fused = f32[64,16,128]{2,1,0} fusion(%p), kind=kLoop, calls=%wrapped_copy
  %written = f32[64,16,128]{2,1,0} fusion(%p), kind=kLoop, calls=%fused_scatter
  ROOT %r = bf16[8,4] negate(%p)
}
ENTRY %main (p: bf16[8,4]) -> bf16[8,4] {
  %outside = f32[64,16,128]{1,2,0} copy(%p)
  %moved = (f32[64,16,128]{1,2,0}, f32[64,16,128]{2,1,0}, u32[]) copy-start(%p)
  %fetched = (f32[64,16,128]{2,1,0:T(8,128)S(1)}, f32[64,16,128]{2,1,0:T(8,128)}, u32[]) copy-start(%p)
  %back = (f32[64,16,128]{2,1,0:T(8,128)}, f32[64,16,128]{2,1,0:T(8,128)S(1)}, u32[]) copy-start(%p)
  ROOT %w = bf16[8,4] while(%p), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"8"}}
}
"""


def test_copies_of_states_are_detected_and_writing_to_them_is_none() -> None:
    found = {copy.name: copy.times for copy in copied_arrays(PROGRAM, {(64, 16, 128)})}
    assert found == {"inside": 8, "fused": 8, "outside": 1, "moved": 1}  # not what goes into VMEM and back


def config() -> dict:
    return json.loads((QWEN[1] / "config.json").read_text())


def test_a_plan_counts_what_the_tower_needs_for_the_largest_image() -> None:
    options = {"topology": "h100:1", "context": 64, "budgets": [16], "max_num_seqs": 4, "block_size": 16}
    with_images, without = (
        make_plan(config(), **options, dtype="bfloat16", images=images, compile=False) for images in (True, False)
    )
    shown = images_from_hf(config(), {})
    assert shown is not None
    needed = tower.temporary_bytes(largest(shown, 4096), 2)
    assert with_images.memory.temporaries == needed > without.memory.temporaries
    assert tower.temporary_bytes(largest(shown, 1024), 2) < needed


@pytest.mark.slow
def test_the_estimate_is_near_what_the_compiler_says() -> None:
    shown = images_from_hf(config(), {})
    assert shown is not None
    shown = largest(shown, 256)
    program = tower.compile_tower(shown, tensor_mesh(jax.devices()[:1]), dtype="float32")
    assert program.weights > 0
    assert program.patches >= 256 * 4
    assert program.temporaries < 4 * tower.temporary_bytes(shown, 4)
