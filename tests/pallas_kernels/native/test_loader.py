"""Native kernels: compiled once, shared between processes, absent without harm."""

from __future__ import annotations

import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels.native import compiler, isa, loader, sources
from tests.pallas_kernels.programs.run import run, start

PROBE = Path(__file__).with_name("probe.cc")
SYMBOLS = {"pallas_kernels_probe": "PallasKernelsProbe"}
# One ulp of float32 is 1.2e-7 of the value; exp is within two of them.
_EXP_TOLERANCE = 2.4e-7

needs_compiler = pytest.mark.skipif(not native.available(), reason=str(native.unavailable_reason()))


@needs_compiler
def test_vector_exp_and_silu_agree_with_numpy():
    assert native.load("probe", SYMBOLS, source=PROBE)
    x = np.linspace(-87, 88, 16 * 4001, dtype=np.float32)
    like_x = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    exps, silus = jax.jit(jax.ffi.ffi_call("pallas_kernels_probe", (like_x, like_x)))(x)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(exps, np.exp(wide), rtol=_EXP_TOLERANCE)
    np.testing.assert_allclose(silus, wide / (1 + np.exp(-wide)), rtol=4 * _EXP_TOLERANCE, atol=1e-37)


@needs_compiler
def test_vector_exp_of_extremes_is_zero_or_huge_and_nan_stays():
    assert native.load("probe", SYMBOLS, source=PROBE)
    x = np.tile(np.array([-np.inf, -1e30, -100, 100, 1e30, np.inf, np.nan, 0], np.float32), 2)
    like_x = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    exps, _ = jax.jit(jax.ffi.ffi_call("pallas_kernels_probe", (like_x, like_x)))(x)
    assert (np.asarray(exps)[:3] == 0).all()
    assert (np.asarray(exps)[3:6] > 2e38).all()
    assert np.isnan(exps[6])
    assert exps[7] == 1


@needs_compiler
@pytest.mark.slow
def test_several_processes_build_one_library(tmp_path: Path):
    processes = [start("load_probe", XDG_CACHE_HOME=str(tmp_path)) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in processes] == ["True"] * 3
    files = {path.suffix for path in (tmp_path / "pallas_kernels" / "native").iterdir()}
    libraries = list((tmp_path / "pallas_kernels" / "native").glob("*.so"))
    assert len(libraries) == 1
    assert files == {".so", ".sha256", ".lock"}

    built = libraries[0].stat().st_mtime_ns
    assert run("load_probe", XDG_CACHE_HOME=str(tmp_path)) == "True"
    assert libraries[0].stat().st_mtime_ns == built, "a cached library is not built again"

    # A library truncated by a full disk would end the process that opens it with a bus error.
    contents = libraries[0].read_bytes()
    libraries[0].write_bytes(contents[: len(contents) // 2])
    assert run("load_probe", XDG_CACHE_HOME=str(tmp_path)) == "True", "a broken library is built again"
    assert len(libraries[0].read_bytes()) == len(contents)
    libraries[0].write_bytes(b"not a library")
    libraries[0].with_suffix(".sha256").write_text(hashlib.sha256(b"not a library").hexdigest())
    assert run("load_probe", XDG_CACHE_HOME=str(tmp_path)) == "True", "one that does not load is built again"


@needs_compiler
@pytest.mark.slow
def test_without_a_folder_for_it_the_library_is_built_among_the_temporary_files(tmp_path: Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "temporary").mkdir()
    assert run("load_probe", XDG_CACHE_HOME=str(tmp_path / "file"), TMPDIR=str(tmp_path / "temporary")) == "True"
    assert len(list((tmp_path / "temporary").rglob("*.so"))) == 1


def test_the_library_key_changes_with_source_flags_and_cpu(monkeypatch: pytest.MonkeyPatch):
    one = compiler.Compiler(command=("c++",), flags=("-O3",), version="1")
    other = compiler.Compiler(command=("c++",), flags=("-O2",), version="1")
    assert one.key(b"a") == one.key(b"a")
    key = one.key(b"a")
    assert len({key, one.key(b"b"), other.key(b"a")}) == 3
    monkeypatch.setattr(compiler, "cpu_description", lambda: "another machine")
    assert one.key(b"a") != key


@needs_compiler
def test_a_source_that_does_not_compile_is_reported_and_not_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    broken = tmp_path / "broken.cc"
    broken.write_text("this is not C++;")
    with caplog.at_level("INFO", logger=loader.__name__):
        assert not native.load("broken", {"pallas_kernels_broken": "Broken"}, source=broken)
        assert not native.load("broken", {"pallas_kernels_broken": "Broken"}, source=broken)
    reports = [record for record in caplog.records if "not used" in record.message]
    assert len(reports) == 1, "the reason is logged once"
    assert "error" in reports[0].message


def test_the_environment_turns_native_kernels_off():
    assert run("native_availability", PALLAS_KERNELS_NATIVE="0") == "False PALLAS_KERNELS_NATIVE=0 turns native kernels off"


def test_without_a_compiler_nothing_raises_and_the_reason_names_a_remedy():
    output = run("native_availability", "no-compiler")
    assert output.startswith("False")
    assert "install g++" in output


def test_importing_the_kernels_compiles_nothing_and_starts_no_backend(tmp_path: Path):
    assert run("import_only", XDG_CACHE_HOME=str(tmp_path)) == "False"
    assert list(tmp_path.iterdir()) == []


@needs_compiler
@pytest.mark.slow
def test_prefetched_kernels_are_compiled_once_and_load_waits_for_them(tmp_path: Path):
    variables = {"XDG_CACHE_HOME": str(tmp_path), "PALLAS_KERNELS_ISA": "native"}
    assert run("prefetch", **variables) == "['norm', 'rotary'] ['norm', 'rotary'] ()"
    assert run("prefetch", **variables) == "[] [] ()", "cached libraries are not compiled again"


@needs_compiler
@pytest.mark.slow
def test_a_process_that_ends_leaves_neither_compilers_nor_incomplete_libraries(tmp_path: Path):
    assert run("prefetch", "exit", XDG_CACHE_HOME=str(tmp_path), PALLAS_KERNELS_ISA="native") == ""
    left = {path.suffix for path in (tmp_path / "pallas_kernels" / "native").iterdir()}
    assert left <= {".lock", ".so", ".sha256"}, "one that was complete before the end may stay"


def test_every_cpp_source_of_the_package_is_listed():
    package = sources.HEADERS.parent
    assert sorted(sources.SOURCES.values()) == sorted(package.rglob("*.cc"))


def test_an_instruction_set_that_does_not_exist_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PALLAS_KERNELS_ISA", "sse9")
    with pytest.raises(ValueError, match="PALLAS_KERNELS_ISA is 'sse9'"):
        isa.chosen()
