"""One look for every page: colours per run, chart layout, number formats, text that stays text."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import streamlit as st

from lshv2.axes import length_ticks
from lshv2.operator_results import Target, verdict

# Okabe and Ito's colour-blind-safe set without its yellow and black (lost on white and on dark grounds), and two of
# Paul Tol's that keep their distance to them.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#AA3377", "#999999")
DASHES = ("solid", "dash", "dot")  # a second and third round through the palette
GREY = "#8A8A8A"
MARKS = {"missed": "✖", "not measured": "·"}  # of a target; else met
MAX_ROWS = 30  # a longer table scrolls
STATE_WORDS = {
    "ok": "✔ ok", "done": "✔ done", "running": "▶ running", "failed": "✖ failed", "partial": "◐ partial",
    "stopped": "◐ stopped", "skipped": "– skipped", "not run": "· not run",
}


def plain(value: str) -> str:
    """Text for a markdown field, with every character that markdown or streamlit would act on escaped."""
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|<>$:~=])", r"\\\1", value).replace("\n", "  \n")


def faded(colour: str, alpha: float) -> str:
    """`#RRGGBB` as `rgba(...)`."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def figure(x_title: str, y_title: str, *, log_x: bool = False, log_y: bool = False, height: int = 360,
           revision: str = "") -> go.Figure:
    """An empty chart. The legend stands above; zoom is kept while `revision` stays the same."""
    chart = go.Figure()
    chart.update_layout(
        height=height, margin=dict(l=8, r=8, t=8, b=8), hovermode="closest",
        legend=dict(orientation="h", yanchor="bottom", y=1.02, x=0, font=dict(size=12)),
        uirevision=f"{revision}{log_x}{log_y}",
    )
    grid = dict(showgrid=True, gridcolor="rgba(128,128,128,0.18)", zeroline=False, automargin=True, exponentformat="SI")
    chart.update_xaxes(title=x_title, type="log" if log_x else "linear", **grid)
    chart.update_yaxes(title=y_title, type="log" if log_y else "linear", **grid)
    if log_y:
        chart.update_yaxes(dtick="D2", minexponent=4)
    return chart


def show(chart: go.Figure, key: str, alt: str) -> None:
    """Draw it under a stable key, so that a live redraw changes the lines and nothing else."""
    config = {"displaylogo": False, "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
              "toImageButtonOptions": {"filename": f"lshv2-{key}", "scale": 2}}
    st.plotly_chart(chart, key=f"chart {key}", config=config, alt=alt)


def length_axis(chart: go.Figure, lengths: list[int]) -> None:
    """Tick the measured powers of two, written 1k, 2k, ... 128k."""
    ticks = length_ticks(lengths)
    chart.update_xaxes(tickmode="array", tickvals=list(ticks), ticktext=list(ticks.values()))
    if len(set(lengths)) == 1:  # else a single length lies on the axis's edge, without its tick
        middle = math.log10(lengths[0])
        chart.update_xaxes(range=[middle - 0.5, middle + 0.5])


def quantity(value: float, unit: str = "", digits: int = 4) -> str:
    """`1,234 ms`, or an em dash for what was not measured."""
    if not math.isfinite(value):
        return "—"
    shown = f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"
    return f"{shown} {unit}".strip()


def count(value: float) -> str:
    """`101M`, `1.2M`, `48k`."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}" if math.isfinite(value) else "—"


def duration(seconds: float) -> str:
    """`45 s`, `3 min 05 s`, `2 h 10 min`."""
    if not math.isfinite(seconds) or seconds < 0:
        return "—"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def judged(targets: Sequence[Target]) -> list[dict[str, str]]:
    """Rows of a table of targets."""
    rows = []
    for target in targets:
        said = verdict(target)
        rows.append({"target": target.name, "at least": target.target or "—", "stretch": target.stretch or "—",
                     "measured": quantity(target.value, target.unit), "result": f"{MARKS.get(said, '✔')} {said}",
                     "how": target.detail or "—"})
    return rows


def table(rows: list[dict[str, Any]], key: str) -> None:
    """Rows as a table of plain text: nothing in a cell is read as markdown or HTML."""
    st.dataframe(rows, key=key, hide_index=True, height="content" if len(rows) <= MAX_ROWS else 600)
