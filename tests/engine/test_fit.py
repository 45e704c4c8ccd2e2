"""The number formats and sizes with which a model fits the free memory."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from fastgen_jax import Engine, EngineConfig
from fastgen_jax.engine import fit, footprint, machine, memory
from fastgen_jax.engine.config import Formats
from fastgen_jax.engine.fit import LEAST_CONTEXT, USABLE_CONTEXT, candidates, choose_formats, tokens_that_fit
from fastgen_jax.engine.machine import Machine
from fastgen_jax.engine.memory import Memory
from fastgen_jax.engine.resolve import resolve
from tests.engine.fit_cases import GIB, MACHINES, model, table
from tests.serving.checkpoint import write_checkpoint

ROOT = Path(__file__).parents[2]
LLAMA, SMALL = model("Llama-3-8B"), model("SmolLM2-135M")
DEVICE, HOST = MACHINES["v5e, 1 chip"], MACHINES["CPU, 16 GiB free"]


def of_size(machine: Machine, limit: float, **changes) -> Machine:
    return replace(machine, memory=replace(machine.memory, limit=int(limit), **changes))


def names(formats: Formats) -> tuple[str, str | None, str]:
    return formats.dtype, formats.quantize, formats.kv_dtype


def choices(config: EngineConfig, machine: Machine, sizes_in_gib: list[float]) -> list[tuple[str, str | None, str] | None]:
    """The distinct choices for Llama-3-8B as memory shrinks; None where it is refused."""
    found: list[tuple[str, str | None, str] | None] = []
    for size in sizes_in_gib:
        try:
            chosen = names(choose_formats(config, LLAMA, of_size(machine, size * GIB)))
        except ValueError:
            chosen = None
        if not found or found[-1] != chosen:
            found.append(chosen)
    return found


def test_the_documented_table_is_what_is_chosen() -> None:
    assert table() in (ROOT / "docs" / "memory.md").read_text(), "put the output of python -m tests.engine.fit_cases there"


def test_formats_are_given_up_in_the_documented_order() -> None:
    shrinking = [size / 8 for size in range(8 * 50, 0, -2)]
    assert choices(EngineConfig(), DEVICE, shrinking) == [
        ("bfloat16", None, "bfloat16"),
        ("bfloat16", None, "int8"),
        ("bfloat16", "int8", "bfloat16"),
        ("bfloat16", "int8", "int8"),
        None,
    ]
    assert choices(EngineConfig(), HOST, shrinking) == [
        ("float32", None, "float32"),
        ("bfloat16", None, "bfloat16"),
        ("bfloat16", "int8", "bfloat16"),
        None,
    ]


@pytest.mark.parametrize("machine", [DEVICE, HOST], ids=["device", "host"])
def test_formats_are_kept_while_a_usable_context_fits(machine: Machine) -> None:
    for size in range(6, 60, 3):
        here = of_size(machine, size * GIB)
        options = candidates(EngineConfig(), here, LLAMA)
        fitting = [tokens_that_fit(formats, EngineConfig(), LLAMA, here) for formats in options]
        if fitting[-1] < LEAST_CONTEXT:
            continue
        chosen = choose_formats(EngineConfig(), LLAMA, here)
        index = [names(option) for option in options].index(names(chosen))
        assert all(tokens < USABLE_CONTEXT for tokens in fitting[:index]), "a better format would have fitted"
        assert bool(chosen.why) == (index > 0), "a change is explained, and nothing else"


@pytest.mark.parametrize(
    "given",
    [
        {"dtype": "float32"},
        {"dtype": "bfloat16", "kv_dtype": "bfloat16"},
        {"quantize": "int8"},
        {"kv_dtype": "float8_e4m3fn", "max_context_len": 8192},
        {"num_blocks": 300},
    ],
    ids=str,
)
@pytest.mark.parametrize("machine", [DEVICE, HOST], ids=["device", "host"])
def test_what_the_operator_chose_is_never_changed(given: dict, machine: Machine) -> None:
    config = EngineConfig(**given)
    for size in (8, 12, 20, 30, 40, 60):
        machine = of_size(machine, size * GIB)
        for chosen in candidates(config, machine, LLAMA):
            kept = {name: getattr(chosen, name) for name in given if hasattr(chosen, name)}
            assert kept == {name: given[name] for name in kept}
    assert names(choose_formats(config, LLAMA, machine))[0] == config.dtype or config.dtype is None
    with pytest.raises(ValueError, match="does not fit") as refused:
        choose_formats(config, LLAMA, of_size(machine, 2 * GIB))
    for name in given.keys() - {"quantize", "max_context_len"}:
        assert f"omit {name}={given[name]}" in str(refused.value)


def test_a_cache_of_a_given_size_is_weighed_with_the_weights() -> None:
    half: dict[str, Any] = {"num_blocks": 2048, "block_size": 32}  # 8 GiB in bfloat16
    assert names(choose_formats(EngineConfig(**half), LLAMA, of_size(DEVICE, 30 * GIB)))[1] is None
    assert names(choose_formats(EngineConfig(**half), LLAMA, of_size(DEVICE, 20 * GIB)))[1] == "int8"
    with pytest.raises(ValueError, match=r"65,536 tokens of bfloat16 KV cache 8\.0 GiB.*omit num_blocks=2048"):
        choose_formats(EngineConfig(**half), LLAMA, of_size(DEVICE, 16 * GIB))


def test_a_model_that_fits_in_no_way_is_refused_with_the_numbers_and_what_would_help() -> None:
    llama_70b = replace(LLAMA, num_layers=80, embed_dim=8192, mlp_dim=28_672, num_heads=64)
    eight = replace(DEVICE, num_devices=8)
    with pytest.raises(ValueError, match="does not fit") as refused:
        choose_formats(EngineConfig(), llama_70b, eight)
    message = str(refused.value)
    weights = footprint.size(footprint.weight_bytes(llama_70b, 1, 2, quantize="int8"))
    for said in (f"int8 weights take {weights}", "256 tokens of int8 KV cache", "15.8 GiB", "14.2 GiB can be used"):
        assert said in message
    needed = re.search(r"tensor_parallel=(\d+)", message)
    assert needed, message
    wider = EngineConfig(tensor_parallel=int(needed[1]))
    assert choose_formats(wider, llama_70b, eight), "the remedy must work"
    with pytest.raises(ValueError, match="XLA_PYTHON_CLIENT_MEM_FRACTION"):
        choose_formats(EngineConfig(), llama_70b, MACHINES["T4"])
    with pytest.raises(ValueError, match=r"1\.7 GiB that are free"):
        choose_formats(EngineConfig(), LLAMA, MACHINES["CPU, 2 GiB control group"])


def test_a_device_divided_model_needs_a_part_of_the_memory_on_each() -> None:
    assert names(choose_formats(EngineConfig(), LLAMA, DEVICE))[1] == "int8"
    assert names(choose_formats(EngineConfig(tensor_parallel=2), LLAMA, DEVICE)) == ("bfloat16", None, "bfloat16")
    both = replace(HOST, memory=Memory(limit=24 * GIB, is_host=True))  # CPU devices share it
    assert choose_formats(EngineConfig(tensor_parallel=2), LLAMA, both).dtype == "bfloat16"


def test_a_large_step_leaves_less_room() -> None:
    usual, large = (
        tokens_that_fit(candidates(config, DEVICE, SMALL)[0], config, SMALL, DEVICE)
        for config in (EngineConfig(max_num_seqs=4096), EngineConfig(max_num_seqs=4096, token_budget=16_384))
    )
    assert large < usual


def test_an_earlier_choice_is_kept_while_it_is_reasonable() -> None:
    def limit_between(first: tuple, second: tuple) -> float:
        """GiB below which `first` is no longer chosen."""
        low, high = 1.0, 64.0
        for _ in range(12):
            middle = (low + high) / 2
            try:
                chosen = names(choose_formats(EngineConfig(), LLAMA, of_size(HOST, middle * GIB)))
            except ValueError:
                chosen = None
            low, high = (low, middle) if chosen == first else (middle, high)
        assert names(choose_formats(EngineConfig(), LLAMA, of_size(HOST, (low - 0.1) * GIB))) == second
        return high

    wide, narrow = ("float32", None, "float32"), ("bfloat16", None, "bfloat16")
    edge = limit_between(wide, narrow)
    for size in (edge - 0.3, edge + 0.3):
        for earlier in (wide, narrow):
            machine = of_size(HOST, size * GIB)
            assert names(choose_formats(EngineConfig(), LLAMA, machine, earlier=list(earlier))) == earlier, (size, earlier)
    assert names(choose_formats(EngineConfig(), LLAMA, of_size(HOST, 60 * GIB), earlier=list(narrow))) == wide
    assert names(choose_formats(EngineConfig(), LLAMA, of_size(HOST, 20 * GIB), earlier=list(wide))) == narrow
    for unknown in (None, "float32", ["float64", None, "x"], {}):
        assert names(choose_formats(EngineConfig(), LLAMA, of_size(HOST, 60 * GIB), earlier=unknown)) == wide


# With the memory that a device reports


def on_device(monkeypatch, limit: float, *, platform: str = "gpu", capability: str = "7.5", in_use: int = 0) -> None:
    stats = {"bytes_limit": int(limit), "bytes_in_use": in_use}
    device = SimpleNamespace(
        platform=platform, device_kind="Tesla T4", compute_capability=capability, memory_stats=lambda: stats
    )
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(jax, "default_backend", lambda: platform)


def test_a_t4_computes_in_float16_and_gemma_adds_in_float32(monkeypatch) -> None:
    on_device(monkeypatch, 11 * GIB)
    for name, activations in (("Llama-3.2-1B", "float16"), ("Gemma-3-1B", "float32")):
        config = fit.with_formats(EngineConfig(), model(name), None)
        resolved = resolve(config, model(name))
        assert (resolved.dtype, resolved.kv_dtype, resolved.activation_dtype) == ("float16", "float16", activations), name
    on_device(monkeypatch, 59 * GIB, capability="9.0")
    assert resolve(EngineConfig(), model("Gemma-3-1B")).activation_dtype == "bfloat16"
    # Chosen explicitly, float16 is not changed, and still does not overflow.
    assert resolve(EngineConfig(dtype="float16"), model("Gemma-3-1B")).activation_dtype == "float32"


def test_the_memory_is_that_of_the_device(monkeypatch) -> None:
    on_device(monkeypatch, 11 * GIB)
    assert choose_formats(EngineConfig(), LLAMA, Machine.here()).quantize == "int8"
    on_device(monkeypatch, 11 * GIB, in_use=6 * GIB)
    with pytest.raises(ValueError, match=r"5\.0 GiB that are free on Tesla T4"):
        choose_formats(EngineConfig(), LLAMA, Machine.here())


def test_the_context_is_what_the_cache_holds(monkeypatch) -> None:
    big = replace(SMALL, max_context_len=131_072)
    on_device(monkeypatch, GIB, platform="tpu")
    resolved = resolve(EngineConfig(), big)
    assert resolved.max_context_len == resolved.num_blocks * resolved.block_size < big.max_context_len
    assert f"context {resolved.max_context_len:,} of 131,072 tokens because no more fit" in resolved.fitted
    told = resolve(EngineConfig(max_context_len=100_000), big)
    assert told.max_context_len == 100_000
    assert told.longest_sequence < 100_000
    assert f"context {told.longest_sequence:,} of 100,000 tokens because no more fit" in told.fitted
    before = resolve(EngineConfig(fit=False), big)
    assert (before.max_context_len, before.num_blocks, before.fitted) == (131_072, resolved.num_blocks, "")


# With an engine


def test_a_small_machine_gets_smaller_weights_says_so_once_and_keeps_to_it(tmp_path, monkeypatch, caplog) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny")
    options = {"token_budget": 8, "budget_ladder": (), "max_num_seqs": 2, "block_size": 4}
    cache = {"compile_cache_dir": str(tmp_path / "cache")}

    def started(limit: int, **more) -> Engine:
        monkeypatch.setattr(machine, "memory_now", lambda platform: Memory(limit=limit, is_host=True))
        return Engine.from_pretrained(str(checkpoint), **{**options, **more})

    whole = started(2**30)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(whole.params))
    assert (whole.config.dtype, whole.config.quantize) == ("float32", None)
    tight = int(0.9 * weights)
    with caplog.at_level(logging.INFO):
        small = started(tight, **cache)
    lines = [record.message for record in caplog.records if record.message.startswith("fit: ")]
    assert lines == [f"fit: {small.config.fitted}"]
    assert names(Formats(dtype=small.config.dtype, quantize=small.config.quantize, kv_dtype=small.config.kv_dtype)) != names(
        Formats(dtype="float32", quantize=None, kv_dtype="float32")
    )
    assert re.search(
        r"smaller formats because float32 weights of .* leave too little of the .* that are free", small.config.fitted
    )
    assert small.config.fitted in repr(small.config)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(small.params)) < weights
    again = started(int(1.02 * tight), **cache)
    same = replace(again.config, choices=small.config.choices, fitted=small.config.fitted)
    assert same == small.config, "the second start must find the compiled programs of the first"
    with pytest.raises(ValueError, match="does not fit"):
        started(weights // 8)
    forced = started(tight, fit=False)
    assert (forced.config.dtype, forced.config.fitted) == ("float32", "")


def test_the_memory_of_a_control_group_counts_for_the_weights(monkeypatch) -> None:
    monkeypatch.setattr(memory, "cgroup_room", lambda: 2 * GIB)
    with pytest.raises(ValueError, match=r"2\.0 GiB that are free"):
        choose_formats(EngineConfig(), LLAMA, Machine.here())
