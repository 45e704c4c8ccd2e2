"""The metadata of a GGUF file, and the config.json fields that most architectures share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastgen_jax.checkpoint.gguf_file import GGUFFile, dequantize
from fastgen_jax.json_types import JsonFields, JsonObject

_ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = frozenset({_ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS})
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LLAMA4_ROPE = _LLAMA3_ROPE | {"high_freq_factor": 1.0}
_YARN_KEYS = {
    "scaling.original_context_length": "original_max_position_embeddings",
    "scaling.yarn_beta_fast": "beta_fast",
    "scaling.yarn_beta_slow": "beta_slow",
    "scaling.yarn_attn_factor": "attention_factor",
}
_ROPE_KEYS = (
    "freq_base",
    "freq_base_swa",
    "dimension_count",
    "scale_linear",
    "scaling.type",
    "scaling.factor",
    "scaling.attn_factor",
    "scaling.finetuned",
    *_YARN_KEYS,
)
_INERT = frozenset({"vocab_size", "tensor_data_layout"})  # follows from the tensors


class Metadata:
    """The fields of the file's architecture; it records which were read, so that none is overlooked."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.kind: str = file.metadata["general.architecture"]
        prefix = f"{self.kind}."
        self.fields = {
            name.removeprefix(prefix): _as_written(value) for name, value in file.metadata.items() if name.startswith(prefix)
        }
        self._read: set[str] = set(_INERT)

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a field; ValueError if it is absent and has no default."""
        self._read.add(name)
        value = self.fields.get(name, default)
        if value is None:
            raise self.refusal(f"the metadata lacks {self.kind}.{name}; the file is incomplete, convert it again")
        return value

    def only(self, name: str, value: object) -> None:
        """Raises ValueError unless the field is absent or has the one supported value."""
        if self.get(name, value) != value:
            raise self.refusal(f"{self.kind}.{name} is {self.get(name)}; only {value} is supported")

    def has(self, tensor: str) -> bool:
        """Whether the file holds a tensor."""
        return tensor in self.file.tensors

    def refuse_unread(self) -> None:
        """Raises ValueError if a field that was not read could change what the model computes."""
        for name, value in self.fields.items():
            if name not in self._read and value not in (0, False, "", []):
                raise self.refusal(f"{self.kind}.{name} is {value!r}, which is not supported")

    def refusal(self, what: str) -> ValueError:
        """An error that begins with the file's name."""
        return ValueError(f"{self.file.path}: {what}")


def _as_written(value: object) -> object:
    """The shortest decimal of a number that was stored in float32: 1e-06, not 9.999999974752427e-07."""
    if isinstance(value, float) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value


