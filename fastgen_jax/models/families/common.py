"""What the families share when they read a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastgen_jax.models.config import RopeConfig


@dataclass(frozen=True, init=False)
class Source:
    """Checkpoint tensors that make one weight: joined along their output axis, transposed from [out, in] if asked."""

    names: tuple[str, ...]
    transpose: bool

    def __init__(self, *names: str, transpose: bool = False) -> None:
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "transpose", transpose)


def eos_ids(hf: Mapping[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids: none, one or several."""
    eos = hf.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (eos,)


def refuse_unsupported(hf: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises ValueError for a field whose value is not among the supported ones; an absent field is fine."""
    for name, values in supported.items():
        if name in hf and hf[name] not in values:
            raise ValueError(
                f"config.json has {name}={hf[name]!r}, which is not supported; supported: "
                f"{', '.join(map(repr, values))}"
            )


def rope_from_hf(hf: Mapping[str, Any], *, max_context_len: int) -> RopeConfig:
    """The rotary settings, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    fields = dict(hf.get("rope_scaling") or {})
    fields.update(hf.get("rope_parameters") or {})
    theta = float(fields.pop("rope_theta", None) or hf.get("rope_theta") or 10_000.0)
    kind = fields.pop("rope_type", None) or fields.pop("type", None) or "default"
    fields.pop("type", None)
    known = {
        "default": (),
        "linear": ("factor",),
        "dynamic": ("factor", "original_max_position_embeddings"),
        "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
        "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor",
                 "mscale", "mscale_all_dim", "truncate"),
    }
    if kind not in known:
        raise ValueError(f"rope_type {kind!r} is not supported; supported: {', '.join(known)}")
    # transformers writes these two beside any kind, at their neutral values
    neutral = {"partial_rotary_factor": 1.0, "original_max_position_embeddings": fields.get(
        "original_max_position_embeddings")}
    unknown = {
        name: value for name, value in fields.items()
        if name not in known[kind] and value is not None and neutral.get(name, ...) != value
    }
    if unknown:
        raise ValueError(f"rope_type {kind!r} has fields that we do not know: {unknown}; refusing to ignore them")
    if kind == "default":
        return RopeConfig(theta=theta)
    if "factor" not in fields:
        raise ValueError(f"rope_type {kind!r} needs a `factor`; config.json gives only {sorted(fields)}")
    original = fields.pop("original_max_position_embeddings", None)
    if kind == "dynamic" or not original:  # transformers reads the dynamic kind's threshold from the model's limit
        original = max_context_len
    settings = {name: fields[name] for name in known[kind] if fields.get(name) is not None}
    return RopeConfig(kind=kind, theta=theta, original_max_position=original, **settings)
