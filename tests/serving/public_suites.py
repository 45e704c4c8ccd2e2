"""Runs the public test suites of OpenAI's and Anthropic's Python clients, unmodified, against a served model.

    python -m tests.serving.public_suites --folder /tmp/suites
    python -m tests.serving.public_suites --folder /tmp/suites --suites anthropic --url http://127.0.0.1:8000

Packages and their source distributions come from PyPI, into a virtual environment in the folder, which later runs use again.
Without `--url` the script starts `fastgen serve` with all model names that the suites ask for, and ends it afterwards. It
prints a table of what passed in each file, and the failures by their reason. The suites ask for stored objects by ids that
they made up; these are replaced on their way (`known_ids`).
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
from tests.serving.known_ids import with_known_ids

CONTEXT = 8192
TESTERS = (
    *("pytest", "pytest-asyncio", "pytest-xdist", "respx", "rich", "inline-snapshot", "http-snapshot[httpx]", "httpx2"),
    *("dirty-equals", "hypothesis", "time-machine", "trio", "opentelemetry-sdk", "boto3", "pillow", "importlib-metadata"),
)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The tests of one client that send requests to `TEST_API_BASE_URL`."""

    package: str
    extra: str
    tests: tuple[str, ...]
    """Files and folders in the source distribution."""
    path: str
    """What follows the server's address in the client's base URL."""


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
    names = sorted({name for suite in suites for name in models_of(sources[suite.package], suite)})
    with contextlib.nullcontext(options.url) if options.url else serving(options.model or tiny_model(folder), names) as url:
        for suite in suites:
            with with_known_ids(url, names[0]) as known:
                results = run(suite, sources[suite.package], python, url=known, workers=options.workers)
            print("\n".join(report(suite, sources[suite.package].name, results)), flush=True)
    return 0


def environment(folder: Path, suites: Sequence[Suite]) -> Path:
    """The Python of an environment in the folder that has the clients and what their tests import."""
    python = folder / "venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    clients = [f"{suite.package}[{suite.extra}]" for suite in suites]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *TESTERS, *clients], check=True)
    return python


def source_of(folder: Path, python: Path, suite: Suite) -> Path:
    """The unpacked source distribution of the version that is installed."""
    show = subprocess.run([python, "-m", "pip", "show", suite.package], check=True, capture_output=True, text=True).stdout
    (version,) = re.findall(r"^Version: (\S+)", show, re.MULTILINE)
    source = folder / f"{suite.package}-{version}"
    if not source.exists():
        only_source = ["--no-deps", "--no-binary", ":all:", "--dest", str(folder), f"{suite.package}=={version}"]
        subprocess.run([python, "-m", "pip", "download", "--quiet", *only_source], check=True)
        with tarfile.open(folder / f"{suite.package}-{version}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return source


def models_of(source: Path, suite: Suite) -> set[str]:
    """The names of models that a suite asks for."""
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
    settings = ["-n", workers, "-q", "-p", "no:cacheprovider", f"--junitxml={record}"]
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI", "ANTHROPIC", "PYTHON"))}
    subprocess.run(
        [python, "-m", "pytest", *suite.tests, *settings],
        cwd=source,
        env={**variables, "TEST_API_BASE_URL": url + suite.path},
        stdout=subprocess.DEVNULL,
    )
    return [result_of(case) for case in ElementTree.parse(record).iter("testcase") if case.find("skipped") is None]


def result_of(case: ElementTree.Element) -> Result:
    """One test of pytest's record."""
    file = case.get("classname", "").removeprefix("tests.api_resources.").rpartition(".")[0]
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
