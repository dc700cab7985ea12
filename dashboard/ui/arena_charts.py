"""The arena as pictures: what is right by length, depth, hops and position, and by how many keys a query sees."""

from __future__ import annotations

import math
from html import escape

import plotly.graph_objects as go

from lshv2.arena_results import ACCURACY, BITS, Summary, label_place
from lshv2.arena_views import (
    group_labels,
    grouped,
    levels,
    lines,
    quality_lines,
    quality_twins,
    shown_score,
    spread,
    trained_to,
)
from lshv2.axes import short
from ui.style import DASHES, GREY, PALETTE, faded, figure, length_axis

COLOURS = {"lsh": PALETTE[0], "dense": PALETTE[5], "dense_scaled": "#999933", "window": PALETTE[2]}
SYMBOLS = {"lsh": "circle", "dense": "square", "dense_scaled": "square-open", "window": "diamond"}
WORDS = {"depth": "depth of the needle", "hops": "hops", "gap": "tokens between key and question",
         "position": "position (tokens)", "ponder_step": "ponder step", "copies": "copies",
         "root": "outermost operation"}
SHORTCUT = PALETTE[3]


def _colour(model: str) -> str:
    return COLOURS.get(model, PALETTE[6])


def _scale(chart: go.Figure, metric: str) -> None:
    if metric == ACCURACY:
        chart.update_yaxes(range=[-0.03, 1.05], tickformat=".0%")


def _title(metric: str) -> str:
    return {ACCURACY: "accuracy", BITS: "bits per byte"}.get(metric, metric)


def length_chart(task: list[Summary]) -> go.Figure:
    """Mean over seeds with a band from the lowest to the highest; chance and the strongest shortcut dotted."""
    metric = task[0].metric
    chart = figure("sequence length (tokens)", _title(metric), log_x=True, height=440)
    trained = sorted({s.trained_len for s in task if s.trained_len > 0})
    for name, line in lines(task).items():
        good = [s for s in line if s.seeds]
        if not good:
            continue
        colour, x = _colour(good[0].model), [s.seq_len for s in good]
        if any(s.high > s.low for s in good):
            chart.add_scatter(x=[*x, *x[::-1]], y=[s.high for s in good] + [s.low for s in good[::-1]], fill="toself",
                              mode="lines", line=dict(width=0), fillcolor=faded(colour, 0.18), showlegend=False,
                              hoverinfo="skip", legendgroup=name)
        chart.add_scatter(
            x=x, y=[s.mean for s in good], name=escape(name), mode="lines+markers", legendgroup=name,
            line=dict(color=colour, width=2), marker=dict(size=8, symbol=SYMBOLS.get(good[0].model, "cross")),
            text=[f"{spread(s)}, {s.seeds} seed{'' if s.seeds == 1 else 's'}" for s in good],
            hovertemplate=escape(name) + "<br>%{x:,} tokens<br>%{text}<extra></extra>",
        )
    _levels(chart, task)
    for length in trained:
        chart.add_vline(length, line=dict(color=GREY, width=1.2, dash="dash"))
        chart.add_annotation(x=math.log10(length), y=1, yref="paper", yanchor="bottom", showarrow=False,
                             text=f"trained at {short(length)}", font=dict(size=11, color=GREY))
    length_axis(chart, [*(s.seq_len for s in task), *(int(length) for length in trained)])
    _scale(chart, metric)
    drawn = [value for s in task if s.seeds for value in (s.low, s.high) if math.isfinite(value)]
    drawn += [s.shortcut[1] for s in task if drawn and s.shortcut[1] <= max(drawn)]  # one that beats them is shown
    if metric == BITS and drawn:  # chance, 8 bits, and weak shortcuts would press all else flat: the legend says them
        room = 0.06 * (max(drawn) - min(drawn)) or 0.1
        chart.update_yaxes(range=[min(drawn) - room, max(drawn) + room])
    chart.update_layout(legend=dict(y=1.06))
    return chart


def _levels(chart: go.Figure, task: list[Summary]) -> None:
    """Dotted lines by length: guessing, and whatever needs no model."""
    found, metric = levels(task), task[0].metric
    for title, colour, points in (
        ("chance", GREY, [(level.seq_len, level.chance, "chance") for level in found]),
        ("best shortcut", SHORTCUT, [(level.seq_len, level.shortcut, level.name) for level in found]),
    ):
        points = [point for point in points if math.isfinite(point[1])]
        if not points:
            continue
        names = {name for _, _, name in points if name != title}
        values = {shown_score(value, metric) for _, value, _ in points}
        words = title + "".join(f" {value}" for value in values if len(values) == 1)
        words += "".join(f": {name}" for name in names if len(names) == 1)
        chart.add_scatter(
            x=[length for length, _, _ in points], y=[value for _, value, _ in points], name=escape(words),
            mode="lines+markers" if len(points) == 1 else "lines", line=dict(color=colour, width=1.8, dash="dot"),
            text=[f"{escape(name)}: {shown_score(value, metric)}" for _, value, name in points],
            hovertemplate="%{x:,} tokens<br>%{text}<extra></extra>",
        )


