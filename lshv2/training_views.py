"""Training steps as tables: a `training.json` of `lshv2.benchmark.training`, a `parallel*.json` of `.parallel`.

    step_table(rows), parallel_table(rows)      # cells, the heading first

Rows as they were read from a file of any quality; what they do not hold is an empty cell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lshv2.tolerant import number, text

RECOMPUTED = {"True": "all but attention", "block": "blocks", "feed_forward": "after attention", "False": "nothing"}
Rows = Sequence[dict[str, Any]]


def step_table(rows: Rows) -> list[list[str]]:
    """A line a row. A speed-up over a dense twin that was measured at another commit names that commit."""
    lines = [["model", "tokens", "recomputed", "milliseconds", "tokens/s", "over dense", "MFU", "peak GB", "commit"]]
    for row in rows:
        commit = text(row.get("commit"))[:7]
        if row.get("status") != "ok":
            lines.append([*_settings(row), text(row.get("status")), *[""] * 4, commit])
            continue
        low, middle, high, rate, mfu, peak = (number(row.get(name)) for name in (
            "step_ms_p20", "step_ms", "step_ms_p80", "tokens_per_sec", "mfu", "peak_mb"))
        lines.append([*_settings(row), f"{middle:,.0f} ({low:,.0f} to {high:,.0f})", f"{rate:,.0f}", _over_dense(row),
                      f"{mfu:.2f}" if math.isfinite(mfu) else "", f"{peak / 1024:.1f}", commit])
    return lines


def parallel_table(rows: Rows) -> list[list[str]]:
    """A line a mode: one process by itself, sequences divided among them, one sequence shared."""
    lines = [["each GPU has", "GPUs", "model", "tokens", "recomputed", "milliseconds", "tokens/s", "over one",
              "peak GB"]]
    named = {"alone": "the whole step", "data": "sequences of its own", "sequence": "a part of each sequence"}
    for row in rows:
        world, middle, rate, factor, peak = (number(row.get(name)) for name in (
            "processes", "step_ms", "tokens_per_sec", "speed_up", "peak_mb"))
        mode = text(row.get("mode"))
        lines.append([named.get(mode, mode), f"{world:.0f}", *_settings(row), f"{middle:,.0f}", f"{rate:,.0f}",
                      f"{factor:.2f} ×" if math.isfinite(factor) else "", f"{peak / 1024:.1f}"])
    return lines


def _settings(row: dict[str, Any]) -> list[str]:
    """Model, tokens and what is computed again."""
    names = [text(row.get("attention")), *["Ponder"] * (row.get("ponder") is True),
             *["not compiled"] * (row.get("compile") is False)]
    tokens = f"{number(row.get('seq_len')):,.0f} x {number(row.get('batch_size')):.0f}"
    return [", ".join(names), tokens, RECOMPUTED.get(str(row.get("gradient_checkpoint")), "")]


def _over_dense(row: dict[str, Any]) -> str:
    factor, elsewhere = number(row.get("over_dense")), text(row.get("over_dense_commit"))[:7]
    if not math.isfinite(factor):
        return ""
    return f"{factor:.2f} ×" + (f" (dense: {elsewhere})" if elsewhere else "")
