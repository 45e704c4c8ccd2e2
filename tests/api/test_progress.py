"""The progress bar of a call: what it shows, and where."""

from __future__ import annotations

import io
import logging
import sys
import threading
import types

import pytest

from fastgen_jax import Pipeline, RequestOutput
from fastgen_jax.api import progress
from fastgen_jax.api.progress import Progress
from fastgen_jax.core import progress as long_tasks
from tests.tiny import tiny_engine


class Terminal(io.StringIO):
    def isatty(self):
        return True


def output(*token_ids: int, finished: bool = False) -> RequestOutput:
    return RequestOutput(
        request_id="a",
        new_token_ids=token_ids,
        text="",
        finished=finished,
        finish_reason="stop" if finished else None,
        logprobs=None,
        prompt_logprobs=None,
        num_prompt_tokens=1,
        num_cached_tokens=0,
        num_generated_tokens=len(token_ids),
    )


def test_the_bar_counts_tokens_and_answers_and_an_early_end_reduces_the_total(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress([10, 20], show=None) as bar:
        assert "answered 0 of 2:   0%" in sys.stderr.getvalue()  # before any output
        assert "computing prompts" in sys.stderr.getvalue()
        bar.add(0, output(5, 6, 7))
        assert (bar._bar.n, bar._bar.total) == (3, 30)
        bar.add(1, output(8))
        bar.add(0, output(9, finished=True))
        assert (bar._bar.n, bar._bar.total) == (5, 24)  # answer 0 had 6 tokens left
        bar.add(1, output(finished=True))
    assert (bar._bar.n, bar._bar.total) == (5, 5)
    assert "answered 2 of 2: 100%" in sys.stderr.getvalue()
    assert "5/5" in sys.stderr.getvalue()


def test_the_clock_advances_while_a_prompt_is_computed(monkeypatch):
    monkeypatch.setattr(progress, "REFRESH_SECONDS", 0.001)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress([10], show=None) as bar:
        refreshed = bar._bar.refresh
        beats = threading.Event()
        monkeypatch.setattr(bar._bar, "refresh", lambda *a, **k: (refreshed(*a, **k), beats.set()))
        assert beats.wait(30)
    assert not bar._clock.is_alive()


@pytest.mark.parametrize("num_prompts", [1, 3])
def test_a_call_shows_its_bar_on_a_terminal_and_in_a_pipe_only_on_request(num_prompts, monkeypatch):
    pipe, prompts = Pipeline(tiny_engine()), [[5, 6]] * num_prompts
    options = {"max_new_tokens": 4, "do_sample": False, "ignore_eos": True}
    for stream, asked, shown in (
        (Terminal(), None, True),
        (Terminal(), False, False),
        (io.StringIO(), None, False),
        (io.StringIO(), True, True),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        pipe(prompts, progress=asked, **options)
        assert (f"answered 0 of {num_prompts}" in stream.getvalue()) == shown
        stays = shown and (asked or num_prompts > 1)  # a bar that was not requested leaves no line behind
        assert (f"{4 * num_prompts}/{4 * num_prompts}" in stream.getvalue()) == stays


def test_a_notebook_is_interactive_although_its_standard_error_is_not_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    assert progress.is_interactive()
    shell.config = {}  # IPython in a terminal whose standard error goes elsewhere
    assert not progress.is_interactive()


def test_a_long_start_draws_no_bar_into_a_file(capsys, caplog):
    with (
        caplog.at_level(logging.INFO),
        long_tasks.shown(logging.getLogger("fastgen_jax"), "loading", total=2, unit="weight", bar=True) as advance,
    ):
        advance()
    assert capsys.readouterr().err == ""
    assert [record.getMessage().partition(" in ")[0] for record in caplog.records] == ["loading: 2 weights", "loading: done"]
