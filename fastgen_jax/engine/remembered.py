"""Choices that an engine made on a machine, kept for its next start: a JSON file that people can read."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import filelock
import jax

from fastgen_jax.version import VERSION
from pallas_kernels.folders import replace_file
from pallas_kernels.native.compiler import cpu_description

log = logging.getLogger(__name__)

KEPT = 200  # entries of a file; the oldest go first
LOCK_SECONDS = 10.0


@functools.cache
def machine() -> str:
    """This machine, as far as the time of a step depends on it."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{len(jax.local_devices())} x {device.device_kind}"
    description = cpu_description()
    names = [line.partition(":")[2].strip() for line in description.splitlines() if line.startswith("model name")]
    digest = sha256(description.encode()).hexdigest()[:8]  # its instruction sets included
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()  # those that it may use
    return f"{names[0] if names else description.splitlines()[0]} ({digest}), {cores} cores"


def versions() -> str:
    """The software that an entry is true for."""
    platform = " ".join(jax.devices()[0].client.platform_version.split())
    return f"fastgen_jax {VERSION}, jax {jax.__version__}, {platform}"


def recall(path: Path, facts: Any) -> dict[str, Any] | None:
    """What was kept for `facts` on this machine with these versions; None if nothing was, or the file is damaged."""
    entry = everything(path).get(_key(facts))
    return entry if entry is not None and entry.get("versions") == versions() else None


def remember(path: Path, facts: Any, entry: dict[str, Any]) -> None:
    """Keeps an entry in the place of the one for the same facts and machine; a warning if the file cannot be written."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    complete = {"machine": machine(), "versions": versions(), "when": now, **entry}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{path}.lock", timeout=LOCK_SECONDS):
            entries = {**everything(path), _key(facts): complete}
            newest = sorted(entries, key=lambda key: str(entries[key].get("when")))[-KEPT:]
            text = json.dumps({key: entries[key] for key in newest}, indent=1)
            replace_file(path, text.encode())
    except OSError as error:  # a lock that cannot be had is one as well
        log.warning("%s cannot be written (%s); what was found out now will be found out again", path, error)


def everything(path: Path) -> dict[str, dict[str, Any]]:
    """All entries of a file, of whatever machine and version; {} if there is none, or it is damaged."""
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in entries.items() if isinstance(v, dict)} if isinstance(entries, dict) else {}


def forget(path: Path) -> int:
    """Removes the file; returns how many entries it had. OSError if it cannot be removed."""
    count = len(everything(path))
    path.unlink(missing_ok=True)
    return count


def _key(facts: Any) -> str:
    return sha256(repr((machine(), facts)).encode()).hexdigest()[:16]
