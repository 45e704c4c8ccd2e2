"""Clients that speak HTTP as it is rarely spoken: version 1.0, and bodies that wait for permission."""

from __future__ import annotations

import json
import socket
from urllib.parse import urlsplit

import httpx
import pytest

from tests.serving.tiny_server import MODEL

COMPLETION = {"model": MODEL, "prompt": "Hi", "max_tokens": 4, "temperature": 0}


def exchange(url, version, body, *, headers=(), path="/v1/completions"):
    """The head and the body of the answer, until the server closes the connection."""
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/{version}", "Host: x", "Content-Type: application/json", f"Content-Length: {len(content)}"]
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=60) as connection:
        connection.sendall(("\r\n".join([*lines, *headers]) + "\r\n\r\n").encode())
        received = b""
        if any("100-continue" in header for header in headers):
            received = connection.recv(65536)
            assert received == b"HTTP/1.1 100 Continue\r\n\r\n"
            received = b""
        connection.sendall(content)
        while piece := connection.recv(65536):
            received += piece
    head, _, rest = received.partition(b"\r\n\r\n")
    return head.decode().lower(), rest


def text_of(lines):
    """The text of a stream: how many tokens an event has depends on the time."""
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]
    return "".join(event["choices"][0]["text"] for event in events)


def test_a_stream_to_an_http_1_0_client_ends_with_its_connection_and_has_no_chunks(url):
    with httpx.stream("POST", f"{url}/v1/completions", json={**COMPLETION, "stream": True}) as response:
        assert response.headers["transfer-encoding"] == "chunked"
        expected = [line for line in response.iter_lines() if line]
    head, content = exchange(url, "1.0", {**COMPLETION, "stream": True})
    assert "transfer-encoding" not in head
    lines = content.decode().split("\n\n")
    assert lines.pop() == ""
    assert text_of(lines) == text_of(expected)
    assert lines[-1] == "data: [DONE]"


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_whole_answers_have_a_length(url, version):
    head, content = exchange(url, version, COMPLETION, headers=["Connection: close"])
    assert "200 ok" in head
    assert f"content-length: {len(content)}" in head
    assert json.loads(content)["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_errors_reach_clients_of_both_versions(url, version):
    head, content = exchange(url, version, {**COMPLETION, "stream": True, "n": 0}, headers=["Connection: close"])
    assert "400 bad request" in head
    assert json.loads(content)["error"]["param"] == "n"


def test_a_body_is_sent_once_the_server_is_willing(url):
    head, content = exchange(url, "1.1", COMPLETION, headers=["Expect: 100-continue", "Connection: close"])
    assert "200 ok" in head
    assert json.loads(content)["usage"]["completion_tokens"] == 4