def llama_like(m: Metadata, *, layer_norm: bool = False, partial_rotary: bool = False) -> JsonObject:
    """The fields that most architectures record as Llama does. With `partial_rotary` the caller adds the rotary settings."""
    heads, width = m.get("attention.head_count"), m.get("embedding_length")
    head_dim = m.get("attention.key_length", width // heads)
    m.only("attention.value_length", head_dim)
    if not partial_rotary:
        m.only("rope.dimension_count", head_dim)
    return {
        "vocab_size": m.file.tensors["token_embd.weight"].shape[0],
        "num_hidden_layers": m.get("block_count"),
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": m.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": m.get("feed_forward_length", m.fields.get("expert_feed_forward_length")),
        "max_position_embeddings": m.get("context_length"),
        **(
            {"layer_norm_eps": m.get("attention.layer_norm_epsilon")}
            if layer_norm
            else {"rms_norm_eps": m.get("attention.layer_norm_rms_epsilon")}
        ),
        "tie_word_embeddings": not m.has("output.weight"),
        "rope_parameters": None if partial_rotary else rope_parameters(m),
    }


def partial_rope(m: Metadata) -> JsonObject:
    """The rotary settings for partly rotated heads; the default base unless another is recorded."""
    head_dim = m.get("attention.key_length", m.get("embedding_length") // m.get("attention.head_count"))
    return {
        "rope_type": "default",
        "rope_theta": float(m.get("rope.freq_base", 10_000.0)),
        "partial_rotary_factor": m.get("rope.dimension_count", head_dim) / head_dim,
    }


def rope_parameters(m: Metadata, *, further: tuple[str, ...] = ()) -> JsonObject:
    """`rope_parameters` of the file: its scaling keys, or the llama3 scaling that matches its table of frequency factors.

    `further` are keys that the caller handles.
    """
    known = {f"rope.{name}" for name in (*_ROPE_KEYS, *further)}
    unknown = {name for name in m.fields if name.startswith("rope.")} - known
    if unknown or m.fields.get("rope.scaling.attn_factor", 1.0) != 1.0:
        name = min(unknown or {"rope.scaling.attn_factor"})
        raise m.refusal(f"{m.kind}.{name} is not supported; supported: {', '.join(_ROPE_KEYS)}")
    settings = {name: m.get(f"rope.{name}") for name in _ROPE_KEYS if f"rope.{name}" in m.fields}
    theta = settings.get("freq_base", 10_000.0)
    scaling = settings.get("scaling.type", "linear" if "scale_linear" in settings else "none")
    if m.has(_ROPE_FACTORS) and scaling == "none":
        return _llama3_rope(m, theta=theta)
    if m.has(_ROPE_FACTORS) or scaling not in ("none", "linear", "yarn"):
        raise m.refusal(
            f"{m.kind}.rope.scaling.type {scaling!r} is not supported"
            + (f" beside {_ROPE_FACTORS!r}" if m.has(_ROPE_FACTORS) else "")
            + "; supported: none, linear, yarn"
        )
    if scaling == "none":
        return {"rope_type": "default", "rope_theta": theta}
    factor = settings.get("scaling.factor", settings.get("scale_linear"))
    rope = {new: settings[old] for old, new in _YARN_KEYS.items() if old in settings and scaling == "yarn"}
    return {"rope_type": scaling, "rope_theta": theta, "factor": factor, **rope}


def longrope(m: Metadata) -> JsonObject:
    """`rope_parameters` with LongRoPE if the file has its tables of factors, and the trained length."""
    rope: JsonObject = {"rope_type": "default", "rope_theta": float(m.get("rope.freq_base", 10_000.0))}
    m.get("rope.scaling.type", "none")  # the tables identify it
    if m.has(LONG_FACTORS):
        rope |= {
            "rope_type": "longrope",
            "long_factor": factors(m, LONG_FACTORS),
            "short_factor": factors(m, SHORT_FACTORS),
            "attention_factor": m.get("rope.scaling.attn_factor", 1.0),
        }
    original = m.get("rope.scaling.original_context_length", 0) or m.get("context_length")
    return {"rope_parameters": rope, "original_max_position_embeddings": original}


def factors(m: Metadata, name: str) -> list[float]:
    tensor = m.file.tensors[name]
    return [float(x) for x in dequantize(m.file.rows(name), tensor.type_id, tensor.shape)]


def _llama3_rope(m: Metadata, *, theta: float) -> JsonObject:
    """The llama3 scaling with the stored frequency factors; the file has the factors, not the settings."""
    head_dim = m.get("attention.key_length", m.get("embedding_length") // m.get("attention.head_count"))
    stored = np.array(factors(m, _ROPE_FACTORS))
    if stored.shape == (head_dim // 2,) and np.all(stored > 0):
        for settings in (_LLAMA3_ROPE, _LLAMA4_ROPE):
            rope = {"rope_type": "llama3", "rope_theta": theta, "factor": float(stored.max()), **settings}
            if np.allclose(stored, llama3_factors(head_dim=head_dim, rope=rope), rtol=1e-4):  # stored in float32
                return rope
    raise m.refusal(
        f"the rotary factors in {_ROPE_FACTORS!r} (shape {stored.shape}) are not those of Llama 3 "
        f"({_LLAMA3_ROPE}, factor = their largest); use the Hugging Face checkpoint, whose config.json has the settings"
    )


def llama3_factors(*, head_dim: int, rope: JsonFields) -> np.ndarray:
    """The divisors of the D/2 rotary frequencies in Llama 3."""
    wavelength = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    turns = rope["original_max_position_embeddings"] / wavelength
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    # The fraction of the frequency that is not scaled.
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0) if high > low else np.where(turns > low, 1.0, 0.0)
    return 1.0 / (kept + (1.0 - kept) / rope["factor"])
