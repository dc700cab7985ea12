"""Curves of one or more runs on one axis: smoothing, thinning to what a screen can show, and the figures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import streamlit as st
from numpy.typing import NDArray

from lshv2.curves import Array, Curves, Training, read_training
from lshv2.run_state import Entry
from ui.data import FILES, Stamp, read, stamp
from ui.page import Look
from ui.style import GREY, faded, figure

POINTS, SMALL_POINTS = 1000, 300  # a curve is drawn with about this many, in a large and in a small chart
Line = tuple[NDArray[np.floating], NDArray[np.floating]]


@dataclass(frozen=True)
class View:
    """What the reader of the page chose."""

    x: str = "steps"  # or "tokens"
    log_x: bool = False
    log_y: bool = False
    smoothing: float = 0.0

    @property
    def x_title(self) -> str:
        return "optimizer steps" if self.x == "steps" else "tokens seen"


def smooth(values: Array, factor: float) -> Array:
    """Exponential moving average over logged points, without the bias of its start; NaN stays a gap."""
    if factor <= 0 or not len(values):
        return values
    averaged = pd.Series(values).ewm(alpha=1 - factor, ignore_na=True).mean().to_numpy()
    return np.where(np.isfinite(values), averaged, np.nan)


def thin(x: Array, y: Array, points: int = POINTS, log_x: bool = False) -> Line:
    """At most about `points` of the curve: the lowest and the highest of each stretch, so that no spike is lost."""
    good = np.isfinite(x) & np.isfinite(y) & ((x > 0) | (not log_x))
    x, y = x[good], y[good]
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    if len(x) <= points:
        return _short(x), _short(y)
    place = np.log(x) if log_x else x
    stretch = np.searchsorted(np.linspace(place[0], place[-1], points // 2 + 1), place)
    by_height = np.lexsort((y, stretch))
    starts = np.flatnonzero(np.diff(stretch[by_height], prepend=-1))
    ends = np.append(starts[1:], len(x)) - 1
    keep = np.unique(np.concatenate([by_height[starts], by_height[ends], [0, len(x) - 1]]))
    return _short(x[keep]), _short(y[keep])


def _short(values: Array) -> NDArray[np.floating]:
    """Half the bytes for the browser, where they are enough: integers stay exact."""
    return values.astype(np.float32) if not len(values) or np.abs(values).max() < 2**24 else values


@st.cache_resource(max_entries=2000, show_spinner=False)
def _line(_curves: Curves, path: str, files: Stamp, task: str, column: str, view: View, smoothing: float, points: int
          ) -> Line:
    train = column in _curves.train
    if view.x == "tokens":
        x = _curves.train["tokens"] if train else _curves.eval_tokens()
    else:
        x = _curves.train["step"] if train else _curves.eval["eval_step"]
    values = (_curves.train if train else _curves.eval)[column]
    return thin(x, smooth(values, smoothing), points, view.log_x)


def line(entry: Entry, task: str, column: str, view: View, smoothing: float = 0.0, points: int = POINTS) -> Line:
    """x and y of one column as drawn; kept until the run's files change."""
    training: Training = read(read_training, entry)
    files = stamp(entry.path, FILES[read_training])
    return _line(getattr(training, task), str(entry.path), files, task, column, view, smoothing, points)


Runs = list[tuple[Entry, Look, Training]]


def curve_chart(runs: Runs, task: str, train: str | None, evaluated: str | None, y_title: str, view: View,
                *, height: int = 360, legend: bool = True) -> go.Figure:
    """Training as a line (its raw values faint behind, when smoothed), evaluation as dots on a line."""
    chart = figure(view.x_title, y_title, log_x=view.log_x, log_y=view.log_y, height=height, revision=view.x)
    points = POINTS if legend else SMALL_POINTS
    for entry, look, training in runs:
        if getattr(training, task).empty:
            continue
        common = dict(legendgroup=entry.key, name=entry.key)
        tip = "%{y:.4g} " + f"{y_title}<br>{view.x_title} " + "%{x:,.0f}"
        if train:
            if view.smoothing:
                x, y = line(entry, task, train, view, points=points)
                chart.add_scatter(x=x, y=y, mode="lines", showlegend=False, hoverinfo="skip", **common,
                                  line=dict(color=faded(look.colour, 0.22), width=1))
            x, y = line(entry, task, train, view, view.smoothing, points)
            chart.add_scatter(x=x, y=y, mode="lines", showlegend=legend and not evaluated, **common,
                              hovertemplate=f"train {tip}",
                              line=dict(color=faded(look.colour, 0.65), width=1.4, dash=look.dash))
        if evaluated:
            x, y = line(entry, task, evaluated, view)
            chart.add_scatter(x=x, y=y, mode="lines+markers" if len(x) <= 60 else "lines", **common,
                              showlegend=legend, hovertemplate=f"eval {tip}",
                              line=dict(color=look.colour, width=2, dash=look.dash), marker=dict(size=7))
    return chart


def level(chart: go.Figure, value: float, label: str, colour: str = GREY) -> None:
    """A horizontal reference line that says what it is. `value` NaN: not measured, nothing is drawn."""
    if np.isfinite(value):
        chart.add_hline(y=value, line=dict(color=colour, width=1.5, dash="dash"))
        shown = np.log10(value) if chart.layout.yaxis.type == "log" and value > 0 else value
        chart.add_annotation(x=1, xref="paper", xanchor="right", y=shown, yanchor="bottom", text=label, showarrow=False,
                             font=dict(size=11, color=colour))
