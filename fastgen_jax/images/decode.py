"""Images from files, bytes, data: URLs, arrays and Pillow's objects, checked before their pixels are decoded."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

ImageSource: TypeAlias = Any  # PIL.Image.Image | str | os.PathLike[str] | bytes | np.ndarray
"""An image of Pillow, a path, a data: URL, the bytes of a file, or an array u8[height, width(, 3)]."""


class NamedImage(NamedTuple):
    """An image, and what messages call it."""

    what: str
    source: ImageSource


def named(images: Sequence[ImageSource]) -> list[NamedImage]:
    """Images that are passed as `images`."""
    return [NamedImage(f"images[{i}]", image) for i, image in enumerate(images)]


MAX_BYTES = 20 << 20  # of a file, as in OpenAI's API
MAX_PIXELS = 1 << 25  # 33 megapixels take 96 MiB as RGB; the tower sees about one megapixel of them
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # others, such as EPS, run further programs or are rarely needed
_DATA_URL = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?P<parameters>(?:;[^,;]*)*),", re.ASCII | re.IGNORECASE)


def open_image(source: ImageSource, *, what: str = "the image") -> Image:
    """An image in RGB; ValueError, which calls it `what`, if it cannot be read, with the reason.

    A text is a data: URL or a path. An animation is its first picture, and a photo is turned as its camera says.
    """
    pillow()
    from PIL import Image

    if isinstance(source, Image.Image):
        _check_size(source.size, what)
        return _in_rgb(source, what)
    if isinstance(source, np.ndarray):
        return _of_array(source, what)
    if isinstance(source, bytes | bytearray | memoryview):
        return decode(bytes(source), what=what)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return decode(bytes_of_data_url(source, what=what), what=what)
    if isinstance(source, str) and re.match(r"(https?|file)://", source, re.IGNORECASE):
        raise ValueError(f"{what} is the URL {source[:80]!r}; download it first, and pass the path or the bytes")
    if isinstance(source, str | os.PathLike):
        return decode(read_file(Path(source), what=what), what=what)
    raise ValueError(
        f"{what} is a {type(source).__name__}; pass an image of Pillow, a path, the bytes of a file, a data: URL, or a "
        "NumPy array of uint8"
    )


def decode(data: bytes, *, what: str = "the image") -> Image:
    """The image in the bytes of a file, in RGB; ValueError as for `open_image`."""
    pillow()
    from PIL import Image, ImageOps, UnidentifiedImageError

    if len(data) > MAX_BYTES:
        raise ValueError(f"{what} has {len(data):,} bytes, more than {MAX_BYTES:,}; send a smaller file")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)  # reads only the header
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"{what} has too many pixels, more than {MAX_PIXELS:,}; make it smaller") from None
    except UnidentifiedImageError:
        raise ValueError(f"{what} is not a file in the format {', '.join(FORMATS)}; it begins with {data[:12]!r}") from None
    except Exception as error:  # decoders raise various errors for damaged headers
        raise ValueError(f"{what} is damaged: {error}; send another file") from None
    _check_size(image.size, what)
    try:
        return _in_rgb(ImageOps.exif_transpose(image), what)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{what} is damaged: {error}; send another file") from None


def bytes_of_data_url(url: str, *, what: str = "the image") -> bytes:
    """The bytes in a data: URL; ValueError if it has another form or too many."""
    head = _DATA_URL.match(url)
    if head is None:
        raise ValueError(f"{what} has the URL {url[:40]!r}; the form is data:image/png;base64,...")
    body = url[head.end() :]
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise ValueError(f"{what} has more than {MAX_BYTES:,} bytes; send a smaller file")
    if not head["parameters"].lower().endswith(";base64"):
        return urllib.parse.unquote_to_bytes(body)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{what} has a data: URL that is not valid base64 ({error}); encode the file again") from None


def read_file(path: Path, *, what: str = "the image") -> bytes:
    """The bytes of a file; ValueError if it cannot be read or has too many."""
    try:
        if not path.is_file():
            raise ValueError(f"{what} is the path {str(path)[:200]!r}, which is not a file; pass the path of a picture")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a null character
        reason = error if isinstance(error, ValueError) and str(error).startswith(what) else None
        raise reason or ValueError(f"{what}: {str(path)[:200]!r} cannot be read: {error}") from None
    if len(data) > MAX_BYTES:
        raise ValueError(f"{what} is in a file of more than {MAX_BYTES:,} bytes; use a smaller one")
    return data


def pillow() -> None:
    """Raises ValueError if Pillow is not installed."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise ValueError("images need Pillow, which is not installed; run `pip install 'fastgen_jax[images]'`") from None


def _in_rgb(image: Image, what: str) -> Image:
    try:
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # decoding begins here: files are truncated, or claim what they do not have
        raise ValueError(f"{what} is damaged: {error}; send another file") from None


def _of_array(array: np.ndarray, what: str) -> Image:
    from PIL import Image

    if array.dtype != np.uint8:
        raise ValueError(
            f"{what} is an array of {array.dtype}; pass uint8 from 0 to 255, for example (255 * x).astype('uint8')"
        )
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or not array.size:
        raise ValueError(f"{what} is an array of shape {array.shape}; pass [height, width] or [height, width, 3]")
    _check_size((array.shape[1], array.shape[0]), what)
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def _check_size(size: tuple[int, int], what: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{what} has {width} x {height} pixels, more than {MAX_PIXELS:,}; make it smaller")
    if min(size) < 1:
        raise ValueError(f"{what} has {width} x {height} pixels; it must have at least one")
