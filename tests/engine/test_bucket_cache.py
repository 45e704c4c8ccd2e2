"""A cache in a bucket: a second machine compiles nothing, and no problem with the bucket stops or delays an engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from platformdirs import user_cache_path

from fastgen_jax.engine import mirror
from fastgen_jax.engine.mirror import Mirror
from pallas_kernels.buckets import Bucket
from tests.bucket_server import BucketServer, bucket_server

REPOSITORY = Path(__file__).parents[2]
URL = "gs://bucket/caches"


@pytest.fixture
def server(monkeypatch):
    with bucket_server() as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        yield running


def machine(home: Path, options: dict[str, object]) -> dict[str, object]:
    """What a process finds whose home, folder and user no other process has; the C++ kernels are those of this machine."""
    (home / "cache").mkdir(parents=True)
    (home / "cache" / "pallas_kernels").symlink_to(user_cache_path("pallas_kernels", appauthor=False))
    variables = {
        **os.environ,
        "HOME": str(home),
        "USER": home.name,
        "XDG_CACHE_HOME": str(home / "cache"),
        "FASTGEN_CACHE_DIR": URL,
        "PYTHONPATH": str(REPOSITORY),
    }
    command = [sys.executable, "-W", "error", "-m", "tests.engine.programs.bucket_start", json.dumps(options)]
    done = subprocess.run(command, env=variables, cwd=home, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "log": done.stderr}


@pytest.mark.slow
def test_a_second_machine_compiles_and_measures_nothing(server, tmp_path) -> None:
    options = {"max_num_seqs": 4, "block_size": 4, "num_blocks": 4}
    first = machine(tmp_path / "anna", options)
    assert first["misses"] > 3
    assert first["loaded"] == 0
    assert first["not found"] > 0
    second = machine(tmp_path / "ben", options)
    assert (second["misses"], second["not found"], second["measured"]) == (0, 0, 0)
    assert second["hits"] > 3
    assert second["loaded"] >= len(second["ladder"])
    assert (second["text"], second["ladder"]) == (first["text"], first["ladder"])
    assert " fetched from gs://bucket/caches/llama-" in second["log"]
    assert {name.split("/")[1].partition("-")[0] for name in server.names("bucket")} == {"llama"}


@pytest.mark.slow
def test_without_access_an_engine_runs_with_a_warning(server, tmp_path) -> None:
    server.refuse.update(list=100, read=100)
    found = machine(tmp_path / "anna", {"token_budget": 4, "budget_ladder": [], "max_num_seqs": 2, "num_blocks": 8})
    assert "the cache in the bucket is not used (gs://bucket/caches/llama-" in found["log"]
    assert "access denied" in found["log"]
    assert server.requests["write"] == 0
    assert found["text"]


@pytest.fixture
def copy(tmp_path):
    def make(folder: str) -> Mirror:
        (tmp_path / folder).mkdir(exist_ok=True)
        return Mirror(bucket=Bucket(URL), folder=tmp_path / folder, is_whole=lambda path, contents: contents != b"half")

    return make


def test_new_and_changed_files_are_sent_once_and_fetched_elsewhere(server: BucketServer, copy) -> None:
    here, there = copy("here"), copy("there")
    here.fetch()
    (here.folder / "xla").mkdir()
    (here.folder / "xla" / "a-cache").write_bytes(b"program")
    (here.folder / "b.json").write_text("1")
    (here.folder / "b.json.lock").write_text("")
    here.send()
    assert server.names("bucket") == ["caches/b.json", "caches/xla/a-cache"]
    here.send()
    assert server.requests["write"] == 2
    there.fetch()
    assert (there.folder / "xla" / "a-cache").read_bytes() == b"program"
    there.send()
    assert server.requests["write"] == 2, "nothing is new"
    (there.folder / "b.json").write_text("22")
    there.send()
    here.fetch()
    assert (here.folder / "b.json").read_text() == "22", "the last writer wins"
    assert server.requests["read"] == 6, "a program that is here is not read: 3 probes, and 3 files"


def test_a_file_that_is_being_written_is_sent_when_it_is_whole(server: BucketServer, copy) -> None:
    here = copy("here")
    here.fetch()
    (here.folder / "a-cache").write_bytes(b"half")
    here.send()
    assert server.names("bucket") == []
    (here.folder / "a-cache").write_bytes(b"whole")
    here.send()
    assert server.names("bucket") == ["caches/a-cache"]


def test_names_that_leave_the_folder_are_not_fetched(server: BucketServer, copy, tmp_path) -> None:
    Bucket(URL).write({"../outside.json": b"1", "a/../../outside.json": b"1", "/etc/outside.json": b"1", "other.txt": b"1"})
    here = copy("here")
    here.fetch()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_bucket_that_can_only_be_read_causes_one_warning(server: BucketServer, copy, caplog) -> None:
    here = copy("here")
    here.fetch()
    server.refuse["write"] = 100
    (here.folder / "a-cache").write_bytes(b"program")
    here.send()
    here.send()
    assert caplog.text.count("nothing more is added to the cache in the bucket") == 1


@pytest.mark.slow
def test_a_slow_bucket_does_not_delay_an_engine(server: BucketServer, tmp_path, monkeypatch, without_jax_cache) -> None:
    """The engine answers while its files wait for the server."""
    from fastgen_jax import Engine, EngineConfig
    from tests.tiny import drain, greedy, tiny_model, tokens_of

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    server.gate.clear()
    params, model = tiny_model()
    config = EngineConfig(
        token_budget=8, budget_ladder=(), max_num_seqs=4, block_size=4, num_blocks=16, compile_cache_dir=URL
    )
    engine = Engine(params, model, config)
    request_id = engine.add([5, 6, 7], greedy(4))
    assert len(tokens_of(drain(engine)[request_id])) == 4
    assert server.names("bucket") == []
    server.gate.set()
    for thread in mirror.threading.enumerate():
        if thread.name == "fastgen-cache":
            thread.join(60)
    assert any(name.endswith(".executable") for name in server.names("bucket"))
