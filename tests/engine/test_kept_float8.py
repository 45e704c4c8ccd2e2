"""FP8 checkpoints stay what they are on devices that multiply 8-bit floats."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fastgen_jax import Engine, EngineConfig
from fastgen_jax.checkpoint import load_params, open_checkpoint, quantized_weights
from fastgen_jax.checkpoint.block_kind import BlockKind
from fastgen_jax.engine import footprint
from fastgen_jax.engine.fit import candidates, choose_formats
from fastgen_jax.engine.kept_forms import Float8Form, Form, choose_forms, described
from pallas_kernels.matmul import BlockWeight, Float8Weight
from pallas_kernels.matmul.weights import unscaled
from tests.checkpoint.quantized_files import write_fp8
from tests.engine.fit_cases import MACHINES, model
from tests.engine.test_blocks import PROMPT, SMALL
from tests.text.vocabularies import write_json
from tests.tiny import drain, greedy, tokens_of

LLAMA = model("Llama-3-8B")
BLOCKS = BlockKind("8-bit floats in groups of 128", 8.25, 128, is_float=True)
OUTPUTS = BLOCKS._replace(size=2048, of_outputs=True)
STORED = tuple((f"layers.{name}", BLOCKS) for name in ("qkv", "o", "gate_up", "down"))
H100 = replace(MACHINES["H100 80 GB"], float8=True)


def chosen(kind: BlockKind, name: str = "gate_up", **options: Any) -> Form | str:
    defaults: dict[str, Any] = {"kernel": None, "platform": "gpu", "activations": "bfloat16", "float8": True}
    choice = choose_forms([(f"layers.{name}", kind)], LLAMA, **defaults | options)
    return (choice.kept or choice.dequantized)[0][1]


def test_scales_of_outputs_and_of_128_inputs_stay() -> None:
    assert chosen(BLOCKS) == chosen(BLOCKS, "down", num_devices=8) == Float8Form(128, in_blocks=True)
    assert chosen(OUTPUTS) == chosen(OUTPUTS, platform="tpu") == Float8Form(4096, in_blocks=False)
    assert chosen(OUTPUTS, "down", num_devices=8) == Float8Form(14_336 // 8, in_blocks=False)


@pytest.mark.parametrize(
    ("kind", "options", "why"),
    [
        (BLOCKS, {"float8": False}, "which this device does not multiply with jax"),
        (BLOCKS, {"platform": "tpu"}, "not one scale for each output"),
        (BLOCKS._replace(size=32), {}, "not one scale for each output or for 128 inputs"),
        (BLOCKS._replace(only_weights=True), {}, "without those of activations, which a kernel would round"),
        (BLOCKS, {"activations": "float32"}, "not in whole tiles of the kernel"),
        # 14,336 inputs of a down matrix are 224 on each device.
        (BLOCKS, {"name": "down", "num_devices": 64}, "a block belongs to two of 64 devices"),
        (BLOCKS, {"requested": True}, "not integers of 4 bits"),
    ],
)
def test_others_are_dequantized_for_a_reason(kind: Any, options: dict[str, Any], why: str) -> None:
    found = chosen(kind, **options)
    assert isinstance(found, str)
    assert why in found


def test_a_checkpoint_fits_as_its_file_does() -> None:
    long = replace(LLAMA, num_layers=160)
    assert choose_formats(EngineConfig(), long, H100, stored=STORED).of_weights == "fp8 and bfloat16"
    assert choose_formats(EngineConfig(), long, replace(H100, float8=False), stored=STORED).quantize == "int8"
    formats = choose_formats(EngineConfig(), LLAMA, H100, stored=STORED)
    line = described(formats.choice, LLAMA, "bfloat16", None)
    assert line.startswith("6.98B of 6.98B quantized weights stay in the 8-bit floats of the checkpoint")
    assert line.endswith("to which rows of activations are rounded")


@pytest.mark.parametrize("quantize", ["none", "int8", "fp8"])
def test_another_choice_keeps_nothing_by_itself(quantize: Any) -> None:
    formats = candidates(EngineConfig(quantize=quantize), H100, LLAMA, stored=STORED)[0]
    assert formats.kept == formats.choice.kept == formats.choice.dequantized == ()


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stores weights as a Hopper does; it multiplies rows that are not rounded."""
    monkeypatch.setattr("pallas_kernels.native.available", lambda: False)
    monkeypatch.setattr("fastgen_jax.engine.machine.multiplies_float8", lambda device: True)
    monkeypatch.setattr("fastgen_jax.engine.machine.int4_kernel", lambda device: "hopper")


