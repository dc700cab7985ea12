"""The results, drawn from the committed reference runs, so that no figure is typed by hand: all of them in
runs/RESULTS.md, what a reader looks for first in README.md.

    python -m lshv2.readme        # rewrites both; a test holds them up to date

A reference run is a folder of measured JSON files at `runs/reference-<machine>/<run>/` (or one level up): a run's
`benchmark_summary.json`, an `arena.jsonl`, `attention.json`, `training.json`, `parity.json`, or the `ablation.json` of
`lshv2.ablation`. Nothing is computed here: a cell is what a file says (averaged over seeds), or why it says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

from lshv2.ablation.summary import ranking, table
from lshv2.arena_results import find_arenas, read_arena
from lshv2.benchmark_results import ATTENTIONS, Benchmark, Fit, Row, read_benchmark
from lshv2.curves import read_training
from lshv2.errors import UserError
from lshv2.operator_results import find_operator_results, read_operator
from lshv2.parity_report import NAME as PARITY
from lshv2.readers import read_manifest, read_settings
from lshv2.readme_parts import arena_part, made_by, markdown, operator_part, operator_parts, parity_part, ruled
from lshv2.run_state import Entry, find_runs
from lshv2.runs import atomic_path, repo_root
from lshv2.tolerant import mapping, number, objects, read_object, text
from lshv2.training_views import parallel_table, step_table

SHOWN = 6  # variants of a task
EVALUATIONS = 5  # of a training, at most
BEGIN, END = "<!-- results: written by `python -m lshv2.readme` -->", "<!-- end of results -->"
NONE_YET = "No reference run committed yet."
MORE = ("Every length, the targets and whether they are met, the other references, training steps on one to four GPUs, "
        "exponents, pondering, which attention, and the pictures: [runs/RESULTS.md](runs/RESULTS.md).")
COLUMNS = (("forward", "latency_ms", "ms"), ("forward + backward", "train_latency_ms", "ms"), ("peak", "rss_mb", "MB"))


def results(runs: Path) -> str:
    """Markdown for every reference below `runs`: arenas, the operator, training, benchmarks, ablations; else
    `NONE_YET`."""
    entries = sorted((entry for entry in find_runs(runs)[0] if entry.reference), key=lambda entry: entry.key)
    ablations = sorted(path.parent for path in runs.glob("reference-*/*/ablation.json"))
    operators = [folder for folder in find_operator_results(runs) if folder.parent.name.startswith("reference-")]
    arenas = [folder for folder in find_arenas(runs) if folder.parent.name.startswith("reference-")]
    parts = [part for folder in arenas if (part := arena_part(folder, folder.relative_to(runs).as_posix()))]
    parts += operator_parts({folder.relative_to(runs).as_posix(): folder for folder in operators})
    trainings = sorted(path.parent for path in runs.glob("reference-*/*/training.json"))
    parts += [_training(folder, folder.relative_to(runs).as_posix()) for folder in trainings]
    parts += _trained(entries)
    parts += [part for entry in entries if (part := _part(entry))]
    parities = sorted(path.parent for path in runs.glob(f"reference-*/*/{PARITY}.json"))
    parts += [parity_part(folder, folder.relative_to(runs).as_posix()) for folder in parities]
    parts += [_ablation(folder, folder.relative_to(runs).as_posix()) for folder in ablations]
    return "\n\n".join(parts) or NONE_YET


def digest(runs: Path) -> str:
    """Of the references below `runs` what README.md shows: the arena and the operator with the most rows, the trained
    models; else `NONE_YET`."""
    arenas = {folder: arena.rows for folder in find_arenas(runs) if (arena := read_arena(folder)[0])}
    operators = {folder: found.rows for folder in find_operator_results(runs) if (found := read_operator(folder)[0])}
    parts: list[str | None] = []
    for make, studies in ((partial(arena_part, short=True), arenas), (operator_part, operators)):
        references = [folder for folder in studies if folder.parent.name.startswith("reference-")]
        if references:
            folder = max(references, key=lambda folder: len(studies[folder]))
            parts.append(make(folder, folder.relative_to(runs).as_posix()))
    parts += _trained(sorted((entry for entry in find_runs(runs)[0] if entry.reference), key=lambda entry: entry.key))
    return "\n\n".join([*filter(None, parts), MORE] if parts else [NONE_YET])


def page_of(runs: Path) -> str:
    """runs/RESULTS.md, whose links begin where it lies."""
    block = results(runs).replace("](runs/", "](")
    return f"# Results\n\nWritten by `python -m lshv2.readme` from the reference runs beside this file.\n\n{block}\n"


def with_results(page: str, block: str) -> str:
    """`page` with `block` between its marks; `UserError` when the marks are not there once each."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise UserError(f"README.md needs the lines {BEGIN} and {END}, once each and in this order")
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n{block}\n{END}{rest.split(END)[1]}"


