"""Programs compiled ahead have the names that the engine will look for, and the config that it will resolve."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from fastgen_jax import Engine, EngineConfig, SamplingParams, cli
from fastgen_jax.devices import parse_topology
from fastgen_jax.engine import executables
from fastgen_jax.models.sharding import tensor_mesh
from fastgen_jax.plan import ahead
from fastgen_jax.plan.ahead import resolve_for
from fastgen_jax.plan.program import DoesNotCompile
from fastgen_jax.text.grammar import Grammar
from tests.gate.models import LLAMA_3_8B, LLAMA_3_70B

REPOSITORY = Path(__file__).parents[2]


def llama(config=LLAMA_3_8B):
    from fastgen_jax.models.families import family_of

    return family_of(config["architectures"][0]).config_from_hf(config)


def test_the_name_of_a_program_follows_from_shapes_alone() -> None:
    flags = "--xla_force_host_platform_device_count=2"
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": flags, "PALLAS_KERNELS_NATIVE": "0"}
    command = [sys.executable, "-m", "tests.plan.programs.program_names"]
    done = subprocess.run(command, env=variables, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    names = json.loads(done.stdout.splitlines()[-1])
    plain = {case: pair for case, pair in names.items() if case.startswith(("default", "multi_head_tied"))}
    assert len(plain) == len({engine for engine, _ in plain.values()}) == 18
    assert len(names) - len(plain) == 12, "of quantized checkpoints"
    for case, (engine, from_shapes) in names.items():
        assert engine == from_shapes, case
    assert names["gptq, kept"] == names["gptq, without fit"] != names["awq, kept"], "which has offsets"


def test_a_model_fills_the_memory_of_its_devices() -> None:
    config = resolve_for(EngineConfig(tensor_parallel=4), llama(), parse_topology("v5e:2x2"))
    assert (config.dtype, config.kv_dtype, config.block_size) == ("bfloat16", "bfloat16", 32)
    assert config.budget_ladder == (16, 128, 256, 512)
    weights, block = 16.06e9 / 4, 2 * 32 * 8 * 128 * 32 * 2 / 4  # bytes of a device
    for reported in (0.96, 0.99):  # a start keeps a number of blocks in this range
        limit = reported * 16 * 2**30
        assert 0.75 * limit < weights + config.num_blocks * block < 0.9 * limit
    h100 = resolve_for(EngineConfig(), llama(), parse_topology("h100:1"))
    reported = 0.75 * 79.1 * 2**30  # by default JAX takes three quarters of a GPU
    assert 0.75 * reported < 16.06e9 + h100.num_blocks * block * 4 < 0.9 * reported
    few = resolve_for(EngineConfig(tensor_parallel=4, max_num_seqs=1, token_budget=6), llama(), parse_topology("v5e:2x2"))
    assert few.num_blocks == 8192 // 32
    assert few.budget_ladder == (1, 2, 4, 6)


@pytest.mark.parametrize(
    ("options", "model", "message"),
    [
        ({"tensor_parallel": 8}, LLAMA_3_8B, "tensor_parallel=8 but v5e:2x2 has 4 devices; choose at most that"),
        (
            {"tensor_parallel": 3},
            LLAMA_3_8B | {"num_attention_heads": 2, "num_key_value_heads": 2},
            "choose at most 2 devices",
        ),
        ({"fit": False}, LLAMA_3_70B, "no memory for a single KV block: the weights take 131.4 GiB of each device"),
        ({"quantize": "fp8"}, LLAMA_3_8B, "or a TPU7x, but this is v5e"),
        ({"stack_layers": False}, LLAMA_3_8B, "stack_layers=False and logits_processor are not supported"),
    ],
)
def test_impossible_options_are_refused(options, model, message) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_for(EngineConfig(**options), llama(model), parse_topology("v5e:2x2"))


@pytest.mark.parametrize(
    ("quantize", "topology"), [("w8a8", "v5e:2x2"), ("w8a8", "v6e:1x1"), ("fp8", "tpu7x:1x1x1"), ("fp8", "h200:1")]
)
def test_products_of_8_bits_are_for_the_devices_that_have_them(quantize, topology, monkeypatch) -> None:
    monkeypatch.setattr("fastgen_jax.plan.kernels.too_old", lambda version: None)  # as with the jax that has the kernels
    config, known = EngineConfig(quantize=quantize), parse_topology(topology)
    assert resolve_for(config, llama(), known).quantize == quantize
    other = {"w8a8": "fp8", "fp8": "w8a8"}[quantize]
    with pytest.raises(
        ValueError, match=f"quantize='{other}' needs a.* but this is {known.device.kind}.*use quantize='int8'"
    ):
        resolve_for(EngineConfig(quantize=other), llama(), known)


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_program_of_a_deterministic_engine_is_compiled_as_one(deterministic: bool, monkeypatch) -> None:
    asked = []

    def step_program(*_, deterministic: bool, **others):
        asked.append(deterministic)
        raise DoesNotCompile

    monkeypatch.setattr(ahead, "step_program", step_program)
    config = resolve_for(EngineConfig(deterministic=deterministic), llama(), parse_topology("v6e:1x1"))
    with pytest.raises(DoesNotCompile):
        ahead._compile(llama(), config, tensor_mesh(jax.devices()[:1]), config.token_budget, "any", None)
    assert asked == [deterministic]


@pytest.mark.slow
def test_programs_compiled_here_are_loaded_by_the_next_start(tmp_path, monkeypatch, capsys, without_jax_cache) -> None:
    options = {"token_budget": 8, "max_num_seqs": 4, "block_size": 4, "num_blocks": 16}
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    model, out = "sotu-1m", str(tmp_path / "programs")
    assert cli.main(["compile", model, *flags, "--budget-ladder", "4", "--out", out]) == 0
    assert "3 programs are ready" in capsys.readouterr().out
    monkeypatch.setattr(executables, "compile_and_save", lambda *args: pytest.fail("it compiles"))
    engine = Engine.from_pretrained(model, **options, budget_ladder=(4,), compile_cache_dir=out)
    engine.add("It", SamplingParams(max_new_tokens=2), grammar=Grammar(kind="regex", source="[a-z]+"))
    engine.wait_until_compiled()
    assert engine.runner.samples_later
