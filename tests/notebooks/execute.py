"""Runs the notebooks and keeps their outputs: `python -m tests.notebooks.execute [quick_start ...]`."""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HOME = Path(__file__).parents[2] / "notebooks"


def run(path: Path) -> None:
    """Executes a notebook in its folder and writes it back with its outputs, without metadata of the run."""
    notebook = nbformat.read(path, as_version=4)
    start, used_before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(HOME)}}, record_timing=False
    ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = kept(cell.outputs)
    notebook.metadata.language_info = {"name": "python"}  # without the version of the Python that ran it
    nbformat.write(notebook, path)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = used.ru_utime + used.ru_stime - used_before.ru_utime - used_before.ru_stime
    print(f"{path.name}: {time.monotonic() - start:.0f} s, {processor:.0f} processor seconds", flush=True)


def kept(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """The outputs without progress bars, which go to stderr, and with each text in one piece."""
    result: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if output.output_type == "stream" and result and result[-1].get("name") == output.name:
            result[-1].text += output.text
        else:
            result.append(output)
    return result


def main(names: list[str]) -> None:
    os.environ.pop("MPLBACKEND", None)  # the kernel's own makes figures outputs
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HOME.parent), os.environ.get("PYTHONPATH"))))
    for name in names or sorted(path.stem for path in HOME.glob("*.ipynb")):
        run(HOME / f"{name}.ipynb")


if __name__ == "__main__":
    main(sys.argv[1:])
