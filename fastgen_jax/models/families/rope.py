"""The rotary settings of a Hugging Face `config.json`, in the formats before and since transformers 5."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from fastgen_jax.json_types import JsonFields, JsonObject
from fastgen_jax.models.config import RopeConfig, RopeKind
from fastgen_jax.models.families.common import ModelFields
from fastgen_jax.models.families.fields import Fields

_KNOWN = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
}
# Fields of other implementations, with the values that change nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "finetuned": (True, False),  # a remark of the first YaRN releases
    "attn_factor": (1,),
    "extrapolation_factor": (1,),
}
_RENAMED = {
    "su": "longrope",  # the name of LongRoPE in the first Phi-3 releases
    "mrope": "default",
}
# How time, row and column of tokens in images divide a head. In text all three are the position.
_OF_IMAGES = ("mrope_section", "mrope_interleaved")


def with_settings(hf: Fields, settings: JsonFields) -> JsonObject:
    """The rotary fields of `hf` with other `rope_parameters`, for a family with settings of its own among them."""
    names = ("max_position_embeddings", "original_max_position_embeddings", "rope_theta")
    hf.ignore("rope_parameters", "rope_scaling")
    return {name: hf[name] for name in names if name in hf} | {"rope_parameters": settings}


def rotary(hf: JsonFields, *, max_context_len: int, **assumed: Any) -> ModelFields:
    """`rope` and `max_context_len` as keyword arguments of `ModelConfig`; `assumed` as in `rope_from_hf`."""
    max_context_len = hf.get("max_position_embeddings") or max_context_len
    rope = rope_from_hf(hf, max_context_len=max_context_len, **assumed)
    # These extend the trained length by `factor`; for the other kinds the field already is the extended length.
    if rope.kind in ("dynamic", "linear", "yarn"):
        max_context_len = max(max_context_len, int((rope.original_max_position or max_context_len) * rope.factor))
    return {"rope": rope, "max_context_len": max_context_len}


def rope_from_hf(
    hf: JsonFields,
    *,
    max_context_len: int,
    head_dim: int | None = None,
    theta: float = 10_000.0,
    partial: float = 1.0,
) -> RopeConfig:
    """The rotary settings, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    `theta` and `partial`, the rotated fraction of a head of `head_dim` dimensions, are the family's defaults. Without
    `head_dim`, whole heads are rotated: transformers reads `partial_rotary_factor` in some architectures only.
    """
    fields = dict(hf.get("rope_scaling") or {})
    fields.update(hf.get("rope_parameters") or {})
    given = (fields.pop("partial_rotary_factor", None), hf.get("partial_rotary_factor"))
    partial = next((value for value in given if value is not None), partial)
    if partial != 1.0 and head_dim is None:
        if (fields.get("rope_type") or fields.get("type") or "default") != "default" or not isinstance(hf, Fields):
            raise ValueError(
                f"partial_rotary_factor={partial} with scaled rotary embeddings is not supported for this architecture, nor "
                "by its implementation in transformers; remove it from config.json if whole heads are rotated"
            )
        hf.have_no_effect(partial_rotary_factor=partial)
    beside = hf.get("rope_theta")
    return rope_from_fields(
        fields,
        max_context_len=max_context_len,
        theta=float(fields.pop("rope_theta", None) or beside or theta),
        dim=None if partial == 1.0 or head_dim is None else int(head_dim * partial),
        trained_len=hf.get("original_max_position_embeddings"),
    )


def for_qwen3_vl(rope: RopeConfig) -> RopeConfig:
    """`rope` with the sections of Qwen3-VL, whose config may leave them out."""
    return replace(rope, sections=rope.sections or (24, 20, 20), sections_interleaved=True)


def ropes_by_layer_type(
    hf: JsonFields, *, max_context_len: int, theta: float, windowed_theta: float
) -> tuple[RopeConfig, RopeConfig]:
    """The rotary settings of layers with full attention, and of layers with a window, which `rope_scaling` does not affect.

    The thetas are defaults; `rope_parameters` holds the settings of both kinds of layers by name.
    """
    given: JsonObject = hf.get("rope_parameters") or {}
    if unknown := given.keys() - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"rope_parameters has the fields {sorted(unknown)}; supported in this family: 'full_attention' and "
            "'sliding_attention', each with the settings of those layers"
        )
    everywhere = {**(hf.get("rope_scaling") or {}), **(given.get("full_attention") or {})}
    windowed = dict(given.get("sliding_attention") or {})
    theta = float(everywhere.pop("rope_theta", None) or hf.get("rope_theta") or theta)
    windowed_theta = float(windowed.pop("rope_theta", None) or windowed_theta)
    return (
        rope_from_fields(everywhere, max_context_len=max_context_len, theta=theta),
        rope_from_fields(windowed, max_context_len=max_context_len, theta=windowed_theta),
    )


def rope_from_fields(
    fields: JsonFields, *, max_context_len: int, theta: float, dim: int | None = None, trained_len: int | None = None
) -> RopeConfig:
    """The `RopeConfig` of one set of scaling fields; ValueError for an unknown kind or field."""
    fields = dict(fields)
    sections = tuple(int(size) for size in fields.get("mrope_section") or ())
    images: dict[str, Any] = {"sections": sections} if sections else {}
    if fields.get("mrope_interleaved"):
        images["sections_interleaved"] = True
    kind = fields.pop("rope_type", None) or fields.get("type") or "default"
    fields.pop("type", None)
    kind = _RENAMED.get(kind, kind)
    if kind not in _KNOWN:
        raise ValueError(f"rope_type {kind!r} is not supported; supported: {', '.join(_KNOWN)}")
    # transformers writes this one with every kind
    unknown = {
        name: value
        for name, value in fields.items()
        if name not in (*_KNOWN[kind], *_OF_IMAGES, "original_max_position_embeddings")
        and value is not None
        and value not in _NEUTRAL.get(name, ())
    }
    if unknown:
        raise ValueError(f"rope_type {kind!r} has unknown fields {unknown}; remove them if they do not matter")
    if kind == "default":
        return RopeConfig(theta=theta, dim=dim, **images)
    original = fields.pop("original_max_position_embeddings", None) or trained_len
    if kind == "dynamic" or not original:  # for the dynamic kind, transformers takes the threshold from the model's limit
        original = max_context_len
    if kind == "longrope":
        fields["factor"] = fields.get("factor") or max(max_context_len / original, 1.0)
    if "factor" not in fields:
        raise ValueError(f"rope_type {kind!r} needs a `factor`; config.json has only {sorted(fields)}")
    settings = {name: fields[name] for name in _KNOWN[kind] if fields.get(name) is not None}
    for name in ("short_factor", "long_factor"):
        if name in settings:
            settings[name] = tuple(float(value) for value in settings[name])
    return RopeConfig(kind=cast(RopeKind, kind), theta=theta, dim=dim, original_max_position=original, **images, **settings)