def depth_map(line: list[Summary]) -> go.Figure:
    """Depth down, length across, of one model; a length without a value is an empty column."""
    metric = line[0].metric
    depths = sorted({depth for s in line for depth in s.by.get("depth", {})}, key=label_place)
    cells = [[s.by.get("depth", {}).get(depth, math.nan) for s in line] for depth in depths]
    chart = figure("sequence length (tokens)", WORDS["depth"], height=400)
    chart.add_heatmap(
        z=cells, x=[short(s.seq_len) for s in line], y=depths, xgap=1, ygap=1,
        colorscale="Blues", zmin=0, zmax=1 if metric == ACCURACY else None,
        text=[[shown_score(cell, metric).removesuffix(" %") for cell in row] for row in cells],
        texttemplate="%{text}", textfont=dict(size=10), hoverongaps=False, showscale=False,
        hovertemplate="%{x} tokens, depth %{y}<br>%{text}" + " %" * (metric == ACCURACY) + "<extra></extra>",
    )
    chart.update_xaxes(type="category", showgrid=False)
    chart.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return chart


def group_chart(here: list[Summary], name: str) -> go.Figure:
    """One grouping at one length: a line a model over the grouping's labels, chance dotted."""
    metric = here[0].metric
    chart = figure(WORDS.get(name, escape(name)), _title(metric), height=400)
    shown = grouped(here, name)
    settings = ["", *dict.fromkeys(s.setting for s in shown.values() if s.setting)]
    for title, s in shown.items():
        groups, dash = s.by[name], DASHES[settings.index(s.setting) % len(DASHES)]
        joined = "lines+markers" if all(math.isfinite(label_place(label)[0]) for label in groups) else "markers"
        chart.add_scatter(
            x=list(groups), y=list(groups.values()), name=escape(title), mode=joined,
            line=dict(color=_colour(s.model), width=2, dash=dash),
            marker=dict(size=8, symbol=SYMBOLS.get(s.model, "cross")),
            text=[shown_score(value, metric) for value in groups.values()],
            hovertemplate=escape(title) + "<br>%{x}<br>%{text}<extra></extra>",
        )
    chance = levels(here)[0].chance
    if metric == ACCURACY and math.isfinite(chance):
        chart.add_hline(chance, line=dict(color=GREY, width=1.8, dash="dot"))
    chart.update_layout(showlegend=True)  # a single line too says whose it is
    chart.update_xaxes(type="category", categoryorder="array", categoryarray=group_labels(shown.values(), name))
    _scale(chart, metric)
    return chart


def quality_chart(here: list[Summary]) -> go.Figure:
    """LSH by keys a query, a line a number of rounds. A twin is a level, or a line where it was swept as well."""
    metric, here = here[0].metric, [s for s in trained_to(here) if s.seeds]
    chart = figure("keys a query", _title(metric), log_x=True, height=440)
    swept = quality_lines(here)
    for n, (title, line) in enumerate(swept.items()):
        _sweep(chart, title, line, PALETTE[(0, 4, 6, 1, 7, 3)[n % 6]], "circle")
    reach = [s.get("keys_a_query") for line in swept.values() for s in line]
    for title, line in quality_twins(here).items():
        colour, keys = _colour(line[0].model), {s.get("keys_a_query") for s in line}
        if len(keys) > 1:
            _sweep(chart, title, sorted(line, key=lambda s: s.get("keys_a_query")), colour, "diamond")
            continue
        chart.add_scatter(x=[min(reach), max(reach)], y=[line[0].mean] * 2, name=escape(title), mode="lines",
                          line=dict(color=colour, width=1.8, dash="dash"), text=[spread(line[0])] * 2,
                          hovertemplate=escape(title) + "<br>%{text}<extra></extra>")
        chart.add_hrect(line[0].low, line[0].high, fillcolor=faded(colour, 0.12), line_width=0, layer="below")
    ticks = sorted(set(reach))
    chart.update_xaxes(tickmode="array", tickvals=ticks, ticktext=[f"{keys:,.0f}" for keys in ticks])
    if metric == ACCURACY:
        chart.update_yaxes(tickformat=".1~%")
    return chart


def _sweep(chart: go.Figure, title: str, line: list[Summary], colour: str, symbol: str) -> None:
    chart.add_scatter(
        x=[s.get("keys_a_query") for s in line], y=[s.mean for s in line], name=escape(title), mode="lines+markers",
        line=dict(color=colour, width=2), marker=dict(size=9, symbol=symbol),
        error_y=dict(type="data", symmetric=False, array=[s.high - s.mean for s in line],
                     arrayminus=[s.mean - s.low for s in line], thickness=1.2),
        text=[f"{escape(s.setting) or 'as trained'}<br>bucket size {s.get('bucket_size'):g}<br>{spread(s)}"
              for s in line],
        hovertemplate=escape(title) + "<br>%{x:,.0f} keys a query<br>%{text}<extra></extra>",
    )
