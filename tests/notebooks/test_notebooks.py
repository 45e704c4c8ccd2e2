"""The notebooks run from top to bottom in their own kernel, as they do for a reader.

Three run in the fast suite: the one that needs no model as it is, the others with a tiny checkpoint in place of the
built-in models. With the real models they take minutes of CPU time, so that is a slow test, and so are the other two, of
which one trains.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tests.checkpoint.tiny_files import write_hf
from tests.serving.checkpoint import write_checkpoint

HOME = Path(__file__).parents[2] / "notebooks"
WITHOUT_MODEL = HOME / "a_model_family_in_an_hour.ipynb"
SLOW = (HOME / "rollouts.ipynb", HOME / "how_splitfuse_fills_steps.ipynb")
NOTEBOOKS = sorted(HOME.glob("*.ipynb"))
EXECUTE = "tests.notebooks.execute"  # writes the outputs
OWNER = re.compile(r"(?:github\.com|colab\.research\.google\.com/github)/([\w-]+)/fastgen_jax")
ADDRESS = "https://github.com/REPOSITORY_OWNER/fastgen_jax"
# The kernel's client is asynchronous internally and leaves its event loop and sockets to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::DeprecationWarning"
)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def execute(
    path: Path,
    folder: Path,
    *,
    kernel: str = "python3",
    num_cells: int | None = None,
    first: Path | None = None,
    changes: Mapping[str, str] | None = None,
) -> None:
    """Runs a notebook, or its first code cells, as if it were in `folder`; a program in `first` runs before them.

    `changes` are new texts for old ones in the first code cell.
    """
    notebook = nbformat.read(path, as_version=4)
    if num_cells is not None:
        notebook.cells = code_cells(path)[:num_cells]
    install = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for old, new in (changes or {}).items():
        assert old in install.source
        install.source = install.source.replace(old, new)
    if first is not None:
        notebook.cells.insert(0, nbformat.v4.new_code_cell(first.read_text()))
    NotebookClient(notebook, timeout=900, kernel_name=kernel, resources={"metadata": {"path": str(folder)}}).execute()


@pytest.fixture
def in_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels import the package from this clone."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(HOME.parent), os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("PIP_NO_INDEX", "1")


@pytest.mark.slow
@pytest.mark.usefixtures("in_clone")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom_in_a_clone(path: Path) -> None:
    execute(path, HOME)


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer that can chat, with one token per character."""
    path = write_checkpoint(tmp_path_factory.mktemp("notebooks") / "tiny")
    write_hf(path, num_hidden_layers=1, vocab_size=128, max_position_embeddings=1024)
    return path


@pytest.mark.usefixtures("in_clone")
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.slow] if path in SLOW else [], id=path.stem)
        for path in NOTEBOOKS
        if path != WITHOUT_MODEL
    ],
)
def test_a_notebook_runs_from_top_to_bottom_with_a_tiny_model(
    path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINY_CHECKPOINT", str(tiny_checkpoint))
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # most of the time is compilation
    execute(path, HOME, first=Path(__file__).parent / "programs" / "tiny_models.py")


def kernel_beside(python: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A kernel in an environment of its own that has the packages of the one of `python`, but not fastgen_jax."""
    environment = folder / "environment"
    subprocess.run([python, "-m", "venv", "--without-pip", environment], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    command = [python, "-c", "import site; print(*site.getsitepackages(), sep='\\n')"]
    # Folders in a .pth file are searched, but their own .pth files are not read, so an editable install is not found.
    (packages / "parent.pth").write_text(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    kernel = folder / "jupyter" / "kernels" / "fresh"
    kernel.mkdir(parents=True)
    argv = [str(environment / "bin" / "python"), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "fresh", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("MPLBACKEND", "agg")
    return "fresh"


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A kernel in an environment that has the dependencies of the package but not the package; pip works offline there."""
    for option in ("NO_DEPS", "NO_INDEX", "DISABLE_PIP_VERSION_CHECK"):
        monkeypatch.setenv(f"PIP_{option}", "1")
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # pip inverts this variable: 0 disables isolation
    return kernel_beside(Path(sys.executable), tmp_path, monkeypatch)


def clone(target: Path) -> Path:
    """A copy of the parts of the repository that are installed."""
    for name in ("fastgen_jax", "pallas_kernels", "notebooks"):
        shutil.copytree(HOME.parent / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(HOME.parent / name, target / name)
    return target


@pytest.mark.slow
@pytest.mark.parametrize(("place", "num_cells"), [("notebooks", None), ("..", 2)])
def test_without_the_package_a_notebook_installs_the_clone_around_it_or_next_to_it(
    place: str, num_cells: int | None, fresh: str, tmp_path: Path
) -> None:
    repository = clone(tmp_path / "content" / "fastgen_jax")  # next to this clone, its name is that of the package
    execute(WITHOUT_MODEL, repository / place, kernel=fresh, num_cells=num_cells)


@pytest.mark.slow
def test_without_the_package_a_notebook_installs_the_wheel_next_to_it(fresh: str, tmp_path: Path) -> None:
    repository, folder = clone(tmp_path / "clone"), tmp_path / "a folder without a clone"
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", folder, repository]
    subprocess.run(command, check=True)
    execute(WITHOUT_MODEL, folder, kernel=fresh, num_cells=2)


@pytest.mark.slow
def test_without_the_package_a_notebook_clones_its_repository(fresh: str, tmp_path: Path) -> None:
    repository, folder = clone(tmp_path / "repository"), tmp_path / "content"
    folder.mkdir()
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@example.com"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "all"]):
        subprocess.run([*git, *command], check=True)
    execute(WITHOUT_MODEL, folder, kernel=fresh, num_cells=2, changes={ADDRESS: repository.as_uri()})
    assert (folder / "fastgen_jax" / "pyproject.toml").exists()


def test_without_anything_to_install_the_first_cell_explains_what_to_do(fresh: str, tmp_path: Path) -> None:
    nowhere = (tmp_path / "nowhere").as_uri()
    with pytest.raises(CellExecutionError, match="nowhere: put its wheel or a clone there"):
        execute(HOME / "quick_start.ipynb", tmp_path, kernel=fresh, num_cells=1, changes={ADDRESS: nowhere})


def test_notebooks_install_the_package_first_and_have_a_badge() -> None:
    assert len(NOTEBOOKS) == 5
    for path in NOTEBOOKS:
        cells = code_cells(path)
        assert cells[0].source == code_cells(NOTEBOOKS[0])[0].source  # tested in a fresh environment
        assert "%pip install" in cells[0].source
        assert "install" in cells[0].metadata.tags
        badge = f"https://colab.research.google.com/github/REPOSITORY_OWNER/fastgen_jax/blob/main/notebooks/{path.name}"
        assert f"({badge})" in nbformat.read(path, as_version=4).cells[0].source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_with_the_outputs_of_one_run_and_a_plot(path: Path) -> None:
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), f"run python -m {EXECUTE}"
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)
    assert path.stat().st_size < 200_000


def test_the_address_of_the_repository_is_the_same_everywhere() -> None:
    files = [
        *NOTEBOOKS,
        *(HOME.parent / "docs").glob("*.md"),
        *(HOME.parent / name for name in ("README.md", "pyproject.toml")),
    ]
    owners = {owner for file in files for owner in OWNER.findall(file.read_text())}
    assert owners == {"REPOSITORY_OWNER"}, "replace REPOSITORY_OWNER in all of them"
