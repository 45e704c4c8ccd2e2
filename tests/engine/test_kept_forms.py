"""Checkpoints of 4 bits stay what they are on devices whose kernels multiply them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from fastgen_jax import Engine, EngineConfig, Research
from fastgen_jax.checkpoint import load_params, open_checkpoint, quantized_weights
from fastgen_jax.checkpoint.block_kind import BlockKind
from fastgen_jax.engine import footprint
from fastgen_jax.engine.fit import candidates, choose_formats
from fastgen_jax.engine.kept_forms import Form, Int4Form, choose_forms, described
from fastgen_jax.engine.machine import Machine
from fastgen_jax.engine.memory import Memory
from pallas_kernels.matmul import Int4Weight, int4_kernel
from tests.checkpoint.tiny_files import write_gguf
from tests.engine.fit_cases import MACHINES, model
from tests.engine.test_blocks import PROMPT, SMALL, TOKENIZER
from tests.tiny import drain, greedy, tokens_of

GIB = 2**30
LLAMA = model("Llama-3-8B")
MATRICES = ("qkv", "o", "gate_up", "down")
AWQ = BlockKind("4 bits and float32 offsets in groups of 128", 4.5, 128, 4, has_offsets=True)
STORED = tuple((f"layers.{name}", AWQ) for name in MATRICES)
H100 = replace(MACHINES["H100 80 GB"], int4="hopper")
V5E = replace(MACHINES["v5e, 1 chip"], int4="tpu")


def chosen(kind: BlockKind, name: str = "gate_up", **options: Any) -> Form | str:
    defaults: dict[str, Any] = {"kernel": "hopper", "platform": "gpu", "activations": "bfloat16"}
    choice = choose_forms([(f"layers.{name}", kind)], LLAMA, **defaults | options)
    return (choice.kept or choice.dequantized)[0][1]


def test_a_form_has_what_the_kernel_and_the_platform_take() -> None:
    q4_0 = BlockKind("Q4_0", 4.5, 32, 4, scale_dtype="float16")
    assert chosen(q4_0) == Int4Form(32, False, "float16")
    assert chosen(q4_0, kernel="tpu", platform="tpu") == Int4Form(32, False, "float32")
    assert chosen(AWQ) == chosen(AWQ, kernel="tpu", platform="tpu") == Int4Form(128, True, "float32")
    wide = replace_size(AWQ, 512)
    assert chosen(wide) == Int4Form(512, True, "float32")
    assert chosen(wide, kernel="tpu", platform="tpu") == Int4Form(256, True, "float32")
    # 14,336 inputs of the down matrix on 8 devices are 1,792 each: 7 groups of 256, but 3.5 of 512.
    assert chosen(wide, "down", num_devices=8) == Int4Form(256, True, "float32")


def replace_size(kind: BlockKind, size: int) -> BlockKind:
    return kind._replace(size=size, bits=4 + 64 / size)


@pytest.mark.parametrize(
    ("kind", "options", "why"),
    [
        (AWQ, {"kernel": None}, "no kernel for 4 bits on this device with jax"),
        (AWQ, {"activations": "float32"}, "multiplies bfloat16 or float16, not float32"),
        (replace_size(AWQ, 16), {}, "groups of 16 inputs, not of a multiple of 32"),
        (BlockKind("Q8_0", 8.5, 32), {}, "Q8_0, not integers of 4 bits"),
        (BlockKind("NF4", 4.5, 64, 4, is_float=True), {}, "NF4, not integers of 4 bits"),
        ("GPTQ4", {}, "GPTQ4, not integers of 4 bits in groups and an order that a kernel reads"),
        # 14,336 inputs of a down matrix are 224 on each device, which are filled up to 256.
        (AWQ, {"name": "down", "num_devices": 64}, "not in whole tiles of the kernel on each device"),
    ],
)
def test_others_are_dequantized_for_a_reason(kind: Any, options: dict[str, Any], why: str) -> None:
    found = chosen(kind, **options)
    assert isinstance(found, str)
    assert why in found


def test_a_checkpoint_fits_as_its_file_does() -> None:
    chosen = choose_formats(EngineConfig(), LLAMA, V5E, stored=STORED)
    assert (chosen.dtype, chosen.quantize, chosen.why) == ("bfloat16", None, "")
    assert dict(chosen.kept) == dict.fromkeys((f"layers.{name}" for name in MATRICES), 4.5)
    weights = footprint.weight_bytes(LLAMA, 1, 2, kept=chosen.kept, platform="tpu")
    assert weights < 6 * GIB < footprint.weight_bytes(LLAMA, 1, 2)
    assert choose_formats(EngineConfig(), LLAMA, replace(V5E, int4=None), stored=STORED).quantize == "int8"
    seventy = replace(LLAMA, num_layers=80, embed_dim=8192, num_heads=64, mlp_dim=28_672)
    assert choose_formats(EngineConfig(), seventy, H100, stored=STORED).quantize is None


def test_what_does_not_stay_in_4_bits_becomes_int8_if_there_is_too_little_memory() -> None:
    stored = [(path, kind if "down" not in path else BlockKind("Q6_K", 10, 16)) for path, kind in STORED]
    small = replace(V5E, memory=Memory(limit=9 * GIB))
    formats = choose_formats(EngineConfig(), LLAMA, small, stored=stored)
    assert formats.quantize == "int8"
    assert {path for path, _ in formats.kept} == {f"layers.{name}" for name in MATRICES if name != "down"}
    line = described(formats.choice, LLAMA, "bfloat16", "int8")
    assert "5.1B of 6.98B quantized weights stay in the 4 bits" in line
    assert "1.88B are quantized again, to int8 (layers.down: Q6_K, not integers of 4 bits)" in line


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_another_choice_keeps_nothing(quantize: Any) -> None:
    formats = candidates(EngineConfig(quantize=quantize), H100, LLAMA, stored=STORED)[0]
    assert formats.kept == formats.choice.kept == formats.choice.dequantized == ()


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stores weights as an accelerator does, and its kernel takes the tiny matrices of these tests."""
    monkeypatch.setattr("pallas_kernels.native.available", lambda: False)
    monkeypatch.setattr("fastgen_jax.engine.machine.int4_kernel", lambda device: "hopper")
    monkeypatch.setattr("fastgen_jax.engine.kept_forms.int4_fits", lambda kernel, shape, *, size, dtype: True)


