"""Deployments on this machine: starting, finding and stopping them, and their records."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastgen_jax import paths
from fastgen_jax.flags import flag_arguments

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
SERVER_KEYS_VARIABLE = "FASTGEN_SERVER_KEYS"


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A current or former server, as it recorded itself."""

    name: str
    model: str
    url: str
    """Base URL, without /v1."""
    pid: int
    started: float
    """Seconds since the epoch."""
    process_start: str
    """Start time of the process in the system's own unit, because process ids are reused."""
    log: str | None = None
    replicas: int = 1

    @property
    def is_alive(self) -> bool:
        """Whether the process that wrote this record is still running."""
        return process_start(self.pid) == self.process_start


def deployments() -> list[Deployment]:
    """All running deployments of this user on this machine; records of ended ones are removed."""
    folder = paths.settle_deployments()
    alive = []
    for path in sorted(folder.path.glob("*.json")) if folder else ():
        deployment = _read(path)
        if deployment is None:
            continue
        if deployment.is_alive:
            alive.append(deployment)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
    return alive


def find_deployment(name: str) -> Deployment:
    """The deployment with that name; if it is not running, ValueError with a list of those that are."""
    folder = paths.settle_deployments()
    # Before `deployments` removes the record of one that has ended.
    record = _read(folder.path / f"{name}.json") if folder else None
    for deployment in deployments():
        if deployment.name == name:
            return deployment
    if record is not None and record.name == name and not record.is_alive:
        raise ValueError(
            f"deployment {name!r} was killed: its process {record.pid} is gone"
            f"{f'; its log is {record.log}' if record.log else ''}; start it again with "
            f"`fastgen serve {record.model} --deployment-name {name}`"
        )
    known = ", ".join(d.name for d in deployments()) or "none"
    raise ValueError(
        f"no deployment {name!r} is running on this machine (running: {known}); start it with `fastgen serve MODEL "
        f"--deployment-name {name}`, or fastgen_jax.serve(model, deployment_name={name!r})"
    )


@contextlib.contextmanager
def recorded(deployment: Deployment) -> Iterator[None]:
    """Context in which a deployment is recorded; ValueError if another deployment with that name is running.

    The file is created exclusively, so that one of two servers that start at the same time fails. If it cannot be written,
    a warning is logged and the server runs; clients then find it by URL and not by name.
    """
    path = _write_record(deployment)
    try:
        yield
    finally:
        if path is not None:
            with contextlib.suppress(OSError):
                path.unlink()


def _write_record(deployment: Deployment) -> Path | None:
    """The path of the record; None if it could not be written."""
    deployments()  # removes the record of an ended one
    folder = paths.settle_deployments()
    if folder is None:
        return None  # a warning has been logged
    path, scratch = folder.path / f"{deployment.name}.json", folder.path / f".{deployment.name}.{os.getpid()}"
    try:
        folder.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            scratch.write_text(json.dumps(asdict(deployment)))
            os.link(scratch, path)  # unlike a rename, it fails if the name is taken, and no reader sees half a file
        except FileExistsError:
            other = _read(path)
            if other is not None:
                raise ValueError(
                    f"a deployment {deployment.name!r} is already running (process {other.pid}); choose another "
                    "deployment_name, or end that one with `fastgen deployments --stop NAME`"
                ) from None
            scratch.replace(path)  # a damaged record is of no use
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        log.warning(
            "deployment %r is not recorded (%s), so clients find it at %s and not by its name; XDG_STATE_HOME "
            "names another folder",
            deployment.name,
            error,
            deployment.url,
        )
        return None
    return path


def check_name(name: str) -> str:
    """`name`, if it is valid for a deployment: it becomes part of a path and of a URL."""
    if not name or not all(c.isalnum() or c in "._-" for c in name) or name.startswith("."):
        raise ValueError(f"deployment_name is {name!r}; use letters, digits, '.', '_' and '-'")
    return name


def default_name(model: str) -> str:
    """The default name of a deployment: the last part of the model's path or id."""
    last = os.path.basename(model.rstrip("/")).removesuffix(".gguf")
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in last).lstrip(".") or "model"


def process_start(pid: int) -> str | None:
    """The start time of a process as reported by the system; None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None if Path("/proc/self").exists() or not _exists(pid) else "unknown"
    state, *rest = stat.rpartition(")")[2].split()  # the name before it may hold any character
    return None if state == "Z" else rest[18]


def start_server(model: str, *, deployment_name: str, options: Mapping[str, Any], timeout: float) -> Deployment:
    """Starts `fastgen serve` in a process that outlives this one; returns when it is ready.

    Raises ValueError with the end of its log if it ends, or is not ready after `timeout` seconds.
    """
    name = check_name(deployment_name)
    if any(d.name == name for d in deployments()):
        raise ValueError(
            f"a deployment {name!r} is already running; use fastgen_jax.client({name!r}), or choose another name"
        )
    folder = paths.settle_deployments()
    if folder is None:
        raise ValueError(
            f"a background server requires a folder for its record and log, but neither "
            f"{paths.deployments_dir()} nor the system's temporary folder is writable; set "
            "XDG_STATE_HOME to a writable folder"
        )
    folder.path.mkdir(parents=True, exist_ok=True, mode=0o700)
    log_file = folder.path / f"{name}.log"
    environment = dict(os.environ)
    options = dict(options)
    if options.get("api_key"):  # command lines are visible to all users
        environment[SERVER_KEYS_VARIABLE] = ",".join(options.pop("api_key"))
    command = [
        sys.executable,
        "-m",
        "fastgen_jax.cli",
        "serve",
        model,
        "--deployment-name",
        name,
        "--log-file",
        str(log_file),
    ]
    for option, value in options.items():
        command += flag_arguments(option, value)
    log_file.write_bytes(b"")
    with log_file.open("ab") as output:
        # In a new session, so that it survives the end of this process and its terminal.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if process.poll() is not None:
            raise ValueError(
                f"the server for {model!r} ended with code {process.returncode}; the end of {log_file}:\n" + _tail(log_file)
            )
        found = next((d for d in deployments() if d.name == name and d.pid == process.pid), None)
        if found is not None and _is_ready(found):
            process.returncode = 0  # it outlives this object, which would warn about that
            return found
        time.sleep(POLL_SECONDS)
    process.terminate()
    raise ValueError(
        f"the server for {model!r} was not ready after {timeout:g} s; raise timeout, or see {log_file}:\n" + _tail(log_file)
    )


def stop_server(deployment: Deployment, *, timeout: float) -> None:
    """Ends a server after its running requests, and waits; ValueError if it is still running after `timeout` seconds."""
    if not deployment.is_alive:
        return
    with contextlib.suppress(ProcessLookupError):  # it has already ended
        os.kill(deployment.pid, signal.SIGTERM)
    end = time.monotonic() + timeout
    while True:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(deployment.pid, os.WNOHANG)  # a child process stays a zombie until it is waited for
        if not deployment.is_alive:
            return
        if time.monotonic() > end:
            raise ValueError(
                f"deployment {deployment.name!r} (process {deployment.pid}) is still running after {timeout:g} s; "
                "its requests may take longer: wait, or kill it"
            )
        time.sleep(POLL_SECONDS)


def _is_ready(deployment: Deployment) -> bool:
    import httpx

    try:
        return httpx.get(f"{deployment.url}/health", timeout=5, verify=False).status_code == 200
    except httpx.HTTPError:
        return False


def _read(path: Path) -> Deployment | None:
    try:
        return Deployment(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _tail(path: Path, lines: int = 20) -> str:
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
