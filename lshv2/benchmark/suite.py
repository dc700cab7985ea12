"""The benchmark's rows in order, each process a fresh one, and the exponents fitted to them.

Two layouts: every length at `benchmark.batch_size` sequences, and, with `benchmark.fixed_tokens`, every length at as
many sequences as make so many tokens, so that short lengths too fill the machine. A case is one (attention, length,
batch size); where both layouts ask for the same, it is measured once. Order: short to long, at each length the
attentions in the order of `benchmark.attentions`, then the other layout. With `benchmark.processes_per_length` above
one all cases are measured once before any is measured again, so that a machine that slows down bends no curve; a case
whose first process took more than REPEAT_SHARE of the time limit is not repeated.

A case that ran out of time or memory settles those of the same attention that are no shorter and have no fewer tokens:
they cannot do better, so they are written as `skipped`, with the reason, instead of spending the limit once more each.
After an `error` they are still tried.

`benchmark_summary.json` is written after every process. A benchmark that was killed (state `running`) goes on where it
was: its rows are kept as long as model, weights, limits, code and machine are the same (`measured_on`).
One that is `done` is measured afresh.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from lshv2.arena_results import FILE as ARENA
from lshv2.arena_results import summarise
from lshv2.benchmark import worker
from lshv2.benchmark.process import run_limited
from lshv2.benchmark.rows import Case, Row, add_process, describe, fit_rows, skipped
from lshv2.checkpoint import find_checkpoint
from lshv2.config import BenchmarkConfig, ModelConfig
from lshv2.machine import git_state, machine, source_hashes, torch_version
from lshv2.progress import Progress
from lshv2.runs import SCHEMA, Run, read_json, read_jsonl, sha256, write_json

SUMMARY = "benchmark_summary.json"
# Named through the imported module, so that whoever asks which code is behind the benchmark finds the worker's too.
WORKER = (sys.executable, "-c", f"from {worker.__name__} import main; main()")
REPEAT_SHARE = 1 / 5  # of the time limit
# the code that a row depends on
TIMED = ("lshv2/attention/", "lshv2/backbone", "lshv2/benchmark/", "lshv2/block", "lshv2/halting", "lshv2/hashing",
         "lshv2/layers", "lshv2/losses", "lshv2/model", "lshv2/ponder", "lshv2/softmax")
SHARED = ("device", "dtype", "threads")  # reported by each worker, the same in all rows


def run_benchmark(run: Run) -> dict[str, Any]:
    """Measure every case of the settings; returns what `benchmark_summary.json` holds at the end.

    The weights are the newest language-model checkpoint's, else untrained; the input is the run's held-out text, else
    seeded random ids. Raises nothing for a row that fails: its `status` and `reason` say why.
    """
    settings = run.settings.benchmark
    job = _job(run)
    summary = _resumed(run, job)
    rows = {_case(row): row for row in _rows(summary)}
    layouts = _layouts(settings)
    todo = [(case, turn) for turn in range(settings.processes_per_length)
            for case in dict.fromkeys(case for cases in layouts.values() for case in cases)]
    with Progress(run, "04_benchmark", "benchmark", len(todo), unit="process") as bar:
        for case, turn in todo:
            row = rows.get(case)
            if row is None and (blocker := _blocker(rows, case)):
                rows[case] = skipped(blocker, case)
            elif row is None or _wants_another(row, turn, job["timeout_seconds"]):
                rows[case] = add_process(row, _measure(job, case, summary))
            if rows[case] is not row:
                _place(summary, layouts, rows)
                write_json(run.file(SUMMARY), summary)
                print(describe(rows[case]), flush=True)
            done = rows[case]
            figure = done["latency_ms"] if "latency_ms" in done else done["status"]
            bar.update(1, seq_len=case.seq_len, attention=case.attention, latency_ms=figure)
    summary |= {"state": "done", **fit_rows(summary["rows"])}
    if summary["fixed_tokens"]:
        summary["fixed_tokens"] |= fit_rows(summary["fixed_tokens"]["rows"])
    if arena := read_jsonl(run.file(ARENA))[0]:
        summary["arena"] = summarise(arena)
    write_json(run.file(SUMMARY), summary)
    return summary


def _layouts(settings: BenchmarkConfig) -> dict[str, list[Case]]:
    """The cases of "rows" and, where asked for, of "fixed_tokens", in their order."""
    pairs = [(attention, n) for n in settings.sequence_lengths for attention in settings.attentions]
    layouts = {"rows": [Case(attention, n, settings.batch_size) for attention, n in pairs]}
    if tokens := settings.fixed_tokens:
        layouts["fixed_tokens"] = [Case(attention, n, tokens // n) for attention, n in pairs if n <= tokens]
    return layouts


def _place(summary: dict[str, Any], layouts: dict[str, list[Case]], rows: dict[Case, Row]) -> None:
    """Each layout's rows where the contract has them."""
    for name, cases in layouts.items():
        there = [rows[case] for case in cases if case in rows]
        if name == "rows":
            summary["rows"] = there
        else:
            summary[name]["rows"] = there


