"""What is right at which length: the arena's tasks, LSH beside its twins, with chance and the strongest shortcut."""

import math

import plotly.graph_objects as go
import streamlit as st
from ui.arena_charts import WORDS, depth_map, group_chart, length_chart, quality_chart
from ui.data import Noted, downloads, read
from ui.page import chosen_runs, live, notices, selected
from ui.style import judged, plain, quantity, show, table

from lshv2.arena_gain import GAIN, gain_table
from lshv2.arena_results import (
    BITS,
    CURVE,
    FILE,
    MODELS,
    NEEDLES,
    PICTURE,
    TASKS,
    Arena,
    Summary,
    find_arenas,
    read_arena,
)
from lshv2.arena_shapes import ABOUT, shape_table
from lshv2.arena_targets import PUBLISHED, arena_targets
from lshv2.arena_views import (
    Level,
    grouped,
    levels,
    lines,
    quality_lengths,
    seed_range,
    shown_score,
    spread,
    trained_to,
)
from lshv2.benchmark_results import read_benchmark
from lshv2.run_state import Entry
from lshv2.runs import runs_root

st.title("Arena")


def found() -> dict[str, Entry]:
    """Runs and references that have an arena, the chosen runs first."""
    keys = {folder.relative_to(runs_root()).as_posix(): folder for folder in find_arenas(runs_root())}
    first = [entry.key for entry in chosen_runs() if entry.key in keys]
    return {key: Entry(key, keys[key], "/" in key, 0.0) for key in [*first, *(key for key in keys if key not in first)]}


def without() -> None:
    """How the chosen runs that have no arena get one."""
    for entry in chosen_runs():
        if not (entry.path / FILE).exists():
            name = "name" if entry.reference else entry.path.name
            st.info(f"**{plain(entry.key)} has no arena yet.** Measure it with `make arena RUN={name}`.",
                    icon=":material/stadium:")


def choices() -> tuple[list[str], list[str], list[int]]:
    """What there is to choose from: results, tasks, lengths. A change redraws the page."""
    entries = found()
    arena = read(read_arena, entries[key]) if key in entries else None
    tasks = arena.tasks if arena else []
    lengths = sorted({s.seq_len for s in arena.of(task, None)}) if arena and task in tasks else []
    return list(entries), tasks, lengths


key, task = "", ""
entries = found()
without()
if not entries:
    selected()
    live(lambda: st.rerun() if found() else None)
    st.stop()
with st.container(horizontal=True, vertical_alignment="bottom"):
    key = st.selectbox("Result", list(entries), key="arena", bind="query-params", persist_state="session", width=280)
    offered = choices()[1]
    if offered:
        task = st.selectbox("Task", offered, key="task", bind="query-params", persist_state="session", width=280,
                            format_func=lambda name: TASKS.get(name, name))
    known = choices()
    if known[2]:
        length = st.selectbox("Groups at", known[2][::-1], key=f"arena length {task}", width=180,
                              format_func=lambda n: f"{n:,} tokens")


def draw() -> None:
    if choices() != known:
        st.rerun()
    notes: Noted = []
    arena: Arena | None = read(read_arena, entries[key], notes)
    notices(notes)
    if arena is None:
        return
    made_by = [", ".join(arena.origins(name, task)[:8]) or "—" for name in ("device", "dtype", "torch", "commit")]
    st.markdown(plain(f"{made_by[0]} · {made_by[1]} · torch {made_by[2]} · commit {made_by[3]}"))
    of_task = arena.of(task, None)
    as_trained = [s for s in of_task if not s.setting]
    st.subheader(plain(TASKS.get(task, task)))
    charts(of_task, as_trained)
    if task in PUBLISHED:
        st.caption(plain(f"Published, by other models and trainings: {PUBLISHED[task]}."))
    overview(arena)
    gains(arena)
    shapes(arena)
    st.subheader("Targets")
    table(judged(arena_targets(arena.summaries, read(read_benchmark, entries[key]))), "arena targets")
    st.caption("Means over seeds, as trained; met is said only of what was measured as far as the target goes. "
               f"Source: `{FILE}`, and `benchmark_summary.json` for α and β.")
    results(of_task)


