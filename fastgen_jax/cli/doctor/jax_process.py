"""What JAX finds, asked in a process of its own with a time limit: the devices, and the C++ kernels for the CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from fastgen_jax.cli.doctor import packages, system
from fastgen_jax.cli.doctor.finding import Finding, Problem, size

VERSION_SECONDS = 20  # for a compiler to print its version
# The oldest NVIDIA drivers that the CUDA libraries on PyPI work with, newest first.
CUDA_DRIVERS = ((580, "cuda13"), (525, "cuda12"))


def devices(timeout: float) -> Finding:
    """The devices that JAX uses, with their memory; problems where an accelerator of this machine is not among them."""
    found, errors = ask("devices", timeout)
    problems = list(_device_problems(found, errors))
    if "devices" not in found:
        return Finding(facts=found, lines=[("", found.get("error", "no answer"))], problems=problems)
    lines = []
    for number, device in enumerate(found["devices"]):
        memory = ""
        if device["memory_bytes"]:
            free = device["memory_bytes"] - (device["used_bytes"] or 0)
            memory = f", {size(free)} free of {size(device['memory_bytes'])}"
        int4 = ""
        if device["platform"] != "cpu":
            int4 = f"; checkpoints of 4 bits {'stay so' if device.get('int4') else 'are dequantized'}"
        lines.append((f"{device['platform']}:{number}", f"{device['kind']}{memory}{int4}"))
    lines.append(("host memory", f"{size(found['free_host_bytes'])} free for this process, within its control groups"))
    return Finding(facts=found, lines=lines, problems=problems)


def kernels(timeout: float) -> Finding:
    """Whether the C++ kernels for the CPU are used, and the compilers of this machine."""
    found, _ = ask("kernels", timeout)
    reason = found.get("unavailable") or found.get("error")
    compilers = dict(_compilers())
    built = found.get("built") or []
    lines = [
        ("in use", "no: " + " ".join(reason.split()) if reason else f"yes, {found.get('origin', '')}".rstrip(", ")),
        ("built", ", ".join(built) or "none yet; they are built at the first start"),
        *(compilers.items() or [("compilers", "none")]),
    ]
    problems = []
    if reason and "error" not in found and not _is_turned_off() and not system.accelerators():
        what = "the C++ kernels for the CPU cannot be built, so a CPU runs models several times slower"
        remedy = "install g++ or clang++ (Debian, Ubuntu: apt-get install g++), or pip install 'fastgen_jax[native]'"
        problems.append(Problem(f"{what} ({' '.join(reason.split())[:200]})", remedy))
    return Finding(facts={**found, "compilers": compilers}, lines=lines, problems=problems)


def ask(what: str, timeout: float) -> tuple[dict[str, Any], str]:
    """What `probe` prints for this question, or {"error": ...}, and the end of what it writes to standard error."""
    command = [sys.executable, "-m", "fastgen_jax.cli.doctor.probe", what]
    # Its own session: a process that JAX has started must not keep the pipes open after the time is over.
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return {"error": f"JAX did not answer within {timeout:g} s", "timeout": True}, ""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            return json.loads(line), errors
    last = (errors.strip().splitlines() or ["it printed nothing"])[-1]
    return {"error": f"JAX ended with exit code {process.returncode}: {last}"}, errors


def _device_problems(found: dict[str, Any], errors: str) -> Iterator[Problem]:
    platforms = {device["platform"] for device in found.get("devices", ())}
    gpus, tpus = system.gpus(), system.tpus()
    users = system.tpu_users() if tpus else []
    chosen = os.environ.get("JAX_PLATFORMS", "")
    if error := found.get("error"):
        yield Problem(f"JAX does not start: {error}", _remedy_of_start(found, users))
    for text in found.get("package_problems", ()):
        what, _, remedy = text.partition(": ")
        yield Problem(what, remedy)
    for device in found.get("devices", ()):
        if not device["works"]:
            yield Problem(f"{device['kind']} computes a wrong product", "restart the machine, or use another device")
    for kind, present, platform in (("GPU", gpus, ("gpu", "cuda")), ("TPU", tpus, ("tpu",))):
        if not present or platforms & set(platform) or "error" in found:
            continue
        if chosen and not any(name in chosen.split(",") for name in platform):
            yield Problem(f"this machine has a {kind}, but JAX_PLATFORMS={chosen} hides it", "unset JAX_PLATFORMS")
        elif found.get("package_problems"):
            continue  # they say why
        elif kind == "GPU":
            yield Problem(
                f"this machine has a GPU ({present[0]}), but JAX does not use it{_last_line(errors)}", _gpu_remedy(gpus)
            )
        elif users:
            yield Problem(f"the TPU is in use by {_named(users)}", _remedy_of_users(users))
        else:
            yield Problem(
                f"this machine has a TPU ({present[0]}), but JAX does not use it{_last_line(errors)}",
                "pip install 'fastgen_jax[tpu]', and restart Python",
            )


def _remedy_of_start(found: dict[str, Any], users: list[tuple[int, str]]) -> str:
    if users:
        return _remedy_of_users(users)
    if pid := re.search(r"already in use by (?:a )?process with pid (\d+)", found["error"]):
        return f"end the process {pid[1]}, which uses the TPU"
    if found.get("timeout"):
        return (
            "end other processes that use the accelerator; on a TPU slice of several hosts start the program on all of "
            "them at the same time; raise --timeout if the machine is just slow"
        )
    return "resolve the problems with packages above, or install into a new virtual environment"


def _remedy_of_users(users: list[tuple[int, str]]) -> str:
    return f"end it: {', '.join(f'kill {pid}' for pid, _ in users)} (`fastgen deployments --stop NAME` for a deployment)"


def _named(users: list[tuple[int, str]]) -> str:
    return ", ".join(f"process {pid} ({name})" for pid, name in users)


def _gpu_remedy(gpus: list[str]) -> str:
    version = next((part for gpu in gpus for part in re.findall(r"\b\d{3}\.\d+[.\d]*", gpu)), None)
    plugins = [name for name in packages.installed() if re.match(r"jax-cuda\d+-plugin", name)]
    major = int(version.split(".")[0]) if version else None
    fitting = next((extra for oldest, extra in CUDA_DRIVERS if major is None or major >= oldest), None)
    if fitting is None:
        return f"update the NVIDIA driver ({version}): JAX needs {CUDA_DRIVERS[-1][0]} or newer"
    if any(fitting in name or (major or 0) >= CUDA_DRIVERS[0][0] for name in plugins):
        return (
            f"the plugin is installed ({', '.join(plugins)}): resolve the problems with packages above; if LD_LIBRARY_PATH "
            "is set, unset it, because JAX brings its own CUDA libraries"
        )
    return f"pip install 'fastgen_jax[{fitting}]', and restart Python"


def _last_line(errors: str) -> str:
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return f": {lines[-1][:300]}" if lines else ""


def _is_turned_off() -> bool:
    return os.environ.get("PALLAS_KERNELS_NATIVE", "1").lower() in ("0", "false", "off")


def _compilers() -> Iterator[tuple[str, str]]:
    """Name and first line of the version of each C++ compiler that is found."""
    commands = {name: [path] for name in ("c++", "g++", "clang++") if (path := shutil.which(name))}
    if named := os.environ.get("CXX"):
        commands = {"CXX": named.split(), **commands}
    if importlib.util.find_spec("ziglang") is not None:
        commands["zig"] = [sys.executable, "-m", "ziglang", "c++"]
    for name, command in commands.items():
        try:
            done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=VERSION_SECONDS)
            text = (done.stdout.strip().splitlines() or [f"exit code {done.returncode}"])[0]
        except (OSError, subprocess.TimeoutExpired) as error:
            text = f"does not run: {error}"
        yield name, f"{' '.join(command)}: {text}"
