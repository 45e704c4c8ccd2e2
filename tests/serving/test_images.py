"""Images in chats through the server: the answer is that of the engine, and what cannot be read is refused."""

from __future__ import annotations

import base64
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from fastgen_jax.api.async_engine import AsyncEngine
from fastgen_jax.images import MAX_BYTES
from fastgen_jax.serving.images import fetch, image_bytes, is_public
from fastgen_jax.serving.settings import ServerConfig
from tests.engine import test_image_grids
from tests.engine.test_images import answer, engine, images
from tests.images.test_decode import file_of, png
from tests.models.vision import reference
from tests.models.vision.reference import NUM_GREEDY, PHOTO
from tests.serving.tiny_server import MODEL, ask, events, with_server

OPTIONS = {"model": MODEL, "temperature": 0, "max_tokens": NUM_GREEDY, "ignore_eos": True, "return_token_ids": True}


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def chat(*urls: str) -> dict[str, Any]:
    """The conversation of the reference."""
    words = ["This", "and", "differ."] if len(urls) == 2 else ["This", "differs."]
    parts: list[dict[str, Any]] = [{"type": "text", "text": words[0]}]
    for url, word in zip(urls, words[1:], strict=True):
        parts += [{"type": "image_url", "image_url": {"url": url, "detail": "high"}}, {"type": "text", "text": word}]
    return {**OPTIONS, "messages": [{"role": "user", "content": parts}]}


def urls() -> list[str]:
    return [data_url(file_of(image, "PNG")) for image in images()]


@pytest.mark.slow
def test_a_chat_with_images_has_the_answer_of_transformers_whole_and_streamed():
    async def scenario(client: httpx.AsyncClient, _: AsyncEngine) -> list[httpx.Response]:
        body = chat(*urls())
        return [
            await client.post("/v1/chat/completions", json=body),
            await client.post("/v1/chat/completions", json={**body, "stream": True}),
            await client.post("/tokenize", json={"model": MODEL, "messages": body["messages"]}),
            await client.get("/stats"),
        ]

    whole, streamed, counted, stats = with_server(scenario, shared=engine())
    assert whole.json()["choices"][0]["token_ids"] == answer()
    assert [i for event in events(streamed) for i in event["choices"][0].get("token_ids") or ()] == answer()
    assert counted.json()["count"] == whole.json()["usage"]["prompt_tokens"] > 2 * 16
    assert stats.json()["images"] is True


@pytest.mark.slow
def test_a_chat_with_images_of_several_sizes_has_the_answer_of_transformers():
    body = chat(*(data_url(file_of(image, "PNG")) for image in reference.pictures(test_image_grids.QWEN3)))
    answered = ask("/v1/chat/completions", body, shared=test_image_grids.engine()).json()
    assert answered["choices"][0]["token_ids"] == reference.answer(test_image_grids.QWEN3)
    assert answered["usage"]["prompt_tokens"] == 79


@pytest.mark.slow
def test_the_other_apis_take_images_in_their_forms():
    text = [{"type": "text", "text": "This"}, {"type": "text", "text": "and"}, {"type": "text", "text": "differ."}]
    sources = [{"type": "base64", "media_type": "image/png", "data": url.partition(",")[2]} for url in urls()]
    blocks = [text[0], {"type": "image", "source": sources[0]}, text[1], {"type": "image", "source": sources[1]}, text[2]]
    body = {"model": MODEL, "max_tokens": NUM_GREEDY, "temperature": 0, "messages": [{"role": "user", "content": blocks}]}
    want = ask("/v1/chat/completions", {**chat(*urls()), "ignore_eos": None}, shared=engine()).json()
    said = want["choices"][0]["message"]["content"]
    answered = ask("/v1/messages", body, shared=engine()).json()
    assert "".join(block.get("text", "") for block in answered["content"]) == said
    shown = [{"type": "input_image", "image_url": url, "detail": "auto"} for url in urls()]
    parts = [{"type": "input_text", "text": part["text"]} for part in text]
    items = [parts[0], shown[0], parts[1], shown[1], parts[2]]
    given = {
        "model": MODEL,
        "input": [{"role": "user", "content": items}],
        "max_output_tokens": NUM_GREEDY,
        "temperature": 0,
    }
    responded = ask("/v1/responses", given, shared=engine()).json()
    assert responded["output"][-1]["content"][0]["text"] == said


UNREADABLE = {
    data_url(png(60_000, 60_000)): "messages[0].content[1] has too many pixels",
    data_url(b"only words"): "messages[0].content[1] is not a file in the format PNG",
    data_url(PHOTO.read_bytes()[:3_000]): "messages[0].content[1] is damaged",
    "data:image/png;base64,@": "not valid base64",
    "https://example.com/a.png": "a remote address, which this server does not fetch",
    "file:///etc/passwd": "names a file of the server, which reads none",
    "/etc/passwd": "the form is data:image/png;base64",
    "ftp://example.com/a.png": "the form is data:image/png;base64",
}


