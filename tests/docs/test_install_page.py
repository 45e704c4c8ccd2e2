"""The commands of docs/install.md and of the quick start, as they are on the page.

Those of the page on installation run in new virtual environments and download packages, hence they are slow tests. What an
accelerator needs is resolved with pip and not downloaded: JAX could not use it here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, blocks

INSTALL = ROOT / "docs" / "install.md"
QUICK_START = ROOT / "docs" / "quick-start.md"
SECONDS = 1500  # for packages to be downloaded and programs to be compiled
PLUGINS = {"cuda13": "jax-cuda13-plugin", "cuda12": "jax-cuda12-plugin", "tpu": "libtpu"}


def commands(block: str) -> list[str]:
    """The lines of a block without comments."""
    return [line.split("  #")[0].strip() for line in block.splitlines() if line.strip()]


ONE_LINE, CHECK, TRY, WHEEL = map(commands, blocks(INSTALL)[:4])
TERMINAL = next(commands(block) for block in blocks(QUICK_START) if "fastgen models" in block)


def run(command: str, venv: Path, clone: Path) -> str:
    """Runs a line of the page in a shell in which the environment is active; returns what it prints."""
    path = os.pathsep.join([str(venv / "bin"), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "VIRTUAL_ENV": str(venv)}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        ["bash", "-c", command], cwd=clone, env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of this repository that git would clone."""
    target = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("this is not a clone")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with nothing but pip."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    if subprocess.run(
        [folder / "bin" / "pip", "download", "--no-deps", "-d", folder, "shtab"], capture_output=True
    ).returncode:
        pytest.skip("packages cannot be downloaded here")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", ONE_LINE)
def test_each_line_of_the_page_installs(command: str, venv: Path, clone: Path, tmp_path: Path) -> None:
    extra = next((name for name in PLUGINS if name in command), None)
    if extra is not None:
        # As a flag: as variables, pip would pass them on to the environment in which it builds the package.
        output = run(command.replace("install", "install --dry-run", 1), venv, clone)
        (would,) = re.findall("^Would install (.*)$", output, re.MULTILINE)
        assert any(word.startswith(PLUGINS[extra]) for word in would.split())
        return
    if command.startswith("uv "):
        if shutil.which("uv") is None:
            pytest.skip("uv is not installed")
        venv = tmp_path / "venv"
        subprocess.run(["uv", "venv", "--quiet", "--python", sys.executable, venv], check=True)
    run(command, venv, clone)
    for check in CHECK:
        # The doctor may find something on this machine, but nothing about packages.
        output = run(f"{check} || true", venv, clone)
        assert "fastgen_jax requires" not in output
    assert output.strip(), "the model answers"


@pytest.mark.slow
def test_the_package_is_tried_without_installing_it(clone: Path, venv: Path) -> None:
    if shutil.which("uvx") is None:
        pytest.skip("uv is not installed")
    (command,) = TRY
    assert run(command, venv, clone).strip()


@pytest.mark.slow
def test_a_wheel_is_built_from_the_clone_and_installed(clone: Path, venv: Path) -> None:
    for command in WHEEL:
        if command.startswith("uvx ") and shutil.which("uvx") is None:
            continue
        # Once it is installed, pip does not replace a version by the same one; this would install the wheel in vain.
        if ".whl" in command:
            run("pip uninstall --yes fastgen_jax", venv, clone)
        run(command, venv, clone)
    (wheel,) = (clone / "dist").iterdir()
    assert wheel.suffix == ".whl"
    assert "fastgen_jax" in run("fastgen --version", venv, clone)


@pytest.mark.slow
@pytest.mark.parametrize("command", TERMINAL)
def test_the_commands_of_the_quick_start_run(command: str) -> None:
    done = subprocess.run(
        ["bash", "-c", command.replace("fastgen ", f"{sys.executable} -m fastgen_jax.cli ", 1)],
        input="Name three colors.\n",  # which `fastgen chat` asks for
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=ROOT,
    )
    assert done.returncode == 0 or "doctor" in command, done.stderr[-2000:]
    assert done.stdout.strip()


def test_the_page_on_installation_has_a_line_for_every_kind_of_machine() -> None:
    extras = {extra for command in ONE_LINE for extra in re.findall(r"\w+", command.partition("[")[2])}
    assert extras == {"serve", "native", *PLUGINS}
    assert all(re.match(r"(uv )?pip install '\.\[[\w,]+\]'$", command) for command in ONE_LINE)
    assert [command.split()[:2] for command in CHECK] == [["fastgen", "doctor"], ["fastgen", "run"]]
