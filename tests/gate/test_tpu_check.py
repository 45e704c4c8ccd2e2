"""What the TPU gate decides without a compiler."""

from __future__ import annotations

from tests.gate.tpu_check import MOST_OPERATIONS, QUICK, TOPOLOGIES, too_many_operations


def test_more_operations_a_layer_than_before_fail() -> None:
    for (kind, check), most in MOST_OPERATIONS.items():
        assert kind in TOPOLOGIES
        assert check in QUICK, "CI would not notice"
        assert not too_many_operations(kind, check, most)
        assert too_many_operations(kind, check, most + 1) == f"{most + 1} operations a layer, where {most} suffice"


def test_operations_of_other_steps_are_only_printed() -> None:
    assert not too_many_operations("v5e", "step: Llama-3-8B", 1000)
