"""A mistake gives one line and a nonzero exit code, never a traceback."""

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

WITHOUT_MODULE = Path(__file__).parent / "programs" / "without_module.py"
# The sizes of `tiny_engine`, whose programs are in the compile cache.
SMALL = ["--token-budget", "32", "--budget-ladder", "8", "--max-num-seqs", "8", "--block-size", "4", "--num-blocks", "64"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "tiny")


def without_template(path: Path) -> Path:
    """A checkpoint without a chat template."""
    write_checkpoint(path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def error_of(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line with which a command fails."""
    assert main([*map(str, argv)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastgen: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "argv"),
    [
        ("uvicorn", ["serve", "some-model"]),
        ("fastapi", ["batch", __file__, "out.jsonl"]),
    ],
)
def test_a_command_without_its_extra_names_it(module: str, argv: list[str]) -> None:
    done = subprocess.run([sys.executable, WITHOUT_MODULE, module, *argv], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"fastgen: {argv[0]} needs {module}, which is not installed; pip install 'fastgen_jax[serve]'"
    )
    assert "Traceback" not in done.stderr


def test_top_without_its_extra_names_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    assert "top needs httpx, which is not installed; pip install 'fastgen_jax[serve]'" in error_of(capsys, "top", "--once")


def test_a_missing_module_is_mapped_to_the_extra_that_brings_it() -> None:
    assert requirement_of("ray.serve") == "'fastgen_jax[ray]'"
    assert requirement_of("matplotlib.pyplot") == "'fastgen_jax[bench]'"
    assert requirement_of("unknown_module.part") == "unknown_module"


def test_bugs_of_our_own_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastgen_jax.checkpoint.convert", None)
    with pytest.raises(ModuleNotFoundError):
        main(["convert", "a", "b"])


def test_an_unknown_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = str(tmp_path / "new")
    for argv in (["generate", "--model", "no-such", "hi"], ["inspect", "no-such"], ["convert", "no-such", new]):
        assert "no model 'no-such'" in error_of(capsys, *argv)


def test_a_batch_into_a_missing_folder_is_rejected_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = tmp_path / "in.jsonl"
    requests.write_text("hello\n")
    error = error_of(capsys, "batch", requests, tmp_path / "no" / "out.jsonl", "--model", "no-such")
    assert f"the folder {tmp_path / 'no'} of the output does not exist; create it" in error
    error = error_of(capsys, "batch", requests, tmp_path, "--model", "no-such")
    assert "is not a file; pass a file for the answers" in error
    assert "is not a file" in error_of(capsys, "batch", tmp_path / "absent", tmp_path / "out.jsonl")


def test_a_file_that_cannot_be_read_or_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = tmp_path / "absent.jsonl"
    assert f"{absent} contains no runs" in error_of(capsys, "bench", "report", absent)
    assert f"{absent}: No such file or directory" in error_of(capsys, "simulate", "run", "--trace", absent)


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
        ("inside", "the checkpoint to convert; choose a directory outside it"),
        ("config.json", "is a file; choose the name of a new directory"),
    ],
)
def test_convert_rejects_its_target_before_it_reads(
    out: str, words: str, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastgen_jax.checkpoint.huggingface.HuggingFaceCheckpoint.read", None)
    assert words in error_of(capsys, "convert", checkpoint, checkpoint / out)
    assert not (checkpoint / "inside").exists()


def test_escape_codes_are_written_to_terminals_only(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--model", str(checkpoint), *SMALL, "--max-length", "100"]) == 2  # the questions are too long
    assert main(["generate", "--model", str(checkpoint), *SMALL, "--max-new-tokens", "3", "--chat", "hi"]) == 0
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err


def test_colors_are_used_on_terminals_unless_no_color_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
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
