"""The attention operator alone against dense attention: time, speed-up, parts, targets. Needs no selected run."""

import streamlit as st
from ui.data import Noted, downloads, read
from ui.operator_charts import LAYOUTS, breakdown_chart, speedup_chart, time_chart
from ui.page import notices
from ui.style import judged, plain, quantity, show, table

from lshv2.operator_results import (
    FILE,
    NAMES,
    ONE_TABLE,
    OperatorResult,
    OperatorRow,
    find_operator_results,
    read_operator,
)
from lshv2.run_state import Entry
from lshv2.runs import runs_root
from lshv2.tolerant import NAN

PARTS = {"forward + backward": "both", "forward": "forward", "backward": "backward"}

st.title("Operator")
root = runs_root()
entries = {folder.relative_to(root).as_posix(): folder for folder in find_operator_results(root)}
if not entries:
    st.info("**No operator benchmark yet.** Measure one layer against dense attention with "
            "`python -m lshv2.benchmark.attention --out runs/operator/attention.json`.", icon=":material/speed:")
    st.stop()
with st.container(horizontal=True, vertical_alignment="bottom"):
    key = st.selectbox("Result", list(entries), key="operator", bind="query-params", persist_state="session", width=320)
    title = st.segmented_control("Rows", [layout.title for layout in LAYOUTS], default=LAYOUTS[0].title, key="layout",
                                 required=True, bind="query-params", persist_state="session")
    part = st.segmented_control("Time of", list(PARTS), default="forward + backward", key="operator time",
                                required=True, persist_state="session")
layout = next(layout for layout in LAYOUTS if layout.title == title)


def targets(result: OperatorResult) -> None:
    st.subheader("Targets")
    if not result.targets:
        st.info("Not judged: this file was written before there were targets.")
        return
    table(judged(result.targets), "operator targets")
    st.caption("Derived by the benchmark from its rows: medians of forward + backward of the whole operator (hashing "
               "and sorting included) against the fastest dense backend of the same row.")


def number(row: OperatorRow, name: str, key: str) -> float:
    return row.contenders[name].get(key) if name in row.contenders else NAN


def by_length(result: OperatorResult, rows: list[OperatorRow]) -> None:
    st.subheader("By length")
    named = [name for name in NAMES if any(number(row, name, "both_ms") > 0 or number(row, name, "forward_ms") > 0
                                            for row in rows)]
    lines = []
    for row in rows:
        times = [number(row, name, f"{PARTS[part]}_ms") for name in named]
        factor = [s.factor for s in result.speedups
                  if (s.mode, s.seq_len, s.batch_size) == (row.mode, row.seq_len, row.batch_size)]
        lines.append({
            "tokens": f"{row.seq_len:,}", "batch": str(row.batch_size),
            "dense ÷ LSH": quantity(factor[0] if factor else NAN, "×", 3),
            **{f"{NAMES[name]}, ms": quantity(ms) for name, ms in zip(named, times, strict=True)},
            "LSH, extra memory": quantity(number(row, "lsh", "extra_memory_ratio"), "×", 3),
        })
    table(lines, "operator by length")
    st.caption("dense ÷ LSH: forward + backward, the slower of both data. Extra memory: peak of forward + backward "
               "beyond q, k, v, o and their gradients, over those bytes.")
    missing = [
        {"tokens": f"{row.seq_len:,}", "attention": NAMES.get(name, name), "reason": entry.reason or entry.status}
        for row in rows for name, entry in row.contenders.items() if entry.status != "ok"
    ]
    if missing:
        with st.expander("Not measured, and why"):
            table(missing, "operator missing")


def adversarial(result: OperatorResult) -> None:
    for row in result.rows:
        if row.mode != "given ids":
            continue
        st.subheader(f"Bucket ids made to hurt, {row.seq_len:,} tokens")
        lines = []
        for name, entry in row.contenders.items():
            uniform = number(row, f"uniform{ONE_TABLE if name.endswith(ONE_TABLE) else ''}", "both_ms")
            lines.append({"bucket ids": name, "forward + backward": quantity(entry.get("both_ms"), "ms"),
                          "over uniform": quantity(entry.get("both_ms") / uniform if uniform else NAN, "×", 3)})
        table(lines, f"operator adversarial {row.seq_len}")
        st.caption("LSH from given ids, without hashing; one table: of several probes a query. A collapsed hash may "
                   "cost tiles, never a quadratic total.")


notes: Noted = []
entry = Entry(key, entries[key], True, 0.0)
result = read(read_operator, entry, notes)
notices(notes)
if result is not None:
    commit, torch = result.environment.get("commit", ""), result.environment.get("torch", "")
    unfinished = "" if result.state == "done" else " · not finished"
    made_by = f"torch {torch or '—'} · commit {commit[:7] or '—'}"
    st.markdown(plain(f"{result.device} · {result.dtype} · {made_by}{unfinished}"))
    targets(result)
    rows = layout.rows(result)
    left, right = st.columns(2)
    with left:
        st.subheader("Time")
        show(time_chart(rows, PARTS[part]), "operator time", "Time of one attention layer against length, log-log")
        st.caption(f"{layout.title}. Points: medians, bars from the 20th to the 80th percentile; LSH solid, others "
                   "dashed. Fixed tokens: shorter sequences in a larger batch.")
    with right:
        st.subheader("Speed-up")
        show(speedup_chart(result), "operator speed-up", "Dense time over LSH time against length, log-log")
        st.caption("The fastest dense backend over LSH on the slower of uniform and clustered data. Above the dashed "
                   "line LSH is faster.")
    told = [row for row in layout.rows(result) if any(entry.parts for entry in row.contenders.values())]
    if told:
        st.subheader("Where LSH's time goes")
        show(breakdown_chart(told, "lsh"), "operator parts", "Stacked bars: share of each part by length")
        st.caption("`global`: local window and sinks; `other`: in no region. Hatched: backward. Uniform data.")
    by_length(result, rows)
    adversarial(result)
    if result.left_out:
        st.caption("Left out: " + plain("; ".join(result.left_out)))
downloads([entry], (FILE,))
