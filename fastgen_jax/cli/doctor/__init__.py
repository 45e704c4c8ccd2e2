"""`fastgen doctor`: versions, devices, kernels, caches, and what is wrong with the remedy."""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Callable, Mapping

from fastgen_jax.cli.doctor import folders, jax_process, packages, system
from fastgen_jax.cli.doctor.finding import Finding, Problem
from fastgen_jax.cli.parser import Options
from fastgen_jax.cli.terminal import has_colors

SLACK_SECONDS = 15  # for checks to end after the processes that they wait for were killed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="time for JAX to start and find its devices (default: %(default)g)",
    )


def run(options: Options) -> int:
    """Prints the report and returns the exit code: 0 without problems, otherwise 1."""
    timeout = options["timeout"]
    if not timeout > 0:
        raise ValueError(f"timeout is {timeout}; it must be above 0 seconds")
    findings = examine(
        {
            "versions": packages.versions,
            "machine": system.machine,
            "devices": lambda: jax_process.devices(timeout),
            "cpu kernels": lambda: jax_process.kernels(timeout),
            "caches": folders.caches,
            "extras": packages.extras,
            "environment": system.variables,
        },
        timeout=timeout + SLACK_SECONDS,
    )
    problems = [problem for finding in findings.values() for problem in finding.problems]
    if options["json"]:
        print(json.dumps(as_json(findings, problems), indent=1))
    else:
        print("\n".join(as_text(findings, problems, bold=has_colors())))
    return 1 if problems else 0


def examine(checks: Mapping[str, Callable[[], Finding]], *, timeout: float) -> dict[str, Finding]:
    """The findings of all checks, which run at the same time; one that fails or takes too long is itself a problem."""
    found: dict[str, Finding] = {}

    def run(name: str, check: Callable[[], Finding]) -> None:
        try:
            found[name] = check()
        except Exception as error:  # the report must not depend on any single check
            what = f"the check of {name} failed ({type(error).__name__}: {error})"
            found[name] = Finding(problems=[Problem(what, "report this as a bug, with the output of this command")])

    # Daemons: a check that hangs, for example on a network drive that is gone, must not keep the command alive.
    threads = [threading.Thread(target=run, args=item, daemon=True) for item in checks.items()]
    for thread in threads:
        thread.start()
    for name, thread in zip(checks, threads, strict=True):
        thread.join(timeout)
        if thread.is_alive():
            what = f"the check of {name} did not finish within {timeout:g} s"
            found[name] = Finding(problems=[Problem(what, "look for a drive or device that does not respond")])
    return {name: found[name] for name in checks}


def as_json(findings: Mapping[str, Finding], problems: list[Problem]) -> dict[str, object]:
    """The report as one JSON object: the facts by section, and the problems."""
    return {
        **{name.replace(" ", "_"): finding.facts for name, finding in findings.items()},
        "problems": [{"problem": problem.what, "remedy": problem.remedy} for problem in problems],
    }


def as_text(findings: Mapping[str, Finding], problems: list[Problem], *, bold: bool = False) -> list[str]:
    """The lines of the report."""
    start, end = ("\033[1m", "\033[0m") if bold else ("", "")
    lines: list[str] = []
    for name, finding in findings.items():
        width = max((len(label) for label, _ in finding.lines), default=0)
        lines += [f"{start}{name}{end}", *(f"  {label:{width}}  {text}".rstrip() for label, text in finding.lines), ""]
    if not problems:
        return [*lines, f"{start}no problems found{end}"]
    lines.append(f"{start}problems{end}")
    for problem in problems:
        lines += [f"  - {problem.what}", f"    remedy: {problem.remedy}"]
    return lines
