from __future__ import annotations

import pytest

from fastgen_jax.cli import main


def test_host_time_is_printed_for_each_number_of_sequences(
    capsys: pytest.CaptureFixture[str], fast_compilation: None
) -> None:
    assert main(["bench", "host", "--sequences", "2", "--steps", "3"]) == 0
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split()[:4] == ["sequences", "plan", "pack", "commit"]
    count, *times = map(float, row.split())
    assert count == 2
    assert len(times) == 6
    assert max(times) > 0


def test_impossible_numbers_are_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "host", "--sequences", "0"]) == 2
    assert "--sequences is [0] and --steps 300; both must be at least 1" in capsys.readouterr().err
