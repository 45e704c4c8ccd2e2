"""Packages that do not fit together are found, each with its remedy, and an environment that is fine has no problems."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jaxlib
import pytest

from fastgen_jax.core.environment import Environment, problems_of, this_environment

REQUIRED = (
    "jaxlib<=0.12.0.1,>=0.12.0",
    'libtpu==0.0.50.*; extra == "tpu"',
    'jax-cuda12-plugin[with-cuda]<=0.12.0.1,>=0.12.0.1; extra == "cuda12"',
    'jax-cuda13-plugin[with-cuda]<=0.12.0.1,>=0.12.0.1; extra == "cuda13"',
)
CUDA12 = {"jax-cuda12-plugin": "0.12.0.1", "jax-cuda12-pjrt": "0.12.0.1"}
CUDA13 = {"jax-cuda13-plugin": "0.12.0.1", "jax-cuda13-pjrt": "0.12.0.1"}


def problems(*, more: dict[str, str] | None = None, **changes: Any) -> list[str]:
    """Of an environment with jax 0.12.0.1 and the packages in `more`."""
    installed = {"jax": "0.12.0.1", "jaxlib": "0.12.0.1", **(more or {})}
    facts: dict[str, Any] = {"loaded_jax": "0.12.0.1", "required": REQUIRED, "nvidia_driver": None, "has_tpu": False}
    return problems_of(Environment(installed=installed, **(facts | changes)))


@pytest.mark.parametrize(
    ("more", "driver", "has_tpu"),
    [
        ({}, None, False),
        (CUDA12, "550.54.15", False),
        (CUDA13, "580.65.06", False),
        ({"libtpu": "0.0.50.2"}, None, True),
        ({"libtpu": "0.0.48.1"}, None, True),  # Colab's is two releases older than the one that its jax asks for
        ({"flax": "0.12.9"}, None, False),
    ],
)
def test_packages_that_fit_together_are_no_problem(more: dict[str, str], driver: str | None, has_tpu: bool) -> None:
    assert problems(more=more, nvidia_driver=driver, has_tpu=has_tpu) == []


@pytest.mark.parametrize(
    ("more", "driver", "has_tpu", "words", "remedy"),
    [
        (
            CUDA12 | {"jax-cuda12-plugin": "0.7.2", "jax-cuda12-pjrt": "0.7.2"},
            "550.54.15",
            False,
            "jax-cuda12-plugin 0.7.2 does not fit jax 0.12.0.1",
            "pip install 'jax[cuda12]==0.12.0.1'",
        ),
        (
            CUDA12 | {"jax-cuda12-pjrt": "0.7.2"},
            "550.54.15",
            False,
            "jax-cuda12-plugin is 0.12.0.1 but jax-cuda12-pjrt is 0.7.2",
            "pip install 'jax[cuda12]==0.12.0.1'",
        ),
        ({"libtpu": "0.0.21.1"}, None, True, "libtpu 0.0.21.1 does not fit", "pip install 'jax[tpu]==0.12.0.1'"),
        ({}, None, True, "has a TPU but libtpu is not installed", "pip install 'jax[tpu]==0.12.0.1'"),
        ({}, "550.54.15", False, "has an NVIDIA GPU (driver 550.54.15)", "pip install 'jax[cuda12]==0.12.0.1'"),
        ({}, "580.65.06", False, "has an NVIDIA GPU (driver 580.65.06)", "pip install 'jax[cuda13]==0.12.0.1'"),
        (
            CUDA13,
            "550.54.15",
            False,
            "jax-cuda13-plugin needs an NVIDIA driver 580 or newer but this is 550.54.15",
            "pip uninstall -y jax-cuda13-plugin jax-cuda13-pjrt, then pip install 'jax[cuda12]==0.12.0.1'",
        ),
        ({"flax": "0.11.2"}, None, False, "flax.nnx of flax 0.11.2", "pip install 'flax>=0.12.9'"),
    ],
)
def test_a_problem_is_named_with_its_remedy(
    more: dict[str, str], driver: str | None, has_tpu: bool, words: str, remedy: str
) -> None:
    (problem,) = problems(more=more, nvidia_driver=driver, has_tpu=has_tpu)
    assert words in problem
    assert remedy in problem
    assert "restart the session" in problem


def test_a_jax_that_was_replaced_under_a_running_process_asks_for_a_restart() -> None:
    (problem,) = problems(loaded_jax="0.7.2")
    assert problem.startswith("this process has loaded jax 0.7.2 but jax 0.12.0.1 is installed now: restart the session")


def test_versions_and_requirements_are_those_of_the_installed_packages() -> None:
    environment = this_environment()
    assert environment.installed["jax"] == environment.loaded_jax == jax.__version__
    assert environment.installed["jaxlib"] == jaxlib.__version__
    extras = [line for line in environment.required if "extra ==" in line]
    for package in ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"):
        assert any(line.startswith(package) for line in extras)
    wrong = dataclasses.replace(environment, installed={**environment.installed, "libtpu": "0.0.1"}, nvidia_driver=None)
    assert any(problem.startswith("libtpu 0.0.1 does not fit jax") for problem in problems_of(wrong))
