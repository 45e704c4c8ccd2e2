"""Regenerates tiny checkpoints in the formats in which some models are released; see also make_families.py.

    python tests/reference/make_released.py [FAMILY/VARIANT ...]    # needs torch and transformers; the tests need neither

These are gpt-oss with its experts in MXFP4, DeepSeek V3 in blocks of FP8, Qwen3 in three formats of compressed-tensors,
Qwen2 in NF4 (both also need the library of the format, compressed-tensors or bitsandbytes), and multimodal models with the
tensor names of their files on the hub. The logits of quantized models are computed from the weights as dequantized by
transformers or the library.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_families import GEMMA, LLAMA_LIKE, PROMPT_LENGTH, compute, randomise
from make_moe import DEEPSEEK, GPT_OSS, GROUPS, QWEN
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

FP8_BLOCK = [8, 4]  # rows and columns; releases have [128, 128]
EYES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def mxfp4(model: Any) -> dict[str, torch.Tensor]:
    """Sets the experts of gpt-oss to random MXFP4 numbers and returns them as stored."""
    stored = {}
    for name, parameter in model.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = parameter.shape
            blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
            scales = torch.randint(122, 126, blocks.shape[:-1], dtype=torch.uint8)
            parameter.data = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    return stored


def fp8(model: Any) -> dict[str, torch.Tensor]:
    """Rounds the layer matrices of a DeepSeek model to blocks of FP8 and returns them as stored."""
    stored = {}
    for name, parameter in model.named_parameters():
        if "layers." not in name or "gate.weight" in name or parameter.dim() < 2:
            continue
        for expert, matrix in enumerate(parameter.data) if parameter.dim() == 3 else [(None, parameter.data)]:
            rows, columns = (size // step for size, step in zip(matrix.shape, FP8_BLOCK, strict=True))
            scales = torch.rand(rows, columns) * 0.02 + 0.01
            spread = scales.repeat_interleave(FP8_BLOCK[0], 0).repeat_interleave(FP8_BLOCK[1], 1)
            narrow = (matrix / spread).to(torch.float8_e4m3fn)
            matrix.copy_(Fp8Dequantize(None)._dequantize_one(narrow, scales))
            if expert is None:
                stored |= {name: narrow, f"{name}_scale_inv": scales}
            else:  # transformers keeps a layer's experts in one tensor, gate above up
                parts = ("gate_proj", "up_proj") if "gate_up" in name else ("down_proj",)
                stem = name.rsplit(".", 1)[0]
                for part, values, of in zip(parts, narrow.chunk(len(parts)), scales.chunk(len(parts)), strict=True):
                    module = f"{stem}.{expert}.{part}.weight"
                    stored |= {module: values.contiguous(), f"{module}_scale_inv": of.contiguous()}
    # The additional layer predicts the token after the next one; it is ignored without speculative decoding.
    return stored | {f"model.layers.{model.config.num_hidden_layers}.enorm.weight": torch.ones(32)}


def as_on_the_hub(folder: Path, config: dict[str, Any]) -> None:
    """Rewrites a multimodal model as before transformers 4.52: old tensor names, and a config without some fields."""

    def name(new: str) -> str:
        if new.startswith("lm_head"):
            return f"language_model.{new}"
        return new.removeprefix("model.").replace("language_model.", "language_model.model.", 1)

    file = folder / "model.safetensors"
    tensors = load_file(file)
    if any(key.startswith("model.") for key in tensors):
        tensors = {name(key): value for key, value in tensors.items()}
    assert any(key.startswith("language_model.model.") for key in tensors)
    is_eye = re.compile(r"vision_(tower|model)\.(?!.*norm)")
    save_file({key: value for key, value in tensors.items() if not is_eye.match(key)}, file)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def gemma3() -> tuple[Any, dict[str, Any]]:
    text = {
        **GEMMA,
        "num_hidden_layers": 3,
        "sliding_window": 16,
        "query_pre_attn_scalar": 20,
        "model_type": "gemma3_text",
        "sliding_window_pattern": 3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 4,
    }
    config = AutoConfig.for_model(
        "gemma3",
        text_config=text,
        vision_config={**EYES, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        image_token_index=63,
        boi_token_index=61,
        eoi_token_index=62,
    )
    gaps = ("num_attention_heads", "num_key_value_heads", "tie_word_embeddings", "eos_token_id", "bos_token_id")
    return config, {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "boi_token_index": 61,
        "eoi_token_index": 62,
        "image_token_index": 63,
        "mm_tokens_per_image": 4,
        "eos_token_id": [1, 2],
        "initializer_range": 0.02,
        "text_config": {key: value for key, value in text.items() if key not in gaps},
        "vision_config": {**EYES, "model_type": "siglip_vision_model"},
        "torch_dtype": "bfloat16",
    }


def mistral3() -> tuple[Any, dict[str, Any]]:
    text = {**LLAMA_LIKE, "head_dim": 12, "sliding_window": None, "rope_theta": 1e6, "model_type": "mistral"}
    eyes = {**EYES, "head_dim": 8, "model_type": "pixtral"}
    config = AutoConfig.for_model(
        "mistral3", text_config=text, vision_config=eyes, image_token_index=63, tie_word_embeddings=False
    )
    return config, {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "image_token_index": 63,
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
        "text_config": text,
        "vision_config": eyes,
        "torch_dtype": "bfloat16",
    }


def llava() -> tuple[Any, dict[str, Any]]:
    text = {**LLAMA_LIKE, "model_type": "llama"}
    eyes = {**EYES, "projection_dim": 16, "model_type": "clip_vision_model"}
    config = AutoConfig.for_model("llava", text_config=text, vision_config=eyes, image_token_index=63)
    return config, {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_token_index": 63,
        "projector_hidden_act": "gelu",
        "text_config": {name: value for name, value in text.items() if name != "tie_word_embeddings"},
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vision_config": eyes,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


def mllama() -> tuple[Any, dict[str, Any]]:
    rope = {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 32,
        "rope_type": "llama3",
    }
    text = {
        **LLAMA_LIKE,
        "num_hidden_layers": 4,
        "cross_attention_layers": [1, 3],
        "rope_theta": 500000.0,
        "rope_scaling": rope,
        "model_type": "mllama_text_model",
    }
    eyes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 32,
        "model_type": "mllama_vision_model",
    }
    config = AutoConfig.for_model(
        "mllama", text_config={**text, "rope_scaling": {**rope}}, vision_config=eyes, image_token_index=64
    )
    return config, {
        "architectures": ["MllamaForConditionalGeneration"],
        "image_token_index": 64,
        "model_type": "mllama",
        "text_config": text,
        "torch_dtype": "bfloat16",
        "vision_config": eyes,
    }


def qwen3_vl_moe() -> tuple[Any, None]:
    text = {
        **QWEN,
        "head_dim": 12,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "model_type": "qwen3_vl_moe_text",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [2, 2, 2]},
    }
    eyes = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": LLAMA_LIKE["hidden_size"],
        "patch_size": 14,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    tokens = {f"{name}_token_id": 63 - i for i, name in enumerate(("image", "video", "vision_start", "vision_end"))}
    return AutoConfig.for_model("qwen3_vl_moe", text_config=text, vision_config=eyes, **tokens), None


def quantized(
    model_type: str, fields: dict[str, Any], quantise: Any, settings: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Writes a quantized checkpoint and returns what transformers computes with its dequantized weights."""
    config = AutoConfig.for_model(model_type, **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    randomise(model)
    stored = quantise(model)
    expected = compute(model, torch.randint(3, config.vocab_size, (PROMPT_LENGTH,)))
    model.to(torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    plain = {name.removesuffix("_blocks").removesuffix("_packed") for name in stored}
    save_file({name: value for name, value in tensors.items() if name not in plain} | stored, folder / "model.safetensors")
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf | settings, indent=2) + "\n")
    return expected


