"""Where fastgen_jax keeps things between runs. docs/caches.md has the table.

The folders follow the platform and the XDG variables. What can be made again goes into the cache, records of servers
that run into the state folder.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from pallas_kernels.folders import Folder, settle

CACHE_VARIABLE = "FASTGEN_CACHE_DIR"


def cache_dir() -> Path:
    """The root of what can be made again: `$XDG_CACHE_HOME/fastgen_jax`, by default under ~/.cache on Linux."""
    return platformdirs.user_cache_path("fastgen_jax", appauthor=False)


def engine_dir(named: str | os.PathLike[str] | None = None) -> Path | None:
    """Compiled programs and measurements: the folder `named`, else that of FASTGEN_CACHE_DIR, else `cache_dir`.

    None where either is an empty string: nothing is to be kept.
    """
    if named is None:
        named = os.environ.get(CACHE_VARIABLE)
    if named is None:
        return cache_dir()
    return Path(os.path.expanduser(named)) if os.fspath(named) else None


def models_dir() -> Path:
    """Downloaded models."""
    return cache_dir() / "models"


def deployments_dir() -> Path:
    """Records and logs of servers: `$XDG_STATE_HOME/fastgen_jax/deployments`, by default under ~/.local/state on Linux."""
    return platformdirs.user_state_path("fastgen_jax", appauthor=False) / "deployments"


def settle_engine(folder: Path) -> Folder | None:
    """`folder` for compiled programs and measurements, or what `settle` gives in its place."""
    return settle(folder, "compiled programs and measurements", variable=CACHE_VARIABLE)


def settle_models() -> Folder | None:
    """A folder that a model can be downloaded to."""
    return settle(models_dir(), "downloaded models", variable="XDG_CACHE_HOME", reading=False)


def settle_deployments() -> Folder | None:
    """A folder that a server can be written down in: the same one for all processes of this user."""
    return settle(deployments_dir(), "records of deployments", variable="XDG_STATE_HOME", reading=False, private=True)
