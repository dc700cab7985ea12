"""All runs with their state; what is running now; verdict, success flags and phases of the selected ones."""

import time

import streamlit as st
from ui.data import Noted, downloads, read
from ui.page import live, notices, selected
from ui.style import STATE_WORDS, count, duration, plain, quantity, table

from lshv2.benchmark_results import read_benchmark
from lshv2.curves import read_training
from lshv2.readers import Manifest, read_manifest, read_settings
from lshv2.run_state import Entry, Status, run_status

entries = selected()
st.title("Overview")


def draw() -> None:
    everything: list[Entry] = st.session_state["entries"]
    states = {entry.key: run_status(entry.path) for entry in everything}
    for entry in everything:
        if states[entry.key].state == "running":
            running(entry, states[entry.key])
    st.subheader("Runs")
    table([summary(entry, states[entry.key]) for entry in everything], "runs table")
    st.caption("Newest first, then the committed reference runs. — means not measured. α and β are the LSH exponents "
               "of time and memory. Choose in the sidebar which runs the other pages overlay.")
    notes: Noted = [(entry, problem) for entry in entries for problem in states[entry.key].problems]
    manifests = {entry.key: read(read_manifest, entry, notes) for entry in entries}
    for entry in entries:
        read(read_settings, entry, notes)
    for entry in entries:
        for failure in states[entry.key].failures:
            st.error(f"**{plain(entry.key)}: {plain(failure.phase)} failed.** {plain(failure.error)}  \n"
                     "The Logs page has the traceback and how to resume.", icon=":material/error:")
    notices(notes)
    verdicts(manifests)
    flags(manifests)
    phases(states)


def running(entry: Entry, status: Status) -> None:
    bar = status.bar
    if bar is None:
        st.progress(0.0, f"**{plain(entry.key)}** · {plain(status.detail)} is starting")
        return
    left = f" · {duration(bar.eta_s)} left" if bar.eta_s == bar.eta_s else ""
    figures = "".join(f" · {name} {value}" for name, value in bar.figures.items())
    words = f"{bar.phase} · {bar.label} · {bar.done:,.0f} of {bar.total:,.0f} {bar.unit}s{left}{figures}"
    st.progress(bar.fraction, f"**{plain(entry.key)}** · {plain(words)}")


def summary(entry: Entry, status: Status) -> dict[str, str]:
    settings = read(read_settings, entry) or {}
    training, benchmark = read(read_training, entry), read(read_benchmark, entry)
    exponents = [benchmark.fits.get(("lsh", kind)) if benchmark else None for kind in ("train_latency", "memory")]
    alpha, beta = (f"{fit.exponent:.2f}" if fit else "—" for fit in exponents)
    return {
        "run": entry.key, "state": STATE_WORDS[status.state] + (" (reference)" if entry.reference else ""),
        "device": device(entry),
        "bits per byte": quantity(training.language_model.last("bits_per_byte"), digits=4) if training else "—",
        "recall": quantity(100 * training.recall.last("accuracy"), "%", 3) if training else "—",
        "α": alpha, "β": beta, "preset": settings.get("preset", "—"),
        "parameters": count(training.parameters) if training else "—",
        "changed": changed(entry), "detail": status.detail or "—",
    }


def changed(entry: Entry) -> str:
    age = time.time() - entry.changed
    if age < 86400:
        return "now" if age < 5 else f"{duration(age)} ago"
    return time.strftime("%Y-%m-%d", time.localtime(entry.changed))


def device(entry: Entry) -> str:
    """The accelerator's name where a file knows it, else what training or benchmark say they ran on."""
    manifest, training, benchmark = (read(reader, entry) for reader in (read_manifest, read_training, read_benchmark))
    environment = manifest.environment if manifest else {}
    known = [environment.get("gpus", "")]
    known += [content.device for content in (benchmark, training) if content]
    return next((name for name in known if name), "—")


def verdicts(manifests: dict[str, Manifest | None]) -> None:
    for key, manifest in manifests.items():
        if manifest and manifest.verdict:
            st.markdown(f"**{plain(key)}** — {plain(manifest.verdict)}")


def flags(manifests: dict[str, Manifest | None]) -> None:
    st.subheader("Success flags")
    names = list(dict.fromkeys(flag.name for manifest in manifests.values() if manifest for flag in manifest.flags))
    if not names:
        st.info("Not measured: no selected run has a report yet (05_report writes the flags).")
        return
    rows = []
    for name in names:
        row = {"flag": name, "target": "", "source": ""}
        for key, manifest in manifests.items():
            flag = next((flag for flag in manifest.flags if flag.name == name), None) if manifest else None
            row[key] = "not measured"
            if flag:
                row["target"], row["source"] = row["target"] or flag.target, row["source"] or flag.source
                if flag.passed is not None:
                    row[key] = f"{'✔' if flag.passed else '✖'} {flag.value}"
            if flag and len(entries) == 1:
                row["how it was measured"] = flag.detail
        rows.append({**{k: v for k, v in row.items() if k != "source"}, "source": row["source"]})
    table(rows, "flags table")
    st.caption("✔ reached, ✖ missed, with the measured value; *not measured* is neither. "
               "Source: `pipeline_results.json`.")


def phases(states: dict[str, Status]) -> None:
    st.subheader("Phases")
    rows = []
    for n, first in enumerate(states[entries[0].key].phases):
        row = {"phase": first.name}
        for entry in entries:
            phase = states[entry.key].phases[n]
            took = f" · {duration(phase.seconds)}" if phase.seconds == phase.seconds else ""
            row[entry.key] = STATE_WORDS.get(phase.state, phase.state) + took
        rows.append(row)
    total = {"phase": "total"}
    for entry in entries:
        known = [phase.seconds for phase in states[entry.key].phases if phase.seconds == phase.seconds]
        total[entry.key] = duration(sum(known)) if known else "—"
    table([*rows, total], "phases table")
    st.caption("Source: the `<phase>.OK` and `<phase>.FAILED` markers, `progress.json`, `pipeline_results.json`.")


live(draw)
downloads(entries, ("config.json", "pipeline_results.json", "model_summary.json", "data/data.json"))
