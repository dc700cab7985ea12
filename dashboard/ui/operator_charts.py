"""The attention operator's benchmark as pictures: time and speed-up against length, and where LSH's time goes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import plotly.graph_objects as go

from lshv2.operator_results import NAMES, OperatorResult, OperatorRow
from ui.style import GREY, PALETTE, figure, length_axis

COLOURS = {name: PALETTE[n % len(PALETTE)] for n, name in enumerate(NAMES)}
HALVES = {"forward": "", "backward": "/"}  # the backward's bars are hatched


@dataclass(frozen=True)
class Layout:
    """A set of rows that are drawn as one line."""

    title: str
    mode: str
    batch_one: bool

    def rows(self, result: OperatorResult) -> list[OperatorRow]:
        return result.of(self.mode, self.batch_one)


LAYOUTS = (
    Layout("batch 1", "eager", True), Layout("fixed tokens", "eager", False),
    Layout("batch 1, CUDA graph", "graph", True), Layout("fixed tokens, CUDA graph", "graph", False),
)


def time_chart(rows: list[OperatorRow], part: str) -> go.Figure:
    """Median milliseconds with 20th to 80th percentile; part: "forward", "backward" or "both"."""
    title = "forward + backward" if part == "both" else part
    chart = figure("sequence length (tokens)", f"{title} (ms)", log_x=True, log_y=True, height=440)
    column = f"{part}_ms"
    for name, words in NAMES.items():
        points = [(row.seq_len, entry) for row in rows if (entry := row.contenders.get(name)) and entry.get(column) > 0]
        if not points:
            continue
        values = [entry.get(column) for _, entry in points]
        above = [entry.get(f"{column}_p80") - entry.get(column) for _, entry in points]
        below = [entry.get(column) - entry.get(f"{column}_p20") for _, entry in points]
        chart.add_scatter(
            x=[length for length, _ in points], y=values, name=words, mode="lines+markers",
            line=dict(color=COLOURS[name], width=1.8, dash="solid" if name.startswith("lsh") else "dash"),
            marker=dict(size=8),
            error_y=dict(type="data", symmetric=False, array=_drawn(above), arrayminus=_drawn(below), thickness=1.2),
            hovertemplate=words + "<br>%{x:,} tokens<br>%{y:,.4g} ms<extra></extra>",
        )
    length_axis(chart, [row.seq_len for row in rows])
    return chart


def _drawn(lengths: list[float]) -> list[float]:
    """Error bars; none where the percentile was not measured."""
    return [max(0.0, value) if math.isfinite(value) else 0.0 for value in lengths]


def speedup_chart(result: OperatorResult) -> go.Figure:
    """Fastest dense over LSH, forward + backward, a line a layout; 1 is where both take as long."""
    chart = figure("sequence length (tokens)", "dense time ÷ LSH time", log_x=True, log_y=True, height=440)
    lengths = []
    for n, layout in enumerate(LAYOUTS):
        shown = {(row.seq_len, row.batch_size) for row in layout.rows(result)}
        points = sorted((s.seq_len, s.factor, s.dense) for s in result.speedups
                        if s.mode == layout.mode and (s.seq_len, s.batch_size) in shown and s.factor > 0)
        if not points:
            continue
        lengths += [length for length, _, _ in points]
        chart.add_scatter(
            x=[length for length, _, _ in points], y=[factor for _, factor, _ in points], name=layout.title,
            mode="lines+markers", line=dict(color=PALETTE[n], dash="solid" if layout.mode == "eager" else "dot"),
            customdata=[NAMES.get(dense, "dense") for _, _, dense in points],
            hovertemplate=layout.title + "<br>%{x:,} tokens<br>%{y:.3g} × against %{customdata}<extra></extra>",
        )
    chart.add_hline(1.0, line=dict(color=GREY, dash="dash", width=1.2))
    length_axis(chart, lengths)
    return chart


def breakdown_chart(rows: list[OperatorRow], name: str) -> go.Figure:
    """Stacked share of forward + backward by part, a bar a length; hovering gives milliseconds."""
    chart = figure("share of forward + backward (%)", "", height=160 + 34 * len(rows))
    told = [(row, row.contenders[name].parts) for row in rows if name in row.contenders and row.contenders[name].parts]
    regions = list(dict.fromkeys(region for _, parts in told for half in HALVES for region in parts.get(half, {})))
    totals = [sum(sum(parts.get(half, {}).values()) for half in HALVES) for _, parts in told]
    for half, pattern in HALVES.items():
        for region in regions:
            taken = [parts.get(half, {}).get(region, 0.0) for _, parts in told]
            if not any(taken):
                continue
            colour = GREY if region == "other" else PALETTE[regions.index(region) % len(PALETTE)]
            chart.add_bar(
                y=[f"{row.seq_len:,}" for row, _ in told], orientation="h", name=f"{half}: {region}",
                x=[100 * ms / total if total else 0.0 for ms, total in zip(taken, totals, strict=True)],
                marker=dict(color=colour, pattern=dict(shape=pattern, fgcolor="white", size=6, fillmode="overlay")),
                customdata=taken, hovertemplate="%{y} tokens<br>%{customdata:,.4g} ms, %{x:.1f} %",
            )
    chart.update_layout(barmode="stack", bargap=0.3, legend=dict(traceorder="normal"))
    chart.update_yaxes(autorange="reversed", showgrid=False, type="category")
    return chart
