"""Images are checked before they are decoded, and refused with the reason."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastgen_jax.images import MAX_BYTES, decode, open_image

PHOTO = Path(__file__).parents[1] / "reference" / "vision" / "photo.png"


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A file that claims a size, whatever `rows` of pixels it has."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def file_of(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(png(60_000, 60_000), "too many pixels", id="a decompression bomb"),
        pytest.param(png(8_000, 8_000), "8000 x 8000 pixels, more than 33,554,432", id="a large picture"),
        pytest.param(b"these are only words", "is not a file in the format PNG", id="a text file called .png"),
        pytest.param(b"", "is not a file in the format PNG", id="an empty file"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a file in the format", id="a program"),
        pytest.param(png(64, 64, b"\0" * 100), "is damaged", id="rows that are missing"),
        pytest.param(PHOTO.read_bytes()[:2_000], "is damaged", id="a truncated file"),
        pytest.param(b"\x89PNG\r\n\x1a\n" + b"x" * (MAX_BYTES - 7), "more than 20,971,520", id="too many bytes"),
    ],
)
def test_a_file_that_is_no_acceptable_picture_is_refused_with_the_reason(data, message):
    with pytest.raises(ValueError, match=f"^the image .*{message}"):
        decode(data)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("data:image/png;base64,@@@@", "not valid base64"),
        ("data:image/png", "the form is data:image/png;base64"),
        ("data:image/png;base64," + "A" * (MAX_BYTES * 4 // 3 + 8), "more than 20,971,520 bytes"),
        ("http://example.com/a.png", "download it first"),
        ("missing.png", "not a file"),
        ("\0.png", "not a file|cannot be read"),
        (np.zeros((4, 4, 3)), "array of float64; pass uint8"),
        (np.zeros((4, 4, 7), np.uint8), "shape .4, 4, 7."),
        (np.broadcast_to(np.uint8(0), (8_000, 8_000)), "8000 x 8000 pixels"),
        (7, "is a int; pass an image of Pillow"),
    ],
)
def test_another_source_is_refused_with_the_remedy(source, message):
    with pytest.raises(ValueError, match=message):
        open_image(source)


def test_all_forms_of_a_picture_are_the_same_pixels(tmp_path, monkeypatch):
    with Image.open(PHOTO) as file:
        photo = file.copy()
    data = PHOTO.read_bytes()
    (tmp_path / "photo.png").write_bytes(data)
    monkeypatch.chdir(tmp_path)
    forms = [photo, np.asarray(photo), data, data_url(data), PHOTO, str(PHOTO), "photo.png"]
    for form in forms:
        opened = open_image(form)
        assert opened.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(opened), np.asarray(photo))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "I;16"])
def test_other_modes_become_rgb(mode):
    image = Image.new(mode, (5, 3))
    assert open_image(file_of(image, "PNG")).mode == "RGB"


def test_a_photo_is_turned_as_its_camera_says():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned = decode(file_of(Image.new("RGB", (20, 10)), "JPEG", exif=exif))
    assert turned.size == (10, 20)


def test_an_animation_is_its_first_picture():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data).getpixel((0, 0)) == (255, 0, 0)
