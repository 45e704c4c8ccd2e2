"""Prompts as people write them: one or several, as text, token ids or chat messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from fastgen_jax.engine.intake import Prompt


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts from one prompt or several."""
    if isinstance(prompts, str):
        return [prompts]
    items = list(prompts)
    if not items:
        raise ValueError("no prompts; give at least one")
    is_single = not isinstance(items[0], str) and not isinstance(items[0], Sequence)  # token ids or messages
    return [cast("Prompt", items)] if is_single else cast("list[Prompt]", items)
