"""Folders that not even root can write to: a file in their place, a full disk, a read-only mount."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from pallas_kernels import folders
from pallas_kernels.folders import replace_file, settle


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The system's temporary folder, for this test alone."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def blocked(tmp_path: Path) -> Path:
    """A path where no folder can be created."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "cache"


def test_a_folder_is_created_and_writable(tmp_path, caplog) -> None:
    found = settle(tmp_path / "a" / "b", "things", variable="V")
    assert found is not None
    assert (found.path, found.writable) == (tmp_path / "a" / "b", True)
    assert found.path.stat().st_mode & 0o077 == 0
    assert list(found.path.iterdir()) == []
    assert caplog.text == ""


def test_all_processes_use_the_same_private_folder_if_one_cannot_be_created(tmp_path, temporary, caplog) -> None:
    wanted = blocked(tmp_path)
    for _ in range(3):
        found = settle(wanted, "things", variable="SOME_VARIABLE")
    assert found is not None
    assert found.writable
    assert found.path.is_relative_to(temporary / f"user-cache-{os.getuid()}")
    assert (temporary / f"user-cache-{os.getuid()}").stat().st_mode & 0o077 == 0
    settle.cache_clear()  # as another process
    assert settle(wanted, "things", variable="SOME_VARIABLE") == found
    assert len(caplog.records) == 2, "said once a process"
    assert all(word in caplog.text for word in ("things", str(wanted), "Not a directory", "SOME_VARIABLE", str(found.path)))


def test_two_folders_that_cannot_be_created_get_separate_replacements(tmp_path) -> None:
    wanted = blocked(tmp_path)
    one, other = (settle(wanted / name / "xla", "things", variable="V") for name in ("a", "b"))
    assert one is not None
    assert other is not None
    assert one.path != other.path


def test_a_temporary_folder_of_another_user_or_a_link_is_not_used(tmp_path, temporary, caplog) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    root = temporary / f"user-cache-{os.getuid()}"
    root.symlink_to(tmp_path / "elsewhere")
    assert settle(blocked(tmp_path), "things", variable="V") is None
    root.unlink()
    root.mkdir()
    root.chmod(0o777)
    assert settle(blocked(tmp_path) / "b", "things", variable="V") is None
    assert caplog.text.count("nothing is kept after this run") == 2


def test_without_any_folder_there_is_none(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(blocked(tmp_path)))
    assert settle(blocked(tmp_path), "things", variable="V") is None
    assert "nothing is kept after this run" in caplog.text


def test_without_a_home_no_folder_named_tilde_is_created(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.chdir(tmp_path)
    found = settle(Path("~/.cache/things"), "things", variable="V")
    assert found is not None
    assert not Path("~").exists()
    assert "has no home folder" in caplog.text


def test_a_full_disk_is_reported_before_anything_is_written(tmp_path, monkeypatch, caplog) -> None:
    full = tmp_path / "full"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        folders.shutil, "disk_usage", lambda path: usage._replace(free=1000) if Path(path).is_relative_to(full) else usage
    )
    found = settle(full, "things", variable="V")
    assert found is not None
    assert not found.path.is_relative_to(full)
    assert "full: 0.0 MiB are free" in caplog.text


@pytest.mark.skipif(not os.path.ismount("/proc"), reason="needs a file system without writable folders")
def test_a_read_only_folder_with_files_is_used_for_reading_if_requested(caplog) -> None:
    found = settle(Path("/proc/self"), "things", variable="V")
    assert found is not None
    assert (found.path, found.writable) == (Path("/proc/self"), False)
    assert "its files are used, and nothing is added" in caplog.text
    assert settle(Path("/proc/self"), "things", variable="V", reading=False) != found


def test_a_folder_that_others_can_write_to_is_not_used_for_executable_files(tmp_path, caplog) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    found = settle(shared, "things", variable="V", private=True)
    assert found is not None
    assert found.path != shared
    assert "other users can write to it" in caplog.text
    assert settle(shared, "other things", variable="V") == folders.Folder(path=shared, writable=True)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch) -> None:
    path = tmp_path / "x.json"
    replace_file(path, b"old")

    def half(self, data):
        with open(self, "wb") as file:
            file.write(data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("x")] == ["x.json"]
