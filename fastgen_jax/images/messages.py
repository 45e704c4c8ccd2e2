"""The images in chat messages, in the forms of OpenAI, Anthropic and transformers."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastgen_jax.images.decode import ImageSource, NamedImage, named
from fastgen_jax.json_types import JsonFields

_KINDS = ("image_url", "input_image", "image")


def has_images(messages: Sequence[JsonFields]) -> bool:
    """Whether a content has a part that is an image."""
    return any(_is_image(part) for message in messages for part in _parts(message))


def take_images(
    messages: Sequence[JsonFields],
    placeholder: str,
    given: Sequence[ImageSource] = (),
    *,
    read: Callable[[str, str], ImageSource] = lambda url, what: url,
) -> tuple[list[JsonFields], list[NamedImage]]:
    """The messages with the text `placeholder` in place of each image, and the images in order.

    Images of `given` belong to the parts {"type": "image"} without a source of their own; if there is no such part, they
    are shown before the content of the last message of the user. `read(url, what)` gets the image of a URL that is part of
    a message. Raises ValueError for a part of another form, and if there are too few or too many of `given`.
    """
    waiting, images = named(given), []
    messages = list(messages)
    if given and not any(_is_open(part) for message in messages for part in _parts(message)):
        messages = _with_parts(messages, len(given))
    result: list[JsonFields] = []
    for i, message in enumerate(messages):
        if not any(map(_is_image, _parts(message))):
            result.append(message)
            continue
        parts: list[object] = []
        for j, part in enumerate(_parts(message)):
            if not _is_image(part):
                parts.append(part)
                continue
            what = f"messages[{i}].content[{j}]"
            if not _is_open(part):
                images.append(NamedImage(what, _source(part, what, read)))
            elif waiting:
                images.append(waiting.pop(0))
            else:
                raise ValueError(f"{what} has no image, and images has only {len(given)}; pass one for each such part")
            parts.append({"type": "text", "text": placeholder})
        result.append({**message, "content": parts})
    if waiting:
        raise ValueError(f"images has {len(given)} entries, but the messages have places for {len(given) - len(waiting)}")
    return result, images


def _parts(message: object) -> Sequence[Any]:
    content = message.get("content") if isinstance(message, Mapping) else None
    return content if isinstance(content, Sequence) and not isinstance(content, str | bytes) else ()


def _is_image(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") in _KINDS


def _is_open(part: object) -> bool:
    """Whether a part is the place of an image that is passed separately."""
    return (
        isinstance(part, Mapping)
        and part.get("type") == "image"
        and all(part.get(name) is None for name in ("image", "image_url", "url", "path", "base64", "source"))
    )


def _source(part: Mapping[str, Any], what: str, read: Callable[[str, str], ImageSource]) -> ImageSource:
    """The image of a part, as the caller gave it or `read` read it."""
    found = next((part[name] for name in ("image_url", "image", "url", "path") if part.get(name) is not None), None)
    if isinstance(found, Mapping):  # OpenAI's chats: {"image_url": {"url": ..., "detail": ...}}
        found = found.get("url")
    if isinstance(part.get("source"), Mapping):  # Anthropic's messages
        source = part["source"]
        found = source.get("url") if source.get("type") == "url" else _decoded(source.get("data"), what)
    if part.get("base64") is not None:
        found = _decoded(part["base64"], what)
    if found is None:
        raise ValueError(f"{what} has no image; the form is {{'type': 'image_url', 'image_url': {{'url': 'data:...'}}}}")
    return read(found, what) if isinstance(found, str) else found


def _decoded(data: object, what: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)  # type: ignore[arg-type]
    except (TypeError, binascii.Error, ValueError) as error:
        raise ValueError(f"{what} has data that is not valid base64 ({error}); encode the file again") from None


def _with_parts(messages: Sequence[JsonFields], count: int) -> list[JsonFields]:
    """The messages with `count` open parts before the content of the last one of the user."""
    places = [i for i, message in enumerate(messages) if isinstance(message, Mapping) and message.get("role") == "user"]
    if not places:
        raise ValueError("images are passed, but no message of the user that they could belong to")
    last = messages[places[-1]]
    content = last.get("content")
    texts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
    shown = {**last, "content": [*({"type": "image"} for _ in range(count)), *texts]}
    return [*messages[: places[-1]], shown, *messages[places[-1] + 1 :]]