def _part(entry: Entry) -> str | None:
    benchmark, _ = read_benchmark(entry.path)
    if benchmark is None or not benchmark.rows:
        return None
    manifest, _ = read_manifest(entry.path)
    origin = made_by(manifest.environment if manifest else benchmark.environment)
    unfinished = "" if benchmark.state == "done" else "; the benchmark was not finished"
    measured = ", ".join(filter(None, (benchmark.device, benchmark.dtype, benchmark.conditions, origin)))
    head = f"**[{entry.key}](runs/{entry.key})**: {measured}{unfinished}"
    return "\n\n".join([head, _table(benchmark), _exponents(benchmark), *([manifest.verdict] if manifest else [])])


def _ablation(folder: Path, key: str) -> str:
    """A table a task, a line a variant, the best SHOWN of them: mean and range over the seeds."""
    content, _ = read_object(folder, "ablation.json")
    environment, (rows, _) = mapping(content, "environment"), objects(content, "rows", "ablation.json")
    gpus = environment.get("gpus")
    device = text(gpus[0] if isinstance(gpus, list) and gpus else environment.get("cpu"))
    head = f"**[{key}](runs/{key})**, quality of language-model twins: {device}, {made_by(environment, rows)}"
    # the first studies had one task, and no name for it
    summaries = mapping(content, "summaries") or {"language": mapping(content, "summary")}
    parts = [f"{head}. Mean (lowest to highest seed); overlapping ranges are no ranking."]
    for task in summaries:
        summary = mapping(summaries, task)
        twins = {name: mapping(summary, name) for name in summary}
        sign = -1 if task.startswith("recall") else 1
        order = [name for _, name in sorted((sign * number(twins[name].get(ranking(task))), name) for name in twins)]
        unit = "recall accuracy" if task.startswith("recall") else "eval bits per byte"
        parts += [f"{task}, {unit}:", table({name: twins[name] for name in order[:SHOWN]}, task)]
        if order[SHOWN:]:
            parts.append(f"{len(order) - SHOWN} more variants: [ablation.md](runs/{key}/ablation.md).")
    return "\n\n".join(parts)


def _training(folder: Path, key: str) -> str:
    """Training steps of the whole model: a line a row; then the same on several GPUs."""
    content, _ = read_object(folder, "training.json")
    rows, _ = objects(content, "rows", "training.json")
    head = (f"**[{key}](runs/{key})**, training steps of the documented model, bfloat16, medians (20 to 80 %): "
            f"{text(content.get('device'))}, {made_by(mapping(content, 'environment'), rows)}")
    parallels = [_parallel(path, key) for path in sorted(folder.glob("parallel*.json"))]
    return "\n\n".join([head, ruled(step_table(rows), (0, 2, 8)), *parallels])


