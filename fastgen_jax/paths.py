"""The folders that fastgen_jax keeps between runs. docs/caches.md has the table.

They follow the platform and the XDG variables. Reproducible files go into the cache folder, records of running servers into
the state folder.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from pallas_kernels.folders import Folder, settle

CACHE_VARIABLE = "FASTGEN_CACHE_DIR"


def cache_dir() -> Path:
    """Returns the root of reproducible files: `$XDG_CACHE_HOME/fastgen_jax`, by default under ~/.cache on Linux."""
    return platformdirs.user_cache_path("fastgen_jax", appauthor=False)


def engine_dir(named: str | os.PathLike[str] | None = None) -> Path | None:
    """Returns the folder of compiled programs and measurements: `named`, else FASTGEN_CACHE_DIR, else `cache_dir`.

    Returns None if the one that applies is an empty string, which turns the cache off.
    """
    if named is None:
        named = os.environ.get(CACHE_VARIABLE)
    if named is None:
        return cache_dir()
    return Path(os.path.expanduser(named)) if os.fspath(named) else None


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
