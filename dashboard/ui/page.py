"""What every page starts with: the selected runs and their colours, the live redraw, the notes on broken files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import streamlit as st

from lshv2.run_state import Entry, find_runs, run_status
from lshv2.runs import runs_root
from ui.data import WRITTEN_BY, Noted, Reader, read
from ui.style import DASHES, PALETTE, plain

LIVE_S = 2.0  # seconds between redraws
MAX_SELECTED = len(PALETTE) * len(DASHES)


@dataclass(frozen=True)
class Look:
    colour: str
    dash: str


def sidebar() -> None:
    """Run selection (also `?runs=` in the address), live switch, refresh. Called by app.py before every page."""
    entries, problems = find_runs(runs_root())
    st.session_state["entries"] = entries
    keys = [entry.key for entry in entries]
    with st.sidebar:
        if keys:
            st.multiselect("Runs", keys, default=keys[:1], key="runs", bind="query-params", persist_state="session",
                           max_selections=MAX_SELECTED, placeholder="Choose runs to overlay",
                           help="Newest first, then the committed reference runs. The address keeps the choice.")
        with st.container(horizontal=True, vertical_alignment="center"):
            st.toggle("Live", True, key="live", bind="query-params", persist_state="session",
                      help=f"Redraw every {LIVE_S:g} seconds.")
            st.button("Refresh", key="refresh", icon=":material/refresh:")
        st.caption(f"{len(entries)} run{'' if len(entries) == 1 else 's'} in `{plain_code(str(runs_root()))}`")
        for problem in problems:
            st.warning(plain(str(problem)))


def plain_code(value: str) -> str:
    """Text between backticks of a markdown field."""
    return value.encode("utf-8", "replace").decode().replace("`", "'")


def selected() -> list[Entry]:
    """The chosen runs in their order. Without any the page ends here, with a word on what to do."""
    entries: list[Entry] = st.session_state["entries"]
    if not entries:
        st.info("**No runs yet.** Start one from the checkout's root with `make quick`; it appears here as soon as it "
                "has begun, and its curves grow while it trains.", icon=":material/science:")
        live(lambda: None)  # draws nothing, sees the first run come
        st.stop()
    chosen = chosen_runs()
    if not chosen:
        st.info("Choose one or more runs in the sidebar.", icon=":material/checklist:")
        st.stop()
    return chosen


def chosen_runs() -> list[Entry]:
    """The runs chosen in the sidebar, in their order; there may be none."""
    by_key = {entry.key: entry for entry in st.session_state["entries"]}
    return [by_key[key] for key in st.session_state.get("runs", []) if key in by_key]


def looks(entries: list[Entry]) -> dict[str, Look]:
    """Colour and dash by run key. A run keeps its own while it stays selected, on every page."""
    keys = [entry.key for entry in entries]
    slots: dict[str, int] = {key: n for key, n in st.session_state.get("slots", {}).items() if key in keys}
    for key in keys:
        if key not in slots:
            slots[key] = next(n for n in range(len(slots) + 1) if n not in slots.values())
    st.session_state["slots"] = slots
    return {key: Look(PALETTE[n % len(PALETTE)], DASHES[n // len(PALETTE) % len(DASHES)]) for key, n in slots.items()}


def loaded(reader: Reader, entries: list[Entry]) -> list[tuple[Entry, Any]]:
    """The runs that have this content, and notices about those files that are missing or broken."""
    notes: Noted = []
    runs = [(entry, content) for entry in entries if (content := read(reader, entry, notes))]
    notices(notes)
    return runs


def live(draw: Callable[[], None]) -> None:
    """Draw now, and again every LIVE_S seconds while Live is on; a new or vanished run redraws the whole app."""

    def body() -> None:
        if {entry.key for entry in find_runs(runs_root())[0]} != {e.key for e in st.session_state["entries"]}:
            st.rerun()
        draw()

    body.__qualname__ = f"{draw.__module__}.{draw.__qualname__}"  # a fragment is known by its name and place
    st.fragment(body, run_every=LIVE_S if st.session_state.get("live", True) else None)()


def notices(notes: Noted) -> None:
    """Broken files as one warning; files that their phase has not written yet as one quiet line each."""
    pending, broken = [], []
    for entry, problem in dict.fromkeys(notes):
        phase = WRITTEN_BY.get(problem.file)
        state = next((p.state for p in run_status(entry.path).phases if p.name == phase), "ok")
        waiting = problem.missing and state not in ("ok", "failed")
        (pending if waiting else broken).append(
            f"{entry.key}: {problem}" + (f": not measured yet, {phase} writes it ({state})" if waiting else "")
        )
    if broken:
        st.warning("\n".join(f"- {plain(line)}" for line in broken), icon=":material/warning:")
    if pending:
        st.info("\n".join(f"- {plain(line)}" for line in pending), icon=":material/hourglass_empty:")
