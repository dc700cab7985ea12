"""Every setting of the selected runs side by side, the differing ones highlighted, and where they ran."""

import pandas as pd
import streamlit as st
from ui.data import Noted, downloads, read
from ui.page import live, notices, selected

from lshv2.readers import read_manifest, read_settings

entries = selected()
st.title("Settings")
only = st.toggle("Only what differs", key="only_differences", bind="query-params", persist_state="session",
                 disabled=len(entries) < 2)


def draw() -> None:
    notes: Noted = []
    settings = {entry.key: read(read_settings, entry, notes) or {} for entry in entries}
    manifests = {entry.key: read(read_manifest, entry) for entry in entries}
    notices(notes)
    compare({key: values for key, values in settings.items() if values}, "setting", "settings")
    st.caption("Highlighted: not the same in all selected runs. Source: `config.json`.")
    environments = {key: found.environment for key, found in manifests.items() if found and found.environment}
    if environments:
        st.subheader("Environment")
        compare(environments, "what", "environment")
        st.caption("The machine and the versions. Source: `pipeline_results.json`.")


def compare(columns: dict[str, dict[str, str]], heading: str, key: str) -> None:
    names = list(dict.fromkeys(name for values in columns.values() for name in values))
    frame = pd.DataFrame({run: [values.get(name, "—") for name in names] for run, values in columns.items()},
                         dtype="string")
    differs = frame.nunique(axis=1) > 1
    frame.insert(0, heading, pd.array(names, dtype="string"))
    if only and len(entries) > 1:
        frame, differs = frame[differs], differs[differs]
        if frame.empty:
            st.info("Nothing differs.")
            return
    shade = "background-color: rgba(230, 159, 0, 0.25)"
    styled = frame.style.apply(lambda row: [shade if differs[row.name] else ""] * len(row), axis=1)
    st.dataframe(styled, key=key, height="content", hide_index=True, column_config={heading: {"width": 260}})


live(draw)
downloads(entries, ("config.json",))
