"""The picture beside an `attention.json`: time against length, speed-up, and where LSH's time goes, as PNG bytes.

    png = operator_png(folder)

Same manner and colours as `lshv2.plots`; nothing is measured or fitted here.
"""

from __future__ import annotations

import io
import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lshv2.errors import UserError
from lshv2.operator_results import NAMES, OperatorResult, read_operator
from lshv2.plots import REFERENCE, label, length_axis, new_figure

COLOURS = dict(zip(NAMES, ("#0072B2", "#56B4E9", "#332288", "#88CCEE", "#D55E00", "#E69F00", "#CC79A7", "#D55E00",
                           "#009E73", "#AA3377"), strict=True))
LAYOUTS = {"batch 1": ("eager", True), "fixed tokens": ("eager", False), "batch 1, CUDA graph": ("graph", True)}
PARTS = {"hashing": "#E69F00", "bucket_attn": "#0072B2", "global": "#009E73", "other": "#BBBBBB"}


def operator_png(folder: Path) -> bytes:
    """Raises UserError where the folder has no usable `attention.json`."""
    result, problems = read_operator(folder)
    if result is None or not result.rows:
        raise UserError(f"{folder}: no plot: {problems[0] if problems else 'attention.json has no rows'}")
    kind = "" if result.state == "done" else "  ·  not finished"
    figure, (time, speed, parts) = new_figure(3, f"one attention layer, {result.device}, {result.dtype}{kind}")
    _draw_times(time, result)
    _draw_speedups(speed, result)
    _draw_parts(parts, result)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _draw_times(axis: Axes, result: OperatorResult) -> None:
    rows = result.of("eager", batch_one=True)
    for name, words in NAMES.items():
        points = [(row.seq_len, entry.get("both_ms")) for row in rows
                  if (entry := row.contenders.get(name)) and entry.get("both_ms") > 0]
        if points:
            axis.plot(*zip(*points, strict=True), color=COLOURS[name], marker="o", markersize=4, linewidth=1.3,
                      linestyle="-" if name.startswith("lsh") else "--", label=words)
    axis.set_yscale("log")
    _lengths(axis, [row.seq_len for row in rows])
    label(axis, "forward + backward, batch 1", "tokens", "milliseconds")


def _draw_speedups(axis: Axes, result: OperatorResult) -> None:
    lengths: list[int] = []
    for words, (mode, batch_one) in LAYOUTS.items():
        shown = {(row.seq_len, row.batch_size) for row in result.of(mode, batch_one)}
        points = sorted((s.seq_len, s.factor) for s in result.speedups
                        if s.mode == mode and (s.seq_len, s.batch_size) in shown and s.factor > 0)
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.3, label=words)
            lengths += [length for length, _ in points]
    axis.axhline(1, color=REFERENCE, linestyle="--", linewidth=1.2)
    axis.set_yscale("log")
    _lengths(axis, lengths)
    label(axis, "fastest dense ÷ LSH (slower data)", "tokens", "times")


def _draw_parts(axis: Axes, result: OperatorResult) -> None:
    """Shares of forward + backward on uniform data, forward and backward of a region together."""
    rows = [row for row in result.of("eager", batch_one=True)
            if "lsh" in row.contenders and row.contenders["lsh"].parts]
    left = [0.0] * len(rows)
    names = [f"{row.seq_len:,}" for row in rows]
    for part, colour in PARTS.items():
        shares = []
        for row in rows:
            halves = row.contenders["lsh"].parts.values()
            total = math.fsum(ms for half in halves for ms in half.values())
            shares.append(100 * math.fsum(half.get(part, 0.0) for half in halves) / total if total else 0.0)
        axis.barh(names, shares, left=left, color=colour, height=0.7, label=part)
        left = [before + share for before, share in zip(left, shares, strict=True)]
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    label(axis, "where LSH's time goes", "% of forward + backward", "tokens")
    axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=len(PARTS))


def _lengths(axis: Axes, lengths: list[int]) -> None:
    """Both axes logarithmic, plain numbers on the upright one."""
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=15))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    length_axis(axis, lengths)
