"""From rows to what may be said: means with their ranges, comparisons that are honest about overlap, tables.

Needs no torch: the README's table is drawn from the same functions. "Better" is fewer bits per byte, or more right
answers. Two variants are told apart only when every seed of one is better than every seed of the other.
"""

from __future__ import annotations

import math
from statistics import mean, stdev
from typing import Any

from lshv2.ablation import depth_summary
from lshv2.ablation.variants import CUT, VARIANTS
from lshv2.scaling import student_t_quantile

Rows = list[dict[str, Any]]
Summary = dict[str, dict[str, float]]

LANGUAGE = {
    "bits_per_byte": "all positions", "late_bits_per_byte": "late positions",
    "tail_bits_per_byte": f"last {CUT // 2:,}", "tail_bits_per_byte_cut": f"last {CUT // 2:,}, {CUT:,} in view",
}
RECALL = {
    "accuracy_1x": "1×", "accuracy_2x": "2×", "accuracy_4x": "4×", "accuracy_8x": "8×",
    "far_accuracy_8x": "8×, asked past the training length",
}
DEPTH = {  # the first two at full depth
    **LANGUAGE, "judged_bits_per_byte": "with tokens halting", "judged_steps": "mean steps with tokens halting",
}
NOT_TIMED = ("masked", "emulated", "reference")  # backends of T×T masks
WITHIN = 0.01  # of the best dense twin's bits per byte
RECALLED = 0.99  # at 8 times the training length


def measures(task: str) -> dict[str, str]:
    """Column -> heading of a task's figures."""
    return RECALL if task.startswith("recall") else DEPTH if task.startswith("depth") else LANGUAGE


def ranking(task: str) -> str:
    """The figure that tells variants of a task apart: at its training length all that can learn recall solve it."""
    return "accuracy_8x" if task.startswith("recall") else "bits_per_byte"


def summarise(rows: Rows, task: str) -> Summary:
    """By variant of one task: `seeds`, and mean, `_low` and `_high` of every figure that its rows have."""
    table: Summary = {}
    mine = [row | (depth_summary.judged(row) if "curve" in row else {}) for row in rows if row["task"] == task]
    for name in dict.fromkeys(row["variant"] for row in mine):
        of = [row for row in mine if row["variant"] == name]
        table[name] = {"seeds": len({row["seed"] for row in of})}
        for column in measures(task):
            table[name] |= _spread(column, [row[column] for row in of if column in row])
        timed = [row["step_ms"] for row in of if row["backend"] not in NOT_TIMED and row["step_ms"] is not None]
        table[name] |= _spread("step_ms", timed)
        layers = [layer for row in of for layer in row["layers"]]
        for column in ("local_mass", "mass", "top_far") if VARIANTS[name].attention == "lsh" else ("local_mass",):
            if layers:  # over layers and seeds: the range says which of them finds least
                table[name] |= _spread(column, [layer[column] for layer in layers])
    better = -1.0 if task.startswith("recall") else 1.0
    return dict(sorted(table.items(), key=lambda item: better * item[1].get(ranking(task), better * math.inf)))


