"""Parts of the README's results: the operator's, the arena's, PonderNet's task; see `lshv2.readme`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lshv2.arena_digest import ABOUT as DIGEST
from lshv2.arena_digest import digest_table
from lshv2.arena_gain import GAIN, gain_table
from lshv2.arena_results import CURVE, NEEDLES, PICTURE, TASKS, Arena, read_arena
from lshv2.arena_shapes import ABOUT, shape_table
from lshv2.arena_targets import PUBLISHED, arena_targets
from lshv2.arena_views import cost_table, score_table
from lshv2.benchmark_results import read_benchmark
from lshv2.operator_results import (
    NAMES,
    OperatorResult,
    OperatorRow,
    Target,
    read_operator,
    shown,
    verdict,
)
from lshv2.parity_report import NAME as PARITY
from lshv2.parity_report import table as parity_table
from lshv2.tolerant import mapping, objects, read_object, text


def made_by(environment: dict[str, Any], rows: Sequence[dict[str, Any]] = ()) -> str:
    """rows: a measurement goes on from them, at other commits too, so theirs count."""
    torch, commit = (text(environment.get(key)) for key in ("torch", "commit"))
    commits = sorted({text(row.get("commit"))[:7] for row in rows if row.get("commit")})
    commits = commits or [one[:7] for one in commit.split(", ")]
    return f"torch {torch or 'not recorded'}, commit {', '.join(commits) or 'not recorded'}"


def markdown(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ruled(cells: list[list[str]], words: Sequence[int]) -> str:
    """A table of cells, the heading first; words: columns that are no numbers."""
    rules = ["---" if i in words else "---:" for i in range(len(cells[0]))]
    return markdown([cells[0], rules, *cells[1:]])


def _picture(folder: Path, key: str, name: str, words: str) -> list[str]:
    return [f"![{words}](runs/{key}/{name})"] if (folder / name).is_file() else []


def target_table(targets: Sequence[Target]) -> list[str]:
    """With how a value was measured behind it, and those that were not measured in a line of their own."""
    lines = [["target", "at least", "stretch", "measured", ""], ["---"] * 5]
    apart = [target for target in targets if not math.isfinite(target.value)]
    for target in targets:
        if target in apart:
            continue
        value = shown(target.value, target.unit) + f" ({target.detail})" * bool(target.detail)
        lines.append([target.name, target.target or "–", target.stretch or "–", value, verdict(target)])
    parts = [markdown(lines)] if len(lines) > 2 else []
    if apart and len(apart) == len(targets):
        parts.append(f"None of its {len(targets)} targets was measured here.")
    elif apart:
        named = [target.name + f" ({target.detail})" * bool(target.detail) for target in apart]
        parts.append(f"Not measured here: {'; '.join(named)}.")
    return parts


def operator_parts(folders: dict[str, Path]) -> list[str]:
    """Each reference's table and targets; a picture once a device, of the one with the most rows."""
    found = {key: result for key, folder in folders.items() if (result := read_operator(folder)[0])}
    fullest: dict[str, str] = {}
    for key, result in found.items():
        if len(result.rows) > len(found[fullest.setdefault(result.device, key)].rows):
            fullest[result.device] = key
    parts = []
    for key, result in found.items():
        if rows := result.of("eager", batch_one=True):
            parts += [_operator(result, rows, key), *target_table(result.targets)]
            if key in fullest.values():
                parts += _picture(folders[key], key, "attention.png", "time, speed-up and parts by length")
    return parts


def operator_part(folder: Path, key: str) -> str | None:
    """One reference's table alone."""
    result, _ = read_operator(folder)
    rows = result.of("eager", batch_one=True) if result else ()
    return _operator(result, rows, key) if result and rows else None