def _trained(entries: Sequence[Entry]) -> list[str]:
    """Runs that were trained: a line each."""
    cells = [["run", "attention", "tokens a sequence", "steps", "tokens/s, median",
              "held-out bits per byte (after steps)", "device, commit"]]
    for entry in entries:
        training, settings = read_training(entry.path)[0], read_settings(entry.path)[0]
        if training is None or training.language_model.empty:
            continue
        curves, manifest = training.language_model, read_manifest(entry.path)[0]
        commit = text((training.environment or (manifest.environment if manifest else {})).get("commit"))
        bits = [(n, b) for n, b in zip(curves.eval["eval_step"], curves.eval["bits_per_byte"], strict=True) if b == b]
        shown = sorted({bits[i * (len(bits) - 1) // (EVALUATIONS - 1)] for i in range(EVALUATIONS)} if bits else [])
        cells.append([
            f"[{entry.key}](runs/{entry.key})", settings.get("model.attention", ""),
            f"{int(settings.get('train.seq_length', '0')):,}", f"{curves.last('step'):,.0f}",
            f"{median(curves.train['tokens_per_sec']):,.0f}", ", ".join(f"{b:.3f} ({n:.0f})" for n, b in shown),
            ", ".join(filter(None, (training.device, commit[:7]))),
        ])
    head = "Language models trained, as far as they went:"
    return ["\n\n".join([head, ruled(cells, (0, 1, 5, 6))])] if cells[1:] else []


def _parallel(path: Path, key: str) -> str:
    content, _ = read_object(path.parent, path.name)
    equal, _ = objects(content, "equality", path.name)
    rows, _ = objects(content, "rows", path.name)
    step = "the same step" if any(row.get("mode") == "alone" for row in rows) else "a step"
    head = (f"[{path.name}](runs/{key}/{path.name}), {step} on {number(content.get('processes')):.0f} GPUs, "
            f"medians: {text(content.get('device'))}, {made_by(mapping(content, 'environment'))}")
    if equal:
        first, later = (max(number(row.get(name)) for row in equal) for name in ("loss_first", "loss_later"))
        head += (f"; a small model's losses in float32 are one process's within {first:.0e} of them in the first step, "
                 f"{later:.0e} in the next")
    return "\n\n".join([head, ruled(parallel_table(rows), (0, 2, 4))])


def _table(benchmark: Benchmark) -> str:
    """A line a length, a column an attention and measure."""
    attentions = [name for name in ATTENTIONS if any(row.attention == name for row in benchmark.rows)]
    rows = {(row.seq_len, row.attention): row for row in benchmark.rows}
    names = [f"{attention} {label}, {unit}" for label, _, unit in COLUMNS for attention in attentions]
    lines = [["tokens", *names], ["---:"] * (len(names) + 1)]
    for length in sorted({row.seq_len for row in benchmark.rows}):
        cells = [_cell(rows.get((length, attention)), key) for _, key, _ in COLUMNS for attention in attentions]
        lines.append([f"{length:,}", *cells])
    return markdown(lines)


def _cell(row: Row | None, key: str) -> str:
    if row is None:
        return "not measured"
    value = row.get(key)
    if not math.isfinite(value):
        return row.status if row.status != "ok" else "not measured"
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _exponents(benchmark: Benchmark) -> str:
    alpha, beta = (benchmark.fits.get(("lsh", measure)) for measure in ("train_latency", "memory"))
    parts = [_exponent("α", "forward + backward", alpha), _exponent("β", "memory above the fixed part", beta)]
    scaling = benchmark.scaling.get(("lsh", "train_latency"))
    if scaling and (decade := scaling.ranges.get("longest_decade")) and math.isfinite(decade.upper):
        drawn = f" and a bootstrap over {scaling.resampled}" if math.isfinite(decade.bootstrap_high) else ""
        lengths = f"{decade.min_seq_len:,.0f} to {decade.max_seq_len:,.0f} tokens"
        parts.append(f"α over the longest decade, {lengths}, at most {decade.upper:.2f} (the larger upper end of its "
                     f"interval{drawn})")
    fixed = benchmark.fixed_tokens
    if fixed and (fit := fixed.fits.get(("lsh", "train_latency"))):
        parts.append(_exponent("α", f"forward + backward at {fixed.tokens:,.0f} tokens a batch", fit))
    parts += [twin for name in ATTENTIONS if name != "lsh" and (twin := _twin(benchmark, name))]
    return "; ".join(parts) + "."


def _twin(benchmark: Benchmark, name: str) -> str:
    """Its exponents beside LSH's: `dense: α 1.55 (1.34 to 1.77), β 1.00`."""
    parts = []
    for symbol, measure in (("α", "train_latency"), ("β", "memory")):
        for where, layout in (("", benchmark), (" at fixed tokens", benchmark.fixed_tokens)):
            if layout and (fit := layout.fits.get((name, measure))):
                interval = f" ({fit.low:.2f} to {fit.high:.2f})" if math.isfinite(fit.low) else ""
                parts.append(f"{symbol}{where} {fit.exponent:.2f}{interval}")
    return f"{name}: {', '.join(parts)}" if parts else ""


def _exponent(name: str, of: str, fit: Fit | None) -> str:
    if fit is None:
        return f"{name} ({of}) not measured"
    interval = f"95 % interval {fit.low:.2f} to {fit.high:.2f}" if math.isfinite(fit.low + fit.high) else "no interval"
    lengths = f"{fit.n:.0f} lengths, {fit.min_seq_len:,.0f} to {fit.max_seq_len:,.0f} tokens"
    doubling = f", {fit.last_doubling:.2f} times by the last doubling" if math.isfinite(fit.last_doubling) else ""
    return f"{name} ({of}) = {fit.exponent:.2f}, {interval}, {lengths}{doubling}"


if __name__ == "__main__":
    path = repo_root() / "README.md"
    written = {path: with_results(path.read_text(encoding="utf-8"), digest(repo_root() / "runs")),
               repo_root() / "runs" / "RESULTS.md": page_of(repo_root() / "runs")}
    for path, content in written.items():
        with atomic_path(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
