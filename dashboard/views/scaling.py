"""Latency and memory against length, LSH beside its dense twin, with exponents and what failed."""

import streamlit as st
from ui.data import downloads
from ui.page import live, loaded, looks, selected
from ui.scaling_charts import FORWARD, MEMORY, TRAIN, WORDS, Measure, Runs, cost_chart, interval
from ui.style import quantity, show, table

from lshv2.readers import Row, read_benchmark

entries = selected()
look = looks(entries)
st.title("Scaling")
with st.container(horizontal=True, vertical_alignment="bottom"):
    kind = st.segmented_control("Time of", ["forward + backward", "forward"], default="forward + backward", key="time",
                                required=True, bind="query-params", persist_state="session")
    attentions = st.pills("Attention", list(WORDS), default=["lsh", "dense"], selection_mode="multi", key="attention",
                          format_func=lambda name: WORDS[name], bind="query-params", persist_state="session")
time_of = FORWARD if kind == "forward" else TRAIN


def draw() -> None:
    runs: Runs = [(entry, look[entry.key], benchmark) for entry, benchmark in loaded(read_benchmark, entries)]
    if not runs or not attentions:
        return
    left, right = st.columns(2)
    with left:
        st.subheader("Time")
        show(cost_chart(runs, time_of, attentions), "latency", "Time against sequence length, both axes logarithmic")
        st.caption("Points: median of the samples, bars from the 20th to the 80th percentile. Lines: least-squares "
                   "fits of the logarithms, bands: their 95 % intervals. α near 1 is linear, 2 quadratic; the target "
                   "is α ≤ 1.2. Crosses above the chart: lengths without a value. Source: `benchmark_summary.json`.")
    with right:
        st.subheader("Memory")
        show(cost_chart(runs, MEMORY, attentions), "memory", "Memory against sequence length, both axes logarithmic")
        st.caption("Peak memory less the fixed cost (interpreter, libraries, weights). β near 1 is linear. "
                   "Source: `benchmark_summary.json` → `activation_mb`.")
    fits(runs)
    by_length(runs)
    failures(runs)


def fits(runs: Runs) -> None:
    rows = []
    for entry, _, benchmark in runs:
        for measure in (TRAIN, FORWARD, MEMORY):
            for attention in attentions:
                fit = benchmark.fits.get((attention, measure.fit))
                if fit:
                    rows.append({
                        "run": entry.key, "attention": WORDS[attention], "cost": measure.title.split(" (")[0],
                        "exponent [95 %]": interval(fit), "last doubling": quantity(fit.last_doubling, "×", 3),
                        "R²": quantity(fit.r2),
                        "lengths": f"{fit.min_seq_len:,.0f} – {fit.max_seq_len:,.0f} ({fit.n:.0f})",
                        "device": f"{benchmark.device} {benchmark.dtype}",
                    })
    if rows:
        st.subheader("Exponents")
        table(rows, "fits")
        st.caption("Last doubling: cost at the longest length over cost at half of it; 2× is linear, 4× quadratic. "
                   "Exponents over short lengths flatter: trust those that reach far.")


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
                line[f"{name}, tokens/s"] = _cell(row, rate)
                line[f"{name}, MB"] = _cell(row, MEMORY.column)
            rows.append(line)
    table(rows, "by length")
    st.caption(f"Time and tokens per second of {kind}; dense ÷ LSH: how many times longer the dense twin takes. "
               "Memory is without the fixed cost. Source: `benchmark_summary.json`.")


def _cell(row: Row | None, column: str) -> str:
    return quantity(row.get(column)) if row is not None else "—"


def _ratio(cells: dict[tuple[str, int], Row], length: int, measure: Measure) -> str:
    lsh, dense = (cells.get((name, length)) for name in ("lsh", "dense"))
    if lsh is None or dense is None or not lsh.get(measure.column) > 0:
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
