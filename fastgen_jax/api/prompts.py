"""Prompts as people write them: one or several, as text, token ids or chat messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastgen_jax.engine.intake import Prompt
from fastgen_jax.engine.prompts import as_array, is_array, is_token, listed, message, plain_prompt


def as_prompts(prompts: Any) -> list[Prompt]:
    """A list of prompts from one prompt or several.

    One prompt is a text, token ids (a list, a tuple, an array of one axis), chat messages, or a single message. Several
    are a list, tuple or iterator of prompts, or an array of two axes, a prompt a row. Raises ValueError for what is
    neither.
    """
    if isinstance(prompts, str | Mapping):
        return [plain_prompt(prompts)]
    if is_array(prompts):
        array = as_array(prompts)
        if array.dtype.kind not in "OU" and array.ndim != 2:
            return [plain_prompt(array)]
        prompts = list(array) if array.ndim == 2 else array.tolist()
    items = listed(prompts) if not isinstance(prompts, str) else [prompts]
    if not items:
        raise ValueError("no prompts; give at least one")
    if isinstance(items[0], Mapping):
        return [[message(item) for item in items]]
    if is_token(items[0]):
        return [plain_prompt(items)]
    plain: list[Prompt] = []
    for item in items:
        if isinstance(item, Mapping) or is_token(item):
            raise ValueError(
                f"prompts holds {item!r} among other prompts; put each prompt of token ids, and each "
                "conversation, into a list of its own"
            )
        plain.append(plain_prompt(item))
    return plain
