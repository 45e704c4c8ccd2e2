"""Converts prompts and token ids from the forms that callers use to the few that the engine accepts."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NewType, Protocol, SupportsIndex, TypeGuard

import numpy as np

from fastgen_jax.json_types import JsonFields

Message = JsonFields
PlainPrompt = str | tuple[int, ...] | list[Message]
"""Text, token ids, or chat messages."""

TokenIds = NewType("TokenIds", tuple[int, ...])
"""Ids that are in the vocabulary of the model, and at least one."""


class SupportsArray(Protocol):
    """What NumPy can read: arrays of NumPy, JAX, PyTorch on the host, ..."""

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """The array on the host."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[object]: ...


TokenIdsInput = Sequence[int] | SupportsArray
Prompt = str | TokenIdsInput | Sequence[Message] | Message
"""Text, token ids (also as an array), or chat messages `[{"role": ..., "content": ...}, ...]`, or a single message."""

_FORMS = "pass text, token ids, or chat messages"


def split_prompts(prompts: object) -> list[Prompt]:
    """A list of prompts from one prompt or several, each still in the caller's form.

    One prompt is a text, token ids (a list, a tuple, a one-dimensional array), chat messages, or a single message.
    Several are a list, tuple or iterator of prompts, or a two-dimensional array with one prompt per row. Raises
    ValueError if `prompts` is ambiguous or contains no prompt; `plain_prompt` checks whether each one is valid.
    """
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if is_array(prompts):
        array = as_array(prompts)
        if array.dtype.kind not in "OU" and array.ndim != 2:
            return [array]
        items: list[Any] = [*array] if array.ndim == 2 else array.reshape(-1).tolist()
    else:
        items = _listed(prompts)
    if not items:
        raise ValueError("no prompts; pass at least one")
    if isinstance(items[0], Mapping) or is_token(items[0]):
        return [items]
    for item in items:
        if isinstance(item, Mapping) or is_token(item):
            raise ValueError(
                f"prompts contains {item!r} among other prompts; put each prompt of token ids, and each "
                "conversation, into a separate list"
            )
    return items


def plain_prompt(prompt: object) -> PlainPrompt:
    """Text, token ids, or chat messages, from one of these, an array of ids, a single message, or an iterator.

    Raises ValueError, with the remedy, for anything else.
    """
    if isinstance(prompt, str):
        return str.__str__(prompt)  # the text itself, also of a subclass
    if isinstance(prompt, Mapping):
        return [_message(prompt)]
    if not is_array(prompt):
        prompt = _listed(prompt)
        if any(isinstance(item, Mapping) for item in prompt):
            return [_message(item) for item in prompt]
    return token_ids(prompt)


def token_ids(values: object, what: str = "the prompt", *, forms: str = _FORMS) -> tuple[int, ...]:
    """Ints from a sequence, an iterator or a one-dimensional array of integers of any library.

    Raises ValueError for anything else; the message calls it `what` and says that `forms` are expected.
    """
    if not is_array(values):
        return _ids_of_list(_listed(values, what, forms=forms), what, forms=forms)
    array = as_array(values, what)
    if array.dtype.kind == "O" and array.ndim == 1:
        return _ids_of_list(array.tolist(), what, forms=forms)
    if array.dtype.kind not in "iu" and array.size:
        raise ValueError(
            f"{what} is an array of {array.dtype}; token ids are integers: convert it, for example with .astype('int32')"
        )
    if array.ndim != 1:
        remedy = "one token id is [id]" if array.ndim == 0 else "pass one row, or the array as the list of prompts"
        raise ValueError(f"{what} is an array of shape {array.shape}; token ids of one prompt are one-dimensional: {remedy}")
    return tuple(array.tolist())


