"""Saved programs: loaded without tracing where everything is the same, refused with a reason and compiled otherwise."""

from __future__ import annotations

import logging
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest

from fastgen_jax import Engine, EngineConfig
from fastgen_jax.engine import executables
from pallas_kernels.folders import Folder
from tests.tiny import drain, greedy, tiny_model, tokens_of

X = jnp.arange(4.0)


@pytest.fixture(autouse=True)
def compiled(without_jax_cache):
    """Every program is compiled."""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "saved").mkdir(mode=0o700)
    return Folder(path=tmp_path / "saved", writable=True)


def name(x: jax.Array = X, *facts: object) -> str:
    return executables.key(x, "double", *facts, devices=jax.devices()[:1])


def save(folder: Folder, factor: float = 2.0) -> str:
    program = jax.jit(lambda x: x * factor, donate_argnums=0).lower(X).compile()
    assert executables.save(folder, name(X, factor), program)
    return name(X, factor)


def load(folder: Folder, name: str) -> jax.stages.Compiled | None:
    return executables.load(folder, name, devices=jax.devices()[:1])


def test_a_loaded_program_computes_the_same_and_takes_its_donated_argument(folder) -> None:
    program = load(folder, save(folder, 3.0))
    assert program is not None
    x = jnp.array(X)
    np.testing.assert_array_equal(program(x), 3 * X)
    assert x.is_deleted()
    assert not list(folder.path.glob("*.loading"))


def test_a_program_that_is_loaded_ahead_is_there_once_for_the_one_who_asks_for_it(folder) -> None:
    ahead, other = save(folder, 3.0), save(folder, 4.0)
    executables.prefetch(folder, ahead, devices=jax.devices()[:1])
    first = load(folder, other)
    assert first is not None
    assert first(jnp.array(X))[1] == 4.0
    executables._prefetched[folder.path, ahead].result()
    (folder.path / (ahead + executables.SUFFIX)).unlink()
    second = load(folder, ahead)
    assert second is not None
    assert second(jnp.array(X))[1] == 3.0
    assert load(folder, ahead) is None
    executables.prefetch(folder, other, devices=jax.devices()[:1])
    executables.forget_prefetched()
    assert not executables._prefetched


def test_a_name_depends_on_shapes_facts_sources_and_settings_but_not_on_values_or_folders(monkeypatch, tmp_path) -> None:
    names = {
        name(),
        name(jnp.arange(5.0)),
        name(jnp.arange(4)),
        name(X, 1),
        executables.key({"x": X}, "double", devices=jax.devices()[:1]),
        executables.key((X, X), "double", devices=jax.devices()[:1]),
    }
    with jax.default_matmul_precision("highest"):
        names.add(name())
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    names.add(name())
    monkeypatch.undo()
    monkeypatch.setattr(executables, "sources", lambda: "changed")
    names.add(name())
    monkeypatch.undo()
    assert len(names) == 9
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert name(X + 1) == name()


def test_a_folder_that_others_can_write_to_is_not_read(folder, caplog) -> None:
    saved = save(folder)
    folder.path.chmod(0o777)
    assert load(folder, saved) is None
    assert "other users can write to it" in caplog.text
    folder.path.chmod(0o700)
    assert load(folder, saved) is not None


def test_damage_is_a_reason_in_the_log(folder, caplog) -> None:
    saved = save(folder)
    path = folder.path / (saved + executables.SUFFIX)
    path.write_bytes(path.read_bytes()[:-100])
    assert load(folder, saved) is None
    assert f"{path} is not loaded (" in caplog.text
    caplog.clear()
    assert load(folder, name(X, "never saved")) is None
    assert not caplog.text


def test_a_program_that_a_process_did_not_survive_is_not_tried_again_until_it_is_replaced(folder, caplog) -> None:
    saved = save(folder)
    child = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    marker = folder.path / f"{saved}.loading"
    marker.write_text(f"{int(child.stdout)} 1.0")
    assert load(folder, saved) is None
    assert "did not survive" in caplog.text
    save(folder)
    assert load(folder, saved) is not None
    process = psutil.Process()
    marker.write_text(f"{process.pid} {process.create_time()}")
    assert load(folder, saved) is not None, "the other process is still at it"


def test_a_folder_without_room_or_permission_costs_a_line_in_the_log(folder, caplog) -> None:
    program = jax.jit(lambda x: x + 1).lower(X).compile()
    assert not executables.save(Folder(path=folder.path, writable=False), "x", program)
    (folder.path / "file").write_text("")
    with caplog.at_level(logging.INFO):
        assert not executables.save(Folder(path=folder.path / "file", writable=True), "x", program)
    assert "is not saved" in caplog.text


def test_the_oldest_programs_are_dropped(folder, monkeypatch) -> None:
    monkeypatch.setattr(executables, "MAX_FILES", 2)
    saved = [save(folder, factor) for factor in (2.0, 3.0, 4.0)]
    assert [load(folder, name) is not None for name in saved] == [False, True, True]


@pytest.mark.parametrize(
    "options",
    [pytest.param({}, id="plain"), pytest.param({"quantize": "int8"}, id="int8", marks=pytest.mark.slow)],
)
def test_an_engine_made_of_loaded_programs_answers_the_same_without_tracing_a_step(tmp_path, options, monkeypatch) -> None:
    traced: list[str] = []
    lower = executables.compile_and_save
    monkeypatch.setattr(
        executables, "compile_and_save", lambda lowered, folder, name: (traced.append(name), lower(lowered, folder, name))[1]
    )

    def answer() -> list[int]:
        params, model = tiny_model()
        config = EngineConfig(
            token_budget=8,
            budget_ladder=(),
            max_num_seqs=4,
            block_size=4,
            num_blocks=16,
            compile_cache_dir=str(tmp_path / "cache"),
            **options,
        )
        engine = Engine(params, model, config)
        request_id = engine.add([5, 6, 7], greedy(6))
        return tokens_of(drain(engine)[request_id])

    expected = answer()
    assert len(traced) == 1
    assert answer() == expected
    assert len(traced) == 1, "the second engine loads"
