"""One prompt in any of the forms that people have, as one of three that the engine knows."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

PlainPrompt = str | tuple[int, ...] | list[Mapping[str, Any]]


class SupportsArray(Protocol):
    """What NumPy can read: arrays of NumPy, JAX, PyTorch on the host, ..."""

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """The array on the host."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


FORMS = "give text, token ids, or chat messages"


def plain_prompt(prompt: object) -> PlainPrompt:
    """Text, token ids, or chat messages, from those, an array of ids, one message, or an iterator.

    Raises ValueError, with the remedy, for what is none of them or may be read in two ways.
    """
    if isinstance(prompt, str):
        return str.__str__(prompt)  # of a subclass, the text itself
    if isinstance(prompt, Mapping):
        return [message(prompt)]
    if is_array(prompt):
        return _ids_of_array(prompt)
    items = listed(prompt)
    if set(map(type, items)) == {int}:  # thousands of them, most of the time
        return tuple(items)
    if any(isinstance(item, Mapping) for item in items):
        return [message(item) for item in items]
    return token_ids(items)


def listed(prompt: object) -> list[Any]:
    """The items of what is neither text nor an array; ValueError for bytes, sets, and what has no items."""
    if isinstance(prompt, bytes | bytearray | memoryview):
        raise ValueError(
            f"the prompt is {type(prompt).__name__}; make text of it with prompt.decode(), or token ids with list(prompt)"
        )
    if isinstance(prompt, set | frozenset):
        raise ValueError("the prompt is a set, which has no order; give a list")
    if not isinstance(prompt, Iterable) or isinstance(prompt, Mapping):
        one = "; one token id is [id]" if is_token(prompt) else ""
        raise ValueError(f"the prompt is {_shown(prompt)}; {FORMS}{one}")
    return list(prompt)


def message(item: object) -> Mapping[str, Any]:
    """`item`, if it can be a chat message; ValueError otherwise."""
    if isinstance(item, Mapping) and "role" in item:
        return item
    if not isinstance(item, Mapping):
        raise ValueError(
            f"the prompt holds {_shown(item)} among chat messages; give messages alone, or each conversation "
            "as a list of its own"
        )
    for key in ("messages", "input_ids", "prompt"):
        if key in item:
            raise ValueError(f"the prompt is a mapping with the keys {_keys(item)}; give prompt[{key!r}] alone")
    raise ValueError(
        f"the prompt has a mapping with the keys {_keys(item)}; a chat message is {{'role': ..., 'content': ...}}"
    )


def token_ids(items: Iterable[Any]) -> tuple[int, ...]:
    """Ints, from ints of any library; ValueError for the first item that is none."""
    ids = tuple(items)
    for item in ids:
        if not is_token(item):
            raise ValueError(f"the prompt holds {_shown(item)}; {FORMS}")
    return tuple(map(operator.index, ids))


def is_token(item: object) -> bool:
    """Whether `item` is a single whole number: an int, or a scalar of an array library; booleans are none."""
    if isinstance(item, bool | np.bool_) or (is_array(item) and np.asarray(item).dtype.kind not in "iu"):
        return False
    try:
        operator.index(item)  # pyright: ignore[reportArgumentType] (it is asked whether it can be one)
    except TypeError:
        return False
    return True


def is_array(prompt: object) -> bool:
    """Whether it is an array of NumPy, or can become one: of JAX, PyTorch, pandas, ..."""
    return isinstance(prompt, np.ndarray) or (hasattr(prompt, "__array__") and not isinstance(prompt, np.generic))


def as_array(prompt: Any) -> np.ndarray:
    """The array on the host; ValueError if it cannot be read there."""
    try:
        return np.asarray(prompt)
    except Exception as error:  # each library has its own for arrays on a device, or deleted, or with gradients
        raise ValueError(
            f"the prompt is a {type(prompt).__name__} that cannot be read as a NumPy array ({error}); bring it "
            "to the host, or give a list of token ids"
        ) from error


def _ids_of_array(prompt: Any) -> tuple[int, ...]:
    array = as_array(prompt)
    if array.dtype.kind == "O" and array.ndim == 1:
        return token_ids(array.tolist())
    if array.dtype.kind not in "iu" and array.size:
        raise ValueError(
            f"the prompt is an array of {array.dtype}; token ids are whole numbers: convert it, for example "
            "with .astype('int32')"
        )
    if array.ndim != 1:
        remedy = "one token id is [id]" if array.ndim == 0 else "give a row of it, or the array as the list of prompts"
        raise ValueError(f"the prompt is an array of shape {array.shape}; token ids of one prompt have one axis: {remedy}")
    return tuple(array.tolist())


def _keys(item: Mapping[Any, Any]) -> str:
    return ", ".join(map(str, item)) or "(none)"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"
