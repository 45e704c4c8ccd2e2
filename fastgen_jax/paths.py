"""The folders that fastgen_jax keeps between runs. docs/caches.md has the table.

They follow the platform and the XDG variables. Reproducible files go into the cache folder, records of running servers into
the state folder.
"""

from __future__ import annotations

import os
import re
from hashlib import sha256
from pathlib import Path

import platformdirs

from pallas_kernels.buckets import is_url
from pallas_kernels.folders import Folder, settle

CACHE_VARIABLE = "FASTGEN_CACHE_DIR"


def cache_dir() -> Path:
    """Returns the root of reproducible files: `$XDG_CACHE_HOME/fastgen_jax`, by default under ~/.cache on Linux."""
    return platformdirs.user_cache_path("fastgen_jax", appauthor=False)


def engine_dir(named: str | os.PathLike[str] | None = None) -> Path | None:
    """Returns the folder of compiled programs and measurements: `named`, else FASTGEN_CACHE_DIR, else `cache_dir`.

    For the URL of a bucket, it is the folder of its local copy. Returns None if the name that applies is an empty string,
    which turns the cache off.
    """
    url = engine_bucket(named)
    if url is not None:
        return cache_dir() / "buckets" / _folder_name(url)
    name = _engine_name(named)
    if name is None:
        return cache_dir()
    return Path(os.path.expanduser(name)) if name else None


def engine_bucket(named: str | os.PathLike[str] | None = None) -> str | None:
    """Returns the URL of the bucket for compiled programs and measurements; None if `engine_dir` is not a copy of one."""
    name = _engine_name(named)
    return name if name is not None and is_url(name) else None


def engine_dirs(named: str | os.PathLike[str] | None = None) -> list[Path]:
    """Returns the folders that hold programs and measurements: `engine_dir`, or the folders in the copy of a bucket."""
    folder = engine_dir(named)
    if folder is None:
        return []
    return [folder] if engine_bucket(named) is None else sorted(path for path in folder.glob("*") if path.is_dir())


def _engine_name(named: str | os.PathLike[str] | None) -> str | None:
    return os.environ.get(CACHE_VARIABLE) if named is None else os.fspath(named)


def _folder_name(url: str) -> str:
    """A readable name, different for each URL."""
    readable = re.sub(r"[^\w.-]+", "-", url.partition("://")[2]).strip("-")[:60]
    return f"{readable}-{sha256(url.encode()).hexdigest()[:8]}"


def models_dir() -> Path:
    """Returns the folder of downloaded models."""
    return cache_dir() / "models"


def deployments_dir() -> Path:
    """Returns the folder of servers' records and logs: `$XDG_STATE_HOME/fastgen_jax/deployments`.

    Its parent is ~/.local/state by default on Linux.
    """
    return platformdirs.user_state_path("fastgen_jax", appauthor=False) / "deployments"


def settle_engine(folder: Path) -> Folder | None:
    """Returns `folder` for compiled programs and measurements, or the replacement chosen by `settle`."""
    return settle(folder, "compiled programs and measurements", variable=CACHE_VARIABLE)


def settle_models() -> Folder | None:
    """Returns a folder that a model can be downloaded to."""
    return settle(models_dir(), "downloaded models", variable="XDG_CACHE_HOME", reading=False)


def settle_deployments() -> Folder | None:
    """Returns a folder for records of servers, the same one for all processes of this user."""
    return settle(deployments_dir(), "records of deployments", variable="XDG_STATE_HOME", reading=False, private=True)
