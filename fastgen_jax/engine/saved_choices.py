"""Choices that an engine made on a machine, saved for its next start in a readable JSON file."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import filelock
import jax

from fastgen_jax.json_types import JsonObject
from fastgen_jax.version import VERSION
from pallas_kernels.folders import replace_file
from pallas_kernels.native.compiler import cpu_description

log = logging.getLogger(__name__)

MAX_ENTRIES = 200  # of a file; the oldest are dropped first
LOCK_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a saved choice is valid for."""

    machine: str
    versions: str


def here() -> Place:
    """This machine, and the software in use."""
    return Place(machine=machine(), versions=versions())


def elsewhere(devices: Sequence[Any]) -> Place:
    """A host with these devices, descriptions by their compiler, and the same software as here."""
    return Place(machine=f"{len(devices)} x {devices[0].device_kind}", versions=_versions(devices[0].client))


@functools.cache
def machine() -> str:
    """The facts of this machine that the time of a step depends on."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{len(jax.local_devices())} x {device.device_kind}"
    description = cpu_description()
    names = [line.partition(":")[2].strip() for line in description.splitlines() if line.startswith("model name")]
    digest = sha256(description.encode()).hexdigest()[:8]  # including its instruction sets
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()  # those that this process may use
    return f"{names[0] if names else description.splitlines()[0]} ({digest}), {cores} cores"


def versions() -> str:
    """The software versions for which an entry is valid."""
    return _versions(jax.devices()[0].client)


def _versions(client: Any) -> str:
    platform = " ".join(client.platform_version.split())
    return f"fastgen_jax {VERSION}, jax {jax.__version__}, {platform}"


def group(facts: object, place: Place | None = None) -> str:
    """A name for what starts with equal `facts` in such a place (None: here) can share."""
    place = place or here()
    return sha256(repr((place.machine, place.versions, facts)).encode()).hexdigest()[:16]


def load(path: Path, facts: object) -> JsonObject | None:
    """The entry saved for `facts` on this machine with these versions; None if there is none, or the file is damaged."""
    entry = load_all(path).get(_key(facts, machine()))
    return entry if entry is not None and entry.get("versions") == versions() else None


def save(path: Path, facts: object, entry: JsonObject, place: Place | None = None) -> None:
    """Saves an entry, replacing one for the same facts and machine; logs a warning if the file cannot be written.

    `place` is where it is valid; None: here.
    """
    place = place or here()
    now = datetime.now(UTC).isoformat(timespec="seconds")
    complete = {"machine": place.machine, "versions": place.versions, "when": now, **entry}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{path}.lock", timeout=LOCK_SECONDS):
            entries = {**load_all(path), _key(facts, place.machine): complete}
            newest = sorted(entries, key=lambda key: str(entries[key].get("when")))[-MAX_ENTRIES:]
            text = json.dumps({key: entries[key] for key in newest}, indent=1)
            replace_file(path, text.encode())
    except OSError as error:  # including a lock that cannot be acquired
        log.warning("%s cannot be written (%s); the next start will measure or choose again", path, error)


def load_all(path: Path) -> dict[str, JsonObject]:
    """All entries of a file, for any machine and version; {} if there is no file, or it is damaged."""
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in entries.items() if isinstance(v, dict)} if isinstance(entries, dict) else {}


def clear(path: Path) -> int:
    """Removes the file and returns how many entries it had; OSError if it cannot be removed."""
    count = len(load_all(path))
    path.unlink(missing_ok=True)
    return count


def _key(facts: object, machine: str) -> str:
    return sha256(repr((machine, facts)).encode()).hexdigest()[:16]