def refused_bodies() -> Iterator[tuple[dict[str, Any], str]]:
    """Bodies, each with a part of the message of the refusal."""
    for url, message in UNREADABLE.items():
        yield chat(url), message
    for name, value in (("use_beam_search", True), ("truncate_prompt_tokens", 8)):
        yield {**chat(*urls()), name: value}, f"{name} cannot be combined with images"
    mark = {"type": "text", "text": "<start_of_image>"}
    for part, message in (
        ({"type": "image"}, "has no image"),
        ({"type": "image_url", "image_url": urls()[0]}, "the text has 2 places for images"),
    ):
        yield {**OPTIONS, "messages": [{"role": "user", "content": [mark, part]}]}, message


def test_what_cannot_be_read_or_makes_no_sense_is_refused_with_the_reason():
    async def scenario(client: httpx.AsyncClient, _: AsyncEngine) -> list[tuple[httpx.Response, str]]:
        return [(await client.post("/v1/chat/completions", json=body), message) for body, message in refused_bodies()]

    for response, message in with_server(scenario, shared=engine()):
        assert response.status_code == 400
        assert message in response.json()["error"]["message"]
        if message in UNREADABLE.values() and message.startswith("messages"):
            assert response.json()["error"]["param"] == "messages"


def test_files_are_read_from_the_folder_of_the_operator_only(tmp_path):
    inside = tmp_path / "pictures"
    inside.mkdir()
    (inside / "a b.png").write_bytes(b"picture")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    config = ServerConfig(image_folder=str(inside))
    assert image_bytes((inside / "a b.png").as_uri(), "it", config=config) == b"picture"
    for path in ("secret.png", "pictures/../secret.png", "pictures/link.png"):
        with pytest.raises(ValueError, match="outside of the server's image folder"):
            image_bytes(f"file://{tmp_path}/{path}", "it", config=config)
    with pytest.raises(ValueError, match="outside of the server's image folder"):
        image_bytes(f"file://elsewhere{inside}/a b.png", "it", config=config)
    with pytest.raises(ValueError, match="which is not a file"):
        image_bytes((inside / "none.png").as_uri(), "it", config=config)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        *(
            (private, False)
            for private in ("127.0.0.1", "10.0.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "224.0.0.1")
        ),
        *((private, False) for private in ("::1", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "2002:7f00:1::")),
    ],
)
def test_only_addresses_of_the_internet_are_public(address, public):
    assert is_public(address) is public


class _Pictures(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/moved") or "/moved")
            self.end_headers()
            return
        body = {"/a.png": b"picture", "/large": b"x" * (MAX_BYTES + 1)}.get(self.path)
        self.send_response(404 if body is None else 200)
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def pictures() -> Iterator[str]:
    """The address of a server of this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Pictures) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_remote_picture_is_fetched_from_public_addresses_only():
    allowed = ServerConfig(remote_images=True)
    with pictures() as here:
        for address in (here, here.replace("127.0.0.1", "localhost")):
            with pytest.raises(ValueError, match="which is not on the public internet"):
                image_bytes(f"{address}/a.png", "it", config=allowed)

        def get(path: str) -> bytes:
            return fetch(f"{here}{path}", "it", seconds=10, is_allowed=lambda address: True)

        assert get("/a.png") == get("/moved/a.png") == b"picture"
        for path, message in (
            ("/none", "status 404"),
            ("/large", "more than 20,971,520 bytes"),
            ("/moved", "redirected more than 3 times"),
            ("/movedfile:///etc/passwd", "no address of the web"),
        ):
            with pytest.raises(ValueError, match=message):
                get(path)
        reached = []

        def is_allowed(address: str) -> bool:
            reached.append(address)
            return len(reached) == 1

        with pytest.raises(ValueError, match="not on the public internet"):  # the redirect leads to another address
            fetch(f"{here}/moved{here.replace('127.0.0.1', 'localhost')}/a.png", "it", seconds=10, is_allowed=is_allowed)
    with pytest.raises(ValueError, match="cannot be fetched"):
        fetch(f"{here}/a.png", "it", seconds=10, is_allowed=lambda address: True)


def test_a_picture_that_does_not_arrive_in_time_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/a.png"
        with pytest.raises(ValueError, match=r"within 0\.1 seconds"):
            fetch(address, "it", seconds=0.1, is_allowed=lambda address: True)


@pytest.mark.slow
def test_a_model_without_a_tower_says_that_it_reads_only_text():
    response = ask("/v1/chat/completions", chat(data_url(PHOTO.read_bytes())))
    assert response.status_code == 400
    assert "only text is supported" in response.json()["error"]["message"]
