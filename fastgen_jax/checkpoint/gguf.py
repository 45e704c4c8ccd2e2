"""GGUF files as checkpoints: their metadata as a `ModelConfig`, their tensors under Hugging Face names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgen_jax.checkpoint.base import missing_tensor
from fastgen_jax.checkpoint.gguf_file import GGUFFile, read_gguf
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import family_of

ARCHITECTURES = {"llama": "LlamaForCausalLM"}  # general.architecture -> the name in config.json

_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_YARN_KEYS = {
    "scaling.original_context_length": "original_max_position_embeddings",
    "scaling.yarn_beta_fast": "beta_fast",
    "scaling.yarn_beta_slow": "beta_slow",
}
_ROPE_KEYS = ("freq_base", "dimension_count", "scale_linear", "scaling.type", "scaling.factor", "scaling.finetuned",
              *_YARN_KEYS)
_PIECE = 1 << 22  # values dequantised at a time: the temporaries of 4 Mi values stay near 100 MB


@dataclass(frozen=True, kw_only=True)
class GGUFCheckpoint:
    """See `Checkpoint`."""

    file: GGUFFile
    config: ModelConfig
    stored_names: Mapping[str, str]  # Hugging Face name -> name in the file

    @classmethod
    def open(cls, path: Path) -> GGUFCheckpoint:
        """Reads the header; ValueError if it is corrupt or the architecture is not supported."""
        file = read_gguf(path)
        hf = config_json(file)
        try:
            config = family_of(hf["architectures"][0]).config_from_hf(hf)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        names = {huggingface_name(name): name for name in file.tensors if name != _ROPE_FACTORS}
        return cls(file=file, config=config, stored_names=names)

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def tensor_names(self) -> frozenset[str]:
        return frozenset(self.stored_names)

    @property
    def tokenizer_source(self) -> GGUFFile:
        return self.file

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file.tensors[self._stored(name)].shape

    def read(self, name: str) -> np.ndarray:
        stored = self._stored(name)
        tensor, rows = self.file.tensors[stored], self.file.rows(stored)
        heads = {"attn_q": self.config.num_heads, "attn_k": self.config.num_kv_heads}.get(stored.split(".")[-2])
        if heads is None:
            return dequantize(rows, tensor.type_id, tensor.shape)
        if len(tensor.shape) == 1:  # a bias is a single row, whose values change places
            return undo_permutation(dequantize(rows, tensor.type_id, tensor.shape), num_heads=heads)
        return dequantize(undo_permutation(rows, num_heads=heads), tensor.type_id, tensor.shape)

    def _stored(self, name: str) -> str:
        if name not in self.stored_names:
            raise missing_tensor(name, self.path, self.tensor_names)
        return self.stored_names[name]


def undo_permutation(rows: np.ndarray, *, num_heads: int) -> np.ndarray:
    """Rows of q or k in Hugging Face's order: each head's first half, then its second half.

    llama.cpp rotates neighbouring rows (0,1), (2,3), ..., Hugging Face rows i and i + D/2; its converter interleaves
    the halves, and only for the llama architecture. Stored bytes can be permuted: a quantised block lies in one row.
    """
    if rows.shape[0] % (2 * num_heads):
        raise ValueError(f"{rows.shape[0]} rows do not divide into {num_heads} heads of even size")
    pairs = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def dequantize(rows: np.ndarray, type_id: int, shape: tuple[int, ...]) -> np.ndarray:
    """Values of stored rows: float32, but F16 and BF16 as they are. `rows` is uint8[..., bytes a row]."""
    import gguf
    import ml_dtypes

    kind = gguf.GGMLQuantizationType(type_id)
    plain = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    if kind.name in plain:
        return np.ascontiguousarray(rows).view(plain[kind.name]).reshape(shape)
    flat = rows.reshape(-1, rows.shape[-1])
    out = np.empty((len(flat), shape[-1]), np.float32)
    step = max(1, _PIECE // shape[-1])
    for start in range(0, len(flat), step):
        try:
            out[start : start + step] = gguf.quants.dequantize(flat[start : start + step], kind)
        except NotImplementedError as error:
            raise ValueError(f"storage type {kind.name} cannot be dequantised; requantise the file to one of "
                             "Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K .. Q6_K, F16, BF16, F32") from error
    return out.reshape(shape)


def huggingface_name(name: str) -> str:
    """The Hugging Face name of a tensor; one that we do not know keeps its own and is refused when loading."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if layer and layer[2] in _LAYER_NAMES:
        return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{layer[3]}"
    stem, _, suffix = name.rpartition(".")
    return f"{_TOP_NAMES[stem]}.{suffix}" if stem in _TOP_NAMES else name