def in_vocabulary(ids: Iterable[int], what: str, *, vocab_size: int) -> TokenIds:
    """The ids, checked; ValueError if there is none, or one is outside the vocabulary."""
    checked = tuple(ids)
    if not checked:
        raise ValueError(f"{what} is empty; pass at least one token")
    if min(checked) < 0 or max(checked) >= vocab_size:
        wrong = next(token_id for token_id in checked if not 0 <= token_id < vocab_size)
        raise ValueError(f"{what}: token id {wrong} is outside the vocabulary, 0..{vocab_size - 1}")
    return TokenIds(checked)


def checked_token_ids(values: object, what: str, *, vocab_size: int) -> TokenIds:
    """The ids in `values`, which has any form of integers; ValueError, calling it `what`, for anything else."""
    if isinstance(values, str | bytes | Mapping):
        raise ValueError(f"{what} is {values!r}; pass a list of token ids, for example tokenizer.encode(text)")
    return in_vocabulary(
        token_ids(values, what, forms="pass a list of token ids, which are integers"), what, vocab_size=vocab_size
    )


def is_token(item: object) -> TypeGuard[SupportsIndex]:
    """Whether `item` is a single integer: an int, or a scalar of an array library, but not a boolean."""
    if isinstance(item, bool | np.bool_) or (is_array(item) and np.asarray(item).dtype.kind not in "iu"):
        return False
    if not isinstance(item, SupportsIndex):
        return False
    try:
        operator.index(item)
    except TypeError:  # an array with an axis, or of floats
        return False
    return True


def is_array(prompt: object) -> TypeGuard[SupportsArray]:
    """Whether it is an array of NumPy, or can become one: of JAX, PyTorch, pandas, ..."""
    return isinstance(prompt, np.ndarray) or (hasattr(prompt, "__array__") and not isinstance(prompt, np.generic))


def as_array(prompt: SupportsArray, what: str = "the prompt") -> np.ndarray:
    """The array on the host; ValueError if it cannot be read there."""
    try:
        return np.asarray(prompt)
    except Exception as error:  # each library has its own for arrays on a device, deleted arrays, or those with gradients
        raise ValueError(
            f"{what} is a {type(prompt).__name__} that cannot be read as a NumPy array ({error}); copy it "
            "to the host, or pass a list of token ids"
        ) from error


def _listed(prompt: object, what: str = "the prompt", *, forms: str = _FORMS) -> list[Any]:
    """The items of anything but text and arrays; ValueError for bytes, sets, and objects without items."""
    if isinstance(prompt, bytes | bytearray | memoryview):
        raise ValueError(
            f"{what} is {type(prompt).__name__}; convert it to text with prompt.decode(), or to token ids with list(prompt)"
        )
    if isinstance(prompt, set | frozenset):
        raise ValueError(f"{what} is a set, which has no order; pass a list")
    if not isinstance(prompt, Iterable) or isinstance(prompt, Mapping):
        one = "; one token id is [id]" if is_token(prompt) else ""
        raise ValueError(f"{what} is {_shown(prompt)}; {forms}{one}")
    return list(prompt)


def _ids_of_list(items: list[Any], what: str, *, forms: str) -> tuple[int, ...]:
    if set(map(type, items)) == {int}:  # thousands of them, most of the time
        return tuple(items)
    for item in items:
        if not is_token(item):
            raise ValueError(f"{what} contains {_shown(item)}; {forms}")
    return tuple(map(operator.index, items))


def _message(item: object) -> Message:
    """`item`, if it can be a chat message; ValueError otherwise."""
    if isinstance(item, Mapping) and "role" in item:
        return item
    if not isinstance(item, Mapping):
        raise ValueError(
            f"the prompt contains {_shown(item)} among chat messages; pass only messages, or each conversation "
            "as a separate list"
        )
    keys = ", ".join(map(str, item)) or "(none)"
    for key in ("messages", "input_ids", "prompt"):
        if key in item:
            raise ValueError(f"the prompt is a mapping with the keys {keys}; pass only prompt[{key!r}]")
    raise ValueError(f"the prompt has a mapping with the keys {keys}; a chat message is {{'role': ..., 'content': ...}}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"
