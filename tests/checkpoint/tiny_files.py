"""Tiny random checkpoints on disk, in both formats, from the same tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tensors(config: dict[str, Any], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Random tensors under the names of Hugging Face, matrices [out, in]."""
    e, f, d = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    h, k = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], e), "model.norm.weight": (e,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], e)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}input_layernorm.weight": (e,), f"{layer}post_attention_layernorm.weight": (e,)}
        projections = {
            "self_attn.q": (h, e),
            "self_attn.k": (k, e),
            "self_attn.v": (k, e),
            "self_attn.o": (e, h),
            "mlp.gate": (f, e),
            "mlp.up": (f, e),
            "mlp.down": (e, f),
        }
        for name, shape in projections.items():
            shapes[f"{layer}{name}_proj.weight"] = shape
            if config.get("attention_bias") and "attn" in name:
                shapes[f"{layer}{name}_proj.bias"] = shape[:1]
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write_hf(
    path: Path,
    *,
    dtype: Any = np.float32,
    shards: int = 0,
    change: Any = None,
    **overrides: Any,
) -> dict[str, np.ndarray]:
    """Writes a Hugging Face directory and returns its tensors; `change` may edit them first, 0 shards means one file."""
    config = CONFIG | overrides
    made = tensors(config, dtype)
    if change:
        change(made)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if not shards:
        save_file(made, path / "model.safetensors")
        return made
    weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(sorted(made))}
    for file in set(weight_map.values()):
        save_file({name: made[name] for name, other in weight_map.items() if other == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return made


def write_gguf(
    path: Path,
    *,
    kind: str | Callable[[str], str] = "F32",
    metadata: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    arrays: dict[str, Any] | None = None,
    architecture: str = "llama",
    tensors_per_part: int = 0,
    **overrides: Any,
) -> dict[str, np.ndarray]:
    """Writes a GGUF file as llama.cpp's converter does, q and k interleaved, and returns the Hugging Face tensors.

    `kind` is the type of the matrices, or a function of their Hugging Face names.
    """
    config = CONFIG | overrides
    made = tensors(config)
    path.parent.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_per_part)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if not arrays:
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    for name, value in (arrays or {}).items():  # a tokenizer
        add = {str: writer.add_string, int: writer.add_uint32, list: writer.add_array}[type(value)]
        add(name, value)
    for name, value in (metadata or {}).items():
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)](name, value)
    for name, array in made.items():
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}.get(
            name.split(".")[-2], 0
        )
        if heads:  # each head's rows 0, D/2, 1, D/2 + 1, ...
            half = array.shape[0] // heads // 2
            array = array.reshape(heads, 2, half, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        of_matrix = kind if isinstance(kind, str) else kind(name)
        quantized = gguf.GGMLQuantizationType[of_matrix if array.ndim == 2 else "F32"]
        writer.add_tensor(
            _gguf_name(name), gguf.quants.quantize(np.ascontiguousarray(array), quantized), raw_dtype=quantized
        )
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


def requantize(source: Path, out: Path, *, kind: Callable[[str], str]) -> None:
    """Copies a GGUF file; matrices whose rows are whole blocks get the type that `kind` says for the name of the tensor."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        wanted = gguf.GGMLQuantizationType[kind(tensor.name)]
        block, _ = gguf.GGML_QUANT_SIZES[wanted]
        values = np.ascontiguousarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        if values.ndim < 2 or values.shape[-1] % block or "norm" in tensor.name:
            wanted = tensor.tensor_type
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    short = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    stem, suffix = name.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return f"{short[stem]}.{suffix}"
    layer, rest = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{short[rest]}.{suffix}"
