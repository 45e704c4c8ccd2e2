"""Markdown tables of benchmark figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastgen_jax.bench.curves import Curve


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def milliseconds(seconds: float | None, *, digits: int = 0) -> str:
    """The cell for a duration, in milliseconds; "-" if it is unknown."""
    return "-" if seconds is None else f"{1e3 * seconds:.{digits}f}"


def curve_tables(curves: Sequence[Curve], prompt_rate: float, generation_rates: Sequence[float]) -> list[str]:
    """Lines of Markdown: one table per curve, then one per comparison of the first curve with another.

    The rates, in tokens per second, are those of the SLA for effective throughput.
    """
    lines: list[str] = []
    for curve in curves:
        effective = [curve.effective(rate, prompt_rate=prompt_rate) for rate in generation_rates]
        lines += ["", f"{curve.label}, {curve.workload}", ""]
        lines += table(
            (
                "clients",
                "throughput",
                "latency s",
                "first token s",
                "gap P50 ms",
                "P90 ms",
                "P95 ms",
                *(f"effective at {rate:g}" for rate in generation_rates),
            ),
            [
                (
                    s.num_clients,
                    f"{s.throughput:.2f}/s",
                    f"{s.latency:.2f}",
                    f"{s.first_token_mean:.2f}",
                    milliseconds(s.token_latency_p50),
                    milliseconds(s.token_latency_p90),
                    milliseconds(s.token_latency_p95),
                    *(f"{row[i]:.2f}/s" for row in effective),
                )
                for i, s in enumerate(curve.summaries)
            ],
        )
    for other in curves[1:]:
        if other.workload == curves[0].workload:
            lines += ["", f"{curves[0].label} against {other.label}", ""]
            lines += table(
                ("figure", "ours", "theirs", "ratio"), comparison(curves[0], other, prompt_rate, generation_rates)
            )
    return lines


def comparison(
    ours: Curve, other: Curve, prompt_rate: float, generation_rates: Sequence[float]
) -> list[tuple[str, str, str, str]]:
    """Rows of (figure, ours, theirs, ratio); a ratio above 1 means that ours is better."""
    rows = []
    for rate in generation_rates:
        a, b = (max(curve.effective(rate, prompt_rate=prompt_rate)) for curve in (ours, other))
        rows.append((f"effective throughput at {rate:g} tokens/s", f"{a:.2f}/s", f"{b:.2f}/s", f"{a / b:.2f}" if b else "-"))
    for s in ours.summaries:
        theirs = next((o for o in other.summaries if o.num_clients == s.num_clients), None)
        if theirs and s.token_latency_p95 and theirs.token_latency_p95:
            rows.append(
                (
                    f"P95 token latency, {s.num_clients} clients",
                    f"{milliseconds(s.token_latency_p95)} ms",
                    f"{milliseconds(theirs.token_latency_p95)} ms",
                    f"{theirs.token_latency_p95 / s.token_latency_p95:.2f}",
                )
            )
    # At the latency of our best point short of saturation, and at the throughput that the other has there.
    best = max(ours.summaries, key=lambda s: s.throughput)
    reached = other.throughput_at(best.latency)
    if reached:
        rows.append(
            (
                f"throughput at a latency of {best.latency:.1f} s",
                f"{best.throughput:.2f}/s",
                f"{reached:.2f}/s",
                f"{best.throughput / reached:.2f}",
            )
        )
        latency = ours.latency_at(reached)
        if latency:
            rows.append(
                (
                    f"latency at {reached:.2f} requests/s",
                    f"{latency:.1f} s",
                    f"{best.latency:.1f} s",
                    f"{best.latency / latency:.2f}",
                )
            )
    return rows
