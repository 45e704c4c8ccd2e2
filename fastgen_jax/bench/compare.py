"""Every installed engine on the same token ids, interleaved, in one run.

Looks for vLLM and transformers in the given Pythons and for llama.cpp's server on the PATH, and runs what it finds as
`fastgen bench offline` does: each engine in its own process, warmed up, A B C A B C, a table of ratios, JSON lines.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fastgen_jax.bench import offline
from fastgen_jax.bench.peers import WORKERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `bench offline`, and where to look for engines."""
    offline.add_arguments(parser)
    parser.add_argument(
        "--python",
        nargs="+",
        default=[],
        metavar="PYTHON",
        help="Pythons in which to look for vLLM and transformers (default: this one)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Finds the engines, prints which ones, and compares them."""
    print("\n".join(find(arguments, [sys.executable, *arguments.python])), flush=True)
    return offline.run(arguments)


def find(arguments: argparse.Namespace, pythons: Sequence[str]) -> list[str]:
    """Fills in the engines that were not given; returns lines about what was found and why an engine is skipped."""
    lines = [f"fastgen_jax, {arguments.model}" if arguments.model else "fastgen_jax: skipped, it needs --model"]
    for python in dict.fromkeys(pythons):
        have = installed(python)
        if {"vllm"} <= have and not arguments.vllm_python:
            arguments.vllm_python = python
        if {"transformers", "torch"} <= have and not arguments.hf_python:
            arguments.hf_python = python
    if not arguments.llama_server:
        arguments.llama_server = shutil.which("llama-server")
    for name, path in (("vLLM", arguments.vllm_python), ("transformers", arguments.hf_python)):
        if path and not arguments.hf_model:
            lines.append(f"{name} in {path}: skipped, it needs --hf-model")
        else:
            lines.append(f"{name} in {path}" if path else f"{name}: not found; pass a Python that has it with --python")
    if not arguments.hf_model:
        arguments.vllm_python = arguments.hf_python = None
    if arguments.llama_server and not arguments.gguf:
        lines.append(f"llama.cpp, {arguments.llama_server}: skipped, it needs --gguf NAME=PATH")
        arguments.llama_server = None
    else:
        server = arguments.llama_server
        lines.append(f"llama.cpp, {server}" if server else "llama.cpp: no llama-server on the PATH")
    return lines


def installed(python: str) -> set[str]:
    """Which of the packages that engines need are in a Python; raises ValueError if it does not run."""
    if not Path(python).exists() and not shutil.which(python):
        raise ValueError(f"--python {python} does not exist")
    command = [python, str(WORKERS / "installed_packages.py"), "vllm", "transformers", "torch"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise ValueError(f"--python {python} does not run: {result.stderr.strip()[-300:]}")
    return set(json.loads(result.stdout))
