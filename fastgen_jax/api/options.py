"""Generation options: from keywords to `SamplingParams`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fastgen_jax.scheduling import SamplingParams


def sampling_params(options: Mapping[str, Any]) -> SamplingParams:
    """`SamplingParams` from keyword options; an unknown one raises ValueError that lists the known."""
    known = {f.name for f in fields(SamplingParams)}
    unknown = sorted(set(options) - known)
    if unknown:
        more = ("echo", "progress", "return_full_text", "stream")
        raise ValueError(f"unknown option {unknown[0]!r}; generation options: {', '.join(sorted({*known, *more}))}")
    return SamplingParams(**options)
