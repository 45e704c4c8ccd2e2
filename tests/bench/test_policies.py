from __future__ import annotations

from pathlib import Path

import pytest

from fastgen_jax.bench import policies
from fastgen_jax.bench.results import read
from fastgen_jax.cli import main
from tests.tiny import tiny_engine

LOAD = ["--prompt", "24", "--output", "24", "--max-prompt", "30", "--requests", "6", "--clients", "4"]


@pytest.fixture
def options(monkeypatch) -> list[dict]:
    """The options requested for each engine of a run, which is replaced by a tiny one."""
    requested: list[dict] = []

    def make_engine(args, **given):
        requested.append(given)
        return tiny_engine(prefix_caching=False, num_blocks=64, policy=given["policy"])

    monkeypatch.setattr(policies, "make_engine", make_engine)
    return requested


def test_policies_are_interleaved_on_the_same_load_and_their_steps_are_recorded(options, tmp_path: Path, capsys) -> None:
    path = tmp_path / "runs.jsonl"
    argv = [
        "bench",
        "policies",
        "--policies",
        "splitfuse",
        "prompts_first",
        *LOAD,
        "--generation-rates",
        "5",
        "-o",
        str(path),
    ]
    assert main([*argv, "--whole-budget", "64"]) == 0
    first, second = read(path)
    assert (first.settings["policy"], second.settings["policy"]) == ("splitfuse", "prompts_first")
    wanted = [(r.request_id, r.num_prompt_tokens, len(r.token_times)) for r in first.requests]
    assert sorted(wanted) == sorted((r.request_id, r.num_prompt_tokens, len(r.token_times)) for r in second.requests)
    assert len(wanted) == 6
    # SplitFuse mixes prompts with generation; the other never does.
    kinds = [[{length == 1 for _, _, length in chunks} for _, _, _, chunks in run.steps] for run in (first, second)]
    assert [{True, False} in kind for kind in kinds] == [True, False]
    assert "effective throughput at 5 tokens/s" in capsys.readouterr().out
    assert "token_budget" not in options[0], "SplitFuse keeps the budget of the engine"
    # The smallest step fits generation alone, and no step is more than half empty.
    assert (options[1]["token_budget"], options[1]["budget_ladder"]) == (64, (4, 8, 16, 32))


def test_the_step_sizes_of_whole_prompts_can_be_given(options) -> None:
    assert main(["bench", "policies", "--policies", "orca", *LOAD, "--whole-ladder", "4", "16", "100"]) == 0
    assert (options[0]["token_budget"], options[0]["budget_ladder"]) == (30, (4, 16))


def test_a_budget_that_would_split_prompts_is_rejected(options, capsys) -> None:
    assert main(["bench", "policies", "--policies", "orca", *LOAD, "--whole-budget", "20"]) == 2
    assert "--whole-budget is 20, but a prompt has 30 tokens; use at least that" in capsys.readouterr().err
