"""Cached readers: a file is parsed again only when its (path, mtime_ns, size) changed. Downloads of the same files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import streamlit as st

from lshv2 import arena_results, operator_results
from lshv2.arena_results import read_arena
from lshv2.benchmark_results import read_benchmark
from lshv2.curves import read_training
from lshv2.operator_results import read_operator
from lshv2.readers import read_manifest, read_profile, read_settings
from lshv2.run_state import Entry
from lshv2.tolerant import Problem, Problems, refusal

Reader = Callable[[Path], tuple[Any, Problems]]
FILES: dict[Reader, tuple[str, ...]] = {
    read_settings: ("config.json",),
    read_training: ("metrics.jsonl", "training_metrics.json"),
    read_profile: ("component_profiles.json",),
    read_benchmark: ("benchmark_summary.json",),
    read_manifest: ("pipeline_results.json",),
    read_operator: (operator_results.FILE,),
    read_arena: (arena_results.FILE,),
}
READERS = {reader.__name__: reader for reader in FILES}
WRITTEN_BY = {"metrics.jsonl": "03_train", "training_metrics.json": "03_train", "component_profiles.json": "03_train",
              "benchmark_summary.json": "04_benchmark", "pipeline_results.json": "05_report"}
Stamp = tuple[tuple[int, int] | None, ...]
Noted = list[tuple[Entry, Problem]]


def stamp(run: Path, names: tuple[str, ...]) -> Stamp:
    """(mtime_ns, size) of each file, None for one that is not there: the cache's key."""
    found: list[tuple[int, int] | None] = []
    for name in names:
        try:
            status = (run / name).stat()
            found.append((status.st_mtime_ns, status.st_size))
        except OSError:
            found.append(None)
    return tuple(found)


@st.cache_resource(max_entries=400, show_spinner=False)
def _read(reader: str, path: str, files: Stamp) -> tuple[Any, Problems]:
    return READERS[reader](Path(path))


def read(reader: Reader, entry: Entry, notes: Noted | None = None) -> Any:
    """The content (shared and read-only; None where unreadable); its problems are added to `notes`."""
    content, problems = _read(reader.__name__, str(entry.path), stamp(entry.path, FILES[reader]))
    if notes is not None:
        notes += [(entry, problem) for problem in problems]
    return content


def downloads(entries: list[Entry], names: tuple[str, ...]) -> None:
    """One button a run and file, read from disk only when pressed."""
    with st.expander("Download the files behind this page", icon=":material/download:"):
        for entry in entries:
            offered = [name for name in names if refusal(entry.path, name) is None]
            st.text(entry.key if offered else f"{entry.key}: none of {', '.join(names)}")
            if not offered:
                continue
            with st.container(horizontal=True):
                for name in offered:
                    shown = f"{entry.key.replace('/', '_')}_{name.replace('/', '_')}"
                    st.download_button(name, (entry.path / name).read_bytes, shown, key=f"get {entry.key} {name}",
                                       on_click="ignore")
