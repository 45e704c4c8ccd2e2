"""The display of a start: its phases, the time left, and what remains of it."""

from __future__ import annotations

import logging

import pytest

from fastgen_jax.core import progress
from fastgen_jax.core.progress import Phases

log = logging.getLogger("fastgen_jax.x")
NAMES = ("loading weights", "compiling")


@pytest.fixture
def terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, "is_interactive", lambda: True)
    return lambda: capsys.readouterr().err


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_terminal_shows_which_phase_of_how_many_runs_and_only_the_last_line_stays(terminal) -> None:
    with Phases(log, names=NAMES, bar=True) as phases:
        with phases.phase("loading weights", total=2, unit="weight") as advance:
            advance()
            advance()
        with phases.phase("compiling"):
            pass
        phases.say("ready in 3 s")
    shown = terminal()
    assert "[1/2] loading weights:   0%" in shown
    assert "0/2" in shown
    assert "[2/2] compiling" in shown
    assert shown.rpartition("\r")[2] == "ready in 3 s\n"
    assert shown.count("\n") == 1


def test_the_time_left_is_that_of_an_earlier_start(terminal, clock) -> None:
    with Phases(log, names=NAMES, bar=True, expected={"loading weights": 4.0, "compiling": 10.0}) as phases:
        with phases.phase("loading weights", total=2, unit="weight"):
            assert phases.left("loading weights") == 14
            clock[0] += 3
            assert phases.left("loading weights") == 11
            clock[0] += 3
            assert phases.left("loading weights") == 10, "it takes longer than usual: the next phase is left"
        with phases.phase("compiling"):
            assert phases.left("compiling") == 10
    assert phases.seconds == {"loading weights": 6, "compiling": 0}
    shown = terminal()
    assert "ready in about 14 s" in shown
    assert "ready in about 10 s" in shown


def test_nothing_is_predicted_for_a_phase_that_never_ran(clock) -> None:
    with Phases(log, names=NAMES, bar=False, expected={"compiling": 10.0}) as phases, phases.phase("loading weights"):
        assert phases.left("loading weights") is None


def test_without_a_terminal_each_phase_is_two_lines_in_the_log(caplog, clock) -> None:
    with (
        caplog.at_level(logging.INFO, "fastgen_jax"),
        Phases(log, names=NAMES, bar=True, expected={"loading weights": 2.0, "compiling": 3.0}) as phases,
    ):
        with phases.phase("loading weights", total=21, unit="weight"):
            clock[0] += 2
        with phases.phase("compiling", total=1, unit="program"):
            pass
        phases.say("ready in 2 s")
    assert [record.getMessage() for record in caplog.records] == [
        "loading weights: 21 weights, ready in about 5 s",
        "loading weights: done in 2.0 s",
        "compiling: 1 program, ready in about 3 s",
        "compiling: done in 0.0 s",
        "ready in 2 s",
    ]


def test_an_error_in_a_phase_removes_the_display(terminal) -> None:
    with pytest.raises(ValueError, match="damaged"), Phases(log, names=NAMES, bar=True) as phases, phases.phase("compiling"):
        raise ValueError("the file is damaged")
    assert phases.seconds == {}
    assert "\n" not in terminal()
