"""Milliseconds a token while decoding, by context length: the whole model's step, LSH and its dense twin.

    python -m lshv2.benchmark.decoding --contexts 1024 8192 32768 131072 --samples 5 --out decoding.json

A step goes from a token to the next one's logits; choosing the token is left out, and so is the prefill, which is timed
apart (one timing). A sample is the mean over `--steps` steps, so the context grows by steps x samples meanwhile. On a
GPU steps run in bfloat16, once launched by Python (`eager`) and once replayed from a CUDA graph (`graph`; the dense
twin's then keeps the context at which it was captured); on a CPU in float32. `n_buckets` is the preset's at every
context. `--fill random` puts random keys, values and buckets into the cache where a real prefill would take too long: a
step's cost does not depend on them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lshv2.benchmark.meter import Meter
from lshv2.config import ModelConfig
from lshv2.decoding import Cache
from lshv2.graphs import WARM, GraphedStep
from lshv2.layers import rotary_angles
from lshv2.machine import environment
from lshv2.model import LSHModel
from lshv2.presets import PRESETS, make_settings
from lshv2.runs import write_json
from lshv2.trainer import pick_device

MODES = {"cpu": ("eager",), "cuda": ("eager", "graph")}


@torch.no_grad()
def random_cache(model: LSHModel, batch: int, context: int, capacity: int, generator: torch.Generator) -> Cache:
    """A cache as after a prefill of `context` tokens a row, holding random numbers, the same in every layer."""
    config, weight = model.config, model.embedding.weight
    cache = Cache(config, [context] * batch, rotary_angles(capacity, config, weight.device))
    heads, rounds = config.n_kv_heads, 1 if config.hashing == "inverted_file" else config.n_rounds
    k, v = (torch.randn(batch, heads, context, config.head_dim, generator=generator).to(weight) for _ in range(2))
    ids = torch.randint(0, config.resolved_n_buckets, (batch, heads, rounds, context), generator=generator)
    x = torch.randn(batch, 1, config.d_model, generator=generator).to(weight)
    for layer in cache.layers:
        layer.fill(x.expand(-1, context, -1), k, v, ids.to(weight.device))
    return cache


def measure(
    model: LSHModel, context: int, *, batch: int, steps: int, samples: int, fill: str, seed: int
) -> dict[str, Any]:
    """One row: median and samples of each mode in milliseconds a token (of the whole batch), prefill, cache size."""
    device = model.embedding.weight.device
    meter = Meter(device)
    generator = torch.Generator().manual_seed(seed)
    modes = MODES[device.type]
    capacity = context + len(modes) * room(steps, samples)
    row: dict[str, Any] = {"context": context, "attention": model.config.attention, "batch": batch, "fill": fill}
    if fill == "random":
        cache, row["prefill_ms"] = random_cache(model, batch, context, capacity, generator), None
    else:
        prompt = torch.randint(0, model.config.vocab_size, (batch, context), generator=generator).to(device)
        held: list[Cache] = []
        row["prefill_ms"] = meter.milliseconds(
            lambda: held.append(model.prefill(prompt, [context] * batch, capacity=capacity)[1])
        )
        cache = held[0]
    stored = [x for layer in cache.layers for x in vars(layer).values() if isinstance(x, Tensor)]
    row["cache_mb"] = sum(x.numel() * x.element_size() for x in stored) / 2**20
    tokens = torch.randint(0, model.config.vocab_size, (room(steps, samples), batch), generator=generator).to(device)
    for mode in modes:
        step: Callable[[Tensor], Tensor] = lambda token: model.step(token, cache)  # noqa: E731
        if mode == "graph":
            step = GraphedStep(step, device)
        _feed(step, tokens[: WARM + 1])
        taken = [
            meter.milliseconds(partial(_feed, step, part)) / steps for part in tokens[WARM + 1 :].split(steps)
        ]
        row |= {f"{mode}_ms": median(taken), f"{mode}_samples_ms": taken}
    return row


def _feed(step: Callable[[Tensor], Tensor], tokens: Tensor) -> None:
    for token in tokens:
        step(token)


def room(steps: int, samples: int) -> int:
    """Tokens that one mode feeds."""
    return WARM + 1 + steps * samples


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Time a token at the longest context over that at the shortest, by attention and mode."""
    result = {}
    for name in dict.fromkeys(row["attention"] for row in rows):
        own = sorted((row for row in rows if row["attention"] == name), key=lambda row: row["context"])
        for mode in ("eager", "graph"):
            if f"{mode}_ms" in own[0]:
                result[f"{name}_{mode}"] = own[-1][f"{mode}_ms"] / own[0][f"{mode}_ms"]
    return result


def model_config(preset: str, attention: str, longest: int) -> ModelConfig:
    """The preset's model with capacity for `longest` tokens and its hash tables unchanged."""
    model = make_settings(preset).model
    sizes = {"max_seq_len": max(model.max_seq_len, longest), "n_buckets": model.resolved_n_buckets}
    return model.twin(attention, **sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 8192, 32_768, 131_072])
    parser.add_argument("--attentions", nargs="+", choices=["lsh", "dense", "window"], default=["lsh", "dense"])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="full")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=64, help="in one sample")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--fill", choices=["prefill", "random"], default="prefill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write rows and environment here as JSON")
    arguments = parser.parse_args()
    device = pick_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    fed = len(MODES[device.type]) * room(arguments.steps, arguments.samples)
    rows: list[dict[str, Any]] = []
    for attention in arguments.attentions:
        config = model_config(arguments.preset, attention, max(arguments.contexts) + fed)
        model = LSHModel(config, arguments.seed).to(device, dtype).eval()
        for context in arguments.contexts:
            rows.append(measure(
                model, context, batch=arguments.batch, steps=arguments.steps, samples=arguments.samples,
                fill=arguments.fill, seed=arguments.seed,
            ))
            row = rows[-1]
            times = ", ".join(f"{mode} {row[f'{mode}_ms']:.2f} ms a token ({min(row[f'{mode}_samples_ms']):.2f} to "
                              f"{max(row[f'{mode}_samples_ms']):.2f})" for mode in MODES[device.type])
            prefill = f", prefill {row['prefill_ms']:,.0f} ms" if row["prefill_ms"] else ""
            print(f"{context:8,} tokens, {attention:5}: {times}{prefill}, cache {row['cache_mb']:,.0f} MB", flush=True)
            if arguments.out:
                about = {"preset": arguments.preset, "n_buckets": config.n_buckets, "dtype": str(dtype),
                         "steps": arguments.steps, "seed": arguments.seed}
                write_json(arguments.out, {"schema": 1, "environment": environment(), **about, "rows": rows,
                                           "longest_over_shortest": ratios(rows)})
    print("longest over shortest context: " + ", ".join(f"{k} {v:.2f}" for k, v in ratios(rows).items()))


if __name__ == "__main__":
    main()