def compressed(model: Any) -> dict[str, torch.Tensor]:
    """Quantizes the layers' matrices, each kind in its own way, and returns them as stored by compressed-tensors."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    stored = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or "layers." not in name:
            continue
        fields = next(group for group in COMPRESSED.values() if re.match(group["targets"][0].removeprefix("re:"), name))
        scheme = QuantizationScheme(**fields)
        outputs, inputs = module.weight.shape
        groups = inputs // 32 if scheme.weights.strategy == "group" else 1
        shape = (1,) if scheme.weights.strategy == "tensor" else (outputs, groups)
        steps = 448.0 if scheme.weights.type == "float" else 2.0 ** (scheme.weights.num_bits - 1)
        state = {"weight": module.weight.data.clone(), "weight_scale": ((torch.rand(shape) + 1) / steps).bfloat16().float()}
        if not scheme.weights.symmetric:
            state["weight_zero_point"] = torch.randint(-4, 4, shape).to(torch.int8)
        compressor = BaseCompressor.get_value_from_registry(fields["format"])
        packed = compressor.compress(state, scheme)
        module.weight.data = compressor.decompress(packed, scheme)["weight"]
        packed["weight_scale"] = packed["weight_scale"].bfloat16()
        stored |= {f"{name}.{ending}": tensor for ending, tensor in packed.items()}
    return stored


def bits_and_bytes(folder: Path) -> dict[str, Any]:
    """Writes a Qwen2 that transformers quantized to NF4, and returns what it computes with bitsandbytes' dequantization."""
    import bitsandbytes
    from transformers import BitsAndBytesConfig

    sizes = {"hidden_size": 64, "intermediate_size": 128}  # whole blocks in a row: see make_quantized.py
    config = AutoConfig.for_model("qwen2", **{**LLAMA_LIKE, **sizes})
    model = AutoModelForCausalLM.from_config(config).float()
    randomise(model)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    with tempfile.TemporaryDirectory() as plain:
        model.save_pretrained(plain)
        narrow = AutoModelForCausalLM.from_pretrained(
            plain, quantization_config=settings, dtype=torch.float32, device_map="cpu", attn_implementation="eager"
        )
    narrow.save_pretrained(folder)
    for name, module in list(narrow.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):  # on CPUs it multiplies in bfloat16
            wide = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            wide.weight.data = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            wide.bias = module.bias
            narrow.set_submodule(name, wide)
    return compute(narrow.eval(), torch.randint(3, config.vocab_size, (PROMPT_LENGTH,)))


