"""Folders follow the environment variables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastgen_jax import cli, paths
from fastgen_jax.engine import fit, ladder, startup
from pallas_kernels.native.loader import library_folder
from pallas_kernels.ragged_attention.measured_tiles import measured_file


def test_every_folder_follows_xdg(monkeypatch, tmp_path) -> None:
    for name in ("FASTGEN_CACHE_DIR", "PALLAS_KERNELS_TILES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "s"))
    assert paths.engine_dir() == paths.cache_dir() == tmp_path / "c" / "fastgen_jax"
    assert paths.models_dir() == tmp_path / "c" / "fastgen_jax" / "models"
    assert library_folder() == native_folder(tmp_path / "c")
    assert measured_file() == tmp_path / "c" / "pallas_kernels" / "tiles.json"
    assert paths.deployments_dir() == tmp_path / "s" / "fastgen_jax" / "deployments"


def test_an_argument_overrides_the_variable_and_an_empty_name_turns_the_cache_off(monkeypatch) -> None:
    monkeypatch.setenv("FASTGEN_CACHE_DIR", "~/here")
    assert paths.engine_dir() == Path.home() / "here"
    assert paths.engine_dir("/there") == Path("/there")
    assert paths.engine_dir("") is None
    monkeypatch.setenv("FASTGEN_CACHE_DIR", "")
    assert paths.engine_dir() is None
    assert paths.engine_dir("/there") == Path("/there")


def native_folder(cache_home: Path) -> Path:
    return cache_home / "pallas_kernels" / "native"


@pytest.fixture
def kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FASTGEN_CACHE_DIR", raising=False)
    home = tmp_path / "fastgen_jax"
    for folder in (home / "xla", native_folder(tmp_path), home / "models"):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"x" * 2_000_000)
    ladder.save_choice(home / ladder.FILE, "facts", (16, 64), {16: 0.001, 32: 0.0019, 64: 0.003}, model="llama, 6 layers")
    return home


def test_fastgen_cache_lists_the_folders_and_measurements(kept, capsys) -> None:
    assert cli.main(["cache"]) == 0
    shown = capsys.readouterr().out
    for folder in (kept / "xla", native_folder(kept.parent), kept / "models"):
        assert f"2.0 MB  {folder}" in shown
    assert "llama, 6 layers" in shown
    assert "16*: 1.0 ms, 32: 1.9 ms, 64*: 3.0 ms" in shown


def test_fastgen_cache_clear_removes_everything_but_models_or_the_named_kind(kept, capsys) -> None:
    names = [ladder.FILE, startup.BLOCKS_FILE, startup.STARTS_FILE, fit.FILE]
    for name in names:
        (kept / name).write_text("{}")
    assert cli.main(["cache", "--clear", "measurements"]) == 0
    assert ladder.known() == []
    assert not any((kept / name).exists() for name in names)
    assert (kept / "xla" / "file").exists()
    assert cli.main(["cache", "--clear"]) == 0
    assert "removed compiled programs: 2.0 MB" in capsys.readouterr().out
    assert [path.name for path in kept.iterdir() if path.is_dir()] == ["models"]
    assert not native_folder(kept.parent).exists()
    assert cli.main(["cache", "--clear", "models"]) == 0
    assert not (kept / "models").exists()
    assert cli.main(["cache", "--clear"]) == 0


def test_fastgen_cache_with_the_cache_turned_off(kept, capsys, monkeypatch) -> None:
    monkeypatch.setenv("FASTGEN_CACHE_DIR", "")
    assert cli.main(["cache"]) == 0
    assert "not kept" in capsys.readouterr().out
    assert cli.main(["cache", "--clear", "measurements"]) == 0
    assert json.loads((kept / ladder.FILE).read_text())


def test_a_bucket_has_a_local_copy_with_a_folder_per_group(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = paths.engine_dir("gs://bucket/some prefix/x")
    assert folder is not None
    assert folder.parent == paths.cache_dir() / "buckets"
    assert folder.name.startswith("bucket-some-prefix-x-")
    assert folder != paths.engine_dir("gs://bucket/some-prefix/x")
    assert paths.engine_bucket("gs://bucket/x") == "gs://bucket/x"
    assert paths.engine_bucket("/there") is None
    assert paths.engine_dirs("/there") == [Path("/there")]
    assert paths.engine_dirs("gs://bucket/x") == paths.engine_dirs("") == []
    (folder / "llama-1").mkdir(parents=True)
    assert paths.engine_dirs("gs://bucket/some prefix/x") == [folder / "llama-1"]
