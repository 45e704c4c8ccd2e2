"""Token ids as callers give them."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


def checked_token_ids(values: Any, what: str, *, vocab_size: int) -> tuple[int, ...]:
    """The ids in a sequence of integers, a range, or a one-dimensional integer array of NumPy or JAX.

    Raises:
        ValueError: it is none of these, is empty, or an id is outside the vocabulary; the message calls it `what`.
    """
    if isinstance(values, np.ndarray | jax.Array):
        if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
            raise ValueError(f"{what} is {values.dtype}{list(values.shape)}; give a vector of integers")
        ids = np.asarray(values).tolist()
    elif isinstance(values, str | bytes | Mapping):
        raise ValueError(f"{what} is {values!r}; give token ids in a list, those of tokenizer.encode(text)")
    else:
        try:
            ids = list(values)
        except TypeError:
            raise ValueError(f"{what} is {values!r}; give token ids in a list") from None
        ids = [_integer(value, what) for value in ids]
    if not ids:
        raise ValueError(f"{what} is empty; give at least one token")
    if min(ids) < 0 or max(ids) >= vocab_size:
        bad = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
        raise ValueError(f"token id {bad} in {what} is outside the vocabulary, 0..{vocab_size - 1}")
    return tuple(ids)


def _integer(value: Any, what: str) -> int:
    if type(value) is int:
        return value
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"{what} holds {value!r}; token ids are integers")
