"""`fastgen bench compare`: every engine that is installed, on the same token ids, in turns, in one run.

Looks for vLLM and transformers in the given Pythons and for llama.cpp's server on the path, and runs what it finds as
`fastgen bench offline` does: each engine in a process of its own, warmed, A B C A B C, a table of ratios, JSON lines.
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

PROBE = """import importlib.util, json
print(json.dumps([n for n in ("vllm", "transformers", "torch") if importlib.util.find_spec(n)]))"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench offline`, and where to look."""
    offline.add_arguments(parser)
    parser.add_argument(
        "--python", nargs="+", default=[], metavar="PYTHON", help="Pythons to look for vLLM and transformers in"
    )


def run(arguments: argparse.Namespace) -> int:
    """Finds the engines, says which, and compares them."""
    print("\n".join(find(arguments, [sys.executable, *arguments.python])), flush=True)
    return offline.run(arguments)


def find(arguments: argparse.Namespace, pythons: Sequence[str]) -> list[str]:
    """Fills in the engines that were not named; lines that say what was found, and what keeps an engine out."""
    lines = [f"fastgen_jax, {arguments.model}" if arguments.model else "fastgen_jax: left out, it needs --model"]
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
            lines.append(f"{name} in {path}: left out, it needs --hf-model")
        else:
            lines.append(f"{name} in {path}" if path else f"{name}: not found; name its Python with --python")
    if not arguments.hf_model:
        arguments.vllm_python = arguments.hf_python = None
    if arguments.llama_server and not arguments.gguf:
        lines.append(f"llama.cpp, {arguments.llama_server}: left out, it needs --gguf NAME=PATH")
        arguments.llama_server = None
    else:
        server = arguments.llama_server
        lines.append(f"llama.cpp, {server}" if server else "llama.cpp: no llama-server on the path")
    return lines


def installed(python: str) -> set[str]:
    """Which of the packages that engines need a Python has; ValueError if it does not run."""
    if not Path(python).exists() and not shutil.which(python):
        raise ValueError(f"--python {python} does not exist")
    result = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, check=False)
    if result.returncode:
        raise ValueError(f"--python {python} does not run: {result.stderr.strip()[-300:]}")
    return set(json.loads(result.stdout))
