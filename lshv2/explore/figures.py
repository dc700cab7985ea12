"""Pictures of a pattern as plotly figures: heat map, shares by position and by rounds, bucket map.

Colours are Okabe and Ito's, as in `lshv2.plots`: blue is what LSH finds. Shapes: T tokens, R rounds.
"""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from lshv2.explore.pattern import MAX_ROUNDS, Pattern

# Each part of the causal triangle has its own ramp, from no mass to all of it. Even without mass a seen key is tinted.
PARTS = {
    "missed": ("#FFFFFF", "#000000"),
    "local window": ("#D9F0E8", "#006B4E"),
    "sinks": ("#F8E3EF", "#A0396F"),
    "found by hash": ("#56B4E9", "#0033A0"),
}
LEVELS = 32  # shades of a part: the picture is one byte a cell, where masses would be four in each of four layers
FLOOR = 1e-3  # the mass that is drawn like none
LINES = {
    "visible": ("visible set", "#0072B2", "solid"),
    "random": ("same number, rest at random", "#D55E00", "dash"),
    "best": ("same number, rest the heaviest", "#009E73", "dot"),
    "near": ("window and sinks alone", "#888888", "solid"),
}
SMOOTH = 8  # queries averaged to either side in the curve by position
LAYOUT = dict(template="plotly_white", margin=dict(l=60, r=20, t=40, b=45), font=dict(size=12))


def mass_levels(pattern: Pattern) -> np.ndarray:
    """uint8 [T,T]: part · LEVELS + shade of log mass; the future is 0, like a missed key without mass."""
    part = torch.zeros_like(pattern.mass, dtype=torch.uint8)
    for index, mask in ((3, pattern.visible), (2, pattern.seen[0]), (1, pattern.local)):  # local wins over sinks
        part[mask] = index
    shade = (pattern.mass.clamp(FLOOR, 1.0).log10() / -np.log10(FLOOR) + 1) * (LEVELS - 1)
    return (part * LEVELS + shade.round().to(torch.uint8)).numpy()


def mass_figure(pattern: Pattern) -> go.Figure:
    """Dense attention's mass, coloured by which part of S(t) sees it; black is missed."""
    top = LEVELS * len(PARTS) - 1
    scale = []
    for index, (light, dark) in enumerate(PARTS.values()):
        scale += [[index * LEVELS / top, light], [(index * LEVELS + LEVELS - 1) / top, dark]]
    figure = go.Figure(go.Heatmap(
        z=mass_levels(pattern), zmin=0, zmax=top, colorscale=scale, showscale=False,
        hovertemplate="query %{y}, key %{x}<extra></extra>",
    ))
    totals = {"local window": pattern.local, "sinks": pattern.seen[0] & ~pattern.local,
              "found by hash": pattern.visible & ~pattern.seen[0], "missed": pattern.far & ~pattern.visible}
    for name, mask in totals.items():
        light, dark = PARTS[name]
        share = float((pattern.mass * mask).sum(-1)[pattern.searching].mean())
        figure.add_scatter(x=[None], y=[None], mode="markers", name=f"{name}: {share:.1%} of the mass",
                           marker=dict(symbol="square", size=13, color=dark, line=dict(width=3, color=light)))
    last = len(pattern.mass) - 0.5
    figure.update_layout(
        **LAYOUT, title="Dense attention's mass (log shades), coloured by what sees it", height=640, width=860,
        legend=dict(x=0.99, y=0.99, xanchor="right", bgcolor="rgba(255,255,255,0.8)"),
    )
    figure.update_xaxes(title="key position", range=[-0.5, last], constrain="domain", showgrid=False, zeroline=False)
    figure.update_yaxes(title="query position", range=[last, -0.5], scaleanchor="x", constrain="domain",
                        showgrid=False, zeroline=False)
    return figure