def config_json(file: GGUFFile) -> dict[str, Any]:
    """The metadata as the fields of a Hugging Face `config.json`, so that one family reads both."""
    metadata, tensors = file.metadata, file.tensors
    kind = metadata.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise ValueError(f"{file.path}: GGUF architecture {kind!r} is not supported; "
                         f"supported: {', '.join(ARCHITECTURES)}")

    def get(name: str, default: Any = None) -> Any:
        value = metadata.get(f"{kind}.{name}", default)
        if value is None:
            raise ValueError(f"{file.path}: the metadata lack {kind}.{name}; the file is incomplete, convert it again")
        return value

    num_heads, embed_dim = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", embed_dim // num_heads)
    for name, only in {
        "expert_count": 0,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "attention.sliding_window": 0,
    }.items():
        if get(name, only) != only:
            raise ValueError(f"{file.path}: {kind}.{name} is {get(name)}; only {only} is supported here")
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{file.path} has no tensor 'token_embd.weight'; it holds a vocabulary, not a model")
    eos = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return {
        "architectures": [ARCHITECTURES[kind]],
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "num_hidden_layers": get("block_count"),
        "hidden_size": embed_dim,
        "num_attention_heads": num_heads,
        "num_key_value_heads": get("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "intermediate_size": get("feed_forward_length"),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(id for id in eos if id is not None)),
        "rope_parameters": _rope(file, kind, head_dim),
    }


def _rope(file: GGUFFile, kind: str, head_dim: int) -> dict[str, Any]:
    """`rope_parameters` of the file: its scaling keys, or the llama3 scaling behind its table of frequency factors."""
    prefix = f"{kind}.rope."
    settings = {name[len(prefix) :]: value for name, value in file.metadata.items() if name.startswith(prefix)}
    unknown = settings.keys() - _ROPE_KEYS
    if unknown:
        raise ValueError(f"{file.path}: {prefix}{min(unknown)} is not supported; supported: {', '.join(_ROPE_KEYS)}")
    theta = settings.get("freq_base", 10_000.0)
    scaling = settings.get("scaling.type", "linear" if "scale_linear" in settings else "none")
    if _ROPE_FACTORS in file.tensors and scaling == "none":
        return _llama3_rope(file, theta=theta, head_dim=head_dim)
    if _ROPE_FACTORS in file.tensors or scaling not in ("none", "linear", "yarn"):
        raise ValueError(f"{file.path}: {prefix}scaling.type {scaling!r} is not supported"
                         + (f" beside {_ROPE_FACTORS!r}" if _ROPE_FACTORS in file.tensors else "")
                         + "; supported: none, linear, yarn")
    if scaling == "none":
        return {"rope_type": "default", "rope_theta": theta}
    factor = settings.get("scaling.factor", settings.get("scale_linear"))
    rope = {new: settings[old] for old, new in _YARN_KEYS.items() if old in settings and scaling == "yarn"}
    return {"rope_type": scaling, "rope_theta": theta, "factor": factor, **rope}


def _llama3_rope(file: GGUFFile, *, theta: float, head_dim: int) -> dict[str, Any]:
    """The llama3 scaling that makes the stored frequency factors; the file keeps the factors, not the settings."""
    tensor = file.tensors[_ROPE_FACTORS]
    stored = dequantize(file.rows(_ROPE_FACTORS), tensor.type_id, tensor.shape).astype(np.float64)
    if stored.shape == (head_dim // 2,) and np.all(stored > 0):
        rope = {"rope_type": "llama3", "rope_theta": theta, "factor": float(stored.max()), **_LLAMA3_ROPE}
        if np.allclose(stored, llama3_factors(head_dim=head_dim, rope=rope), rtol=1e-4):  # stored in float32
            return rope
    raise ValueError(
        f"{file.path}: the rotary factors in {_ROPE_FACTORS!r} (shape {stored.shape}) are not those of Llama 3 "
        f"({_LLAMA3_ROPE}, factor = their largest); use the Hugging Face checkpoint, whose config.json has the settings"
    )


def llama3_factors(*, head_dim: int, rope: Mapping[str, Any]) -> np.ndarray:
    """By how much Llama 3 divides each of the D/2 rotary frequencies."""
    wavelength = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    turns = rope["original_max_position_embeddings"] / wavelength
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)  # share of the frequency that stays as it is
    return 1.0 / (kept + (1.0 - kept) / rope["factor"])
