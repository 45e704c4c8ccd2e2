"""Request bodies: compressed, without a content type or with a wrong one; and names that try to forge a log entry."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import zlib

import pytest

from fastgen_jax.serving.bodies import PIECE, decompressed
from fastgen_jax.serving.errors import ApiError
from fastgen_jax.serving.logs import JsonFormatter, TextFormatter
from tests.serving.tiny_server import MODEL, with_server

COMPLETION = {"model": MODEL, "prompt": "Hi", "max_tokens": 4, "temperature": 0}
BODY = json.dumps(COMPLETION).encode()
PATH = "/v1/completions"


def without_header(data):
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


PACKED = {
    "gzip": ("gzip", gzip.compress(BODY)),
    "gzip of two members": ("x-gzip", gzip.compress(BODY[:9]) + gzip.compress(BODY[9:])),
    "deflate": ("deflate", zlib.compress(BODY)),
    "deflate without a header": ("Deflate", without_header(BODY)),
    "identity": ("identity", BODY),
}


def post(content, headers, **config):
    async def scenario(client, _):
        return await client.post(PATH, content=content, headers=headers)

    return with_server(scenario, **config)


async def in_pieces(data, size):
    for start in range(0, len(data), size):
        yield data[start : start + size]


def error(response):
    return response.json()["error"]


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("size", [1, 1000])
def test_a_compressed_body_is_read_like_an_uncompressed_one(name, size):
    encoding, data = PACKED[name]

    async def scenario(client, _):
        plain = await client.post(PATH, json=COMPLETION)
        headers = {"content-encoding": encoding, "content-type": "application/json"}
        return plain, await client.post(PATH, content=in_pieces(data, size), headers=headers)

    plain, packed = with_server(scenario)
    assert packed.status_code == 200, packed.text
    assert packed.json()["choices"] == plain.json()["choices"]


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_decompression_bomb_is_refused(encoding):
    pack = {"gzip": gzip.compress, "deflate": zlib.compress}[encoding]
    bomb = pack(b'{"prompt": "' + b"x" * 50_000_000)
    response = post(bomb, {"content-encoding": encoding, "content-type": "application/json"}, max_body_mb=0.1)
    assert (response.status_code, error(response)["code"]) == (413, "body_too_large")

    pieces, messages = [], iter([{"type": "http.request", "body": bomb, "more_body": False}])

    async def receive():
        return next(messages)

    async def read():
        body = decompressed([(b"content-encoding", encoding.encode())], receive, max_bytes=3 * PIECE)
        while True:
            pieces.append(len((await body())["body"]))

    with pytest.raises(ApiError, match="exceeds the limit"):
        asyncio.run(read())
    assert pieces == [PIECE] * 3


@pytest.mark.parametrize(
    ("encoding", "data", "status", "code"),
    [
        ("gzip", gzip.compress(BODY)[:-5], 400, "invalid_content_encoding"),
        ("gzip", BODY, 400, "invalid_content_encoding"),
        ("gzip", gzip.compress(BODY) + b"and more", 400, "invalid_content_encoding"),
        ("deflate", b"\xff\xff", 400, "invalid_content_encoding"),
        ("zstd", BODY, 415, "unsupported_content_encoding"),
        ("gzip, gzip", gzip.compress(gzip.compress(BODY)), 415, "unsupported_content_encoding"),
    ],
    ids=["cut off", "not compressed", "followed by more", "not zlib", "unknown", "twice"],
)
def test_a_damaged_body_or_unknown_encoding_is_refused(encoding, data, status, code):
    response = post(data, {"content-encoding": encoding, "content-type": "application/json"})
    assert (response.status_code, error(response)["code"]) == (status, code)
    if status == 415:
        assert response.headers["accept-encoding"] == "gzip, deflate"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": ""},
        {"content-type": "application/json; charset=utf-8"},
        {"content-type": "Application/JSON"},
        {"content-type": "application/vnd.api+json"},
    ],
)
def test_a_body_without_a_content_type_is_json(headers):
    response = post(BODY, headers)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_another_content_type_is_refused(kind):
    response = post(BODY, {"content-type": kind})
    assert (response.status_code, error(response)["code"]) == (415, "unsupported_media_type")
    assert kind.partition(";")[0] in error(response)["message"]
    assert "send the header 'Content-Type: application/json'" in error(response)["message"]


def test_a_page_of_another_origin_must_declare_json():
    from_page = {"origin": "http://page"}
    assert post(BODY, from_page).status_code == 415  # a browser sends such a body without asking first
    assert post(BODY, from_page, cors_origin=("http://page",)).status_code == 200
    assert post(BODY, from_page, cors_origin=("http://other",)).status_code == 415


def test_client_data_cannot_start_a_log_entry(caplog):
    async def scenario(client, _):
        await client.get("/v1/x%0aINFO forged%1b[2J%E2%80%A8y", headers={"x-request-id": b"id\x85forged"})
        await client.post(PATH, content=json.dumps({**COMPLETION, "user": "a\nb\ud800"}))
        return await client.post(PATH, json={**COMPLETION, "logit_bias": {"x\ny": 1}})

    with caplog.at_level(logging.INFO, "fastgen_jax.access"):
        refused = with_server(scenario)
    assert refused.status_code == 400
    lines = [TextFormatter().format(record) for record in caplog.records if record.name == "fastgen_jax.access"]
    assert r"GET /v1/x\nINFO forged\x1b[2J\u2028y 404" in lines[0]
    assert lines[1].endswith(" 200")
    for line in [*lines, *map(JsonFormatter().format, caplog.records)]:
        assert line.isprintable()