def _spread(column: str, values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {column: mean(values), f"{column}_low": min(values), f"{column}_high": max(values)}


def best_dense(summary: Summary) -> str | None:
    """The dense twin with the best mean: what LSH is held against."""
    return next((name for name in summary if VARIANTS[name].attention == "dense"), None)  # they are sorted


def _common(rows: Rows, task: str, name: str, other: str) -> tuple[list[float], list[float]]:
    """The ranking figure of both variants by seed, of the seeds that both have: seeds differ more than variants do."""
    column = ranking(task)
    ours, theirs = (
        {row["seed"]: row[column] for row in rows if (row["task"], row["variant"]) == (task, which) and column in row}
        for which in (name, other)
    )
    both = sorted(set(ours) & set(theirs))
    return [ours[seed] for seed in both], [theirs[seed] for seed in both]


def compare(rows: Rows, task: str, name: str, other: str) -> str:
    """One sentence on `name` against `other`, by the figure that ranks, over the seeds that both have."""
    sides = _common(rows, task, name, other)
    if not sides[0]:
        return f"`{name}` against `{other}`: not measured on a common seed."
    ours, theirs = map(mean, sides)
    more = task.startswith("recall")
    apart = min(sides[0]) > max(sides[1]) or max(sides[0]) < min(sides[1])
    how = "more" if ours > theirs else "less"
    size = f"{100 * abs(ours - theirs):.1f} points {how}" if more else f"{100 * abs(ours / theirs - 1):.2f} % {how}"
    size = "the same" if ours == theirs else size
    wins = sum((a > b) == more and a != b for a, b in zip(*sides, strict=True))
    seeds = f"better on {wins} of {len(sides[0])} common seeds"
    few = len(sides[0]) < 3
    if not few and not more:
        seeds += f" (95 % interval {_interval(*sides)})"
    if apart:
        verdict = "ranges apart" + (", but on fewer than three seeds: a lead" if few else "")
    else:
        verdict = "ranges overlap: no ranking"
    digits = 3 if more else 4
    return f"`{name}` {ours:.{digits}f} against `{other}` {theirs:.{digits}f}: {size}, {seeds}; {verdict}."


def _interval(ours: list[float], theirs: list[float]) -> str:
    """Student's t interval of the mean excess of ours over theirs, seed by seed: "-0.43 to +2.13 %"."""
    excess = [100 * (a / b - 1) for a, b in zip(ours, theirs, strict=True)]
    half = student_t_quantile(len(excess) - 1) * stdev(excess) / math.sqrt(len(excess))
    return f"{mean(excess) - half:+.2f} to {mean(excess) + half:+.2f} %"


PAIRS = (
    ("inverted_file_r8_quarter", "codebooks_quarter"), ("inverted_file_r8_quarter", "window_512_half"),
    ("inverted_file_r8_mix_full", "inverted_file_r8_quarter"), ("inverted_file_mix_full", "inverted_file_quarter"),
    ("inverted_file_r8_mix_full", "inverted_file_r8_mix_quarter"), ("inverted_file_r8_mix_full", "window_512_half"),
    ("dense_mix_full", "dense_half"), ("inverted_file_r8_quarter", "inverted_file_quarter"),
    ("inverted_file_r8", "codebooks_r8_w32"),
    ("inverted_file_half", "codebooks_half"), ("inverted_file_quarter", "codebooks_quarter"),
    ("inverted_file_half", "inverted_file_coarse"), ("codebooks_half", "window_512_half"),
    ("codebooks_quarter", "centred_quarter"), ("dense_half", "dense_quarter"), ("window_512_half", "window_half"),
    ("codebooks_half", "cross_polytope_half"), ("codebooks_half", "centred_half"),
    ("centred_half", "cross_polytope_half"), ("codebooks_half", "codebooks_full"),
    ("codebooks_half", "codebooks_quarter"), ("codebooks_half", "codebooks_content"),
    ("codebooks_half", "codebooks_mix_full"), ("codebooks_half", "codebooks_mix_half"),
    ("codebooks_half", "codebooks_two_way_half"), ("codebooks_half", "codebooks_two_way_content"),
    ("codebooks_half", "codebooks_no_shift"), ("codebooks_half", "codebooks_centred_half"),
    ("codebooks_half", "codebooks_r2_w128"), ("codebooks_half", "codebooks_r8_w32"),
    ("codebooks_half", "codebooks_r3_w128_window128"), ("codebooks_half", "codebooks_few_buckets"),
    ("codebooks_half", "window_half"), ("dense_half", "dense_full"), ("dense_half", "dense_no_shift"),
)


def statements(rows: Rows, task: str) -> list[str]:
    """The bar, then each question of the study that this task has rows for."""
    if task.startswith("depth"):
        return depth_summary.statements(rows, task)
    summary = summarise(rows, task)
    said = _bar(rows, summary, task)
    dense = best_dense(summary)
    sparse = [name for name in summary if VARIANTS[name].attention == "lsh"]
    if dense and sparse:
        said.append(compare(rows, task, sparse[0], dense))
    said += [compare(rows, task, a, b) for a, b in PAIRS if a in summary and b in summary]
    return said + [_gained(rows, task, name) for name in summary if "tail_bits_per_byte_cut" in summary[name]]


def _gained(rows: Rows, task: str, name: str) -> str:
    """What the context beyond CUT tokens is worth to a variant: the same positions, seen with it and without."""
    of = [row for row in rows if (row["task"], row["variant"]) == (task, name) and "tail_bits_per_byte_cut" in row]
    gains = [100 * (1 - row["tail_bits_per_byte"] / row["tail_bits_per_byte_cut"]) for row in of]
    few = "" if len(gains) >= 3 else ", fewer than three seeds: a lead"
    return (f"Context beyond {CUT:,} tokens: `{name}` {mean(gains):.2f} % fewer bits on the last {CUT // 2:,} "
            f"positions ({min(gains):.2f} to {max(gains):.2f} %, {len(gains)} seeds{few}).")


def _bar(rows: Rows, summary: Summary, task: str) -> list[str]:
    dense = best_dense(summary)
    sparse = [name for name in summary if VARIANTS[name].attention == "lsh"]
    if task.startswith("recall"):
        passed = {name: int(summary[name]["seeds"]) for name in sparse
                  if summary[name].get("accuracy_8x_low", 0.0) >= RECALLED}
        said = [f"At least {RECALLED:.0%} at 8× the training length on every seed: {_names(passed)}."]
        if dense:
            worst = max(row["accuracy_1x_low"] for name, row in summary.items() if VARIANTS[name].attention == "dense")
            equal = {name: int(summary[name]["seeds"]) for name in sparse
                     if summary[name]["accuracy_1x_low"] >= worst}
            said.append(f"At 1× no seed below any seed of the best dense twin there ({worst:.4f}): {_names(equal)}.")
        return said
    if dense is None or not sparse:
        return []
    sides = {name: _common(rows, task, name, dense) for name in sparse}
    within = {name: len(ours) for name, (ours, theirs) in sides.items()
              if ours and mean(ours) <= (1 + WITHIN) * mean(theirs)}
    best = summary[dense]["bits_per_byte"]
    return [f"Within {WITHIN:.0%} of the best dense twin (`{dense}`, {best:.4f}) on their common seeds: "
            f"{_names(within)}."]


def _names(seeds: dict[str, int]) -> str:
    """Variants with how many seeds say so, where those are fewer than three."""
    few = {1: " (one seed)", 2: " (two seeds)"}
    return ", ".join(f"`{name}`{few.get(count, '')}" for name, count in seeds.items()) or "none"


def table(summary: Summary, task: str) -> str:
    """Markdown: a line a variant, best mean first; mean (lowest to highest), and what was not measured left empty."""
    columns = {**measures(task), "step_ms": "step, ms", "local_mass": "mass in the window", "mass": "mass in S(t)",
               "top_far": "top 32 far keys found"}
    columns = {column: title for column, title in columns.items() if any(column in row for row in summary.values())}
    lines = [["variant", "seeds", *columns.values()], ["---", "---:", *["---"] * len(columns)]]
    for name, row in summary.items():
        lines.append([f"`{name}`", f"{row['seeds']:.0f}", *(_cell(row, column) for column in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: dict[str, float], column: str) -> str:
    if column not in row:
        return ""
    digits = 1 if column == "step_ms" else 3
    center, low, high = (f"{row[key]:.{digits}f}" for key in (column, f"{column}_low", f"{column}_high"))
    return center if low == high else f"{center} ({low} to {high})"


def layer_table(rows: Rows, task: str) -> str:
    """Markdown: for each variant that looks keys up, what its layers' S(t) hold: mean over seeds (worst to best head
    of any seed)."""
    columns = {"local_mass": "mass in the window", "mass": "mass in S(t)", "top_far": "top 32 far keys found"}
    lines = [["variant", "layer", *columns.values()], ["---", "---:", *["---"] * len(columns)]]
    for name in summarise(rows, task):
        of = [row["layers"] for row in rows if (row["task"], row["variant"]) == (task, name)]
        for i in range(len(of[0])) if VARIANTS[name].attention == "lsh" else ():
            figures: dict[str, float] = {}
            for column in columns:
                figures[column] = mean(layers[i][column] for layers in of)
                figures[f"{column}_low"] = min(layers[i][f"{column}_low"] for layers in of)
                figures[f"{column}_high"] = max(layers[i][f"{column}_high"] for layers in of)
            lines.append([f"`{name}`", str(i + 1), *(_cell(figures, column) for column in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
