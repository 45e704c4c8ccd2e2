"""The notebooks run from top to bottom, in a kernel of their own, as they do for a reader."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

HOME = Path(__file__).parents[2] / "notebooks"
QUICK = {"a_model_family_in_an_hour"}  # the others compile a model's programs, or load SmolLM2
NOTEBOOKS = [pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.slow)
             for path in sorted(HOME.glob("*.ipynb"))]


# The client of the kernel is asynchronous inside and leaves its loop and sockets to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning",
                            "ignore::DeprecationWarning")
@pytest.mark.parametrize("path", NOTEBOOKS)
def test_a_notebook_runs_from_top_to_bottom(path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(HOME.parent), os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = nbformat.read(path, as_version=4)
    # What installs the package is for readers elsewhere; here it is the clone that is tested.
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", ())]
    NotebookClient(notebook, timeout=900, kernel_name="python3").execute()


def test_notebooks_are_kept_without_outputs_and_install_the_package_first():
    assert len(list(HOME.glob("*.ipynb"))) == len(NOTEBOOKS) == 4
    for path in HOME.glob("*.ipynb"):
        cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        assert all(not cell.outputs and cell.execution_count is None for cell in cells), f"clear the outputs of {path.name}"
        assert "%pip install" in cells[0].source
        assert "install" in cells[0].metadata.tags
