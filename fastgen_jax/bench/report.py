"""Figures (PNG), tables and one self-contained HTML page from result files.

    fastgen bench report runs.jsonl others.jsonl --costs costs.json --out report

All runs of the same workload are compared, wherever they were measured or simulated; so are the engines of `bench offline`
and `compare`.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastgen_jax.bench.curves import Curve, curves
from fastgen_jax.bench.engine_runs import EngineRuns, engine_tables, read_engine_runs
from fastgen_jax.bench.options import add_sla_arguments, sla_rates
from fastgen_jax.bench.results import RunRecord, read
from fastgen_jax.bench.tables import curve_tables
from fastgen_jax.json_types import JsonObject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = (
    "body{font:14px/1.45 system-ui,sans-serif;max-width:64em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;font-size:12px}td,th{border:1px solid #ccc;padding:3px 7px;text-align:right}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}pre{background:#f6f6f6;padding:.6em;overflow:auto}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's flags."""
    parser.add_argument(
        "results", type=Path, nargs="+", help="files written by bench serve, policies, offline or compare, or by simulate"
    )
    parser.add_argument("--costs", type=Path, nargs="+", default=[], help="files written by bench steps")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder for the report (default: %(default)s)")
    add_sla_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Writes one PNG per figure, and index.html with all of them."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("figures need matplotlib; pip install 'fastgen_jax[bench]'") from error
    engines = read_engine_runs(args.results)
    with_engines = {group.source for group in engines}
    records = [record for path in args.results for record in read(path, allow_empty=path.stem in with_engines)]
    models = [json.loads(path.read_text(encoding="utf-8")) for path in args.costs]
    prompt_rate, generation = sla_rates(args)
    args.out.mkdir(parents=True, exist_ok=True)
    page = Page(args.out)
    build(page, records, models, prompt_rate, generation, engines)
    num_runs = len(records) + sum(len(group.summaries) for group in engines)
    print(f"{page.write()}: {page.num_figures} figures from {num_runs} runs")
    return 0


class Page:
    """Collects text, tables and figures in order and writes them as one page."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_figures = 0
        self._parts: list[str] = []

    def heading(self, text: str) -> None:
        """Starts a section."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def figure(self, name: str, figure: Figure) -> None:
        """Adds a figure and writes it to `name`.png."""
        data = io.BytesIO()
        # Without date and version, so that the same runs produce identical files.
        figure.savefig(data, format="png", dpi=130, metadata={"Software": None})
        (self.folder / f"{name}.png").write_bytes(data.getvalue())
        self.num_figures += 1
        encoded = base64.b64encode(data.getvalue()).decode()
        self._parts.append(f'<p><img alt="{name}" src="data:image/png;base64,{encoded}"></p>')

    def markdown(self, lines: Sequence[str]) -> None:
        """Adds paragraphs and tables."""
        rows: list[str] = []
        for line in [*lines, ""]:
            if line.startswith("|---"):
                continue
            if line.startswith("|"):
                cell = "td" if rows else "th"
                cells = "".join(f"<{cell}>{html.escape(text.strip())}</{cell}>" for text in line.strip("|").split("|"))
                rows.append(f"<tr>{cells}</tr>")
                continue
            if rows:
                self._parts.append(f"<table>{''.join(rows)}</table>")
                rows = []
            if line:
                self._parts.append(f"<p>{html.escape(line)}</p>")

    def commands(self, contexts: Iterable[JsonObject]) -> None:
        """Adds the commands, machines and versions of the runs."""
        origins = dict.fromkeys(
            tuple(json.dumps(context.get(name, {})) for name in ("command", "machine", "versions")) for context in contexts
        )
        for command, machine, versions in origins:
            lines = html.escape("\n".join((json.loads(command) or "?", machine, versions)))
            self._parts.append(f"<pre>{lines}</pre>")

    def write(self) -> Path:
        """Writes index.html and returns its path."""
        path = self.folder / "index.html"
        body = "\n".join(self._parts)
        path.write_text(
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Benchmark report</title>'
            f"<style>{STYLE}</style><h1>Benchmark report</h1>\n{body}\n</html>\n",
            encoding="utf-8",
        )
        return path


def build(
    page: Page,
    records: Sequence[RunRecord],
    models: Sequence[JsonObject],
    prompt_rate: float,
    generation: Sequence[float],
    engines: Sequence[EngineRuns] = (),
) -> None:
    """Adds all figures and tables of the runs to the page."""
    from fastgen_jax.bench import figures

    by_workload: dict[str, list[Curve]] = {}
    for curve in curves(records):
        by_workload.setdefault(curve.workload, []).append(curve)
    for workload, group in by_workload.items():
        slug = "".join(c if c.isalnum() else "-" for c in workload)
        page.heading(f"Prompt/output {workload}")
        page.figure(f"throughput-latency-{slug}", figures.throughput_latency(group))
        for rate in generation:
            page.figure(f"effective-{rate:g}-{slug}", figures.effective_throughput(group, rate, prompt_rate))
        if set.intersection(*({s.num_clients for s in curve.summaries} for curve in group)):
            page.figure(f"token-latency-{slug}", figures.token_latency(group))
        page.markdown(curve_tables(group, prompt_rate, generation))
    with_steps = {record.label: record for record in records if record.steps}
    if with_steps:
        page.heading("Which token ran in which step")
    for i, record in enumerate(with_steps.values()):
        page.figure(f"steps-{i}", figures.steps(record))
    if models:
        page.heading("Cost of a step")
        page.figure("step-costs", figures.step_costs(models))
    if engines:
        page.heading("Engines on the same token ids")
        page.markdown(engine_tables(engines))
    page.heading("Commands and machines")
    page.commands([*(record.context for record in records), *(group.context for group in engines)])
