"""The figures of the FastGen paper, drawn from recorded runs and step costs."""

from __future__ import annotations

import colorsys
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastgen_jax.bench.curves import Curve
from fastgen_jax.bench.results import RunRecord
from fastgen_jax.json_types import JsonObject

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osv^DP*X"
MAX_SEQUENCES = 18  # rows of the figure of steps


def throughput_latency(curves: Sequence[Curve]) -> Figure:
    """Latency against throughput, one curve per label; lower right is better."""
    figure, axes = _figure()
    for i, curve in enumerate(curves):
        axes.plot(
            [s.throughput for s in curve.summaries],
            [s.latency for s in curve.summaries],
            marker=MARKERS[i % len(MARKERS)],
            label=curve.label,
        )
        for s in (curve.summaries[0], curve.summaries[-1]):
            axes.annotate(
                str(s.num_clients), (s.throughput, s.latency), textcoords="offset points", xytext=(5, 4), fontsize=7
            )
    return _finish(
        figure,
        axes,
        f"{curves[0].workload}: latency against throughput (numbers are clients)",
        "requests per second",
        "mean latency, s",
    )


def effective_throughput(curves: Sequence[Curve], rate: float, prompt_rate: float) -> Figure:
    """Requests per second that met the SLA, against the number of clients."""
    figure, axes = _figure()
    for i, curve in enumerate(curves):
        axes.plot(
            [s.num_clients for s in curve.summaries],
            curve.effective(rate, prompt_rate=prompt_rate),
            marker=MARKERS[i % len(MARKERS)],
            label=curve.label,
        )
    return _finish(
        figure,
        axes,
        f"{curves[0].workload}: effective throughput, prompt at {prompt_rate:g} and generation at {rate:g} tokens/s",
        "clients",
        "requests per second that met it",
        bottom=True,
    )


def token_latency(curves: Sequence[Curve]) -> Figure:
    """P50, P90 and P95 of the gaps between tokens, with 16 clients or the largest number that all curves have."""
    common = set.intersection(*({s.num_clients for s in curve.summaries} for curve in curves))
    clients = 16 if 16 in common else max(common)
    figure, axes = _figure()
    width = 0.8 / len(curves)
    for i, curve in enumerate(curves):
        s = curve.summary(clients)
        values = [1e3 * (v or 0.0) for v in (s.token_latency_p50, s.token_latency_p90, s.token_latency_p95)]
        axes.bar([x + i * width for x in range(3)], values, width=width, label=curve.label)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(3)], ["P50", "P90", "P95"])
    return _finish(figure, axes, f"{curves[0].workload}: token latency with {clients} clients", "", "ms", bottom=True)


def steps(record: RunRecord) -> Figure:
    """Which token ran in which step: one column per step, as wide as its duration, and one row per sequence."""
    figure, axes = _figure(height=4.2)
    names = list(dict.fromkeys(name for step in record.steps for name, _, _ in step[3]))[:MAX_SEQUENCES]
    rows = {name: i for i, name in enumerate(names)}
    colors = {name: colorsys.hsv_to_rgb(i / max(1, len(names)), 0.45, 0.92) for name, i in rows.items()}
    begin = record.steps[0][0]
    last = max(i for i, step in enumerate(record.steps) if any(name in rows for name, _, _ in step[3]))
    for start, end, num_tokens, chunks in record.steps[: last + 1]:
        for name, _, length in chunks:
            if name in rows:
                axes.barh(
                    rows[name],
                    end - start,
                    left=start - begin,
                    height=0.85,
                    color=colors[name],
                    edgecolor="white",
                    linewidth=0.4,
                    hatch="///" if length > 1 else None,
                )
                if length > 1:
                    axes.text((start + end) / 2 - begin, rows[name], str(length), ha="center", va="center", fontsize=6)
        axes.text((start + end) / 2 - begin, -1.0, str(num_tokens), ha="center", va="center", fontsize=5, rotation=90)
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set_ylim(len(names) - 0.5, -1.6)  # the first sequence at the top, with room for the numbers above
    return _finish(
        figure,
        axes,
        f"{record.label}: which token ran in which step\n"
        "hatched: prompt chunks with their tokens; plain: generated tokens; on top: tokens of the step",
        "seconds",
        "sequence",
        legend=False,
    )


def step_costs(models: Sequence[JsonObject]) -> Figure:
    """The paper's two insights: the time of a step depends on its tokens, and throughput saturates with them."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(9, 3.6), layout="constrained")
    latency, rate = figure.subplots(1, 2)
    for i, model in enumerate(models):
        sizes = model["sizes"]
        tokens = sorted({*sizes, *(1 << i for i in range(max(sizes).bit_length()))})
        # For a single prompt: the mean context of its tokens is half their number.
        seconds = [
            model["base"][i] + model["per_token"][i] * n + model["per_row"] + model["per_prompt_attended"] * n * (n + 1) / 2
            for n, i in ((n, bisect_left(sizes, n)) for n in tokens)
        ]
        label = f"{model['facts']['model']}, {model['facts']['engine']['dtype']}"
        style = {"marker": MARKERS[i % len(MARKERS)], "label": label}
        latency.plot(tokens, [1e3 * s for s in seconds], **style)
        rate.plot(tokens, [n / s for n, s in zip(tokens, seconds, strict=True)], **style)
    for axes, title, ylabel in ((latency, "step time", "ms"), (rate, "step throughput", "tokens per second")):
        _finish(figure, axes, title, "tokens in the step", ylabel, bottom=True)
    return figure


def _figure(height: float = 3.8) -> tuple[Figure, Axes]:
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(7.2, height), layout="constrained")
    return figure, figure.subplots()


def _finish(
    figure: Figure, axes: Axes, title: str, xlabel: str, ylabel: str, *, bottom: bool = False, legend: bool = True
) -> Figure:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(xlabel, fontsize=8)
    axes.set_ylabel(ylabel, fontsize=8)
    axes.tick_params(labelsize=7)
    if bottom:
        axes.set_ylim(bottom=0)
    if legend:
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return figure