def multimodal(made: tuple[Any, dict[str, Any] | None], folder: Path) -> dict[str, Any]:
    """Writes a multimodal model and returns what transformers computes from text.

    The second of `made` is the config of a release from before transformers 4.52; None: the names are those of today.
    """
    config, hub = made
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").float().eval()
    randomise(model)
    expected = compute(model, torch.randint(3, 60, (PROMPT_LENGTH,)))
    model.to(torch.bfloat16).save_pretrained(folder)
    if hub is not None:
        as_on_the_hub(folder, hub)
    elif config.model_type == "qwen3_vl_moe":  # published with the inputs of experts first; transformers loads both
        file = folder / "model.safetensors"
        tensors = load_file(file)
        stacks = {name: value.transpose(1, 2).contiguous() for name, value in tensors.items() if "mlp.experts." in name}
        save_file(tensors | stacks, file)
    return expected


GPT_OSS_RELEASED = {**GPT_OSS, "intermediate_size": 32, "num_hidden_layers": 2}
DEEPSEEK_RELEASED = (
    DEEPSEEK
    | GROUPS
    | {
        "q_lora_rank": 16,
        "moe_intermediate_size": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "num_hidden_layers": 2,
    }
)
COMPRESSED = {
    "attention": {
        "targets": ["re:.*self_attn.*"],
        "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
        "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
        "format": "int-quantized",
    },
    "down": {
        "targets": ["re:.*down_proj"],
        "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"},
        "format": "float-quantized",
    },
    "up": {
        "targets": ["re:.*(gate|up)_proj"],
        "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
        "format": "pack-quantized",
    },
}
VARIANTS = {
    "gpt_oss/mxfp4": lambda folder: quantized(
        "gpt_oss", GPT_OSS_RELEASED, mxfp4, {"quantization_config": {"quant_method": "mxfp4"}}, folder
    ),
    "deepseek_v3/fp8": lambda folder: quantized(
        "deepseek_v3",
        DEEPSEEK_RELEASED,
        fp8,
        {
            "quantization_config": {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": FP8_BLOCK,
            },
            "num_nextn_predict_layers": 1,
        },
        folder,
    ),
    "qwen3/compressed": lambda folder: quantized(
        "qwen3",
        {**LLAMA_LIKE, "head_dim": 8},
        compressed,
        {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "mixed-precision",
                "config_groups": COMPRESSED,
                "ignore": ["lm_head"],
            }
        },
        folder,
    ),
    "qwen2/nf4": bits_and_bytes,
    "gemma3/multimodal": lambda folder: multimodal(gemma3(), folder),
    "mistral/multimodal": lambda folder: multimodal(mistral3(), folder),
    "llava/default": lambda folder: multimodal(llava(), folder),
    "mllama/default": lambda folder: multimodal(mllama(), folder),
    "qwen3_vl_moe/default": lambda folder: multimodal(qwen3_vl_moe(), folder),
}


def main() -> None:
    """Writes the variants named on the command line, or all."""
    for name in sys.argv[1:] or VARIANTS:
        torch.manual_seed(0)
        folder = Path(__file__).parent / "families" / name
        expected = VARIANTS[name](folder)
        for extra in ("generation_config.json", "preprocessor_config.json"):
            (folder / extra).unlink(missing_ok=True)
        np.savez_compressed(folder / "expected.npz", **expected)
        size = sum(file.stat().st_size for file in folder.iterdir()) / 1024
        logits = expected["logits"]
        print(f"{name}: {size:.0f} KiB, logits in [{logits.min():.1f}, {logits.max():.1f}]", flush=True)


if __name__ == "__main__":
    main()
