"""The attention operator alone, against torch's dense attention and FlexAttention, in one process.

    python -m lshv2.benchmark.attention --out runs/reference-<machine>/attention/attention.json
    python -m lshv2.benchmark.attention --quick

One layer at the documented head shape (12 query and 4 key/value heads of 64, W 128, window 256, R 4, 4 sinks), T / 128
buckets. LSH is the whole operator from q, k, v: hashing by random codebooks, or by an inverted file of random cells
(one table instead of R, R probes), sorting, attention, and its backward.
Rows, the most telling lengths first:
  eager      every length at batch 1, and 131,072 tokens as a batch of shorter ones: LSH on uniform and clustered data
             and every opponent in turn, sample by sample; LSH's time by part, peak memory on a GPU. Reformer's LSH
             attention takes part where `pip install reformer-pytorch` was run
  given ids  LSH alone on bucket ids made to hurt, without hashing, beside uniform ones
  graph      on CUDA up to 16,384 tokens: forward + backward replayed as a CUDA graph, without launch gaps
Nothing is timed that cannot end: a dense opponent whose predicted time (quadratic from its longest shorter row, at
first from a probe) passes --limit-ms has the prediction in its reason and no figure. JSON is written after every row.
Not here: decoding, several GPUs, whole models.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lshv2.benchmark import attention_inputs as shapes
from lshv2.benchmark.attention_rows import Bench, Case
from lshv2.benchmark.attention_targets import INVERTED_FILE, TOKENS, derive, fastest_dense, slower_lsh, targets
from lshv2.benchmark.worker import device_name
from lshv2.machine import environment
from lshv2.operator_plots import operator_png
from lshv2.operator_results import FILE, shown
from lshv2.runs import atomic_path, write_json
from lshv2.trainer import pick_device

LENGTHS = {  # in the order of what they tell: a run that ends early has the first of them
    "cuda": (131_072, 65_536, 16_384, 4_096, 8_192, 2_048, 32_768, 98_304, 49_152, 1_024, 262_144, 524_288,
             1_048_576),
    "cpu": (1_024, 2_048, 4_096, 8_192, 16_384, 32_768, 65_536),
}
QUICK_LENGTHS = (512, 256)
LIMIT_MS = {"cuda": 1_000.0, "cpu": 60_000.0}
GIVEN_IDS_AT = {"cuda": TOKENS, "cpu": 16_384}
GRAPH_UP_TO = 16_384


def plan(lengths: list[int], device: str) -> list[Case]:
    """All rows in order: each length with its fixed-tokens batch, ids that hurt after the first, graphs last."""
    cases: list[Case] = []
    for length in lengths:
        cases.append(Case("eager", length))
        if length < TOKENS and TOKENS % length == 0 and device == "cuda":
            cases.append(Case("eager", length, TOKENS // length))
    cases.insert(1, Case("given ids", min(GIVEN_IDS_AT[device], max(lengths))))
    if device == "cuda":
        cases += [Case("graph", c.seq_len, c.batch_size) for c in cases
                  if c.mode == "eager" and c.seq_len <= GRAPH_UP_TO]
    return cases


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    head = f"{row['mode']:9} {row['seq_len']:>9,} x {row['batch_size']:<3} {row['seconds']:6.1f} s"
    times = [f"{name} {entry['both_ms']:,.2f}" for name, entry in row["contenders"].items() if entry.get("both_ms")]
    dense, slower = fastest_dense(row), slower_lsh(row)
    return f"{head}  {', '.join(times)} ms" + (f": {dense[1] / slower:.2f} ×" if dense and slower else "")


def _command(arguments: list[str]) -> str:
    """The command line, with the names of files alone: where they lay is the machine's business."""
    return " ".join(["python -m lshv2.benchmark.attention", *(Path(x).name if "/" in x else x for x in arguments)])


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    began = time.monotonic()
    bench = Bench(options.lengths, options.dtype, options.samples, options.limit_ms, options.seed, options.quick)
    content: dict[str, Any] = {
        "schema": 2, "state": "running", "device": device_name(bench.device), "dtype": options.dtype,
        "environment": environment(), "command": _command(arguments),
        "shape": {name.lower(): getattr(shapes, name) for name in (
            "N_HEADS", "N_KV_HEADS", "HEAD_DIM", "N_ROUNDS", "BUCKET_SIZE", "WINDOW", "N_GLOBAL")},
        "seed": options.seed, "samples": asdict(bench.limits), "limit_ms": options.limit_ms, "rows": [], "left_out": [],
    }

    def save() -> None:
        content["derived"] = derive(content["rows"])
        content["derived_inverted_file"] = derive(content["rows"], INVERTED_FILE)
        content["targets"] = targets(content["rows"], bench.device.type)
        content["seconds"] = round(time.monotonic() - began, 1)
        if options.out:
            write_json(options.out, content)

    bench.probe()
    for case in plan(options.lengths, bench.device.type):
        if time.monotonic() - began > options.budget_s:
            content["left_out"].append({**asdict(case), "reason": f"{options.budget_s:g} s were over (--budget-s)"})
            continue
        content["rows"].append(bench.row(case))
        print(line(content["rows"][-1]), flush=True)
        save()
    content["state"] = "done"
    save()
    if content["rows"] and options.out and options.out.name == FILE:
        with atomic_path(options.out.with_suffix(".png")) as picture:
            picture.write_bytes(operator_png(options.out.parent))
    for target in content["targets"]:
        verdict = {None: "not measured", True: "met", False: "missed"}[target["met"]]
        value = "" if target["value"] is None else shown(target["value"], target["unit"])
        print(f"{verdict:12} {target['name']} ({target['target']}): {value}")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command's options, with the device's defaults filled in."""
    device = pick_device().type
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, help=f"in this order; on this device: {LENGTHS[device]}")
    parser.add_argument("--samples", type=int, default=20, help="at most, of each contender and row")
    parser.add_argument("--limit-ms", type=float, default=LIMIT_MS[device],
                        help="longest predicted call of a dense opponent, forward + backward")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="no row is begun after this many seconds")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"],
                        default="bfloat16" if device == "cuda" else "float32")
    parser.add_argument("--quick", action="store_true", help="two short lengths, two samples, nothing compiled")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help=f"write JSON here after every row, and a picture beside {FILE}")
    options = parser.parse_args(arguments)
    options.lengths = options.lengths or list(QUICK_LENGTHS if options.quick else LENGTHS[device])
    options.samples = min(2, options.samples) if options.quick else options.samples
    return options


if __name__ == "__main__":
    main(sys.argv[1:])
