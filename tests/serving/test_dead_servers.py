"""Errors of clients, `fastgen top` and `fastgen batch` if the server is dead, dying, restarted or a different one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import fastgen_jax
from fastgen_jax.api.client import AsyncClient, Client, NoAnswerError, ServerError
from fastgen_jax.api.deployment import Deployment, deployments, process_start, recorded
from fastgen_jax.cli import main
from tests.serving.tiny_server import MODEL

GONE = 2**22 + 1  # above the largest process id of Linux


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


@contextlib.contextmanager
def listening(answer: bytes) -> Iterator[str]:
    """Yields the URL of a server that reads a request, sends `answer` and closes the connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        read_request(connection)  # completely: closing earlier would reset the connection
                        connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def read_request(connection: socket.socket) -> None:
    """Reads the head of a request, and its body."""
    with connection.makefile("rb") as stream:
        length = 0
        while (line := stream.readline()).strip():
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        stream.read(length)


def closed_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def deployment(url: str, **changes) -> Deployment:
    """A deployment of this process, so that it counts as alive."""
    here = Deployment(
        name="chat",
        model="some-model",
        url=url,
        pid=os.getpid(),
        started=0.0,
        log="/logs/chat.log",
        process_start=process_start(os.getpid()) or "",
    )
    return replace(here, **changes)


def failures(of: Deployment) -> list[str]:
    """Returns the errors of all kinds of requests."""
    messages = []
    client = Client(of)
    for ask in (
        lambda: client.generate("x"),
        lambda: list(client.stream("x")),
        lambda: client.generate("x", streaming_fn=print),
    ):
        with pytest.raises(NoAnswerError) as failure:
            ask()
        assert failure.value.status == 503
        messages.append(str(failure.value))
    client.close()

    async def waiting() -> None:
        client = AsyncClient(of)
        with pytest.raises(NoAnswerError) as failure:
            await client.generate("x")
        messages.append(str(failure.value))
        with pytest.raises(NoAnswerError) as failure:
            [_ async for _ in client.stream("x")]
        messages.append(str(failure.value))
        await client.close()

    asyncio.run(waiting())
    assert all("\n" not in message for message in messages)
    return messages


def test_the_error_for_a_server_that_has_ended_names_its_log_and_how_to_restart_it():
    for dead in (deployment(closed_url(), pid=GONE), deployment(closed_url(), process_start="another program")):
        for message in failures(dead):
            assert f"deployment 'chat' has ended (process {dead.pid}" in message
            assert "its log is /logs/chat.log; start it again with `fastgen serve some-model" in message


def test_the_error_for_a_restarted_server_names_its_new_address():
    with recorded(deployment("http://127.0.0.1:1")):
        for message in failures(deployment(closed_url(), pid=GONE)):
            assert f"was started again, as process {os.getpid()} at http://127.0.0.1:1" in message


def test_a_process_that_does_not_listen_is_distinguished_from_one_that_has_ended():
    for message in failures(deployment(closed_url())):
        assert f"the process of deployment 'chat' ({os.getpid()}) is alive but does not answer" in message


def test_a_connection_that_breaks_during_an_answer_is_an_error():
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
    for answer in (b"", head + b"transfer-encoding: chunked\r\n\r\n5\r\ndata:", head + b"content-length: 9\r\n\r\ndata:"):
        with listening(answer) as url:
            for message in failures(deployment(url, pid=GONE)):
                assert "the connection broke before the answer was complete" in message
                assert "has ended" in message


def test_a_stream_that_stops_early_is_an_error():
    event = (
        b'data: {"index": 0, "text": "a", "token_ids": [1], "finish_reason": null, "prompt_length": 1, '
        b'"cached_length": 0, "weight_version": 0}\n\n'
    )
    with listening(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n" + event) as url:
        client, seen = Client(deployment(url)), []
        with pytest.raises(NoAnswerError, match="closed before the answer was complete"):
            seen += [output.text for output in client.stream("x")]
        client.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 404 Not Found\r\nconnection: close\r\ncontent-type: text/html\r\ncontent-length: 6\r\n\r\n<html>",
        b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: text/html\r\ncontent-length: 6\r\n\r\n<html>",
        b"HTTP/1.1 502 Bad Gateway\r\nconnection: close\r\ncontent-length: 4\r\n\r\n[{}]",
    ],
)
def test_a_different_kind_of_server_is_recognized(answer):
    with listening(answer) as url:
        for message in failures(deployment(url)):
            assert f"{url}/mii/chat is not served by fastgen: it answers {answer.split()[1].decode()}" in message
            assert "fastgen deployments" in message


def test_a_record_whose_process_is_gone_or_is_another_program_is_reported_and_removed():
    for dead in (deployment(closed_url(), pid=GONE), deployment(closed_url(), process_start="another program")):
        with recorded(dead):
            with pytest.raises(ValueError, match=r"'chat' was killed: its process \d+ is gone; its log is"):
                fastgen_jax.client("chat")
            assert deployments() == []
        with pytest.raises(ValueError, match=r"no deployment 'chat' is running on this machine \(running: none\)"):
            fastgen_jax.client("chat")


@pytest.mark.parametrize("command", [("top", "chat"), ("top",)])
def test_commands_report_the_error_in_one_line(command, capsys, monkeypatch):
    monkeypatch.setattr("fastgen_jax.serving.batch.GIVE_UP_SECONDS", 0.0)
    with recorded(deployment(closed_url())):
        assert main(command) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith("fastgen: no connection to http://127.0.0.1:")


def test_a_batch_says_why_its_deployment_does_not_answer(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastgen_jax.serving.batch.GIVE_UP_SECONDS", 0.0)
    (tmp_path / "in.txt").write_text("Once\n")
    with recorded(deployment(closed_url())):
        assert main(["batch", str(tmp_path / "in.txt"), str(tmp_path / "out.jsonl"), "--deployment", "chat"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("fastgen: no answer from the server")
    assert "is alive but does not answer" in said


def test_the_error_of_a_timeout_names_the_timeout(url):
    client = Client(deployment(url, name=MODEL), timeout=1e-6)
    with pytest.raises(NoAnswerError, match="sent nothing within the timeout of this client; raise timeout"):
        client.generate("Once", max_new_tokens=4)
    client.close()
    other = Client(deployment(url, name="other"))
    with pytest.raises(ServerError, match="not 'other'") as refusal:
        other.generate("Once")
    assert refusal.value.status == 404
    other.close()
