"""Cost against length, log-log: measured points, fits with their 95 % bands, and the lengths that failed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

import numpy as np
import plotly.graph_objects as go

from lshv2.benchmark_results import Benchmark, Fit, FixedPart, Row
from lshv2.curves import Array
from lshv2.run_state import Entry
from ui.page import Look
from ui.style import faded, figure, length_axis

WORDS = {"lsh": "LSH", "dense": "dense", "window": "window only"}
SYMBOLS = {"lsh": "circle", "dense": "square-open", "window": "diamond-open"}
DASH = {"lsh": "solid", "dense": "dash", "window": "dot"}
Runs = list[tuple[Entry, Look, Benchmark]]


@dataclass(frozen=True)
class Measure:
    """One kind of cost: its columns in `rows`, its name in `fits`, and the words for it."""

    column: str
    fit: str
    title: str
    symbol: str  # α for time, β for memory


ATTENTION = Measure("attention_latency_ms", "attention_latency", "attention alone, forward (ms)", "α")
ATTENTION_TRAIN = Measure("attention_train_latency_ms", "attention_train_latency",
                          "attention alone, forward + backward (ms)", "α")
TRAIN = Measure("train_latency_ms", "train_latency", "forward + backward (ms)", "α")
FORWARD = Measure("latency_ms", "latency", "forward (ms)", "α")
MEMORY = Measure("activation_mb", "memory", "activation memory (MB)", "β")
TIMES = {"forward + backward": TRAIN, "forward": FORWARD, "attention, forward + backward": ATTENTION_TRAIN,
         "attention, forward": ATTENTION}


def measured(rows: list[Row], column: str) -> list[Row]:
    return [row for row in rows if row.status == "ok" and row.get(column) > 0]


def fitted(rows: list[Row], fit: Fit, column: str) -> tuple[Array, Array, Array, Array] | None:
    """x, the fitted line, and the two sides of its pointwise 95 % band, over the fitted lengths.

    The file holds the exponent and its interval h; a least-squares line goes through the centroid of the logarithms,
    and t·s = h·√Sxx, so the band of the line is ± h·√(Sxx/n + (x − x̄)²): nothing is fitted again.
    """
    used = [row for row in measured(rows, column) if fit.min_seq_len <= row.seq_len <= fit.max_seq_len]
    if len(used) < 2 or len(used) != fit.n:  # other points than were fitted have another centroid: no line
        return None
    log_x = np.log([row.seq_len for row in used])
    log_y = np.log([row.get(column) for row in used])
    x = np.linspace(log_x.min(), log_x.max(), 40)
    away = x - log_x.mean()
    y = log_y.mean() + fit.exponent * away
    half = (fit.high - fit.low) / 2 * np.sqrt(((log_x - log_x.mean()) ** 2).sum() / len(used) + away**2)
    return np.exp(x), np.exp(y), np.exp(y - half), np.exp(y + half)


def interval(fit: Fit | FixedPart) -> str:
    return f"{fit.exponent:.2f} {between(fit.low, fit.high) or '(no interval)'}"


def between(low: float, high: float) -> str:
    """`[0.98, 1.04]`, or nothing."""
    return f"[{low:.2f}, {high:.2f}]" if math.isfinite(low) and math.isfinite(high) else ""


def cost_chart(runs: Runs, measure: Measure, attentions: list[str]) -> go.Figure:
    chart = figure("sequence length (tokens)", measure.title, log_x=True, log_y=True, height=440)
    lengths: list[int] = []
    failed: list[tuple[Entry, Look, Row]] = []
    for entry, look, benchmark in runs:
        for attention in attentions:
            rows = [row for row in benchmark.rows if row.attention == attention]
            lengths += [row.seq_len for row in rows]
            failed += [(entry, look, row) for row in rows if row.status != "ok"]
            _one(chart, entry, look, attention, rows, benchmark.fits.get((attention, measure.fit)), measure)
    _failures(chart, failed)
    length_axis(chart, lengths)
    names = sum(1 for trace in chart.data if trace.showlegend is not False)
    legend = 30 * min(names, 8) + 8  # pixels; a longer one scrolls
    chart.update_layout(height=360 + legend, legend=dict(orientation="v", maxheight=legend))
    return chart


def _one(chart: go.Figure, entry: Entry, look: Look, attention: str, rows: list[Row], fit: Fit | None,
         measure: Measure) -> None:
    points = measured(rows, measure.column)
    if not points:
        return
    name = f"{entry.key} · {WORDS[attention]}" + (f"  {measure.symbol} = {interval(fit)}" if fit else "")
    common = dict(legendgroup=f"{entry.key} {attention}", hoverlabel=dict(namelength=0))
    drawn = fitted(points, fit, measure.column) if fit else None
    if drawn:
        x, y, low, high = drawn
        if np.isfinite(low).all():
            chart.add_scatter(x=np.concatenate([x, x[::-1]]), y=np.concatenate([high, low[::-1]]), fill="toself",
                              mode="lines", line=dict(width=0), fillcolor=faded(look.colour, 0.16), showlegend=False,
                              hoverinfo="skip", **common)
        chart.add_scatter(x=x, y=y, mode="lines", line=dict(color=look.colour, width=1.8, dash=DASH[attention]),
                          showlegend=False, hoverinfo="skip", **common)
    values = np.array([row.get(measure.column) for row in points])
    low_end, high_end = (np.array([row.get(f"{measure.column}_{p}") for row in points]) for p in ("p20", "p80"))
    chart.add_scatter(
        x=[row.seq_len for row in points], y=values, name=name, mode="markers",
        marker=dict(color=look.colour, size=9, symbol=SYMBOLS[attention], line=dict(width=1.5, color=look.colour)),
        error_y=dict(type="data", symmetric=False, array=np.nan_to_num(np.maximum(high_end - values, 0)),
                     arrayminus=np.nan_to_num(np.maximum(values - low_end, 0)), color=look.colour, thickness=1.2),
        hovertemplate=f"{entry.key} · {WORDS[attention]}<br>" + "%{x:,} tokens<br>%{y:,.4g} " + measure.title, **common,
    )


def _failures(chart: go.Figure, failed: list[tuple[Entry, Look, Row]]) -> None:
    """Crosses in a strip above the chart: no value, but a length and a reason."""
    if not failed:
        return
    chart.add_scatter(
        x=[row.seq_len for _, _, row in failed], y=[0.5] * len(failed), yaxis="y2", mode="markers+text",
        text=[escape(row.status) for _, _, row in failed], textposition="middle left", textfont=dict(size=11),
        cliponaxis=False, name="not measured (reason on hover)",
        marker=dict(symbol="x", size=10, color=[look.colour for _, look, _ in failed]),
        hovertext=[f"{entry.key} · {WORDS[row.attention]}<br>{row.seq_len:,} tokens<br>{escape(row.status)}: "
                   f"{escape(row.reason)}" for entry, _, row in failed],
        hoverinfo="text",
    )
    chart.update_layout(yaxis=dict(domain=[0, 0.9]),
                        yaxis2=dict(domain=[0.91, 1], range=[0, 1], visible=False, fixedrange=True))