def _operator(result: OperatorResult, rows: Sequence[OperatorRow], key: str) -> str:
    """One attention layer at batch 1: a line a length, a column a contender."""
    unfinished = "" if result.state == "done" else "; not finished"
    if result.left_out:
        unfinished += f"; {len(result.left_out)} rows left out"
    head = (f"**[{key}](runs/{key})**, one attention layer, forward + backward at batch 1, milliseconds (medians): "
            f"{result.device}, {result.dtype}, {made_by(result.environment)}{unfinished}. The ratio is that of LSH "
            "with ids drawn by direction, on the slower of both data; the default is an inverted file.")
    names = [name for name in NAMES if any(row.contenders[name].get("both_ms") > 0 for row in rows
                                           if name in row.contenders)]
    factors = {s.seq_len: s.factor for s in result.speedups if s.mode == "eager" and s.batch_size == 1}
    lines = [["tokens", *(NAMES[name] for name in names), "fastest dense ÷ LSH"], ["---:"] * (len(names) + 2)]
    for row in rows:
        times = [row.contenders[name].get("both_ms") if name in row.contenders else math.nan for name in names]
        shown = [f"{ms:,.4g}" if ms < 1000 else f"{ms:,.0f}" if math.isfinite(ms) else "not measured" for ms in times]
        factor = factors.get(row.seq_len, math.nan)
        lines.append([f"{row.seq_len:,}", *shown, f"{factor:.2f} ×" if math.isfinite(factor) else "not measured"])
    return "\n\n".join([head, markdown(lines)])


def arena_part(folder: Path, key: str, short: bool = False) -> str | None:
    """What the twins get right by length, the targets and the pictures; short: each task once."""
    arena, problems = read_arena(folder)
    if arena is None:
        return None
    device, torch, commits = (", ".join(arena.origins(name)) for name in ("device", "torch", "commit"))
    head = (f"**[{key}](runs/{key})**, the arena: {device or 'device not recorded'}, "
            f"{made_by({'torch': torch, 'commit': commits})}.")
    problem = "".join(f" **{problem}.**" for problem in problems)
    if short:
        cells = digest_table(arena)
        return f"{head} {DIGEST}{problem}\n\n{ruled(cells, (0, len(cells[0]) - 1))}"
    head += (" Mean (lowest to highest seed), as trained; –: not measured; from 99 % on rounded down. Keys a query: "
             "what it sees at most, whatever the length. Trained at: the longest of the lengths trained. Twins differ"
             " by their attention alone, so they learn at the rate that was chosen for LSH, by these very sequences "
             "(what others gave: the targets). Chance and the best shortcut, a rule without a model: where they reach"
             " most; of one length, every rule.")
    head += problem
    cells = score_table(arena)
    scores = ruled(cells, (0, 1, len(cells[0]) - 1))
    return "\n\n".join([
        head, scores, *_published(arena),
        *target_table(arena_targets(arena.summaries, read_benchmark(folder)[0])),
        *_gains(arena), *_shapes(arena), *_costs(arena),
        *_picture(folder, key, PICTURE, "scores by length and by group"),
        *_picture(folder, key, CURVE, "scores by keys a query"),
        *_picture(folder, key, NEEDLES, "accuracy by depth and length"),
    ])


def _published(arena: Arena) -> list[str]:
    """What others reported on these tasks."""
    told = [f"{TASKS[task]}: {words}" for task, words in PUBLISHED.items() if task in arena.tasks]
    return [f"Published, by other models and trainings: {'; '.join(told)}."] if told else []


def _gains(arena: Arena) -> list[str]:
    """What the longer context is worth on text."""
    if not (cells := gain_table(arena)):
        return []
    return [GAIN, ruled(cells, (0, 1))]


def _costs(arena: Arena) -> list[str]:
    """What a sequence costs the models whose answers are above."""
    if not (cells := cost_table(arena)):
        return []
    return ["What one sequence costs these models: a forward pass at batch 1, eager; medians, their mean over the "
            "seeds that were timed (lowest to highest).", ruled(cells, (0, 2))]


def _shapes(arena: Arena) -> list[str]:
    """The quality curve as a table, and what it advises."""
    if not (cells := shape_table(arena)):
        return []
    return [
        f"The quality curve: shapes of LSH attention with models of their own, beside their twins. {ABOUT}",
        ruled(cells, (0, 1)),
    ]


def parity_part(folder: Path, key: str) -> str:
    """PonderNet's own task: a line a task and network."""
    content, _ = read_object(folder, f"{PARITY}.json")
    runs, _ = objects(content, "runs", f"{PARITY}.json")
    made = [mapping(run, "environment") for run in runs]
    cpus, torches = (", ".join(sorted({text(one.get(name)) for one in made})) for name in ("cpu", "torch"))
    head = (f"**[{key}](runs/{key})**, PonderNet's parity task (`python -m lshv2.parity`), accuracy of sampled "
            f"halting, mean (lowest to highest seed): {cpus}, {made_by({'torch': torches}, made)}")
    cells = parity_table(runs)
    picture = _picture(folder, key, f"{PARITY}.png", "accuracy and ponder steps by non-zero elements")
    return "\n\n".join([head, ruled(cells, (0, 2, 3)), *picture])
