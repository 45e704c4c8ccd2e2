"""The file of choices: shared by processes, true for one machine and version, harmless when damaged."""

from __future__ import annotations

import json
import logging
import threading

import pytest

from fastgen_jax.engine import remembered
from fastgen_jax.engine.remembered import everything, forget, recall, remember


def test_an_entry_is_found_again_beside_others(tmp_path) -> None:
    path = tmp_path / "new" / "x.json"
    assert recall(path, "a") is None
    remember(path, "a", {"n": 1})
    remember(path, ("b", 2), {"n": 2})
    remember(path, "a", {"n": 3})
    first, second = recall(path, "a"), recall(path, ("b", 2))
    assert first is not None
    assert second is not None
    assert (first["n"], second["n"]) == (3, 2)
    assert len(everything(path)) == 2
    assert forget(path) == 2
    assert recall(path, "a") is None
    assert forget(path) == 0


@pytest.mark.parametrize("what", ["machine", "versions"])
def test_another_machine_or_version_has_another_entry_and_the_old_version_s_goes(tmp_path, monkeypatch, what) -> None:
    path = tmp_path / "x.json"
    remember(path, "a", {"n": 1})
    monkeypatch.setattr(remembered, what, lambda: "something else")
    assert recall(path, "a") is None
    remember(path, "a", {"n": 2})
    assert len(everything(path)) == (2 if what == "machine" else 1)
    monkeypatch.undo()
    assert (recall(path, "a") is None) == (what == "versions")


def test_machine_and_versions_name_what_a_measurement_depends_on() -> None:
    import jax

    import fastgen_jax

    assert f"jax {jax.__version__}" in remembered.versions()
    assert f"fastgen_jax {fastgen_jax.__version__}" in remembered.versions()
    assert "cores" in remembered.machine()


def test_the_oldest_entries_go(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(remembered, "KEPT", 3)
    path = tmp_path / "x.json"
    for n in range(5):
        remember(path, n, {"n": n, "when": f"2026-01-0{n + 1}"})
    assert sorted(entry["n"] for entry in everything(path).values()) == [2, 3, 4]


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"x": 5}', '{"x": {"versions": 3}}', "\x00\x01"])
def test_a_damaged_file_is_an_empty_one_and_is_mended(tmp_path, text) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    assert recall(path, "a") is None
    remember(path, "a", {"n": 1})
    assert (recall(path, "a") or {})["n"] == 1


def test_what_is_kept_at_the_same_time_is_all_kept(tmp_path) -> None:
    path = tmp_path / "x.json"
    threads = [threading.Thread(target=lambda k=k: [remember(path, (k, n), {}) for n in range(10)]) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(everything(path)) == 40
    assert json.loads(path.read_text())


def test_a_file_that_cannot_be_written_costs_a_warning(tmp_path, caplog) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        remember(tmp_path / "file" / "x.json", "a", {"n": 1})
    assert "cannot be written" in caplog.text
    assert recall(tmp_path / "file" / "x.json", "a") is None
