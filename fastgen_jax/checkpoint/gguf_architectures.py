"""What each architecture of GGUF is in the words of Hugging Face: the metadata as a config.json, so that one family
reads both formats.

An entry is here only if the metadata say all that the model computes. Some do not: Starcoder2's window and Stablelm's
residual are not recorded, for instance, so those checkpoints are read as safetensors alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastgen_jax.checkpoint.gguf_file import GGUFFile, dequantize

_ROPE_FACTORS = "rope_freqs.weight"
_LONG_FACTORS, _SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = frozenset({_ROPE_FACTORS, _LONG_FACTORS, _SHORT_FACTORS})
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_YARN_KEYS = {
    "scaling.original_context_length": "original_max_position_embeddings",
    "scaling.yarn_beta_fast": "beta_fast",
    "scaling.yarn_beta_slow": "beta_slow",
}
_ROPE_KEYS = ("freq_base", "freq_base_swa", "dimension_count", "scale_linear", "scaling.type", "scaling.factor",
              "scaling.attn_factor", "scaling.finetuned", *_YARN_KEYS)
_INERT = frozenset({"vocab_size", "tensor_data_layout"})  # what the tensors say as well
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}  # its attention scale is another, and only its depth shows it


class Metadata:
    """The fields of the file's architecture; it remembers which were read, so that none is ignored by oversight."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.kind: str = file.metadata["general.architecture"]
        prefix = f"{self.kind}."
        self.fields = {name.removeprefix(prefix): value for name, value in file.metadata.items() if name.startswith(prefix)}
        self._read: set[str] = set(_INERT)

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a field; ValueError if it is absent and has no default."""
        self._read.add(name)
        value = self.fields.get(name, default)
        if value is None:
            raise self.refusal(f"the metadata lack {self.kind}.{name}; the file is incomplete, convert it again")
        return value

    def only(self, name: str, value: Any) -> None:
        """ValueError unless the field is absent or has the one value that we compute."""
        if self.get(name, value) != value:
            raise self.refusal(f"{self.kind}.{name} is {self.get(name)}; only {value} is supported here")

    def has(self, tensor: str) -> bool:
        """Whether the file holds a tensor."""
        return tensor in self.file.tensors

    def refuse_unread(self) -> None:
        """ValueError if a field that nobody has read could change what the model computes."""
        for name, value in self.fields.items():
            if name not in self._read and value not in (0, False, "", []):
                raise self.refusal(f"{self.kind}.{name} is {value!r}, which is not supported")

    def refusal(self, what: str) -> ValueError:
        """An error that begins with the file's name."""
        return ValueError(f"{self.file.path}: {what}")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How one GGUF architecture differs from Llama's metadata and tensors."""

    name: str  # in config.json
    fields: Callable[[Metadata], dict[str, Any]] = lambda metadata: {}  # fields of config.json beyond Llama's, or instead
    halves_interleaved: bool = False  # rows of q and k lie as llama.cpp's converter permutes them for its own rotation
    stored_norm_offset: float = 0.0  # what the converter added to the weights of norms
    transposed: tuple[str, ...] = ()  # endings of the modules whose matrices Hugging Face keeps [in, out]


def _llama(m: Metadata) -> dict[str, Any]:
    m.only("expert_count", 0)
    m.only("attention.sliding_window", 0)
    return {"attention_bias": m.has("blk.0.attn_output.bias"), "mlp_bias": m.has("blk.0.ffn_down.bias")}


def _gemma(m: Metadata) -> dict[str, Any]:
    return {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}


def _gemma2(m: Metadata) -> dict[str, Any]:
    return _gemma(m) | {
        "attn_logit_softcapping": m.get("attn_logit_softcapping"),
        "final_logit_softcapping": m.get("final_logit_softcapping"),
        "sliding_window": m.get("attention.sliding_window"),
        "query_pre_attn_scalar": _gemma_scale(m),
    }


def _gemma3(m: Metadata) -> dict[str, Any]:
    rope = _rope(m)
    local = float(m.get("rope.freq_base_swa", 10_000.0))
    if m.fields.get("final_logit_softcapping"):
        raise m.refusal("gemma3.final_logit_softcapping is not supported")
    return _gemma(m) | {
        "sliding_window": m.get("attention.sliding_window"),
        "sliding_window_pattern": 6,  # every sixth layer sees all; not recorded, the same in every release
        "query_pre_attn_scalar": _gemma_scale(m),
        "rope_theta": rope.pop("rope_theta"),
        "rope_local_base_freq": local,
        "rope_scaling": rope if rope["rope_type"] != "default" else None,
        "rope_parameters": None,
    }