def caught_figure(pattern: Pattern) -> go.Figure:
    """Left: caught mass by query position (running mean). Right: its mean against rounds, the chosen number marked."""
    figure = make_subplots(1, 2, horizontal_spacing=0.09,
                           subplot_titles=("caught mass by query position", "caught mass against rounds"))
    chosen = pattern.shares(pattern.mass)
    by_rounds = [pattern.shares(pattern.mass, r) for r in range(MAX_ROUNDS + 1)]
    rounds = list(range(MAX_ROUNDS + 1))
    for key, (name, colour, dash) in LINES.items():
        line = dict(color=colour, dash=dash, width=2)
        figure.add_scatter(y=running_mean(getattr(chosen, key)), mode="lines", line=line, name=name, row=1, col=1)
        means = [float(getattr(shares, key)[pattern.searching].mean()) for shares in by_rounds]
        figure.add_scatter(x=rounds, y=means, mode="lines+markers" if key == "visible" else "lines", line=line,
                           name=name, showlegend=False, row=1, col=2)
    figure.add_vline(x=pattern.n_rounds, line=dict(color="#333333", width=1, dash="dot"), row=1, col=2)
    if 0 < pattern.own_rounds < MAX_ROUNDS:
        figure.add_vrect(x0=pattern.own_rounds + 0.5, x1=MAX_ROUNDS + 0.2, fillcolor="#888888", opacity=0.12,
                         line_width=0, annotation_text="untrained tables", annotation_position="top left",
                         row=1, col=2)
    figure.update_layout(**LAYOUT, height=360, width=1060, legend=dict(orientation="h", y=-0.2))
    figure.update_yaxes(tickformat=".0%")
    figure.update_yaxes(range=[0, 1.02], row=1, col=1)
    figure.update_xaxes(title="query position", row=1, col=1)
    figure.update_xaxes(title="rounds", dtick=1, row=1, col=2)
    return figure


def bucket_map(pattern: Pattern) -> go.Figure:
    """Bucket of every query and key by position, a panel a round: a query finds the keys at its height to its left."""
    rounds = max(1, pattern.n_rounds)
    columns = min(4, rounds)
    rows = -(-rounds // columns)
    titles = [f"round {r + 1}{'' if r < pattern.own_rounds else ' (untrained table)'}" for r in range(rounds)]
    figure = make_subplots(rows, columns, shared_xaxes=True, shared_yaxes=True, horizontal_spacing=0.02,
                           vertical_spacing=0.09, subplot_titles=titles)
    position = np.arange(len(pattern.mass), dtype=np.int16)
    for r in range(rounds):
        for name, ids, colour, symbol in (("keys", pattern.k_ids, "#E69F00", "square"),
                                          ("queries", pattern.q_ids, "#0072B2", "circle-open")):
            figure.add_scatter(
                x=position, y=ids[r].numpy(), mode="markers", name=name, legendgroup=name, showlegend=r == 0,
                marker=dict(size=4, color=colour, symbol=symbol), row=r // columns + 1, col=r % columns + 1,
                hovertemplate=f"{name[:-1] if name == 'keys' else 'query'} %{{x}}, bucket %{{y}}<extra></extra>",
            )
    figure.update_layout(**LAYOUT, height=110 + 230 * rows, width=1060)
    figure.update_layout(legend=dict(orientation="h", x=0.3, y=1, yref="container", yanchor="top"), margin_t=75,
                         title="Buckets by position")
    figure.update_yaxes(range=[-0.03 * pattern.n_buckets - 0.5, 1.03 * pattern.n_buckets - 0.5])
    figure.update_yaxes(title="bucket", col=1)
    figure.update_xaxes(title="position", row=rows)
    return figure


def running_mean(x: Tensor) -> np.ndarray:
    """Mean over SMOOTH neighbours to either side, fewer at the ends: float32 [T] -> [T]."""
    kernel = np.ones(2 * SMOOTH + 1, np.float32)
    values = x.numpy().astype(np.float32)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")
