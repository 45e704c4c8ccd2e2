"""Records of deployments; a server also runs where its record cannot be written."""

from __future__ import annotations

import os
import tempfile

import pytest

from fastgen_jax import paths
from fastgen_jax.api.deployment import Deployment, deployments, find_deployment, process_start, recorded, start_server


def record(name: str = "one") -> Deployment:
    return Deployment(
        name=name,
        model="m",
        url="http://127.0.0.1:1",
        pid=os.getpid(),
        started=1.0,
        process_start=process_start(os.getpid()) or "",
    )


@pytest.fixture
def no_state(tmp_path, monkeypatch):
    """A file in place of the state folder, and a separate folder for temporary files."""
    (tmp_path / "file").write_text("")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path


def test_without_a_state_folder_deployments_are_found_through_the_temporary_folder(no_state, caplog) -> None:
    with recorded(record()):
        assert find_deployment("one") == record()
        with pytest.raises(ValueError, match="is already running"), recorded(record()):
            pass
    assert deployments() == []
    assert "records of deployments cannot be kept in" in caplog.text


def test_without_any_folder_a_server_runs_and_a_background_server_reports_what_it_requires(
    no_state, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(no_state / "file"))
    monkeypatch.setenv("XDG_STATE_HOME", str(no_state / "file" / "b"))
    with recorded(record()):
        assert deployments() == []
    assert "nothing is kept after this run" in caplog.text
    with pytest.raises(ValueError, match=r"requires a folder for its record and log.*XDG_STATE_HOME"):
        start_server("m", deployment_name="one", options={}, timeout=1)


def test_a_full_disk_causes_a_warning(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.link", full)
    with recorded(record()):
        assert deployments() == []
    assert "deployment 'one' is not recorded" in caplog.text
    assert "http://127.0.0.1:1" in caplog.text
    assert list(paths.deployments_dir().iterdir()) == []


def test_a_damaged_record_does_not_block_its_name(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    paths.deployments_dir().mkdir(parents=True)
    (paths.deployments_dir() / "one.json").write_text("{")
    assert deployments() == []
    with recorded(record()):
        assert find_deployment("one") == record()
    assert deployments() == []