def charts(of_task: list[Summary], as_trained: list[Summary]) -> None:
    drawn: list[tuple[go.Figure, str, str, str]] = []  # figure, key, alternative text, caption
    if as_trained:
        drawn.append((length_chart(as_trained), "arena length", "against sequence length, a line a model",
                      f"{'Lower' if as_trained[0].metric == BITS else 'Higher'} is better. Lines: means over seeds, "
                      "bands: lowest to highest seed. Dotted: chance, and the strongest rule that needs no model; "
                      "dashed: the length of the training. A line ends where its model has no value."))
    here = [s for s in of_task if s.seq_len == length]
    names = dict.fromkeys(name for s in here for name in s.by if name not in ("depth", "part"))
    for name in (name for name in names if grouped(here, name)):
        words = WORDS.get(name, name)
        drawn.append((group_chart(here, name), f"arena {name}", f"by {words}",
                      plain(f"By {words}, at {length:,} tokens. Means over seeds.")))
    if swept := quality_lengths(of_task):
        where = length if length in swept else swept[-1]
        drawn.append((quality_chart([s for s in of_task if s.seq_len == where]), "arena quality",
                      "against keys a query", f"At {where:,} tokens, what more rounds and larger buckets buy. "
                      "Points: means, bars and bands: lowest to highest seed; dashed: the twins. The axis does not "
                      "begin at 0."))
    for pair in (drawn[n : n + 2] for n in range(0, len(drawn), 2)):
        for column, (chart, name, alt, caption) in zip(st.columns(min(2, len(drawn))), pair, strict=False):
            with column:
                show(chart, name, f"{task}: score {alt}")
                st.caption(caption)
    with_depth = {name: line for name, line in lines(as_trained).items() if any("depth" in s.by for s in line)}
    if with_depth:
        st.subheader("By depth and length")
        for column, (name, line) in zip(st.columns(len(with_depth)), with_depth.items(), strict=True):
            with column:
                st.markdown(plain(name))
                show(depth_map(line), f"arena depth {name}", f"{task}, {name}: score by depth and length")
        st.caption("Numbers in % where the score is an accuracy. Depth 0: at the beginning of the sequence, 1: at its "
                   "end. Empty: not measured.")


def results(of_task: list[Summary]) -> None:
    st.subheader(plain(f"{TASKS.get(task, task)}: every number"))
    best = {level.seq_len: level for level in levels(of_task)}
    rows = []
    for s in of_task:
        level = best[s.seq_len]
        rows.append({
            "model": MODELS.get(s.model, s.model), "evaluated": s.setting or "as trained", "tokens": f"{s.seq_len:,}",
            "seeds": str(s.seeds), "status": s.status, "mean": shown_score(s.mean, s.metric) or "—",
            "lowest": shown_score(s.low, s.metric) or "—", "highest": shown_score(s.high, s.metric) or "—",
            "chance": shown_score(level.chance, s.metric) or "—", "best shortcut": _shortcut(level, s.metric),
            "keys a query": _whole(s.get("keys_a_query")), "forward ms": quantity(s.get("forward_ms")),
            "forward MB": quantity(s.get("forward_mb")),
            "trained at": _whole(s.trained_len),
        })
    table(rows, "arena results")
    st.caption("Lowest and highest: of the seeds. Chance and shortcut are of the same examples. Forward: one pass of "
               "one sequence, eager, and its memory beyond the weights; not taken beside other jobs.")


def _whole(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "—"


def _shortcut(level: Level, metric: str) -> str:
    return f"{shown_score(level.shortcut, metric)} ({level.name})" if level.name else "—"


def overview(arena: Arena) -> None:
    st.subheader("All tasks")
    rows = []
    for name in arena.tasks:
        mine = trained_to(arena.of(name))
        longest = max((s.seq_len for s in mine if s.model == "lsh" and s.seeds), default=0)
        here = [s for s in mine if s.seq_len == longest]
        if not here:
            continue
        level = levels(here)[0]
        cells = {s.model: spread(s) or s.status for s in here}
        rows.append({"task": TASKS.get(name, name), "trained at": _whole(here[0].trained_len),
                     "tokens": f"{longest:,}", **{words: cells.get(model, "—") for model, words in MODELS.items()},
                     "chance": shown_score(level.chance, here[0].metric) or "—",
                     "best shortcut": _shortcut(level, here[0].metric),
                     "seeds": seed_range(here)})
    table(rows, "arena overview")
    st.caption("Each task at the longest length that LSH was evaluated at, as trained: mean (lowest to highest seed).")


def gains(arena: Arena) -> None:
    if cells := gain_table(arena):
        st.subheader("What a longer context is worth")
        table([dict(zip(cells[0], row, strict=True)) for row in cells[1:]], "arena gains")
        st.caption(plain(GAIN))


def shapes(arena: Arena) -> None:
    if cells := shape_table(arena):
        st.subheader("Which shape of attention")
        table([dict(zip(cells[0], row, strict=True)) for row in cells[1:]], "arena shapes")
        st.caption(plain(ABOUT))


live(draw)
downloads([entries[key]], (FILE, PICTURE, CURVE, NEEDLES))
