"""The forms in which chat messages carry images."""

from __future__ import annotations

import base64

import pytest

from fastgen_jax.images.messages import has_images, take_images

PLACE = {"type": "text", "text": "<image>"}
URL = "data:image/png;base64,AAAA"


def user(*parts: object) -> dict[str, object]:
    return {"role": "user", "content": list(parts)}


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ({"type": "image_url", "image_url": {"url": URL, "detail": "low"}}, URL),
        ({"type": "image_url", "image_url": URL}, URL),
        ({"type": "input_image", "image_url": URL}, URL),
        ({"type": "image", "image": URL}, URL),
        ({"type": "image", "url": URL}, URL),
        ({"type": "image", "path": "a.png"}, "a.png"),
        ({"type": "image", "source": {"type": "url", "url": URL}}, URL),
        ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}, b"\0\0\0"),
        ({"type": "image", "base64": base64.b64encode(b"abc").decode()}, b"abc"),
    ],
)
def test_every_common_form_of_a_part_is_taken(part, source):
    text = {"type": "text", "text": "What is it?"}
    messages = [{"role": "system", "content": "Short."}, user(text, part)]
    assert has_images(messages)
    taken, images = take_images(messages, "<image>")
    assert taken == [messages[0], user(text, PLACE)]
    assert images == [("messages[1].content[1]", source)]


def test_text_stays_as_it_is():
    messages = [user({"type": "text", "text": "Hi"}), {"role": "assistant", "content": "Yes"}, {"role": "user"}]
    assert not has_images(messages)
    assert take_images(messages, "<image>") == (messages, [])


def test_images_that_are_passed_fill_the_open_parts_in_order():
    messages = [user({"type": "image"}, {"type": "image", "url": URL}), user({"type": "image"})]
    taken, images = take_images(messages, "<image>", ["a", "b"])
    assert taken == [user(PLACE, PLACE), user(PLACE)]
    assert [image.source for image in images] == ["a", URL, "b"]


def test_without_open_parts_they_come_before_the_last_message_of_the_user():
    messages = [
        {"role": "user", "content": "First"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "?"},
    ]
    taken, images = take_images(messages, "<image>", ["a", "b"])
    assert taken == [*messages[:2], user(PLACE, PLACE, {"type": "text", "text": "?"})]
    assert [image.source for image in images] == ["a", "b"]


@pytest.mark.parametrize(
    ("messages", "given", "message"),
    [
        ([user({"type": "image"})], (), r"messages\[0\].content\[0\] has no image, and images has only 0"),
        ([user({"type": "image"})], ("a", "b"), "images has 2 entries, but the messages have places for 1"),
        ([user({"type": "image_url"})], (), r"messages\[0\].content\[0\] has no image; the form is"),
        ([user({"type": "image", "source": {"type": "base64", "data": "@"}})], (), "not valid base64"),
        ([{"role": "system", "content": "Hi"}], ("a",), "no message of the user"),
    ],
)
def test_a_part_without_its_image_is_refused(messages, given, message):
    with pytest.raises(ValueError, match=message):
        take_images(messages, "<image>", given)


def test_a_url_goes_through_the_reader():
    taken = take_images(
        [user({"type": "image_url", "image_url": {"url": "x:1"}})], "", read=lambda url, what: f"{what} {url}"
    )
    assert taken[1][0].source == "messages[0].content[0] x:1"
