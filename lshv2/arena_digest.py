"""An arena in short: each task at two lengths, the trained one and the longest.

    digest_table(arena)     # cells with their heading, for the README
    told(arena)             # lines for a terminal, with every length
"""

from __future__ import annotations

from lshv2.arena_results import MODELS, TASKS, Arena
from lshv2.arena_views import counted, keys_shown, levels, lines, shown_score, spread, task_named, trained_to

ABOUT = ("Each task at the first length judged that is no shorter than the longest trained, and at the longest "
         "judged; mean (lowest to highest seed), as trained, from 99 % on rounded down; –: not measured. Keys a "
         "query: what LSH and the window see at most. Twins differ by their attention alone, so they learn at the "
         "rate that was chosen for LSH. A shortcut is a rule without a model.")


def digest_table(arena: Arena) -> list[list[str]]:
    """Cells with their heading: a line a task and length, a column a model."""
    known = {s.model for s in arena.summaries if not s.setting}
    models = [name for name in MODELS if name in known] + sorted(known - set(MODELS))
    table = [["task", "tokens", "keys a query", *(MODELS.get(name, name) for name in models), "best shortcut"]]
    for task in arena.tasks:
        every = [s for s in arena.of(task) if s.seeds]
        base = trained_to([s for s in every if s.model == "lsh"] or every)
        if not base:
            table.append([TASKS.get(task, task), *["–"] * (len(table[0]) - 1)])
            continue
        # twins of another trained length are another study: RESULTS.md has them
        mine = [s for s in arena.of(task) if s.trained_len == base[0].trained_len] or base
        judged = sorted({s.seq_len for s in base})
        shown = sorted({next((n for n in judged if n >= base[0].trained_len), judged[-1]), judged[-1]})
        for length in shown:
            here = {s.model: s for s in mine if s.seq_len == length}
            level, = levels([s for s in arena.of(task) if s.seq_len == length])
            rule = f"{shown_score(level.shortcut, base[0].metric)} ({level.name})" if level.name else "–"
            cells = [f"{spread(s)}, {counted(s.seeds)}" if (s := here.get(name)) and s.seeds else s.status if s else "–"
                     for name in models]
            first = length == shown[0]
            table.append([task_named(mine) if first else "", f"{length:,}", keys_shown(base[0]) if first else "",
                          *cells, rule])
    return table


def told(arena: Arena) -> list[str]:
    """`induction heads: LSH 100 %, 96.9 %; dense 62.5 %, 12.5 %; at 256, 1,024 tokens, trained at 64; chance 6.7 %`."""
    said = []
    for task in arena.tasks:
        mine = arena.of(task)
        if not mine:  # asked with other settings alone
            continue
        lengths = sorted({s.seq_len for s in mine})
        models = []
        for name, line in lines(mine).items():
            at = {s.seq_len: shown_score(s.mean, s.metric) or s.status for s in line}
            models.append(f"{name} {', '.join(at.get(n, '–') for n in lengths)}")
        chance = shown_score(levels(mine)[-1].chance, mine[0].metric)
        about = task_named(mine).removeprefix(TASKS.get(task, task)).removeprefix(", ")
        said.append(f"{TASKS.get(task, task)}: {'; '.join(models)}; at {', '.join(f'{n:,}' for n in lengths)} tokens"
                    + (f", {about}" if about else "") + (f"; chance {chance}" if chance else ""))
    return said
