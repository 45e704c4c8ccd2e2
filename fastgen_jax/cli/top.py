"""`fastgen top`: shows what a deployment is doing, live in the terminal."""

from __future__ import annotations

import argparse
import time

from fastgen_jax.cli.parser import Options
from fastgen_jax.cli.terminal import has_colors
from fastgen_jax.json_types import JsonObject

BAR = 40  # width of a full bar in characters
STEPS_SHOWN = 12
LOADING = 503  # HTTP status of a server that is loading or shutting down


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    parser.add_argument("name", nargs="?", help="deployment (default: the only one running)")
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="time between two updates")
    parser.add_argument("--once", action="store_true", help="print one update after one interval, then exit")


def run(options: Options) -> int:
    """Runs the command and returns the exit code."""
    import httpx

    from fastgen_jax.api.client import NoAnswerError, ServerError, checked, explained_errors, http_settings
    from fastgen_jax.api.deployment import deployments, find_deployment

    if options["interval"] <= 0:
        raise ValueError(f"interval is {options['interval']}; it must be above 0 seconds")
    running = deployments()
    if options["name"] is None and len(running) != 1:
        names = ", ".join(d.name for d in running) or "none"
        raise ValueError(f"choose the deployment to watch (running: {names})")
    deployment = find_deployment(options["name"]) if options["name"] else running[0]
    before, since = None, 0
    clear = "\x1b[H\x1b[2J" if has_colors() and not options["once"] else ""
    with httpx.Client(**http_settings(deployment, timeout=30)) as http:
        while True:
            try:
                with explained_errors(deployment):
                    stats = checked(http.get("/stats", params={"since_step": since}))
            except ServerError as error:
                if isinstance(error, NoAnswerError) or error.status != LOADING or options["once"]:
                    raise ValueError(str(error)) from None
                print(f"{deployment.name}: {error}", flush=True)
                time.sleep(options["interval"])
                continue
            now = time.monotonic()
            if before is not None:
                print(clear, render(stats, before[0], now - before[1]), sep="", flush=True)
                if options["once"]:
                    return 0
            before = (stats, now)
            since = max([0, *(step[0] - STEPS_SHOWN for engine in stats["engines"] for step in engine["steps"][-1:])])
            time.sleep(options["interval"])


def render(stats: JsonObject, before: JsonObject, seconds: float) -> str:
    """One screen of text from two responses of /stats, `seconds` apart."""
    lines = [
        f"{stats['deployment']}  {stats['model']}  up {int(stats['uptime'])} s  unfinished {stats['unfinished']}  "
        f"worst event loop lag {stats['worst_lag_ms']:.1f} ms"
    ]
    for number, (engine, old) in enumerate(zip(stats["engines"], before["engines"], strict=False)):
        counters, past = engine["counters"], old["counters"]

        def rate(name: str, counters: dict[str, int] = counters, past: dict[str, int] = past) -> float:
            return max(0, counters[name] - past[name]) / seconds

        used = 1 - engine["free_blocks"] / engine["blocks"]
        lines += [
            "",
            f"engine {number}: {engine['running']} running, {engine['waiting']} waiting; {rate('generated_tokens'):.1f} "
            f"generated and {rate('tokens'):.0f} tokens/s in {rate('steps'):.1f} steps/s; {counters['preemptions']} "
            f"preemptions, {counters.get('failed_steps', 0)} failed steps",
            f"KV blocks  {'█' * round(BAR * used):<{BAR}}  {used:.1%} of {engine['blocks']}",
        ]
        for step in engine["steps"][-STEPS_SHOWN:]:
            generated = round(BAR * step[2] / engine["token_budget"])
            prompt = round(BAR * step[1] / engine["token_budget"]) - generated
            lines.append(
                f"step {step[0]:>6} {'█' * generated + '░' * prompt:<{BAR}}  {step[2]} generated, "
                f"{step[1] - step[2]} prompt tokens, {1e3 * (step[11] - step[9]):.1f} ms"
            )
    return "\n".join(lines)
