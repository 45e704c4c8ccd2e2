"""`fastgen doctor` on machines where something is wrong: it finds it, names the remedy, and neither crashes nor hangs."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import pytest

from fastgen_jax.cli import doctor
from fastgen_jax.cli.doctor import folders, jax_process, packages, system
from fastgen_jax.cli.doctor.finding import Finding, Problem

PROGRAMS = Path(__file__).parent / "programs"
SECONDS = 240  # for the command, most of it spent on importing JAX on a busy machine
ONE_CPU = {"backend": "cpu", "devices": [{"kind": "cpu", "platform": "cpu", "memory_bytes": None, "works": True}]}


def diagnose(*flags: str, **variables: str | None) -> tuple[int, dict, str]:
    """Exit code, report and errors of the command in an environment with these changes; None removes a variable."""
    environment = {name: text for name, text in {**os.environ, **variables}.items() if text is not None}
    command = [sys.executable, "-m", "fastgen_jax.cli", "doctor", "--json", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS)
    assert "Traceback" not in done.stderr
    report = json.loads(done.stdout)
    assert done.returncode == (1 if report["problems"] else 0)
    assert all(problem["remedy"] for problem in report["problems"])
    return done.returncode, report, done.stderr


def matching(report: dict, words: str) -> list[dict[str, str]]:
    return [problem for problem in report["problems"] if words in problem["problem"]]


def test_the_report_has_versions_devices_kernels_caches_and_extras() -> None:
    _, report, _ = diagnose()
    assert {"fastgen_jax", "python", "jax", "jaxlib", "numpy", "tokenizers"} <= report["versions"].keys()
    assert report["machine"]["cores"] >= 1
    assert report["devices"]["backend"] == "cpu"
    assert report["devices"]["free_host_bytes"] > 0
    assert "unavailable" in report["cpu_kernels"]
    assert {"compiled programs", "C++ kernels", "downloaded models", "Hugging Face hub"} <= report["caches"].keys()
    assert report["extras"]["serve"] == []
    assert report["environment"]["JAX_PLATFORMS"] == "cpu"


@pytest.mark.slow
def test_folders_that_cannot_be_written_are_named_with_the_variable_that_moves_them(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, report, _ = diagnose(
        HOME=str(tmp_path / "file"),
        XDG_CACHE_HOME=str(tmp_path / "file"),
        XDG_STATE_HOME=None,
        HF_HOME=None,
        FASTGEN_CACHE_DIR=None,
    )
    assert code == 1
    for what, variable in (
        ("compiled programs", "FASTGEN_CACHE_DIR"),
        ("C++ kernels", "XDG_CACHE_HOME"),
        ("Hugging Face hub", "HF_HOME"),
        ("deployments", "XDG_STATE_HOME"),
    ):
        (problem,) = matching(report, f"for {what} cannot be written ({tmp_path / 'file'} is not a folder")
        assert f"set {variable} to" in problem["remedy"]


@pytest.mark.slow
def test_a_machine_without_a_compiler_gets_the_command_that_installs_one(tmp_path: Path) -> None:
    if importlib.util.find_spec("ziglang") is not None:
        pytest.skip("ziglang is installed, which is a compiler")
    _, report, _ = diagnose(PATH=str(tmp_path), CXX=None, PALLAS_KERNELS_NATIVE=None)
    (problem,) = matching(report, "the C++ kernels for the CPU cannot be built")
    assert "pip install 'fastgen_jax[native]'" in problem["remedy"]
    assert report["cpu_kernels"]["compilers"] == {}


@pytest.mark.slow
def test_kernels_that_were_turned_off_are_shown_and_are_not_a_problem() -> None:
    _, report, _ = diagnose(PALLAS_KERNELS_NATIVE="0")
    assert report["cpu_kernels"]["unavailable"] == "PALLAS_KERNELS_NATIVE=0 turns native kernels off"
    assert matching(report, "kernels") == []


def test_a_jax_that_cannot_be_imported_is_a_problem_like_any_other() -> None:
    path = os.pathsep.join([str(PROGRAMS / "broken_jax"), str(Path(__file__).parents[2])])
    code, report, _ = diagnose(PYTHONPATH=path)
    assert code == 1
    (problem,) = matching(report, "JAX does not start")
    assert "libmissing.so.9: cannot open shared object file" in problem["problem"]
    assert report["caches"]


def test_a_jax_that_hangs_is_stopped() -> None:
    code, report, _ = diagnose("--timeout", "0.01")
    assert code == 1
    (problem,) = matching(report, "JAX does not start: JAX did not answer within 0.01 s")
    assert "end other processes that use the accelerator" in problem["remedy"]


@pytest.mark.slow
def test_a_gpu_without_a_plugin_gets_the_extra_for_its_driver() -> None:
    path = os.pathsep.join([str(PROGRAMS / "gpu"), os.environ["PATH"]])
    _, report, _ = diagnose(PATH=path, JAX_PLATFORMS=None)
    if any(name.startswith("jax-cuda") for name in report["versions"]):
        pytest.skip("a CUDA plugin of JAX is installed")
    (problem,) = matching(report, "this machine has a GPU (Tesla T4, 550.54.15, 15360 MiB), but JAX does not use it")
    assert problem["remedy"].startswith("pip install 'fastgen_jax[cuda12]'")


def test_a_gpu_that_a_variable_hides_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.pathsep.join([str(PROGRAMS / "gpu"), os.environ["PATH"]]))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    (problem,) = jax_process._device_problems(ONE_CPU, "")
    assert problem == Problem("this machine has a GPU, but JAX_PLATFORMS=cpu hides it", "unset JAX_PLATFORMS")


@pytest.mark.parametrize(
    ("gpu", "plugins", "remedy"),
    [
        ("H100, 580.65.06, 81559 MiB", (), "pip install 'fastgen_jax[cuda13]'"),
        ("T4, 525.60.13, 15360 MiB", (), "pip install 'fastgen_jax[cuda12]'"),
        ("K80, 470.82.01, 11441 MiB", (), "update the NVIDIA driver (470.82.01): JAX needs 525 or newer"),
        ("T4, 525.60.13, 15360 MiB", ("jax-cuda13-plugin",), "pip install 'fastgen_jax[cuda12]'"),
        ("H100, 580.65.06, 81559 MiB", ("jax-cuda12-plugin",), "the plugin is installed (jax-cuda12-plugin)"),
    ],
)
def test_the_remedy_for_a_gpu_fits_its_driver(
    gpu: str, plugins: tuple[str, ...], remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "installed", lambda: dict.fromkeys(plugins, "0.7.2"))
    assert jax_process._gpu_remedy([gpu]).startswith(remedy)


@pytest.fixture
def tpu_host(tmp_path: Path) -> Path:
    """The files of a machine with a TPU v5e, a network card of the same vendor, and a process that holds the TPU."""
    for number, (vendor, device) in enumerate((("0x1ae0", "0x0063"), ("0x1ae0", "0x0042"))):
        folder = tmp_path / f"sys/bus/pci/devices/0000:00:0{number}.0"
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(f"{vendor}\n")
        (folder / "device").write_text(f"{device}\n")
    for pid, target in ((4321, "/dev/vfio/0"), (4322, "/dev/null")):
        (tmp_path / f"proc/{pid}/fd").mkdir(parents=True)
        (tmp_path / f"proc/{pid}/fd/7").symlink_to(target)
        (tmp_path / f"proc/{pid}/comm").write_text("trainer\n")
    return tmp_path


def test_a_tpu_in_use_names_the_process_that_holds_it(tpu_host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert system.tpus(tpu_host) == ["TPU v5e"]
    assert system.tpu_users(tpu_host) == [(4321, "trainer")]
    monkeypatch.setattr(system, "tpus", lambda: ["TPU v5e"])
    monkeypatch.setattr(system, "tpu_users", lambda: [(4321, "trainer")])
    monkeypatch.delenv("JAX_PLATFORMS")
    (problem,) = jax_process._device_problems(ONE_CPU, "")
    assert problem.what == "the TPU is in use by process 4321 (trainer)"
    assert problem.remedy.startswith("end it: kill 4321")
    monkeypatch.setattr(system, "tpu_users", list)
    (problem,) = jax_process._device_problems({"error": "RuntimeError: TPU already in use by process with pid 77"}, "")
    assert problem.remedy == "end the process 77, which uses the TPU"


def test_a_container_that_sees_more_cores_than_it_may_use_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "usable_cores", lambda: 64)
    (tmp_path / "sys/fs/cgroup/cpu").mkdir(parents=True)
    assert system.cpu_quota(tmp_path) is None
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("150000 100000\n")
    (problem,) = [problem for problem in system.machine(tmp_path).problems if "cores" in problem.what]
    assert "64 cores but may use the time of only 1.5" in problem.what
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("max 100000\n")
    assert system.cpu_quota(tmp_path) is None
    (tmp_path / "sys/fs/cgroup/cpu.max").unlink()
    (tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_quota_us").write_text("200000\n")  # version 1
    (tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_period_us").write_text("100000\n")
    assert system.cpu_quota(tmp_path) == 2


def test_a_full_disk_and_one_that_is_almost_full_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 2**20))
    assert any("its disk is full: 1.0 MiB are free" in problem.what for problem in folders.caches().problems)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 2**28))
    assert any("has 256.0 MiB left, too little for most models" in problem.what for problem in folders.caches().problems)


def test_libraries_on_a_disk_without_execution_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    usage, mount = namedtuple("usage", "total used free"), namedtuple("mount", "f_flag")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, 2**40))
    monkeypatch.setattr(os, "statvfs", lambda path: mount(os.ST_NOEXEC))
    assert any("is mounted noexec, so the C++ kernels" in problem.what for problem in folders.caches().problems)


def test_little_free_memory_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = namedtuple("memory", "total available")
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory(2**32, 2**28))
    assert any("only 256.0 MiB of memory are free" in problem.what for problem in system.machine().problems)


def test_packages_that_are_missing_or_too_old_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {**packages.installed(), "numpy": "1.26.4"}
    del found["tqdm"], found["uvicorn"]
    monkeypatch.setattr(packages, "installed", lambda: found)
    problems = {problem.what: problem.remedy for problem in packages.versions().problems}
    assert any(what.startswith("numpy 1.26.4 is installed, but fastgen_jax requires numpy>=") for what in problems)
    assert any(what.startswith("tqdm is not installed, but") for what in problems)
    assert packages.extras().facts["serve"] == ["uvicorn"]
    assert ("jax-cuda13-plugin" in packages.extras().facts["cuda"]) != ("jax-cuda13-plugin" in found)


def test_parts_of_jax_that_do_not_fit_are_reported_with_the_remedy_and_as_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(system, "gpus", lambda: ["Tesla T4, 550.54.15, 15360 MiB"])
    monkeypatch.delenv("JAX_PLATFORMS")
    text = "jax-cuda12-plugin 0.7.2 does not fit jax 0.12.0: pip install 'jax[cuda12]==0.12.0'"
    (problem,) = jax_process._device_problems({**ONE_CPU, "package_problems": [text]}, "")
    assert problem == Problem("jax-cuda12-plugin 0.7.2 does not fit jax 0.12.0", "pip install 'jax[cuda12]==0.12.0'")


def test_keys_and_tokens_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "sesame")
    monkeypatch.setenv("FASTGEN_SERVER_KEYS", "sesame")
    monkeypatch.setenv("HF_HOME", "/models")
    facts = system.variables().facts
    assert facts["HF_HOME"] == "/models"
    assert "sesame" not in str(facts)
    assert facts["HF_TOKEN"] == facts["FASTGEN_SERVER_KEYS"] == "(set, not shown)"


def test_a_check_that_fails_or_hangs_is_a_problem_and_the_others_are_reported() -> None:
    never = threading.Event()

    def fails() -> Finding:
        raise RuntimeError("broken")

    def hangs() -> Finding:
        never.wait()
        return Finding()

    checks = {"good": lambda: Finding(lines=[("a", "b")]), "bad": fails, "slow": hangs}
    findings = doctor.examine(checks, timeout=0.1)
    never.set()
    assert [len(finding.problems) for finding in findings.values()] == [0, 1, 1]
    text = "\n".join(doctor.as_text(findings, [*findings["bad"].problems, *findings["slow"].problems]))
    assert "a  b" in text
    assert "the check of bad failed (RuntimeError: broken)" in text
    assert "the check of slow did not finish within 0.1 s" in text
    assert "    remedy: " in text


def test_the_report_for_the_terminal_ends_with_the_result() -> None:
    assert doctor.as_text({"a": Finding(lines=[("x", "y")])}, []) == ["a", "  x  y", "", "no problems found"]
