"""Where the log goes, and that client data cannot forge its entries."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import sys
import warnings

import httpx
import pytest

from fastgen_jax.cli import main
from fastgen_jax.core import progress
from fastgen_jax.serving.app import create_app
from fastgen_jax.serving.logs import JsonFormatter, TextFormatter, set_up_logging
from fastgen_jax.serving.settings import ServedModel
from fastgen_jax.serving.state import ServerState
from tests.serving.tiny_server import MODEL

FORGED = "fine\n2026-01-01 00:00:00,000 INFO fastgen_jax: a lie\r\x1b[2J\x85\u2028\x00\ud800"


@pytest.fixture
def root():
    """The root logger, restored after the test."""
    logger, package = logging.getLogger(), logging.getLogger("fastgen_jax")
    before = logger.handlers[:], logger.level, package.level
    yield logger
    for handler in [handler for handler in logger.handlers if handler not in before[0]]:
        handler.close()
    logger.handlers[:], logger.level, package.level = before
    logging.captureWarnings(False)


def entry(formatter: logging.Formatter, message: str, error: Exception | None = None) -> str:
    record = logging.LogRecord(
        "fastgen_jax.x", logging.INFO, __file__, 1, "said %s", (message,), (type(error), error, None) if error else None
    )
    record.path = message
    return formatter.format(record)


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter("replica 1")])
def test_client_data_cannot_start_another_line_or_control_the_terminal(formatter):
    text = entry(formatter, FORGED)
    assert len(text.splitlines()) == 1
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in text)
    if isinstance(formatter, JsonFormatter):
        assert json.loads(text)["path"] == FORGED
        assert json.loads(text)["source"] == "replica 1"


def test_the_lines_of_a_traceback_do_not_look_like_entries():
    first, *more = entry(TextFormatter("replica 1"), "x", ValueError(FORGED)).splitlines()
    assert "INFO replica 1 fastgen_jax.x: said x" in first
    assert "a lie" in "".join(more)
    assert all(line.startswith("    ") for line in more)


def test_the_log_and_warnings_go_to_the_file_and_to_standard_error(tmp_path, root, capsys):
    file = tmp_path / "log"
    set_up_logging("text", file=str(file), source="replica 3")
    logging.getLogger("fastgen_jax.some.part").info("hello")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("look out", stacklevel=1)
    written = file.read_text()
    assert "INFO replica 3 fastgen_jax.some.part: hello\n" in written
    assert "look out" in written
    assert capsys.readouterr().err == written
    file.rename(tmp_path / "log.1")  # as logrotate does
    logging.getLogger("fastgen_jax.some.part").info("again")
    assert file.read_text().endswith("again\n")


def test_a_file_that_is_also_standard_error_gets_each_entry_once(tmp_path, root, monkeypatch):
    file = tmp_path / "log"
    with file.open("a") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        set_up_logging("text", file=str(file))
        logging.getLogger("fastgen_jax").info("once")
        monkeypatch.undo()
    assert file.read_text().count("once") == 1


def test_a_log_file_that_cannot_be_written_is_refused(tmp_path):
    for path in (tmp_path / "missing" / "log", tmp_path):
        with pytest.raises(ValueError, match=r"log_file '.*' cannot be written \(.*\); choose a file in"):
            set_up_logging("text", file=str(path))


def test_a_server_that_fails_to_start_says_so_in_its_log_file_too(tmp_path, root, capsys, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(os, "_exit", sys.exit)
    file = tmp_path / "log"
    command = ["serve", str(tmp_path / "no-model"), "--port", "0", "--log-file", str(file)]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    written = file.read_text()
    assert capsys.readouterr().err == written
    assert "deployment no-model listens on http://127.0.0.1:" in written
    assert "ERROR fastgen_jax.serving.server: the model could not be loaded: " in written
    with pytest.raises(SystemExit) as ended:
        main([*command, "--host", "127.0.0.999"])
    assert ended.value.code == 2
    assert "cannot listen on 127.0.0.999" in file.read_text()
    assert main([*command[:-1], str(tmp_path)]) == 2
    assert "log_file" in capsys.readouterr().err.splitlines()[-1]


def test_polls_are_not_logged_even_while_the_model_loads(caplog):
    server = ServerState(ServedModel(name=MODEL, deployment=MODEL))  # without a backend, as while it loads

    async def scenario() -> list[int]:
        transport = httpx.ASGITransport(app=create_app(server))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return [(await client.get(path)).status_code for path in ("/health", "/metrics", "/stats", "/version", "/no%0A")]

    with caplog.at_level(logging.DEBUG, "fastgen_jax.access"):
        statuses = asyncio.run(scenario())
    assert statuses == [503, 200, 503, 200, 404]
    levels = [record.levelname for record in caplog.records if record.name == "fastgen_jax.access"]
    assert levels == ["DEBUG", "DEBUG", "DEBUG", "INFO", "INFO"]


def test_the_log_reports_a_long_task_from_its_start(caplog, monkeypatch):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    log = logging.getLogger("fastgen_jax.x")
    with caplog.at_level(logging.INFO, "fastgen_jax"):
        with progress.shown(log, "compiling", total=3, unit="program", bar=False) as advance:
            assert [record.getMessage() for record in caplog.records] == ["compiling: 3 programs"]
            for _ in range(3):
                advance()
        said = [record.getMessage() for record in caplog.records]
    assert said[1].startswith("compiling: 1 of 3 programs after ")
    assert said[-1].startswith("compiling: done in ")
    assert len(said) == 4


def test_nothing_is_logged_where_a_progress_bar_is_shown(caplog, monkeypatch):
    monkeypatch.setattr(progress, "is_interactive", lambda: True)
    monkeypatch.setattr(sys, "stderr", shown := io.StringIO())
    with (
        caplog.at_level(logging.INFO, "fastgen_jax"),
        progress.shown(logging.getLogger("fastgen_jax.x"), "loading", total=1, unit="weight", bar=True) as advance,
    ):
        advance()
    assert "loading: 100%" in shown.getvalue()
    assert not caplog.records
