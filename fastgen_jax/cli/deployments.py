"""`fastgen deployments`: lists or stops the servers on this machine."""

from __future__ import annotations

import argparse
import time

from fastgen_jax.cli.parser import Options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    parser.add_argument(
        "--stop", metavar="NAME", help="stop this deployment after its running requests have finished (default: list all)"
    )
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="how long --stop waits")


def run(options: Options) -> int:
    """Runs the command and returns the exit code."""
    from fastgen_jax.api.deployment import deployments, find_deployment, stop_server

    if options["stop"] is not None:
        stop_server(find_deployment(options["stop"]), timeout=options["timeout"])
        return 0
    rows = [("name", "url", "process", "up", "replicas", "model", "log")]
    for d in deployments():
        minutes, seconds = divmod(int(time.time() - d.started), 60)
        up = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
        rows.append((d.name, d.url, str(d.pid), up, str(d.replicas), d.model, d.log or "-"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0
