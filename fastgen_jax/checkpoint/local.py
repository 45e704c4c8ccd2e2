"""The models that this machine has, by name, and the nearest of them to a misspelled one."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import NamedTuple

from fastgen_jax.checkpoint.built_in import BUILT_IN, find_packaged


class LocalModel(NamedTuple):
    """A model by the name that `resolve_model` accepts."""

    name: str
    num_bytes: int
    where: str


def local_models() -> list[LocalModel]:
    """Built-in models, also those that are downloaded at first use, then those in the cache of the Hugging Face hub."""
    built_in = []
    for name, model in BUILT_IN.items():
        if not isinstance(model, Path):
            where = "built in" if find_packaged(name, model) else "built in, downloaded at first use"
            built_in.append(LocalModel(name, model.megabytes * 10**6, where))
        elif model.exists():
            num_bytes = sum(file.stat().st_size for file in model.rglob("*") if file.is_file())
            built_in.append(LocalModel(name, num_bytes, "in this clone of the repository"))
    return built_in + _of_hub()


def nearest_name(name: str) -> str | None:
    """The model on this machine whose name is most like `name`, with or without its organization; None if none is."""
    names = {model.name.rpartition("/")[2].lower(): model.name for model in local_models()}
    wanted = name.lower().rpartition("/")[2]
    if not wanted:
        return None
    names |= {known[: len(wanted)]: name for known, name in names.items()}  # only the beginning may have been typed
    near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.7)
    return names[near[0]] if near else None


def _of_hub() -> list[LocalModel]:
    try:
        import huggingface_hub
        import huggingface_hub.constants
    except ImportError:
        return []
    try:  # the folder as it is now: the default of the argument is that of the import
        repos = huggingface_hub.scan_cache_dir(huggingface_hub.constants.HF_HUB_CACHE).repos
    except (huggingface_hub.errors.CacheNotFound, OSError, ValueError):
        return []
    found = []
    for repo in repos:
        files = {file.file_name for revision in repo.revisions for file in revision.files}
        # A repository of which only the tokenizer was downloaded is not a model.
        if repo.repo_type == "model" and "config.json" in files and any(name.endswith(".safetensors") for name in files):
            found.append(LocalModel(repo.repo_id, repo.size_on_disk, "in the cache of the Hugging Face hub"))
    return sorted(found)
