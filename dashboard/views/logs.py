"""The log of a phase, and for a failed one its error, its traceback's excerpt and how to resume."""

import streamlit as st
from ui.data import Noted, downloads
from ui.page import live, notices, selected
from ui.style import STATE_WORDS, plain

from lshv2.run_state import Entry, log_tail, run_status
from lshv2.runs import PHASES

LINES = 200

entries = selected()
st.title("Logs")
by_key = {entry.key: entry for entry in entries}
with st.container(horizontal=True, vertical_alignment="bottom"):
    chosen = st.selectbox("Run", list(by_key), key="log_run", width=320)
    entry: Entry = by_key.get(chosen, entries[0])
    phases = run_status(entry.path).phases
    telling = [p.name for state in ("failed", "running", "stopped") for p in phases if p.state == state]
    telling += [p.name for p in reversed(phases) if p.state == "ok"]
    first = telling[0] if telling else PHASES[0]
    phase = st.segmented_control("Phase", PHASES, default=first, required=True, key=f"log_phase {entry.key}") or first


def draw() -> None:
    notes: Noted = []
    status = run_status(entry.path)
    shown = next(p for p in status.phases if p.name == phase)
    tail, size, problems = log_tail(entry.path, phase, LINES)
    for failure in status.failures:
        if failure.phase == phase:
            st.error(f"**{plain(phase)} failed.** {plain(failure.error)}", icon=":material/error:")
            if failure.excerpt:
                st.markdown("Traceback, the relevant part:")
                st.code(failure.excerpt, language=None, wrap_lines=True)
            if failure.resume:
                st.markdown("To go on:")
                st.code(failure.resume, language="bash", wrap_lines=True)
    notes += [(entry, problem) for problem in status.problems]
    notes += [(entry, problem) for problem in problems if not (problem.missing and shown.state == "not run")]
    notices(notes)
    st.markdown(f"`logs/{phase}.log` · {plain(STATE_WORDS.get(shown.state, shown.state))}")
    if not problems:
        lines = tail.count("\n") + 1 if tail else 0
        with st.container(height=480 if lines > 18 else "content", border=False, autoscroll=True):  # opens at its end
            st.code(tail or "(empty)", language=None, wrap_lines=True)
        st.caption(f"The last {min(lines, LINES)} lines of {size:,} bytes. A bar that redraws itself is shown once.")
    elif shown.state == "not run":
        st.info(f"{phase} has not run in this run.")


live(draw)
downloads([entry], (f"logs/{phase}.log", f"{phase}.FAILED", f"{phase}.OK"))
