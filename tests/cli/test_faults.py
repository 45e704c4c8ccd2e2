"""A mistake is one line and an exit code that is not 0, never a traceback."""

from __future__ import annotations

import json
import os
import pty
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fastgen_jax.cli import main, requirement_of
from fastgen_jax.cli.terminal import has_colors
from tests.serving.checkpoint import write_checkpoint

SMALL = ["--token-budget", "16", "--budget-ladder", "8", "--max-num-seqs", "4", "--block-size", "4", "--num-blocks", "64"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "tiny")


def without_template(path: Path) -> Path:
    """A checkpoint of a model that was not taught to chat."""
    write_checkpoint(path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def complaint(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line that a command ends with."""
    assert main([*map(str, argv)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastgen: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("module", "argv"),
    [
        ("uvicorn", ["serve", "some-model"]),
        ("fastapi", ["batch", __file__, "/tmp/out.jsonl"]),
    ],
)
def test_a_command_without_its_extra_names_it(module: str, argv: list[str]) -> None:
    code = f"import sys; sys.modules[{module!r}] = None; from fastgen_jax.cli import main; sys.exit(main({argv!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"fastgen: {argv[0]} needs {module}, which is not installed; pip install 'fastgen_jax[serve]'"
    )
    assert "Traceback" not in done.stderr


def test_top_without_its_extra_names_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    assert "top needs httpx, which is not installed; pip install 'fastgen_jax[serve]'" in complaint(capsys, "top", "--once")


def test_a_module_names_the_extra_that_brings_it() -> None:
    assert requirement_of("ray.serve") == "'fastgen_jax[ray]'"
    assert requirement_of("matplotlib.pyplot") == "'fastgen_jax[bench]'"
    assert requirement_of("nothing_we_know.of") == "nothing_we_know"


def test_our_own_faults_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastgen_jax.checkpoint.convert", None)
    with pytest.raises(ModuleNotFoundError):
        main(["convert", "a", "b"])


def test_an_unknown_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["generate", "--model", "no-such", "hi"], ["inspect", "no-such"], ["convert", "no-such", "/tmp/new"]):
        assert "no model 'no-such'" in complaint(capsys, *argv)


def test_a_batch_into_a_folder_that_is_not_there_is_refused_before_anything_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = tmp_path / "in.jsonl"
    requests.write_text("hello\n")
    error = complaint(capsys, "batch", requests, tmp_path / "no" / "out.jsonl", "--model", "no-such")
    assert f"the folder {tmp_path / 'no'} of the output does not exist; make it" in error
    error = complaint(capsys, "batch", requests, tmp_path, "--model", "no-such")
    assert "is not a file; choose a file for the answers" in error
    assert "is not a file" in complaint(capsys, "batch", tmp_path / "absent", tmp_path / "out.jsonl")


def test_a_file_that_cannot_be_read_or_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = tmp_path / "absent.jsonl"
    assert f"{absent} holds no runs" in complaint(capsys, "bench", "report", absent)
    assert f"{absent}: No such file or directory" in complaint(capsys, "simulate", "run", "--trace", absent)


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [sys.executable, "-m", "fastgen_jax.cli", "serve", "m", "--port", str(taken.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("fastgen: cannot listen on 127.0.0.1:")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("out", "words"),
    [
        (".", "is not empty; choose another directory"),
        ("inside", "which is to be converted; choose another directory"),
        ("config.json", "is a file; choose another name"),
    ],
)
def test_convert_refuses_its_target_before_it_reads(
    out: str, words: str, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastgen_jax.checkpoint.huggingface.HuggingFaceCheckpoint.read", None)
    assert words in complaint(capsys, "convert", checkpoint, checkpoint / out)
    assert not (checkpoint / "inside").exists()


def test_nothing_that_is_not_a_terminal_gets_escape_codes(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--model", str(checkpoint), *SMALL, "--max-length", "100"]) == 2  # its questions are too long
    assert main(["generate", "--model", str(checkpoint), *SMALL, "--max-new-tokens", "3", "--chat", "hi"]) == 0
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err


def test_colors_are_for_terminals_without_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_colors()
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr("sys.stdout", terminal)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        assert has_colors()
        monkeypatch.setenv("NO_COLOR", "1")
        assert not has_colors()
        monkeypatch.delenv("NO_COLOR")
        monkeypatch.setenv("TERM", "dumb")
        assert not has_colors()
    os.close(ours)