@pytest.fixture(scope="module", params=["Q4_0", "Q4_1"])
def path(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def kind(name: str) -> str:
        return "Q8_0" if "down_proj" in name else request.param

    path = tmp_path_factory.mktemp("forms") / f"{request.param}.gguf"
    write_gguf(path, kind=kind, arrays=TOKENIZER, hidden_size=64, intermediate_size=128)
    return path


def engine_of(path: Path, **options: Any) -> Engine:
    return Engine.from_pretrained(path, **SMALL | {"stack_layers": True}, **options)


@pytest.mark.usefixtures("accelerator")
def test_an_engine_computes_with_the_numbers_of_the_file(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        kept, plain = engine_of(path), engine_of(path, quantize="none")
    layers = kept.params["layers"]
    assert {name for name, leaf in layers.items() if isinstance(leaf, Int4Weight)} == {"qkv", "o", "gate_up"}
    assert not isinstance(plain.params["layers"]["qkv"], Int4Weight)
    values = load_params(open_checkpoint(path), dtype="float32")
    for name in ("qkv", "o", "gate_up"):
        np.testing.assert_allclose(layers[name].dequantize(), values["layers"][name], rtol=0, atol=1e-6)
    assert "weights in the 4 bits of the file" in repr(kept)
    assert kept.config.fitted.startswith("4-bit and float32 weights")
    assert "4 bits" not in repr(plain)
    line = next(message for message in caplog.messages if "stay in the 4 bits" in message)
    assert "are dequantized to float32 (layers.down: Q8_0, not integers of 4 bits)" in line
    answers = []
    for engine in (kept, plain):
        request = engine.add(PROMPT, greedy(6))
        answers.append(tokens_of(drain(engine)[request]))
    assert answers[0] == answers[1]


@pytest.mark.slow
@pytest.mark.usefixtures("accelerator")
def test_an_engine_of_4_bits_sleeps_and_wakes_and_refuses_other_weights(path: Path) -> None:
    engine = engine_of(path)
    before = Research(engine).put(["a"], [PROMPT])
    Research(engine).flush("a")
    engine.release_memory(weights="dropped")
    engine.restore_memory()
    np.testing.assert_array_equal(Research(engine).put(["a"], [PROMPT]), before)
    Research(engine).flush("a")
    with pytest.raises(ValueError, match=r"blocks of its checkpoint.*quantize='none'"):
        engine.update_params(load_params(open_checkpoint(path), dtype="float32"))
    engine.update_params(path)
    np.testing.assert_array_equal(Research(engine).put(["a"], [PROMPT]), before)


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("options", [{}, {"quantize": "int4"}, {"fit": False}], ids=str)
def test_weights_take_the_memory_that_is_counted_for_them(path: Path, options: dict[str, Any]) -> None:
    engine = engine_of(path, **options)
    config = engine.config
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.params))
    assert config.kept
    assert held == footprint.weight_bytes(engine.model, 1, 4, quantize=config.quantize, kept=config.kept)


def test_what_a_checkpoint_holds_quantized_is_known_from_headers(path: Path) -> None:
    found = quantized_weights(open_checkpoint(path))
    assert {name: kind.name for name, kind in found.items() if isinstance(kind, BlockKind)} == {
        **dict.fromkeys(("layers.qkv", "layers.o", "layers.gate_up", "lm_head"), path.stem),
        "layers.down": "Q8_0",
    }


def test_the_kernel_of_a_device_is_known_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    kinds = {"9.0": "hopper", "8.0": "ampere", "8.9": "ampere", "7.5": None, "10.0": None}
    for capability, kernel in kinds.items():
        device = SimpleNamespace(platform="gpu", device_kind="a GPU", compute_capability=capability)
        assert int4_kernel(device) == kernel
    assert int4_kernel(SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")) == "tpu"
    assert int4_kernel(SimpleNamespace(platform="tpu", device_kind="TPU v2")) is None
    assert int4_kernel(SimpleNamespace(platform="cpu", device_kind="cpu")) is None
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    assert int4_kernel(SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0")) is None
    assert Machine.here().int4 is None
