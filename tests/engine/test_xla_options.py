"""Options of XLA by device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fastgen_jax import EngineConfig
from fastgen_jax.engine.machine import Machine
from fastgen_jax.engine.memory import Memory
from fastgen_jax.engine.resolve import resolve
from fastgen_jax.engine.xla_options import step_options
from pallas_kernels.jax_versions import COMMAND_BUFFERS, too_old
from tests.tiny import tiny_model

H100: Any = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0")
T4: Any = SimpleNamespace(platform="gpu", device_kind="Tesla T4", compute_capability="7.5")
GRAPH = "xla_gpu_enable_command_buffer"
needs_graphs = pytest.mark.skipif(too_old(COMMAND_BUFFERS) is not None, reason="this jax is older")


@needs_graphs
@pytest.mark.parametrize("device", [H100, T4])
def test_a_step_on_a_gpu_is_a_graph_with_loops_and_branches(device: Any) -> None:
    options = step_options(device)
    assert options is not None
    assert {"WHILE", "CONDITIONAL"} < set(str(options[GRAPH]).split(","))
    alone = step_options(device, cuda_graphs=False)
    assert alone is not None
    assert alone[GRAPH] == ""
    assert alone["xla_gpu_enable_triton_gemm"] is False


@pytest.mark.parametrize("device", [H100, T4])
@pytest.mark.parametrize("has_int8_weights", [False, True])
def test_nothing_is_computed_twice_because_weights_and_cache_fill_a_gpu(device: Any, has_int8_weights: bool) -> None:
    options = step_options(device, has_int8_weights=has_int8_weights)
    assert options is not None
    assert "rematerialization" in str(options["xla_disable_hlo_passes"]).split(",")


@pytest.mark.skipif(too_old(COMMAND_BUFFERS) is None, reason="this jax is newer")
def test_an_older_jax_is_not_asked_for_what_it_does_not_know() -> None:
    assert GRAPH not in (step_options(H100) or {})


def test_other_devices_have_options_of_their_own() -> None:
    assert step_options(SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")) is None
    cpu = step_options(SimpleNamespace(platform="cpu", device_kind="cpu"), deterministic=True)
    assert cpu == {"xla_disable_hlo_passes": "tree_reduction_rewriter"}


@pytest.mark.parametrize("wanted", [False, True])
def test_graphs_are_for_gpus(wanted: bool) -> None:
    with pytest.raises(ValueError, match=f"cuda_graphs={wanted}, but this is cpu; omit it"):
        resolve(EngineConfig(cuda_graphs=wanted), tiny_model()[1])
    gpu = Machine(platform="gpu", kind=H100.device_kind, memory=Memory(limit=70 * 2**30))
    config = EngineConfig(cuda_graphs=wanted)
    if too_old(COMMAND_BUFFERS):
        with pytest.raises(ValueError, match=rf"cuda_graphs={wanted} needs jax 0\.12 or newer"):
            resolve(config, tiny_model()[1], machine=gpu)
    else:
        assert resolve(config, tiny_model()[1], machine=gpu).cuda_graphs == wanted
