"""`fastgen plan` for weights of 8-bit floats: quantized by the engine, or those of a checkpoint."""

from __future__ import annotations

import json

import pytest

from fastgen_jax.checkpoint.quantized.declared import declared_weights
from fastgen_jax.cli import main
from fastgen_jax.models.families import family_of
from fastgen_jax.models.params import all_specs
from tests.gate.models import LLAMA_3_8B
from tests.plan.test_plan import REFERENCE, plan


def test_fp8_weights_take_the_bytes_of_int8_on_gpus_that_multiply_them() -> None:
    int8, fp8 = (plan(LLAMA_3_8B, "h100:8", quantize=quantize).memory.weights for quantize in ("int8", "fp8"))
    assert int8 == fp8
    with pytest.raises(
        ValueError, match="quantize is 'fp8', but a100 does not multiply it; choose 'int8', or one of h100, "
    ):
        plan(LLAMA_3_8B, "a100:8", quantize="fp8")
    of_tpus = (plan(LLAMA_3_8B, "tpu7x:2x2x1", quantize=quantize).memory.weights for quantize in ("int8", "fp8"))
    assert {*of_tpus} == {int8}


def test_scales_of_blocks_of_8_bit_floats_are_counted() -> None:
    sizes = {"hidden_size": 256, "vocab_size": 128}  # other vocabularies are filled up
    config = json.loads((REFERENCE / "tiny" / "default" / "config.json").read_text()) | sizes
    stored = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    apart, together = (plan(config | extra, "h100", context=64, quantize="fp8").memory.weights for extra in (stored, {}))
    model = family_of(config["architectures"][0]).config_from_hf(config)
    matrices = [spec for spec in all_specs(model).values() if spec.quantizable and spec.shape[-2] % 128 == 0]
    copies = [model.num_layers if spec.per_layer else 1 for spec in matrices]
    more = [4 * spec.shape[-1] * (spec.shape[-2] // 128 - 1) for spec in matrices]
    assert apart - together == sum(n * size for n, size in zip(copies, more, strict=True)) > 0


BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
CHANNELS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
            "input_activations": {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"},
        }
    },
    "ignore": ["lm_head"],
}
PER_TENSOR = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
ALONE = {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO", "ignore": ["lm_head"]}
KEPT = "6.98B of 6.98B quantized weights stay in the 8-bit floats of the checkpoint, to which rows"


@pytest.mark.parametrize(
    ("settings", "topology", "found"),
    [
        (BLOCKS, "h100", KEPT),
        (CHANNELS, "h100:2", KEPT),
        (CHANNELS, "tpu7x:1x1x1", KEPT),
        (PER_TENSOR, "tpu7x:1x1x1", KEPT),
        (BLOCKS, "tpu7x:1x1x1", "are dequantized to bfloat16"),
        (BLOCKS, "a100", "which this device does not multiply with jax"),
        (
            ALONE,
            "h100",
            "8-bit floats in groups of 128, float32 scales without those of activations, which a kernel would round",
        ),
    ],
)
def test_a_checkpoint_is_planned_by_its_settings_alone(settings, topology, found, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("fastgen_jax.plan.kernels.too_old", lambda version: None)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA_3_8B | {"quantization_config": settings}))
    assert main(["plan", "--model", str(file), "--topology", topology, "--context", "2048", "--no-compile"]) == 0
    assert found in " ".join(capsys.readouterr().out.split())


def test_numbers_that_stay_take_a_byte_each(monkeypatch) -> None:
    monkeypatch.setattr("fastgen_jax.plan.kernels.too_old", lambda version: None)
    model = family_of(LLAMA_3_8B["architectures"][0]).config_from_hf(LLAMA_3_8B)
    stored = tuple(declared_weights(BLOCKS, model, "bfloat16").items())
    weights = plan(LLAMA_3_8B | {"quantization_config": BLOCKS}, "h100", stored=stored).memory.weights
    matrices = 32 * (4096 * 6144 + 4096 * 4096 + 4096 * 2 * 14336 + 14336 * 4096)
    assert plan(LLAMA_3_8B, "h100").memory.weights - weights == matrices * (2 - 1 - 4 / 128)
