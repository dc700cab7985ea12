"""What a longer context is worth on text: bits a byte that it saves, each model against itself.

    gain_table(arena)       # cells with their heading; GAIN says how they are read
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

from lshv2.arena_results import BITS, MODELS, TASKS, Arena, ArenaRow, mean, place
from lshv2.arena_views import span

GAIN = ("What context beyond 4,096 tokens saves, in bits per byte of the same last bytes, each seed against itself "
        "(below zero: it harms).")


def _trained(row: ArenaRow) -> float:
    return row.trained_len if math.isfinite(row.trained_len) else -1.0


def _signed(values: Sequence[float]) -> str:
    """`+0.022 (+0.010 to +0.039)`, and `+0.000` where all of it is less."""
    if not values:
        return "–"
    middle, low, high = (f"{round(value, 3) + 0.0:+.3f}" for value in (mean(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def gain_table(arena: Arena, context: int = 4096) -> list[list[str]]:
    """Cells with their heading: of text whose windows end alike, the bits a byte that more than `context` tokens before
    it save, by length; the mean over seeds of each seed's own difference (lowest to highest). [] without such text."""
    rows = [row for row in arena.rows
            if row.metric == BITS and row.setting == "" and "part" in row.by and math.isfinite(row.value)]
    longest: dict[tuple[str, str], float] = {}  # one training a model: trained lengths are not mixed
    for row in rows:
        longest[row.task, row.model] = max(longest.get((row.task, row.model), -1.0), _trained(row))
    values = {(row.task, row.model, row.seed, row.seq_len): row.value for row in rows
              if _trained(row) == longest[row.task, row.model]}
    longer = sorted({length for *_, length in values if length > context})
    table = [["task", "model", "seeds", *(f"{length:,}" for length in longer)]]
    pairs = {key[:2] for key in values}
    for task, model in sorted(pairs, key=lambda pair: (place(TASKS, pair[0]), place(MODELS, pair[1]))):
        saved: dict[int, list[float]] = {length: [] for length in longer}
        seeds = sorted({seed for t, m, seed, length in values if (t, m, length) == (task, model, context)})
        for length, seed in product(longer, seeds):
            if (with_more := values.get((task, model, seed, length))) is not None:
                saved[length].append(values[task, model, seed, context] - with_more)
        if any(saved.values()):
            table.append([TASKS.get(task, task), MODELS.get(model, model), span(map(len, saved.values())),
                          *(_signed(gains) for gains in saved.values())])
    return table if len(table) > 1 else []
