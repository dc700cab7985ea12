"""Latency and memory against length, LSH beside its dense twin, with exponents and what failed."""

import math

import streamlit as st
from ui.data import downloads
from ui.page import live, loaded, looks, selected
from ui.scaling_charts import MEMORY, TIMES, TRAIN, WORDS, Measure, Runs, between, cost_chart, interval
from ui.style import plain, quantity, show, table

from lshv2.benchmark_results import Row, read_benchmark

entries = selected()
look = looks(entries)
LAYOUTS = ("fixed batch", "fixed tokens")
st.title("Scaling")
with st.container(horizontal=True, vertical_alignment="bottom"):
    kind = st.segmented_control("Time of", list(TIMES), default="forward + backward", key="time",
                                required=True, bind="query-params", persist_state="session")
    layout = st.segmented_control("Every length with", LAYOUTS, default=LAYOUTS[0], required=True,
                                  key="every_length_with", bind="query-params", persist_state="session")
    attentions = st.pills("Attention", list(WORDS), default=["lsh", "dense"], selection_mode="multi", key="attention",
                          format_func=lambda name: WORDS[name], bind="query-params", persist_state="session")
time_of = TIMES[kind]
of = " of one sequence" if layout == LAYOUTS[1] else ""


def draw() -> None:
    runs: Runs = [(entry, look[entry.key], benchmark) for entry, benchmark in loaded(read_benchmark, entries)]
    if layout == LAYOUTS[1]:
        without = [entry.key for entry, _, benchmark in runs if benchmark.fixed_tokens is None]
        if without:
            st.info(f"{plain(', '.join(without))}: not measured at fixed tokens (`benchmark.fixed_tokens`)")
        runs = [(entry, colours, benchmark.fixed_tokens) for entry, colours, benchmark in runs
                if benchmark.fixed_tokens is not None]
    if not runs or not attentions:
        return
    left, right = st.columns(2)
    with left:
        st.subheader(f"Time{of}")
        show(cost_chart(runs, time_of, attentions), "latency", "Time against sequence length, both axes logarithmic")
        st.caption("Points: median of the samples, bars from the 20th to the 80th percentile. Lines: least-squares "
                   "fits of the logarithms, bands: their 95 % intervals. α near 1 is linear, 2 quadratic; the target "
                   "is α ≤ 1.2. Crosses above the chart: lengths without a value. Source: `benchmark_summary.json`.")
    with right:
        st.subheader(f"Memory{of}")
        show(cost_chart(runs, MEMORY, attentions), "memory", "Memory against sequence length, both axes logarithmic")
        st.caption("Peak memory less the fixed cost (interpreter, libraries, weights). β near 1 is linear. "
                   "Source: `benchmark_summary.json` → `activation_mb`.")
    fits(runs)
    doublings(runs)
    by_length(runs)
    failures(runs)


def fits(runs: Runs) -> None:
    rows = []
    for entry, _, benchmark in runs:
        for measure in (*TIMES.values(), MEMORY):
            for attention in attentions:
                fit = benchmark.fits.get((attention, measure.fit))
                if not fit:
                    continue
                more = benchmark.scaling[attention, measure.fit]
                decade, beside = more.ranges.get("longest_decade"), more.fixed_part
                rows.append({
                    "run": entry.key, "attention": WORDS[attention], "cost": measure.title.split(" (")[0],
                    "exponent [95 %]": interval(fit),
                    "bootstrap [95 %]": between(fit.bootstrap_low, fit.bootstrap_high) or "—",
                    "drawn again": more.resampled or "—",
                    "longest decade, at most": quantity(decade.upper, digits=3) if decade else "—",
                    "a + b·n^α [95 %]": interval(beside) if beside else "—",
                    "R²": quantity(fit.r2),
                    "lengths": f"{fit.min_seq_len:,.0f} – {fit.max_seq_len:,.0f} ({fit.n:.0f})",
                    "device": f"{benchmark.device} {benchmark.dtype}",
                })
    if rows:
        st.subheader("Exponents")
        table(rows, "fits")
        st.caption("First Student's t interval, of the points about the line, then the bootstrap's: what measuring "
                   "again in other processes would change (samples of one process where there was one). Longest "
                   "decade: the larger upper end of both, from a tenth of the longest length on. a + b·n^α: a cost "
                   "that does not grow is fitted beside. Exponents over short lengths flatter: trust those that reach "
                   "far.")


def doublings(runs: Runs) -> None:
    """A line an attention, a column a length: the cost over that of half the length."""
    found = [(entry.key, attention, scaling.doublings) for entry, _, benchmark in runs for attention in attentions
             if (scaling := benchmark.scaling.get((attention, time_of.fit))) and scaling.doublings]
    lengths = sorted({one.seq_len for _, _, ratios in found for one in ratios})
    if not lengths:
        return
    rows = []
    for key, attention, ratios in found:
        cells = {one.seq_len: f"{one.ratio:.2f} {between(one.low, one.high)}".strip() for one in ratios}
        rows.append({"run": key, "attention": WORDS[attention],
                     **{f"to {length:,.0f}": cells.get(length, "—") for length in lengths}})
    st.subheader("Every doubling")
    table(rows, "doublings")
    st.caption(f"Time of {kind} at a length over that at half of it, with the bootstrap's 95 % interval; 2 is linear, "
               "4 quadratic. No model is in it.")


def by_length(runs: Runs) -> None:
    st.subheader("By length")
    rows = []
    for entry, _, benchmark in runs:
        cells = {(row.attention, row.seq_len): row for row in benchmark.rows if row.status == "ok"}
        for length in sorted({row.seq_len for row in benchmark.rows}):
            line = {"run": entry.key, "tokens": f"{length:,}", "dense ÷ LSH": _ratio(cells, length, time_of)}
            for attention in attentions:
                row = cells.get((attention, length))
                name, rate = WORDS[attention], "train_tokens_per_sec" if time_of is TRAIN else "tokens_per_sec"
                line[f"{name}, ms"] = _cell(row, time_of.column)
                if time_of.column in ("latency_ms", "train_latency_ms"):
                    line[f"{name}, tokens/s"] = _cell(row, rate)
                line[f"{name}, MB"] = _cell(row, MEMORY.column)
            rows.append(line)
    table(rows, "by length")
    st.caption(f"Time{of} and tokens per second of {kind}; dense ÷ LSH: how many times longer the dense twin takes. "
               f"Memory{of} is without the fixed cost. Source: `benchmark_summary.json`.")


def _cell(row: Row | None, column: str) -> str:
    return quantity(row.get(column)) if row is not None else "—"


def _ratio(cells: dict[tuple[str, int], Row], length: int, measure: Measure) -> str:
    lsh, dense = (cells.get((name, length)) for name in ("lsh", "dense"))
    if lsh is None or dense is None or not lsh.get(measure.column) > 0 or math.isnan(dense.get(measure.column)):
        return "—"
    return quantity(dense.get(measure.column) / lsh.get(measure.column), "×", 3)


def failures(runs: Runs) -> None:
    rows = [
        {"run": entry.key, "attention": WORDS[row.attention], "tokens": f"{row.seq_len:,}", "what happened": row.status,
         "reason": row.reason or "—"}
        for entry, _, benchmark in runs for row in benchmark.rows if row.status != "ok"
    ]
    if rows:
        st.subheader("Lengths without a value")
        table(rows, "failures")


live(draw)
downloads(entries, ("benchmark_summary.json",))
