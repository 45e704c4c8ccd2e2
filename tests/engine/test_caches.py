"""Second starts: with a different amount of free memory, without a writable folder, on a full disk, with truncated files.

The second start compiles nothing, and no problem with a folder ends a run.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from fastgen_jax import Engine, EngineConfig
from fastgen_jax.engine import ladder, memory, startup
from fastgen_jax.engine.runner import Runner
from pallas_kernels import folders
from tests.tiny import drain, greedy, tiny_model, tokens_of

REPOSITORY = Path(__file__).parents[2]
ONE_PROGRAM = {"token_budget": 8, "budget_ladder": (), "max_num_seqs": 4, "block_size": 4, "num_blocks": 16}
THREE_PROGRAMS = {"max_num_seqs": 4, "block_size": 4, "num_blocks": 4}  # of 1, 4 and 16 tokens: larger ones do not fit
HITS, MISSES = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"

_events: Counter[str] = Counter()
jax.monitoring.register_event_listener(lambda event, **kwargs: _events.update([event]))


@pytest.fixture
def fresh(tmp_path, monkeypatch, fast_compilation):
    """JAX without a persistent cache, and a temporary folder for this test."""
    options = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_enable_xla_caches",
    )
    before = {name: getattr(jax.config, name) for name in options}
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    new_process()
    yield tmp_path
    jax_cache.reset_cache()
    for name, value in before.items():
        jax.config.update(name, value)


def new_process() -> None:
    """The state of a new process: no folder chosen, nothing read, nothing counted."""
    jax_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", None)
    folders.settle.cache_clear()
    _events.clear()


def start(folder: Path | str | None, **options) -> Engine:
    params, model = tiny_model()
    return Engine(
        params,
        model,
        EngineConfig(**{**ONE_PROGRAM, "compile_cache_dir": None if folder is None else str(folder), **options}),
    )


def answer(engine: Engine) -> list[int]:
    request_id = engine.add([5, 6, 7], greedy(4))
    return tokens_of(drain(engine)[request_id])


@pytest.mark.parametrize(
    ("backend", "version", "kept"),
    [
        ("gpu", (0, 12), "xla_gpu_per_fusion_autotune_cache_dir"),
        ("gpu", (0, 11, 2), "none"),
        ("cpu", (0, 12), "none"),
    ],
)
def test_what_xla_measured_on_a_gpu_is_kept_beside_the_programs(fresh, monkeypatch, backend, version, kept) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "__version_info__", version)
    startup.compile_cache.use(str(fresh / "cache"), "any")
    assert getattr(jax.config, "jax_persistent_cache_enable_xla_caches") == kept  # noqa: B009 (defined at run time)


def entries(folder: Path, name: str = "") -> dict[str, int]:
    """Sizes of the compiled programs in a folder, by file name."""
    return {path.name: path.stat().st_size for path in folder.rglob(f"{name}*-cache")}


def forget_executables(folder: Path) -> None:
    """Makes the next start trace its programs and look for them in JAX's cache."""
    shutil.rmtree(folder / "executables")