def _rows(summary: dict[str, Any]) -> list[Row]:
    """The rows of both layouts; one that is in both comes twice."""
    return [*summary["rows"], *(summary["fixed_tokens"] or {"rows": []})["rows"]]


def _case(row: Row) -> Case:
    return Case(row["attention"], row["seq_len"], row["batch_size"])


def _wants_another(row: Row, turn: int, limit: float) -> bool:
    done = row["processes"]
    return row["status"] == "ok" and len(done) <= turn and done[0]["seconds"] <= REPEAT_SHARE * limit


def _job(run: Run) -> dict[str, Any]:
    """What every worker is told; attention, seq_len and batch_size are added for each.

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
        "precision": run.settings.train.precision, "seed": run.settings.seed,
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
    checkpoint, tokens = job["checkpoint"], run.settings.benchmark.fixed_tokens
    empty: dict[str, Any] = {
        "schema": SCHEMA, "state": "running", "measured_on": measured_on, **dict.fromkeys(SHARED),
        "environment": {"torch": torch_version(), **git_state()},
        "weights": f"checkpoint {Path(checkpoint).name}" if checkpoint else "untrained",
        "tokens": "held-out text" if job["tokens"] else "random",
        "gradient_checkpoint": job["gradient_checkpoint"], "rows": [],
        "fixed_tokens": {"tokens": tokens, "rows": []} if tokens else None,
    }
    former, _ = read_json(run.file(SUMMARY))
    if not isinstance(former, dict) or former.get("state") != "running" or former.get("measured_on") != measured_on:
        return empty
    summary = {**empty, **{name: former[name] for name in SHARED}}
    summary["rows"] = [row for row in former["rows"] if row["status"] != "skipped"]
    before = former["fixed_tokens"]
    if tokens and before and before["tokens"] == tokens:
        summary["fixed_tokens"]["rows"] = [row for row in before["rows"] if row["status"] != "skipped"]
    if count := len({_case(row) for row in _rows(summary)}):
        print(f"resuming: {count} rows were measured before this benchmark was interrupted")
    return summary


def _measure(job: dict[str, Any], case: Case, summary: dict[str, Any]) -> Row:
    """What a fresh process measured; what is the same in all rows moves to the summary."""
    model = ModelConfig(**job["model"]).twin(case.attention).model_dump()
    outcome = run_limited(
        WORKER, {**job, "model": model, "seq_len": case.seq_len, "batch_size": case.batch_size},
        timeout_seconds=job["timeout_seconds"], max_memory_gb=job["max_memory_gb"],
    )
    for name in SHARED:
        value = outcome.result.pop(name, None)
        summary[name] = value if summary[name] is None else summary[name]
    return {**case._asdict(), "status": outcome.status, "reason": outcome.reason,
            "seconds": round(outcome.seconds, 2), **outcome.result}


def _blocker(rows: dict[Case, Row], case: Case) -> Row | None:
    """The shortest row of this attention that asked for no more and ran out of time or memory, if there is one."""
    tokens = case.seq_len * case.batch_size
    hopeless = [row for (attention, n, batch), row in rows.items()
                if attention == case.attention and n <= case.seq_len and n * batch <= tokens
                and row["status"] in ("timeout", "out of memory")]
    return min(hopeless, key=lambda row: row["seq_len"], default=None)
