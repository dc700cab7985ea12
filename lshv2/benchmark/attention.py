"""The attention operator alone, against torch's SDPA, forward + backward, in one process.

    python -m lshv2.benchmark.attention --lengths 4096 16384 --samples 5 --out attention.json

One layer at the documented head shape (12 query and 4 key/value heads of 64, W 128, window 256, R 4, batch 1) on random
q, k, v, with max(1, T / W) buckets a round. What is timed for LSH is the whole operator: hashing by random codebooks,
sorting, attention, and its backward. The two are measured in turn, so that a machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lshv2.attention import choose_backend, lsh_attention
from lshv2.hashing import bucket_ids, codebook_tables
from lshv2.machine import environment
from lshv2.runs import write_json
from lshv2.trainer import pick_device

N_HEADS, N_KV_HEADS, HEAD_DIM, N_ROUNDS, BUCKET_SIZE, WINDOW, N_GLOBAL = 12, 4, 64, 4, 128, 256, 4


def milliseconds(step: Callable[[], object], device: torch.device) -> float:
    """Wall-clock of one call, the device's work included."""
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e3


def measure(length: int, samples: int, seed: int) -> dict[str, Any]:
    """Medians and samples in milliseconds of forward + backward, LSH and dense, after one warm-up each."""
    device = pick_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> Tensor:
        x = torch.randn(1, heads, length, HEAD_DIM, generator=generator)
        return x.to(device, dtype).requires_grad_()

    q, k, v = draw(N_HEADS), draw(N_KV_HEADS), draw(N_KV_HEADS)
    grad = draw(N_HEADS).detach()
    n_buckets = max(1, 2 ** round(torch.tensor(length / BUCKET_SIZE).log2().item()))
    tables = [t.to(device) for t in codebook_tables(N_KV_HEADS, N_ROUNDS, n_buckets, HEAD_DIM, generator)]

    def lsh() -> Tensor:
        return lsh_attention(
            q, k, v, bucket_ids(q, tables), bucket_ids(k, tables), n_buckets=n_buckets, bucket_size=BUCKET_SIZE,
            window=WINDOW, n_global=N_GLOBAL,
        )

    def dense() -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    taken: dict[str, list[float]] = {"lsh": [], "dense": []}
    for sample in range(samples + 1):
        for name, forward in (("lsh", lsh), ("dense", dense)):
            elapsed = milliseconds(lambda f=forward: torch.autograd.grad(f(), (q, k, v), grad), device)  # type: ignore[misc]
            if sample:
                taken[name].append(elapsed)
    row: dict[str, Any] = {"seq_len": length, "n_buckets": n_buckets, "backend": choose_backend(q), "dtype": str(dtype)}
    for name, values in taken.items():
        row |= {f"{name}_ms": median(values), f"{name}_samples_ms": values}
    return {**row, "speedup": row["dense_ms"] / row["lsh_ms"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096, 8192, 16_384])
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write rows and environment here as JSON")
    arguments = parser.parse_args()
    rows = []
    for length in arguments.lengths:
        rows.append(measure(length, arguments.samples, arguments.seed))
        low, high = min(rows[-1]["lsh_samples_ms"]), max(rows[-1]["lsh_samples_ms"])
        print(f"{length:8,} tokens: LSH {rows[-1]['lsh_ms']:10.1f} ms ({low:.1f} to {high:.1f}), "
              f"SDPA {rows[-1]['dense_ms']:10.1f} ms, {rows[-1]['speedup']:.2f} x", flush=True)
        if arguments.out:
            write_json(arguments.out, {"schema": 1, "environment": environment(), "seed": arguments.seed, "rows": rows})
    if not arguments.out:
        print(json.dumps(environment()))


if __name__ == "__main__":
    main()
