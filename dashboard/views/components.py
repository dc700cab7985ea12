"""Where a training step's time goes, by component, for each selected run."""

import math
from html import escape

import plotly.graph_objects as go
import streamlit as st
from ui.data import downloads
from ui.page import live, loaded, selected
from ui.style import GREY, PALETTE, faded, figure, plain, quantity, show, table

from lshv2.readers import Profile, read_profile
from lshv2.run_state import Entry

PATTERNS = ("", "/", "x")  # a colour that comes round again is hatched
REST = "not attributed"
Runs = list[tuple[Entry, Profile]]

entries = selected()
st.title("Components")
unit = st.segmented_control("Show", ["milliseconds", "% of the step"], default="milliseconds", required=True,
                            key="unit", bind="query-params", persist_state="session")
percent = unit == "% of the step"


def draw() -> None:
    runs: Runs = loaded(read_profile, entries)
    if not runs:
        return
    names = sorted({name for _, profile in runs for name in profile.components_ms},
                   key=lambda name: -max(profile.components_ms.get(name, 0.0) / profile.step_ms for _, profile in runs))
    show(bars(runs, names), "components", "Stacked bars: time of each component in one training step, a bar a run")
    st.caption("One bar a run, in the order of the largest share. `hashing_ms`, `bucket_attn_ms` and `global_ms` "
               "(local window and sinks) are the attention; the parts exclude one another. The "
               "median of the profiled steps, forward + backward + optimizer; a part is its share of all of them (in "
               "runs until 2026-11-28 its own median). Source: `component_profiles.json`.")
    uncovered = [f"{entry.key}: {profile.coverage:.0%}" for entry, profile in runs if abs(profile.coverage - 1) > 0.1]
    if uncovered:
        st.warning("The components do not add up to the step within 10 %: " + plain(", ".join(uncovered)))
    details(runs, names)


def bars(runs: Runs, names: list[str]) -> go.Figure:
    title = "share of the step (%)" if percent else "time (ms per training step)"
    chart = figure(title, "", height=220 + 44 * len(runs))
    keys = [entry.key for entry, _ in runs]
    for n, name in enumerate(names):
        parts = [profile.components_ms.get(name, 0.0) for _, profile in runs]
        add_bar(chart, runs, keys, name, parts, PALETTE[n % len(PALETTE)], PATTERNS[n // len(PALETTE) % len(PATTERNS)])
    rest = [max(0.0, profile.step_ms - profile.sum_ms) for _, profile in runs]
    if max(rest) > 0:
        add_bar(chart, runs, keys, REST, rest, faded(GREY, 0.35), ".")
    chart.update_layout(barmode="stack", bargap=0.35, legend=dict(traceorder="normal"))
    chart.update_yaxes(autorange="reversed", showgrid=False, type="category")
    return chart


def add_bar(chart: go.Figure, runs: Runs, keys: list[str], name: str, parts: list[float], colour: str,
            shape: str) -> None:
    shares = [100 * part / profile.step_ms for part, (_, profile) in zip(parts, runs, strict=True)]
    chart.add_bar(
        y=keys, x=shares if percent else parts, name=escape(name), orientation="h",
        marker=dict(color=colour, line=dict(width=0),
                    pattern=dict(shape=shape, fgcolor="white", size=6, fillmode="overlay")),
        customdata=list(zip(parts, shares, strict=True)),
        hovertemplate="%{y}<br>" + escape(name) + ": %{customdata[0]:,.4g} ms, %{customdata[1]:.1f} % of the step"
                      "<extra></extra>",
    )


def details(runs: Runs, names: list[str]) -> None:
    rows = []
    for name in names:
        row = {"component": name}
        for entry, profile in runs:
            part = profile.components_ms.get(name, math.nan)
            row[f"{entry.key}, ms"] = quantity(part)
            row[f"{entry.key}, %"] = quantity(100 * part / profile.step_ms, digits=3)
        rows.append(row)
    table(rows, "components table")
    table([
        {"run": entry.key, "step": quantity(profile.step_ms, "ms"), "sum of components": quantity(profile.sum_ms, "ms"),
         "coverage": quantity(100 * profile.coverage, "%", 3),
         "tokens per sequence": quantity(profile.seq_length, digits=9),
         "batch size": quantity(profile.batch_size), "profiled steps": quantity(profile.n_steps),
         "device": f"{profile.device} {profile.dtype}"}
        for entry, profile in runs
    ], "profiles")


live(draw)
downloads(entries, ("component_profiles.json",))