def _gemma_scale(m: Metadata) -> float:
    heads = m.get("attention.head_count")
    if m.get("block_count") == _GEMMA_27B_LAYERS[m.kind]:
        return m.get("embedding_length") / heads
    return m.get("attention.key_length", m.get("embedding_length") // heads)


def _gpt2(m: Metadata) -> dict[str, Any]:
    width = m.get("embedding_length")
    return {
        "n_embd": width, "n_layer": m.get("block_count"), "n_head": m.get("attention.head_count"),
        "n_positions": m.get("context_length"), "n_inner": m.get("feed_forward_length"),
        "layer_norm_epsilon": m.get("attention.layer_norm_epsilon"), "activation_function": "gelu_new",
        "vocab_size": m.file.tensors["token_embd.weight"].shape[0], "tie_word_embeddings": not m.has("output.weight"),
    }


def _granite(m: Metadata) -> dict[str, Any]:
    m.only("expert_count", 0)
    return {
        "attention_multiplier": m.get("attention.scale"), "embedding_multiplier": m.get("embedding_scale"),
        "residual_multiplier": m.get("residual_scale"), "logits_scaling": m.get("logit_scale"),
        "attention_bias": m.has("blk.0.attn_output.bias"), "mlp_bias": m.has("blk.0.ffn_down.bias"),
    }


def _smollm3(m: Metadata) -> dict[str, Any]:
    # Every fourth layer has no rotary embedding; not recorded, the same in every release.
    return {"no_rope_layers": [int((i + 1) % 4 != 0) for i in range(m.get("block_count"))], "use_sliding_window": False}


def _phi3(m: Metadata) -> dict[str, Any]:
    heads, width = m.get("attention.head_count"), m.get("embedding_length")
    window, original = m.get("attention.sliding_window", 0), m.get("rope.scaling.original_context_length", 0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(m.get("rope.freq_base", 10_000.0))}
    if m.has(_LONG_FACTORS):
        rope |= {"rope_type": "longrope", "long_factor": _factors(m, _LONG_FACTORS),
                 "short_factor": _factors(m, _SHORT_FACTORS), "attention_factor": m.get("rope.scaling.attn_factor", 1.0)}
    return {
        "sliding_window": window or None,
        "partial_rotary_factor": m.get("rope.dimension_count", width // heads) / (width // heads),
        "original_max_position_embeddings": original or m.get("context_length"),
        "rope_parameters": rope,
    }


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(name="LlamaForCausalLM", fields=_llama, halves_interleaved=True),
    "qwen2": Architecture(name="Qwen2ForCausalLM", fields=lambda m: {"use_sliding_window": False}),
    "qwen3": Architecture(name="Qwen3ForCausalLM", fields=lambda m: {"use_sliding_window": False, "attention_bias": False}),
    "gemma": Architecture(name="GemmaForCausalLM", fields=_gemma, stored_norm_offset=1.0),
    "gemma2": Architecture(name="Gemma2ForCausalLM", fields=_gemma2, stored_norm_offset=1.0),
    "gemma3": Architecture(name="Gemma3ForCausalLM", fields=_gemma3, stored_norm_offset=1.0),
    "gpt2": Architecture(name="GPT2LMHeadModel", fields=_gpt2, transposed=("c_attn", "c_proj", "c_fc")),
    "granite": Architecture(name="GraniteForCausalLM", fields=_granite, halves_interleaved=True),
    "smollm3": Architecture(name="SmolLM3ForCausalLM", fields=_smollm3, halves_interleaved=True),
    "olmo2": Architecture(name="Olmo2ForCausalLM", fields=lambda m: m.only("attention.sliding_window", 0) or {}),
    "phi3": Architecture(name="Phi3ForCausalLM", fields=_phi3),
}
"""By general.architecture. Whether we have the family is another matter, and its refusal names the nearest."""


def config_json(file: GGUFFile) -> dict[str, Any]:
    """The metadata as the fields of a Hugging Face `config.json`, so that one family reads both."""
    kind = file.metadata.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise ValueError(f"{file.path}: GGUF architecture {kind!r} is not supported; "
                         f"supported: {', '.join(ARCHITECTURES)}")
    if "token_embd.weight" not in file.tensors:
        if not file.tensors:
            raise ValueError(f"{file.path} holds a vocabulary, not a model")
        raise ValueError(f"{file.path} has no tensor 'token_embd.weight'; the file is incomplete, convert it again")
    architecture, m = ARCHITECTURES[kind], Metadata(file)
    if m.get("block_count") > len(file.tensors):  # before anybody counts to it
        raise m.refusal(f"{kind}.block_count is {m.get('block_count'):,}, but the file holds only {len(file.tensors)} "
                        "tensors; it is corrupt, download it again")
    eos = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    config = {
        "architectures": [architecture.name],
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(id for id in eos if id is not None)),
    }
    config |= {} if kind == "gpt2" else _llama_like(m)
    config |= architecture.fields(m)
    m.refuse_unread()
    return {name: value for name, value in config.items() if value is not None}


