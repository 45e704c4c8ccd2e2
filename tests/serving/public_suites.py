"""Runs the public test suites of OpenAI's and Anthropic's Python clients and of llama.cpp's server, unmodified.

    python -m tests.serving.public_suites --folder /tmp/suites
    python -m tests.serving.public_suites --folder /tmp/suites --suites anthropic --url http://127.0.0.1:8000

Packages and their source distributions come from PyPI, into a virtual environment in the folder, which later runs use again.
Without `--url` the script starts `fastgen serve` with all model names that the suites ask for, and ends it afterwards. It
prints a table of what passed in each file, and the failures by their reason. The clients' suites ask for stored objects by
ids that they made up, and llama.cpp's for models that it does not serve; a proxy changes these (`suite_proxies`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import fastgen_jax
from tests.serving.checkpoint import write_checkpoint
from tests.serving.suite_proxies import with_any_model, with_known_ids

CONTEXT = 8192
TESTERS = (
    *("pytest", "pytest-asyncio", "pytest-xdist", "respx", "rich", "inline-snapshot", "http-snapshot[httpx]", "httpx2"),
    *("dirty-equals", "hypothesis", "time-machine", "trio", "opentelemetry-sdk", "boto3", "pillow", "importlib-metadata"),
    *("openai", "requests", "wget", "filelock", "numpy", "prometheus-client", "aiohttp"),
)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The tests of one client, which send requests to `TEST_API_BASE_URL`, or of a server, which they find by its port."""

    package: str
    tests: tuple[str, ...]
    """Files and folders below `folder`."""
    extra: str | None
    """What is installed with the client; None: the package is only unpacked."""
    path: str
    """What follows the server's address in the client's base URL."""
    folder: str = ""
    """Where the tests run, in the source distribution."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One test."""

    file: str
    name: str
    reason: str | None
    """Why it failed; None if it passed."""


SUITES = {
    "openai": Suite(
        package="openai",
        extra="aiohttp",
        tests=tuple(
            f"tests/api_resources/{name}"
            for name in (
                *("test_completions.py", "chat", "test_models.py", "test_embeddings.py"),
                *("test_responses.py", "responses"),
            )
        ),
        path="/v1",
    ),
    "anthropic": Suite(
        package="anthropic",
        extra="aiohttp",
        tests=("tests/api_resources/test_messages.py", "tests/api_resources/test_models.py"),
        path="",
    ),
    # The tests of endpoints that OpenAI and Anthropic have; their texts and token counts are those of llama.cpp's models.
    "llama.cpp": Suite(
        package="llama-cpp-python",
        extra=None,
        folder="vendor/llama.cpp/tools/server/tests",
        tests=tuple(
            f"unit/test_{name}.py"
            for name in (
                *("basic", "chat_completion", "completion", "compat_anthropic", "compat_oai_responses", "embedding"),
                *("rerank", "security", "template", "tokenize", "tool_call"),
            )
        ),
        path="",
    ),
}


