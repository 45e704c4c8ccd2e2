"""Checkpoints whose numbers stay as they are, by the `quantization_config` of their config.json."""

from __future__ import annotations

from typing import Any

AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
FP8_BLOCKS: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
FP8_TENSORS: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}


def forms_of(settings: dict[str, Any] | None, model: Any, mesh: Any) -> dict[str, Any]:
    """The forms that an engine on these devices keeps, by the path of a weight; all that are quantized must stay."""
    from fastgen_jax.checkpoint.quantized.declared import declared_weights
    from fastgen_jax.core.devices import multiplies_float8
    from fastgen_jax.engine.kept_forms import choose_forms
    from pallas_kernels.matmul import int4_kernel

    if settings is None:
        return {}
    device = mesh.devices.flat[0]
    choice = choose_forms(
        tuple(declared_weights(settings, model, "bfloat16").items()),
        model,
        kernel=int4_kernel(device),
        platform=device.platform,
        activations="bfloat16",
        num_devices=mesh.size,
        float8=multiplies_float8(device),
    )
    assert choice.kept, choice.dequantized
    assert not choice.dequantized, choice.dequantized
    return dict(choice.kept)
