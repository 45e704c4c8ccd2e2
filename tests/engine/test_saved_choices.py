"""The file of saved choices: shared by processes, valid for one machine and version, ignored when damaged."""

from __future__ import annotations

import json
import logging
import threading

import pytest

from fastgen_jax.engine import saved_choices
from fastgen_jax.engine.saved_choices import clear, load, load_all, save


def test_an_entry_is_found_among_others(tmp_path) -> None:
    path = tmp_path / "new" / "x.json"
    assert load(path, "a") is None
    save(path, "a", {"n": 1})
    save(path, ("b", 2), {"n": 2})
    save(path, "a", {"n": 3})
    first, second = load(path, "a"), load(path, ("b", 2))
    assert first is not None
    assert second is not None
    assert (first["n"], second["n"]) == (3, 2)
    assert len(load_all(path)) == 2
    assert clear(path) == 2
    assert load(path, "a") is None
    assert clear(path) == 0


@pytest.mark.parametrize("what", ["machine", "versions"])
def test_another_machine_has_another_entry_and_a_new_version_replaces_it(tmp_path, monkeypatch, what) -> None:
    path = tmp_path / "x.json"
    save(path, "a", {"n": 1})
    monkeypatch.setattr(saved_choices, what, lambda: "something else")
    assert load(path, "a") is None
    save(path, "a", {"n": 2})
    assert len(load_all(path)) == (2 if what == "machine" else 1)
    monkeypatch.undo()
    assert (load(path, "a") is None) == (what == "versions")


def test_machine_and_versions_name_the_facts_that_a_measurement_depends_on() -> None:
    import jax

    import fastgen_jax

    assert f"jax {jax.__version__}" in saved_choices.versions()
    assert f"fastgen_jax {fastgen_jax.__version__}" in saved_choices.versions()
    assert "cores" in saved_choices.machine()


def test_the_oldest_entries_are_dropped(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(saved_choices, "MAX_ENTRIES", 3)
    path = tmp_path / "x.json"
    for n in range(5):
        save(path, n, {"n": n, "when": f"2026-01-0{n + 1}"})
    assert sorted(entry["n"] for entry in load_all(path).values()) == [2, 3, 4]


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"x": 5}', '{"x": {"versions": 3}}', "\x00\x01"])
def test_a_damaged_file_counts_as_empty_and_is_replaced(tmp_path, text) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    assert load(path, "a") is None
    save(path, "a", {"n": 1})
    assert (load(path, "a") or {})["n"] == 1


def test_entries_saved_at_the_same_time_are_all_kept(tmp_path) -> None:
    path = tmp_path / "x.json"
    threads = [threading.Thread(target=lambda k=k: [save(path, (k, n), {}) for n in range(10)]) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(load_all(path)) == 40
    assert json.loads(path.read_text())


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path, caplog) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        save(tmp_path / "file" / "x.json", "a", {"n": 1})
    assert "cannot be written" in caplog.text
    assert load(tmp_path / "file" / "x.json", "a") is None