def run(program: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a program of tests/engine/programs in a new process, with warnings as errors."""
    variables = {name: value for name, value in os.environ.items() if name != "FASTGEN_CACHE_DIR"}
    variables |= {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    variables |= environment
    command = [sys.executable, "-W", "error", "-m", f"tests.engine.programs.{program}", *map(str, arguments)]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"token_budget": 16, "budget_ladder": []}, id="one program", marks=pytest.mark.slow),
        pytest.param({}, id="all defaults", marks=pytest.mark.slow),
    ],
)
def test_a_second_start_with_less_free_memory_compiles_nothing(tmp_path, options) -> None:
    share = 200e6 / memory.available()
    runs = []
    for factor, megabytes in ((1.0, 0), (0.8, 200)):
        done = run("second_start", factor * share, megabytes, json.dumps(options), FASTGEN_CACHE_DIR=str(tmp_path))
        assert done.returncode == 0, done.stderr
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    first, second = runs
    assert second["available"] < 0.9 * first["available"]
    assert 0 < first["num_blocks"] < 1024, "memory must be the limit, not the need of 64 sequences"
    assert first["hits"] == 0
    assert first["misses"] > 3
    assert second["misses"] == 0
    assert second["hits"] > 3
    for same in ("num_blocks", "ladder", "text"):
        assert first[same] == second[same]


def test_the_number_of_blocks_is_kept_for_the_same_options_while_it_fits(fresh, monkeypatch) -> None:
    def blocks(free: int, folder: Path | str = fresh / "cache", **options) -> int:
        monkeypatch.setattr(memory, "available", lambda: free)
        config = EngineConfig(**{"compile_cache_dir": str(folder), "block_size": 4, "max_num_seqs": 4, **options})
        settled = startup.compile_cache.use(config.compile_cache_dir, "group")
        return startup._resolve_as_before(config, tiny_model()[1], settled).num_blocks

    enough = blocks(10**9, max_num_seqs=64)
    a_block = tiny_model()[1].kv_bytes_per_token(4, stored_head_dim=tiny_model()[1].head_dim) * 4
    free = 4 * 20 * a_block  # a quarter: 20 blocks
    assert blocks(free) == 20
    assert blocks(int(0.7 * free)) == blocks(int(1.5 * free)) == 20
    assert blocks(int(0.7 * free), kv_dtype="bfloat16") == 28
    assert blocks(int(0.7 * free), folder="") == 14, "nothing is saved"
    assert blocks(int(0.3 * free)) == 6
    assert blocks(int(0.4 * free)) == 6
    assert blocks(10**9, max_num_seqs=64) == enough


@pytest.mark.slow
def test_a_damaged_program_is_compiled_again_once(fresh, caplog) -> None:
    folder = fresh / "cache"
    expected = answer(start(folder))
    whole = entries(folder, "jit_step")
    assert whole
    for name, size in whole.items():
        os.truncate(folder / "xla" / name, size // 2)
    forget_executables(folder)
    new_process()
    with caplog.at_level(logging.WARNING):
        assert answer(start(folder)) == expected
    assert "Error reading persistent compilation cache entry for 'jit_step_" in caplog.text
    assert "the run continues" in caplog.text
    assert entries(folder, "jit_step").keys() == whole.keys()
    assert min(entries(folder, "jit_step").values()) > 0.9 * min(whole.values())
    forget_executables(folder)
    new_process()
    caplog.clear()
    assert answer(start(folder)) == expected
    assert _events[MISSES] == 0
    assert _events[HITS] > 0
    assert "Error" not in caplog.text


def test_a_full_disk_causes_a_warning_and_leaves_no_truncated_programs(fresh, caplog) -> None:
    folder = fresh / "cache"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))  # a longer write fails, as on a full disk
    try:
        engine = start(folder)
        expected = answer(engine)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Error writing persistent compilation cache entry" in caplog.text
    assert caplog.text.count("Error writing") == 1, "after the first failure there is no further attempt"
    assert not entries(folder, "jit_step")
    new_process()
    assert answer(start(folder)) == expected
    assert entries(folder, "jit_step")


@pytest.mark.slow
def test_a_disk_that_is_full_in_the_background_causes_the_same_warning(fresh, caplog) -> None:
    folder = fresh / "cache"
    expected = answer(start(folder))
    before = entries(folder)
    new_process()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        engine = start(folder, budget_ladder=(4,), background_compile=True)  # that of 8 tokens is in the cache
        engine.wait_until_compiled()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert engine.runner.budgets == (4, 8)
    assert caplog.text.count("Error writing") == 1
    assert entries(folder) == before
    assert answer(engine) == expected


@pytest.mark.slow
def test_a_file_in_place_of_the_folder_causes_a_warning(fresh, caplog) -> None:
    (fresh / "file").write_text("")
    expected = answer(start(fresh / "file" / "cache", num_blocks=None))
    assert "is used instead" in caplog.text
    assert entries(fresh / "temporary")
    new_process()
    assert answer(start(fresh / "file" / "cache", num_blocks=None)) == expected
    assert _events[MISSES] == 0


def test_if_no_folder_can_be_written_nothing_is_kept(fresh, monkeypatch, caplog) -> None:
    (fresh / "file").write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(fresh / "file"))
    assert answer(start(fresh / "file" / "cache", num_blocks=None))
    assert "nothing is kept after this run" in caplog.text
    assert jax.config.jax_compilation_cache_dir is None


@pytest.fixture
def read_only():
    """Makes folders read-only for all users by a mount; skips if that is not permitted."""
    mounted: list[Path] = []

    def mount(folder: Path) -> None:
        commands = (["mount", "--bind", folder, folder], ["mount", "-o", "remount,ro,bind", folder])
        for number, command in enumerate(commands):
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"mount is not permitted here: {done.stderr.strip()}")
            if number == 0:
                mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_read_only_folder_is_read_and_missing_programs_are_compiled(fresh, read_only, caplog) -> None:
    folder = fresh / "cache"
    expected = answer(start(folder, num_blocks=None))
    forget_executables(folder)
    before = sorted(folder.rglob("*"))
    read_only(folder)
    new_process()
    assert answer(start(folder, num_blocks=None)) == expected
    assert _events[HITS] > 0
    assert _events[MISSES] == 0
    assert caplog.text.count("its files are used, and nothing is added") == 1
    assert answer(start(folder, token_budget=9)) == expected
    assert "Error writing" not in caplog.text
    assert sorted(folder.rglob("*")) == before


@pytest.mark.slow
def test_step_sizes_are_measured_on_request_and_later_starts_use_the_result(fresh, monkeypatch, caplog) -> None:
    measured: list[int] = []
    measure = Runner.measure
    monkeypatch.setattr(
        Runner,
        "measure",
        lambda runner, budget, **options: (
            measured.append(budget),
            measure(runner, budget, **{"repeats": 1, "at_least": 0.0, **options}),
        )[1],
    )
    folder = fresh / "cache"

    def ladder_of(**options) -> tuple[int, ...]:
        measured.clear()
        with caplog.at_level(logging.INFO):
            return start(
                folder, **{**THREE_PROGRAMS, "token_budget": None, "budget_ladder": None, **options}
            ).config.budget_ladder

    modeled = ladder_of()
    assert not measured
    assert not ladder.known(str(folder))
    chosen = ladder_of(remeasure=True)
    assert set(measured) == {1, 4, 16}
    (known,) = ladder.known(str(folder))
    assert known.ladder == chosen
    assert set(known.seconds) == {1, 4, 16}
    path = folder / ladder.FILE
    saved = json.loads(path.read_text())

    def saved_as(*sizes: int) -> None:
        path.write_text(json.dumps({key: {**entry, "ladder": sizes} for key, entry in saved.items()}))

    for sizes in ((16,), (1, 16)):  # at least one differs from what the model chooses
        saved_as(*sizes)
        assert ladder_of() == sizes
    assert "remeasure=True measures again" in caplog.text
    saved_as(3, 16)
    assert ladder_of() == modeled, "3 tokens are not a candidate"
    path.write_text("{")
    assert ladder_of() == modeled
    assert not measured


def test_remeasuring_a_given_budget_is_refused() -> None:
    with pytest.raises(ValueError, match=r"remeasure with token_budget=8: .* omit one of them"):
        EngineConfig(token_budget=8, remeasure=True)


@pytest.mark.slow
def test_a_disk_of_64_kib_causes_a_warning_in_a_real_run(tmp_path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mount is not permitted here: {done.stderr.strip()}")
    try:
        done = run("short_answer", XDG_CACHE_HOME=str(disk), XDG_STATE_HOME=str(disk), TMPDIR=str(disk), HOME=str(disk))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert done.returncode == 0, done.stderr
    assert "its disk is full" in done.stderr
    assert done.stdout.strip()


def own_memory_group() -> Path | None:
    """The folder of this process's memory control group, if groups can be created in it."""
    for group, _ in memory._groups(Path("/")):
        return group if os.access(group, os.W_OK) else None
    return None


@pytest.mark.slow
def test_in_a_control_group_the_cache_takes_a_quarter_of_the_remaining_limit(tmp_path) -> None:
    parent = own_memory_group()
    if parent is None:
        pytest.skip("no control group that limits memory can be made here")
    group, limit = parent / f"fastgen-test-{os.getpid()}", 2 * 2**30
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        names = [group / name for name in ("memory.max", "memory.limit_in_bytes") if (group / name).exists()]
        if not names:
            pytest.skip("the groups that can be made here have no limit for memory")
        names[0].write_text(str(limit))
        done = run("limited_memory", group, FASTGEN_CACHE_DIR=str(tmp_path))
    finally:
        group.rmdir()
    assert done.returncode == 0, done.stderr
    num_blocks, available = json.loads(done.stdout.splitlines()[-1])
    taken = num_blocks * 32 * 3072  # bytes: 32 tokens of 6 layers x 2 heads x 32 x 2 numbers of 4 bytes
    assert 0.05 * limit < taken < 0.25 * limit
    assert taken < 0.2 * available, "the machine has more, so it was the limit"
