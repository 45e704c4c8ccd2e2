"""The notebooks run from top to bottom as they stand, in a kernel of their own, as they do for a reader."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HOME = Path(__file__).parents[2] / "notebooks"
QUICK = HOME / "a_model_family_in_an_hour.ipynb"  # the others compile a model's programs, or load SmolLM2
NOTEBOOKS = sorted(HOME.glob("*.ipynb"))
# The client of the kernel is asynchronous inside and leaves its loop and sockets to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::DeprecationWarning"
)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def execute(path: Path, folder: Path, *, kernel: str = "python3", cells: int | None = None) -> None:
    """Runs a notebook, or its first code cells, as if it lay in `folder`."""
    notebook = nbformat.read(path, as_version=4)
    if cells is not None:
        notebook.cells = code_cells(path)[:cells]
    NotebookClient(notebook, timeout=900, kernel_name=kernel, resources={"metadata": {"path": str(folder)}}).execute()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom_in_a_clone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(HOME.parent), os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("MPLBACKEND", "agg")
    execute(path, HOME)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernel of an environment that has what the package needs, but not the package; pip works there offline."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    # A folder that is named in a .pth is searched, but what it names in its own is not: an editable install is not seen.
    (packages / "parent.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    kernel = tmp_path / "jupyter" / "kernels" / "fresh"
    kernel.mkdir(parents=True)
    argv = [str(environment / "bin" / "python"), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "fresh", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("MPLBACKEND", "agg")
    for option in ("NO_DEPS", "NO_INDEX", "DISABLE_PIP_VERSION_CHECK"):
        monkeypatch.setenv(f"PIP_{option}", "1")
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # pip reads it the other way round: there is no isolation
    return "fresh"


def clone(target: Path) -> Path:
    """What git would clone, as far as it is installed."""
    for name in ("fastgen_jax", "pallas_kernels", "notebooks"):
        shutil.copytree(HOME.parent / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(HOME.parent / name, target / name)
    return target


@pytest.mark.parametrize(("place", "cells"), [("notebooks", None), ("..", 2)])
def test_where_nothing_is_installed_a_notebook_installs_the_clone_that_it_lies_in_or_beside(
    place: str, cells: int | None, fresh: str, tmp_path: Path
) -> None:
    repository = clone(tmp_path / "content" / "fastgen_jax")  # beside it, a folder of the package's name
    execute(QUICK, repository / place, kernel=fresh, cells=cells)


def test_where_nothing_is_installed_a_notebook_takes_the_wheel_beside_it(fresh: str, tmp_path: Path) -> None:
    repository, folder = clone(tmp_path / "clone"), tmp_path / "a folder of its own"
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", folder, repository]
    subprocess.run(command, check=True)
    execute(QUICK, folder, kernel=fresh, cells=2)


def test_where_there_is_nothing_to_install_the_first_cell_says_what_to_do(fresh: str, tmp_path: Path) -> None:
    with pytest.raises(CellExecutionError, match="put its wheel there, or clone its repository there with git"):
        execute(HOME / "quick_start.ipynb", tmp_path, kernel=fresh, cells=1)


def test_notebooks_are_kept_without_outputs_and_install_the_package_first() -> None:
    assert len(NOTEBOOKS) == 4
    for path in NOTEBOOKS:
        cells = code_cells(path)
        assert all(not cell.outputs and cell.execution_count is None for cell in cells), f"clear the outputs of {path.name}"
        assert cells[0].source == code_cells(NOTEBOOKS[0])[0].source  # which is tested in a fresh environment
        assert "%pip install" in cells[0].source
        assert "install" in cells[0].metadata.tags
