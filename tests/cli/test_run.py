"""`fastgen run`: as its own process with a browser of ours, under ^C, and without a browser."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastgen_jax.api.deployment import Deployment, process_start
from fastgen_jax.cli import browser, main, run
from fastgen_jax.engine.config import EngineConfig
from tests.cli.test_faults import SMALL
from tests.serving.checkpoint import write_checkpoint

FAKE_BROWSER = Path(__file__).parent / "programs" / "fake_browser.py"
START_SECONDS = 300  # for a process to import, load and compile on a busy machine
STOP_SECONDS = 60
URL = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "tiny")


@pytest.fixture
def desktop(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine without a browser; tests add one."""
    for name in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION", "COLAB_RELEASE_TAG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    return monkeypatch


@pytest.fixture
def seen() -> Iterator[socket.socket]:
    """Where the fake browser reports."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(START_SECONDS)
        yield listener


@contextmanager
def start(checkpoint: Path, state: Path, *flags: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "XDG_STATE_HOME": str(state), **variables}
    command = [sys.executable, "-m", "fastgen_jax.cli", "run", str(checkpoint), *SMALL, *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()  # a test that fails does not wait for the server


def test_the_page_opens_in_the_browser_when_it_is_ready_and_an_interrupt_stops_the_server(
    checkpoint: Path, tmp_path: Path, seen: socket.socket
) -> None:
    command = f"{sys.executable} {FAKE_BROWSER} {seen.getsockname()[1]} %s"
    with start(checkpoint, tmp_path, "--port", "0", BROWSER=command) as process:
        connection, _ = seen.accept()
        with connection:
            url, title = connection.recv(1000).decode().split()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=STOP_SECONDS)
    assert (process.returncode, title) == (0, "fastgen_jax")
    assert f"tiny is ready: {url}   (^C stops it)" in output
    assert f"OpenAI's API at {url}v1, model 'tiny'" in output
    assert "Traceback" not in errors


def test_an_interrupt_while_the_model_loads_stops_it_at_once(checkpoint: Path, tmp_path: Path) -> None:
    with start(checkpoint, tmp_path, "--port", "0", "--no-browser") as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"starting {checkpoint}")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=STOP_SECONDS)
    assert process.returncode in (0, 130)  # after or before the server listens to signals
    assert "Traceback" not in errors


def test_an_unknown_model_ends_with_a_suggestion(tmp_path: Path) -> None:
    with start(Path("smolm-135m"), tmp_path, "--port", "0") as process:
        _, errors = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 2
    assert errors.strip().endswith("did you mean smollm2-135m-instruct?")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The ports on which servers would have been started."""
    ports: list[int] = []
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    def run_server(model, config, engine_config, **options) -> int:
        ports.append(config.port)
        return 0

    monkeypatch.setattr("fastgen_jax.serving.server.run_server", run_server)
    return ports


def test_another_port_is_used_if_the_usual_one_is_taken(served, monkeypatch, capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(run, "PORT", port)
        assert run.serve("m", EngineConfig(), host="127.0.0.1", port=None, browser=False) == 0
    assert f"port {port} is in use; choosing another one" in capsys.readouterr().out
    assert run.serve("m", EngineConfig(), host="127.0.0.1", port=None, browser=False) == 0
    assert run.serve("m", EngineConfig(), host="127.0.0.1", port=7, browser=False) == 0
    assert served == [0, port, 7]


def test_a_model_that_is_already_served_is_shown_and_not_started_again(served, desktop, monkeypatch, capsys) -> None:
    there = Deployment(
        name="m", model="org/m", url=URL, pid=os.getpid(), started=0, process_start=process_start(os.getpid()) or ""
    )
    monkeypatch.setattr("fastgen_jax.api.deployment.deployments", lambda: [there])
    assert run.serve("org/m", EngineConfig(), host="127.0.0.1", port=None, browser=True) == 0
    output = capsys.readouterr().out
    assert f"org/m is already served at {URL}/ (stop it with `fastgen deployments --stop m`)" in output
    assert f"Open {URL}/" in output
    assert served == []


def test_a_prompt_is_answered_in_the_terminal(checkpoint: Path, capsys) -> None:
    assert main(["run", *SMALL, "--generation-config", '{"do_sample": false}', str(checkpoint), "hello", "you"]) == 0
    assert capsys.readouterr().out.strip()


def test_without_a_model_those_of_this_machine_are_listed(capsys) -> None:
    assert main(["run"]) == 0
    output = capsys.readouterr().out
    assert "smollm2-135m-instruct" in output
    assert "fastgen run smollm2-135m-instruct" in output


def test_a_browser_is_opened_only_where_the_user_sees_it(desktop: pytest.MonkeyPatch) -> None:
    assert not browser.can_open()
    desktop.setenv("DISPLAY", ":0")
    assert browser.can_open()
    desktop.setenv("SSH_CONNECTION", "10.0.0.1 5000 10.0.0.2 22")
    assert not browser.can_open()
    desktop.setenv("BROWSER", "firefox")  # as editors set it on the machines that they connect to
    assert browser.can_open()


def test_without_a_browser_the_command_says_how_to_reach_the_page(desktop: pytest.MonkeyPatch) -> None:
    assert browser.how_to_reach(URL) == [f"Open {URL}/ in a browser on this machine."]
    desktop.setenv("SSH_CONNECTION", "10.0.0.1 5000 10.0.0.2 22")
    desktop.setenv("LOGNAME", "ada")
    assert "  ssh -N -L 8000:127.0.0.1:8000 ada@10.0.0.2" in browser.how_to_reach(URL)
    desktop.setenv("COLAB_RELEASE_TAG", "release-colab")
    assert "serve_kernel_port_as_window(8000)" in browser.how_to_reach(URL)[1]