def _llama_like(m: Metadata) -> dict[str, Any]:
    heads, width = m.get("attention.head_count"), m.get("embedding_length")
    head_dim = m.get("attention.key_length", width // heads)
    m.only("attention.value_length", head_dim)
    if m.kind != "phi3":
        m.only("rope.dimension_count", head_dim)
    return {
        "vocab_size": m.file.tensors["token_embd.weight"].shape[0],
        "num_hidden_layers": m.get("block_count"),
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": m.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": m.get("feed_forward_length"),
        "max_position_embeddings": m.get("context_length"),
        "rms_norm_eps": m.get("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": not m.has("output.weight"),
        "rope_parameters": _rope(m) if m.kind != "phi3" else None,
    }


def _rope(m: Metadata) -> dict[str, Any]:
    """`rope_parameters` of the file: its scaling keys, or the llama3 scaling behind its table of frequency factors."""
    unknown = {name for name in m.fields if name.startswith("rope.")} - {f"rope.{name}" for name in _ROPE_KEYS}
    if unknown or m.fields.get("rope.scaling.attn_factor", 1.0) != 1.0:
        name = min(unknown or {"rope.scaling.attn_factor"})
        raise m.refusal(f"{m.kind}.{name} is not supported; supported: {', '.join(_ROPE_KEYS)}")
    settings = {name: m.get(f"rope.{name}") for name in _ROPE_KEYS if f"rope.{name}" in m.fields}
    theta = settings.get("freq_base", 10_000.0)
    scaling = settings.get("scaling.type", "linear" if "scale_linear" in settings else "none")
    if m.has(_ROPE_FACTORS) and scaling == "none":
        return _llama3_rope(m, theta=theta)
    if m.has(_ROPE_FACTORS) or scaling not in ("none", "linear", "yarn"):
        raise m.refusal(f"{m.kind}.rope.scaling.type {scaling!r} is not supported"
                        + (f" beside {_ROPE_FACTORS!r}" if m.has(_ROPE_FACTORS) else "") + "; supported: none, linear, yarn")
    if scaling == "none":
        return {"rope_type": "default", "rope_theta": theta}
    factor = settings.get("scaling.factor", settings.get("scale_linear"))
    rope = {new: settings[old] for old, new in _YARN_KEYS.items() if old in settings and scaling == "yarn"}
    return {"rope_type": scaling, "rope_theta": theta, "factor": factor, **rope}


def _factors(m: Metadata, name: str) -> list[float]:
    tensor = m.file.tensors[name]
    return [float(x) for x in dequantize(m.file.rows(name), tensor.type_id, tensor.shape)]


def _llama3_rope(m: Metadata, *, theta: float) -> dict[str, Any]:
    """The llama3 scaling that makes the stored frequency factors; the file keeps the factors, not the settings."""
    head_dim = m.get("attention.key_length", m.get("embedding_length") // m.get("attention.head_count"))
    stored = np.array(_factors(m, _ROPE_FACTORS))
    if stored.shape == (head_dim // 2,) and np.all(stored > 0):
        rope = {"rope_type": "llama3", "rope_theta": theta, "factor": float(stored.max()), **_LLAMA3_ROPE}
        if np.allclose(stored, llama3_factors(head_dim=head_dim, rope=rope), rtol=1e-4):  # stored in float32
            return rope
    raise m.refusal(
        f"the rotary factors in {_ROPE_FACTORS!r} (shape {stored.shape}) are not those of Llama 3 "
        f"({_LLAMA3_ROPE}, factor = their largest); use the Hugging Face checkpoint, whose config.json has the settings"
    )


def llama3_factors(*, head_dim: int, rope: Mapping[str, Any]) -> np.ndarray:
    """By how much Llama 3 divides each of the D/2 rotary frequencies."""
    wavelength = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    turns = rope["original_max_position_embeddings"] / wavelength
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)  # share of the frequency that stays as it is
    return 1.0 / (kept + (1.0 - kept) / rope["factor"])
