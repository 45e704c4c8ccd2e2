"""Rows of logits whose layout changes are found in the text of a program."""

from __future__ import annotations

import pytest

from fastgen_jax.plan.hlo import relaid_rows

PROGRAM = """
ENTRY %main (x: f32[64,1024]) -> f32[64] {{
  %x = f32[64,1024]{{1,0:T(8,128)}} parameter(0)
  %made = {made}
  ROOT %r = f32[64]{{0:T(128)}} reduce(%made)
}}
"""


@pytest.mark.parametrize(
    ("made", "found"),
    [
        ("f32[64,1024]{1,0:T(8,128)S(1)} copy(%x)", False),
        ("f32[64,8,128]{2,0,1:T(8,128)} copy(%x)", False),
        ("f32[64,1024]{1,0:T(8,128)} exponential(%x)", False),
        ("f32[64,1024]{0,1:T(8,128)} copy(%x)", True),
        ("f32[64,8,128]{2,1,0:T(8,128)} reshape(%x)", True),
        ("f32[65536]{0:T(1024)} fusion(%x)", True),
        ("(s32[64]{0:T(128)}, s32[64,1024]{0,1:T(8,128)}) fusion(%x)", True),
        ("f32[32,1024]{0,1:T(8,128)} slice(%x)", False),
    ],
)
def test_rows_that_get_another_layout_are_found(made: str, found: bool) -> None:
    assert relaid_rows(PROGRAM.format(made=made), 64, 1024) == (["made"] if found else [])
