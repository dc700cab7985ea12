"""The benchmark's rows in order, each in its own process, and the exponents fitted to them.

Order: short to long, at each length the attentions in the order of `benchmark.attentions`. A row that ran out of
time or memory settles the longer lengths of the same attention: they cannot do better, so they are written as
`skipped`, with the reason, instead of spending the limit once more each. After an `error` they are still tried.

`benchmark_summary.json` is written after every row. A benchmark that was killed (state `running`) goes on where it
was: its rows are kept as long as model, weights, limits, code and machine are the same (`measured_on`).
One that is `done` is measured afresh.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lshv2.benchmark import worker
from lshv2.benchmark.process import run_limited
from lshv2.checkpoint import find_checkpoint
from lshv2.config import ModelConfig
from lshv2.machine import machine, source_hashes
from lshv2.progress import Progress
from lshv2.runs import SCHEMA, Run, read_json, sha256, write_json
from lshv2.scaling import fit_power

SUMMARY = "benchmark_summary.json"
# Named through the imported module, so that whoever asks which code is behind the benchmark finds the worker's too.
WORKER = (sys.executable, "-c", f"from {worker.__name__} import main; main()")
FIT_FROM = 16_384  # below, launch overheads and cache sizes hide the exponent: used where three lengths remain
RESOLUTION_MB = 1.0  # peaks below this are within the allocator's granularity
TIMED = ("lshv2/attention/", "lshv2/backbone", "lshv2/benchmark/", "lshv2/block", "lshv2/halting", "lshv2/hashing",
         "lshv2/layers", "lshv2/losses", "lshv2/model", "lshv2/ponder")  # the code that a row depends on
MEASURES = {"latency": "latency_ms", "train_latency": "train_latency_ms", "memory": "activation_mb"}
SHARED = ("device", "dtype", "threads")  # reported by each worker, the same in all rows
Row = dict[str, Any]


def run_benchmark(run: Run) -> dict[str, Any]:
    """Measure every (attention, length) of the settings; returns what `benchmark_summary.json` holds at the end.

    The weights are the newest language-model checkpoint's, else untrained; the input is the run's held-out text, else
    seeded random ids. Raises nothing for a row that fails: its `status` and `reason` say why.
    """
    settings = run.settings.benchmark
    job = _job(run)
    summary = _resumed(run, job)
    rows = {(row["attention"], row["seq_len"]): row for row in summary["rows"]}
    todo = [(a, n) for n in settings.sequence_lengths for a in settings.attentions]
    with Progress(run, "04_benchmark", "benchmark", len(todo), unit="row") as bar:
        for attention, seq_len in todo:
            if (attention, seq_len) not in rows:
                blocker = _blocker(rows, attention, seq_len)
                row = _measure(job, attention, seq_len, summary) if blocker is None else _skipped(blocker, seq_len)
                rows[attention, seq_len] = row
                summary["rows"] = [rows[key] for key in todo if key in rows]
                write_json(run.file(SUMMARY), summary)
                print(describe(row), flush=True)
            row = rows[attention, seq_len]
            bar.update(1, seq_len=seq_len, attention=attention, latency_ms=row.get("latency_ms", row["status"]))
    summary |= {"state": "done", **fit_rows(summary["rows"])}
    write_json(run.file(SUMMARY), summary)
    return summary


def _job(run: Run) -> dict[str, Any]:
    """What every worker is told; attention and seq_len are added for each.

    Capacity is raised to the longest length, while `n_buckets` stays the run's own: it is part of the model (the hash
    tables' shape), and with buckets capped at `bucket_size` keys a token's cost does not depend on it.
    """
    model, settings = run.settings.model, run.settings.benchmark
    longest = max(model.max_seq_len, *settings.sequence_lengths)
    checkpoint, notes = find_checkpoint(run.checkpoints / "language_model")
    for note in notes:
        print(note)
    described, _ = read_json(run.data / "data.json")
    tokenizer_size = described["tokenizer"]["vocab_size"] if described else None
    return {
        "model": ModelConfig(
            **{**model.model_dump(), "max_seq_len": longest, "n_buckets": model.resolved_n_buckets}
        ).model_dump(),
        "trained_attention": model.attention, "gradient_checkpoint": run.settings.train.gradient_checkpoint,
        "precision": run.settings.train.precision, "seed": run.settings.seed, "batch_size": settings.batch_size,
        "samples": settings.num_samples_per_length, "max_memory_gb": settings.max_memory_gb,
        "timeout_seconds": settings.timeout_seconds, "checkpoint": str(checkpoint) if checkpoint else None,
        "tokens": str(run.data / "eval.bin") if described else None, "tokenizer_size": tokenizer_size,
    }


def _resumed(run: Run, job: dict[str, Any]) -> dict[str, Any]:
    """An empty summary, with the rows of a killed benchmark if they were measured on the same."""
    key = {name: value for name, value in job.items() if name not in ("checkpoint", "tokens")}  # paths: by content
    contents = [sha256(Path(job[name])) if job[name] else "" for name in ("checkpoint", "tokens")]
    code = {name: digest for name, digest in source_hashes().items() if name.startswith(TIMED)}
    decisive = json.dumps([key, contents, machine(), code], sort_keys=True)
    measured_on = hashlib.sha256(decisive.encode()).hexdigest()
    checkpoint = job["checkpoint"]
    empty = {
        "schema": SCHEMA, "state": "running", "measured_on": measured_on, **dict.fromkeys(SHARED),
        "weights": f"checkpoint {Path(checkpoint).name}" if checkpoint else "untrained",
        "tokens": "held-out text" if job["tokens"] else "random",
        "gradient_checkpoint": job["gradient_checkpoint"], "rows": [],
    }
    former, _ = read_json(run.file(SUMMARY))
    if not isinstance(former, dict) or former.get("state") != "running" or former.get("measured_on") != measured_on:
        return empty
    rows = [row for row in former["rows"] if row["status"] != "skipped"]
    if rows:
        print(f"resuming: {len(rows)} rows were measured before this benchmark was interrupted")
    return {**empty, **{name: former[name] for name in SHARED}, "rows": rows}


def _measure(job: dict[str, Any], attention: str, seq_len: int, summary: dict[str, Any]) -> Row:
    """One row from a fresh process; what is the same in all rows moves to the summary."""
    outcome = run_limited(
        WORKER, {**job, "model": {**job["model"], "attention": attention}, "seq_len": seq_len},
        timeout_seconds=job["timeout_seconds"], max_memory_gb=job["max_memory_gb"],
    )
    for name in SHARED:
        value = outcome.result.pop(name, None)
        summary[name] = value if summary[name] is None else summary[name]
    return {
        "attention": attention, "seq_len": seq_len, "batch_size": job["batch_size"], "status": outcome.status,
        "reason": outcome.reason, "seconds": round(outcome.seconds, 2), **outcome.result,
    }


def _blocker(rows: dict[tuple[str, int], Row], attention: str, seq_len: int) -> Row | None:
    """A shorter row of this attention that ran out of time or memory, if there is one."""
    hopeless = [row for (a, n), row in rows.items()
                if a == attention and n < seq_len and row["status"] in ("timeout", "out of memory")]
    return min(hopeless, key=lambda row: row["seq_len"], default=None)


def _skipped(blocker: Row, seq_len: int) -> Row:
    reason = f"not attempted: {blocker['seq_len']} tokens already ended in {blocker['status']}"
    return {"attention": blocker["attention"], "seq_len": seq_len, "batch_size": blocker["batch_size"],
            "status": "skipped", "reason": reason}


def fit_rows(rows: list[Row]) -> dict[str, Any]:
    """`fits`, `alpha`, `beta`, their intervals and `longest_ok` from the rows whose status is ok."""
    fits: dict[str, dict[str, Any]] = {}
    longest: dict[str, int | None] = {}
    for attention in dict.fromkeys(row["attention"] for row in rows):
        mine = [row for row in rows if row["attention"] == attention and row["status"] == "ok"]
        longest[attention] = max((row["seq_len"] for row in mine), default=None)
        fits[attention] = {name: _fit(mine, key) for name, key in MEASURES.items()}
    chosen = {"alpha": fits.get("lsh", {}).get("train_latency"), "beta": fits.get("lsh", {}).get("memory")}
    result: dict[str, Any] = {"fits": fits, "longest_ok": longest}
    for name, fit in chosen.items():
        result[name] = fit["exponent"] if fit else None
        result[f"{name}_interval"] = [fit["low"], fit["high"]] if fit and fit["low"] is not None else None
    return result


def _fit(rows: list[Row], key: str) -> dict[str, Any] | None:
    """The exponent of one column; None with fewer than two usable lengths.

    Lengths from FIT_FROM on where there are at least three of them, else all: fixed overheads at short lengths would
    flatter the exponent. `min_seq_len` and `max_seq_len` say which range it was.
    """
    floor = RESOLUTION_MB if key == "activation_mb" else 0.0
    points = [(row["seq_len"], row[key]) for row in rows if row[key] > floor]
    long = [point for point in points if point[0] >= FIT_FROM]
    points = long if len(long) >= 3 else points
    return asdict(fit_power([n for n, _ in points], [y for _, y in points])) if len(points) >= 2 else None


def describe(row: Row) -> str:
    """One line of the log."""
    what = f"{row['attention']:>6} {row['seq_len']:>7,} tokens: "
    if row["status"] != "ok":
        return f"{what}{row['status']}: {row['reason']}"
    return (f"{what}forward {row['latency_ms']:,.1f} ms, with backward {row['train_latency_ms']:,.1f} ms, "
            f"activations {row['activation_mb']:,.0f} MB")
