"""The models of this machine, and suggestions for misspelled names."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastgen_jax.checkpoint import resolve_model
from fastgen_jax.checkpoint.local import local_models, nearest_name


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with a model, and a repository of which only the tokenizer was downloaded."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for repo, names in {
        "models--Qwen--Qwen9-1B-Instruct": ("config.json", "model.safetensors"),
        "models--other--tokenizer": ("config.json", "tokenizer.json"),
    }.items():
        commit = tmp_path / repo / "snapshots" / ("a" * 40)
        commit.mkdir(parents=True)
        (tmp_path / repo / "blobs").mkdir()
        for name in names:
            blob = tmp_path / repo / "blobs" / name
            blob.write_text("12345")
            (commit / name).symlink_to(blob)
    return tmp_path


def test_models_in_the_cache_of_the_hub_are_listed_and_partial_downloads_are_not(hub: Path) -> None:
    found = {model.name: model for model in local_models()}
    assert "smollm2-135m-instruct" in found
    assert found["Qwen/Qwen9-1B-Instruct"].num_bytes == 10
    assert "other/tokenizer" not in found


def test_without_a_cache_of_the_hub_only_built_in_models_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "absent"))
    assert all("/" not in model.name for model in local_models())


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("smollm2", "smollm2-135m-instruct"),
        ("SmolM2-135M-Instruct", "smollm2-135m-instruct"),
        ("qwen9-1b", "Qwen/Qwen9-1B-Instruct"),
        ("entirely-different", None),
        ("", None),
    ],
)
def test_the_nearest_model_is_suggested(hub: Path, typed: str, meant: str | None) -> None:
    assert nearest_name(typed) == meant


def test_a_misspelled_name_is_refused_with_the_suggestion(hub: Path) -> None:
    with pytest.raises(ValueError, match=r"did you mean Qwen/Qwen9-1B-Instruct\?$"):
        resolve_model("Qwen9-1B")
