"""Prebuilt kernels are used where they fit, without a compiler, and refused where they do not, without a crash."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import sys
from pathlib import Path

import jax
import pytest

from pallas_kernels.native import compiler, isa, prebuilt, sources
from tests.pallas_kernels.programs.run import run

BEST = isa.choose(None, platform.machine(), isa.cpu_flags())
INCLUDE = Path(jax.ffi.include_dir())


def has_compiler() -> bool:
    try:
        compiler.find_compiler()
    except compiler.CompilerError:
        return False
    return True


pytestmark = pytest.mark.skipif(
    not has_compiler() or BEST is None or sys.platform != "linux", reason="cannot make a prebuilt library here"
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a wheel has it, whose library has only the kernel of norms."""
    folder = tmp_path_factory.mktemp("prebuilt")
    library = folder / f"{BEST}.so"
    compiler.find_compiler().compile(sources.SOURCES["norm"], library, include=(sources.HEADERS, INCLUDE))
    manifest = {
        "system": f"{sys.platform} {platform.machine()}",
        "ffi": prebuilt.ffi_version(INCLUDE),
        "sources": sources.digest(),
        "sha256": {BEST: hashlib.sha256(library.read_bytes()).hexdigest()},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(whole, tmp_path / "prebuilt"))


def change(folder: Path, **values: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(folder: Path) -> str:
    found = prebuilt.find(folder, INCLUDE)
    assert isinstance(found, prebuilt.Refusal)
    assert not found.expected
    return found.reason


def test_a_library_that_fits_is_found(whole: Path):
    assert prebuilt.find(whole, INCLUDE) == prebuilt.Prebuilt(path=whole / f"{BEST}.so", isa=BEST)


def test_an_installation_without_prebuilt_kernels_is_as_expected(tmp_path: Path):
    found = prebuilt.find(tmp_path, INCLUDE)
    assert isinstance(found, prebuilt.Refusal)
    assert found.expected


def test_the_environment_can_require_that_kernels_are_compiled_here(whole: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PALLAS_KERNELS_ISA", "native")
    found = prebuilt.find(whole, INCLUDE)
    assert isinstance(found, prebuilt.Refusal)
    assert found.expected


def test_a_truncated_library_is_refused(folder: Path):
    library = folder / f"{BEST}.so"
    library.write_bytes(library.read_bytes()[:1000])
    assert "is damaged; reinstall the package" in refusal(folder)


def test_a_missing_library_is_refused(folder: Path):
    (folder / f"{BEST}.so").unlink()
    assert "cannot be used" in refusal(folder)


def test_a_damaged_manifest_is_refused(folder: Path):
    (folder / "manifest.json").write_text("{")
    assert "manifest.json cannot be used" in refusal(folder)


def test_libraries_of_another_system_are_refused(folder: Path):
    change(folder, system="linux riscv64")
    assert "are for linux riscv64, but this is" in refusal(folder)


def test_libraries_of_other_sources_are_refused(folder: Path):
    change(folder, sources="of another version")
    assert "sources of the kernels have changed" in refusal(folder)


@pytest.mark.parametrize("newer", [(0, 1), (1, -1000)], ids=["minor", "major"])
def test_libraries_that_need_another_interface_of_xla_are_refused(folder: Path, newer: tuple[int, int]):
    major, minor = prebuilt.ffi_version(INCLUDE)
    change(folder, ffi=[major + newer[0], max(0, minor + newer[1])])
    assert "require XLA FFI" in refusal(folder)


def test_a_library_made_for_an_older_interface_of_xla_is_used(folder: Path):
    change(folder, ffi=[prebuilt.ffi_version(INCLUDE)[0], 0])
    assert isinstance(prebuilt.find(folder, INCLUDE), prebuilt.Prebuilt)


def test_without_a_compiler_prebuilt_kernels_are_used_and_nothing_is_written(whole: Path, tmp_path: Path):
    before = sorted(path.stat().st_mtime_ns for path in whole.iterdir())
    assert run("norm_origin", str(whole), "no-compiler", XDG_CACHE_HOME=str(tmp_path), PATH="") == f"prebuilt for {BEST}"
    assert sorted(path.stat().st_mtime_ns for path in whole.iterdir()) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_library_that_cannot_be_opened_is_replaced_by_a_compiled_one_with_a_warning(folder: Path, tmp_path: Path):
    (folder / f"{BEST}.so").write_bytes(b"not a library")
    change(folder, sha256={BEST: hashlib.sha256(b"not a library").hexdigest()})
    warning, origin = run("norm_origin", str(folder), XDG_CACHE_HOME=str(tmp_path)).splitlines()
    assert "cannot be opened" in warning
    assert warning.endswith("kernels are compiled on this machine if there is a C++ compiler")
    assert origin.startswith("compiled by")


@pytest.mark.slow
def test_without_a_fitting_library_and_a_compiler_xla_is_used(folder: Path):
    change(folder, ffi=[99, 0])
    warning, origin = run("norm_origin", str(folder), "no-compiler").splitlines()
    assert "require XLA FFI 99.0" in warning
    assert origin.startswith("none: no C++ compiler works")


@pytest.mark.slow
def test_a_kernel_that_xla_refuses_is_replaced_by_a_compiled_one_with_a_warning(folder: Path):
    library = folder / f"{BEST}.so"
    compiler.find_compiler().compile(Path(__file__).with_name("refused.cc"), library, include=(INCLUDE,))
    change(folder, sha256={BEST: hashlib.sha256(library.read_bytes()).hexdigest()})
    printed = run("norm_origin", str(folder)).splitlines()
    assert printed[0].startswith("XLA refuses the prebuilt kernel 'norm', which is compiled instead:")
    assert "not used" not in "".join(printed)