def main() -> int:
    """Runs the suites and returns the exit code: 0 whatever the suites find."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for the environment and the sources; kept")
    parser.add_argument("--suites", nargs="+", choices=[*SUITES], default=[*SUITES])
    parser.add_argument("--model", help="model to serve (default: a tiny random one, whose answers have the right form)")
    parser.add_argument("--url", help="a server that runs already, without /v1; it must accept the models of the suites")
    parser.add_argument("--workers", default="2", help="tests at the same time (default: %(default)s)")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = options.folder.resolve()
    suites = [SUITES[name] for name in options.suites]
    python = environment(folder, suites)
    sources = {suite.package: source_of(folder, python, suite) for suite in suites}
    names = sorted({name for suite in suites for name in models_of(sources[suite.package], suite)}) or ["any"]
    with contextlib.nullcontext(options.url) if options.url else serving(options.model or tiny_model(folder), names) as url:
        for suite in suites:
            with (with_any_model if suite.extra is None else with_known_ids)(url, names[0]) as known:
                results = run(suite, sources[suite.package], python, url=known, workers=options.workers)
            print("\n".join(report(suite, sources[suite.package].name, results)), flush=True)
    return 0


def environment(folder: Path, suites: Sequence[Suite]) -> Path:
    """The Python of an environment in the folder that has the clients and what their tests import."""
    python = folder / "venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    clients = [f"{suite.package}[{suite.extra}]" for suite in suites if suite.extra is not None]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *TESTERS, *clients], check=True)
    return python


def source_of(folder: Path, python: Path, suite: Suite) -> Path:
    """The unpacked source distribution of the version that is installed, or of the newest one."""
    wanted = suite.package
    if suite.extra is not None:
        show = [python, "-m", "pip", "show", suite.package]
        told = subprocess.run(show, check=True, capture_output=True, text=True).stdout
        wanted += "==" + re.findall(r"^Version: (\S+)", told, re.MULTILINE)[0]
    archives = folder / "archives"
    only_source = ["--no-deps", "--no-binary", suite.package, "--dest", str(archives), wanted]
    subprocess.run([python, "-m", "pip", "download", "--quiet", *only_source], check=True)
    newest = max(archives.glob(f"{suite.package.replace('-', '_')}-*.tar.gz"), key=lambda file: file.stat().st_mtime)
    source = folder / newest.name.removesuffix(".tar.gz")
    if not source.exists():
        with tarfile.open(newest) as archive:
            archive.extractall(folder, filter="data")
    return source


def models_of(source: Path, suite: Suite) -> set[str]:
    """The names of models that a suite asks for; none if the proxy replaces them."""
    if suite.extra is None:
        return set()
    files = [
        file for test in suite.tests for file in ([source / test] if test.endswith(".py") else (source / test).rglob("*.py"))
    ]
    text = "\n".join(file.read_text() for file in files)
    own = "\n".join(file.read_text() for file in (source / "src").rglob("*.py"))  # its lists of names are tested, too
    return set(re.findall(r'\bmodel(?:_id)?="([^"]+)"', text)) | set(re.findall(r'"(claude-[\w.-]+)"', own))


def tiny_model(folder: Path) -> str:
    """A tiny random model with a context that is long enough for the tests, one token per character."""
    path = folder / "tiny"
    if not path.exists():
        write_checkpoint(path)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CONTEXT}))
    return str(path)


@contextlib.contextmanager
def serving(model: str, names: Sequence[str]) -> Iterator[str]:
    """The URL of a server that answers for these names; it ends with the context."""
    client = fastgen_jax.serve(model, deployment_name="public-suites", served_model_name=tuple(names))
    try:
        yield client.deployment.url
    finally:
        client.terminate_server()


def run(suite: Suite, source: Path, python: Path, *, url: str, workers: str) -> list[Result]:
    """The results of all tests of a suite."""
    record = source / "results.xml"
    settings = ["-q", "-p", "no:cacheprovider", f"--junitxml={record}"]
    if suite.extra is not None:
        settings += ["-n", workers]  # llama.cpp's tests would look for one server per worker
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI", "ANTHROPIC", "PYTHON"))}
    address = {"TEST_API_BASE_URL": url + suite.path, "DEBUG_EXTERNAL": "1", "PORT": url.rpartition(":")[2]}
    subprocess.run(
        [python, "-m", "pytest", *suite.tests, *settings],
        cwd=source / suite.folder,
        env={**variables, **address},
        stdout=subprocess.DEVNULL,
    )
    return [result_of(case) for case in ElementTree.parse(record).iter("testcase") if case.find("skipped") is None]


def result_of(case: ElementTree.Element) -> Result:
    """One test of pytest's record."""
    name = case.get("classname", "")  # ends with the name of a class in the clients' suites
    file = name if name.startswith("unit.") else name.removeprefix("tests.api_resources.").rpartition(".")[0]
    problem = case.find("failure")
    if problem is None:
        problem = case.find("error")
    reason = None if problem is None else reason_of(problem.get("message") or problem.text or "")
    return Result(file=file, name=case.get("name", ""), reason=reason)


def reason_of(message: str) -> str:
    """The reason of a failure: status and message of the server's error, else the first line of the exception."""
    told = re.search(r"Error code: (\d+) - .*?'message': (['\"])(.*?)\2[,}]", message, re.DOTALL)
    if told is None:
        return " ".join(message.split())[:120]
    return f"{told[1]} {' '.join(told[3].split())[:110]}"


def report(suite: Suite, version: str, results: Sequence[Result]) -> Iterator[str]:
    """Lines of Markdown."""
    passed = sum(result.reason is None for result in results)
    yield f"\n## {version}: {passed} of {len(results)} pass\n"
    yield "| file | passed | failed |\n|---|---|---|"
    for file in sorted({result.file for result in results}):
        mine = [result for result in results if result.file == file]
        failed = sum(result.reason is not None for result in mine)
        yield f"| {file} | {len(mine) - failed} | {failed} |"
    yield "\n| failures | reason | for example |\n|---|---|---|"
    for reason, count in Counter(result.reason for result in results if result.reason is not None).most_common():
        example = next(result.name for result in results if result.reason == reason)
        yield f"| {count} | {reason.replace('|', '/')} | {example} |"


if __name__ == "__main__":
    raise SystemExit(main())
