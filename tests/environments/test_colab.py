"""In Colab, the first cell of the notebooks adds packages and changes none: with a CPU, a GPU and a TPU.

`make compat` makes the environment: the packages that Colab lists, without those that only a GPU or a TPU needs. For
these, pip resolves the cell's requirements against the list but installs nothing.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.notebooks.test_notebooks import HOME, WITHOUT_MODEL, execute, kernel_beside

HERE = Path(__file__).parent
COLAB = HOME.parent / ".venv-colab"
NEW = {"fastgen-jax", "gguf", "httpx-sse", "llguidance", "shtab"}  # the others are there
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not COLAB.exists(), reason="no environment with Colab's packages; `make compat` makes one"),
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::DeprecationWarning"
    ),
]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def resolved(report: Path) -> dict[str, str]:
    """Version of each package that pip chose."""
    packages = [package["metadata"] for package in json.loads(report.read_text())["install"]]
    return {canonical(package["name"]): package["version"] for package in packages}


def check_unchanged(chosen: dict[str, str], listed: str) -> None:
    lines = [line.split("==") for line in (HERE / listed).read_text().splitlines() if not line.startswith("#")]
    there = {canonical(name): version for name, version in lines}
    assert {name: version for name, version in chosen.items() if name not in NEW} == {
        name: version for name, version in there.items() if name in chosen
    }


def install(report: Path, listed: str) -> list[str]:
    """`install` with options of pip: it resolves against a list of versions and installs nothing.

    As variables, pip would pass them on to the environment in which it builds the package, which would lack setuptools.
    """
    return ["install", "--dry-run", "--ignore-installed", "--report", str(report), "--constraint", str(HERE / listed)]


@pytest.mark.parametrize(
    ("module", "listed"),
    [(None, "colab.txt"), ("jax_cuda12_plugin", "colab_gpu.txt"), ("libtpu", "colab_tpu.txt")],
    ids=["CPU", "GPU", "TPU"],
)
def test_the_first_cell_changes_no_package(
    module: str | None, listed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = kernel_beside(COLAB / "bin" / "python", tmp_path, monkeypatch)
    if module is not None:  # what the cell looks for
        (tmp_path / "modules" / module).mkdir(parents=True)
        (tmp_path / "modules" / module / "__init__.py").touch()
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    report = tmp_path / "report.json"
    changes = {'pip install --quiet "': f'pip {shlex.join(install(report, listed))} --quiet "'}
    execute(WITHOUT_MODEL, HOME, kernel=kernel, num_cells=1, changes=changes)
    chosen = resolved(report)
    assert chosen["jax"] == "0.7.2"
    check_unchanged(chosen, listed)


def test_the_extra_for_cuda_12_changes_no_package_of_the_gpu_runtime(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    pip = [COLAB / "bin" / "python", "-m", "pip", *install(report, "colab_gpu.txt")]
    subprocess.run([*pip, "--quiet", f"{HOME.parent}[cuda12,serve]"], check=True)
    chosen = resolved(report)
    assert {"jax-cuda12-plugin", "nvidia-cudnn-cu12", "fastapi"} <= chosen.keys()
    check_unchanged(chosen, "colab_gpu.txt")