@pytest.fixture(scope="module", params=[128, None], ids=["blocks", "tensors"])
def path(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8")
    return write_json(write_fp8(folder, request.param, exceptions=("layers.1.self_attn.o_proj",)))


def engine_of(path: Path, **options: Any) -> Engine:
    return Engine.from_pretrained(path, **SMALL | {"stack_layers": True}, **options)


def dequantized(leaf: Float8Weight) -> np.ndarray:
    values = unscaled(leaf, leaf.values, leaf.scales)
    return np.asarray(values if leaf.in_blocks else values * leaf.scales[..., None, :])


@pytest.mark.usefixtures("accelerator")
def test_an_engine_computes_with_the_numbers_of_the_file(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        kept, plain = engine_of(path), engine_of(path, quantize="none")
    layers = kept.params["layers"]
    # One layer has another type for `o`, so that all have the values.
    assert {name for name, leaf in layers.items() if isinstance(leaf, Float8Weight)} == {"qkv", "gate_up", "down"}
    values = load_params(open_checkpoint(path), dtype="float32")
    for name in ("qkv", "gate_up", "down"):
        np.testing.assert_array_equal(dequantized(layers[name]), values["layers"][name])
    assert "weights in the 8-bit floats of the file" in repr(kept)
    assert kept.config.fitted.startswith("fp8 and float32 weights")
    assert "8-bit" not in repr(plain)
    line = next(message for message in caplog.messages if "stay in the 8-bit floats" in message)
    assert "are dequantized to float32 (layers.o: float32, float8_e4m3fn, without a common form)" in line
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(kept.params))
    assert held == footprint.weight_bytes(kept.model, 1, 4, kept=kept.config.kept)
    answers = []
    for engine in (kept, plain):
        request = engine.add(PROMPT, greedy(6))
        answers.append(tokens_of(drain(engine)[request]))
    assert answers[0] == answers[1]
    with pytest.raises(ValueError, match=r"blocks of its checkpoint.*quantize='none'"):
        kept.update_params(values)
    kept.update_params(path)
    kept.release_memory(weights="dropped")
    kept.restore_memory()
    request = kept.add(PROMPT, greedy(6))
    assert tokens_of(drain(kept)[request]) == answers[0]


def test_a_file_that_is_not_what_its_headers_declare_is_refused() -> None:
    from fastgen_jax.engine.kept_forms import in_form

    values = np.zeros((8, 256), np.float32).astype("float8_e4m3fn")
    array = BlockWeight(values=values, scales=np.arange(1, 17, dtype=np.float32).reshape(8, 2))
    assert in_form(array, Float8Form(128, in_blocks=True)).scales.shape == (2, 8)
    with pytest.raises(ValueError, match=r"its headers declare Float8Form\(size=256.*download"):
        in_form(array, Float8Form(256, in_blocks=False))


def test_what_a_checkpoint_holds_quantized_is_known_from_headers(path: Path) -> None:
    found = quantized_weights(open_checkpoint(path))
    in_blocks = json.loads((path / "config.json").read_text())["quantization_config"]["weight_block_size"] is not None
    kinds = {name: kind for name, kind in found.items() if isinstance(kind, BlockKind)}
    assert kinds.keys() == {"layers.qkv", "layers.gate_up", "layers.down"}
    for kind in kinds.values():
        assert kind.is_float8
        assert not kind.only_weights
        assert (kind.size, kind.of_outputs) == ((128, False) if in_blocks else (256, True))
    assert isinstance(found["layers.o"], str)
