"""Phase 1: does the model build here, count what it should, and keep its invariants on this machine?

Small inputs, seconds in all; the test suite asks the same questions at length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lshv2.attention import BACKENDS, MASKED_UP_TO, lsh_attention, runs_here, visible_set
from lshv2.block import Block
from lshv2.config import ModelConfig, Settings
from lshv2.layers import rotary_angles
from lshv2.model import LSHModel
from lshv2.progress import Progress
from lshv2.runs import SCHEMA, Run, write_json
from lshv2.sizes import count_parameters
from lshv2.trainer import pick_device

ORACLE_TOLERANCE = 1e-4  # float32, relative to the largest entry; sums of a few hundred terms in another order


def check_model(run: Run) -> dict[str, Any]:
    """Build the run's model, check it, write `model_summary.json` and return its content."""
    settings, device = run.settings, pick_device()
    checks: list[dict[str, Any]] = []

    def check(name: str, value: float, allowed: float, meaning: str) -> None:
        checks.append(dict(name=name, passed=bool(value <= allowed), value=value, allowed=allowed, meaning=meaning))

    sample = torch.empty(1, 1, 1, settings.model.head_dim, device=device)
    backends = [name for name in BACKENDS if name != "reference" and runs_here(name, sample)]
    with Progress(run, "01_model", "model checks", 2 + len(backends), "check") as bar:
        model = LSHModel(settings.model, settings.seed).to(device)
        parameters = model.count_parameters()
        check("size", abs(parameters - count_parameters(settings.model)), 0, "parameters away from the closed form")
        bar.update()
        for backend in backends:
            for name, error in oracle_errors(settings.model, device, settings.seed, backend).items():
                check(f"{backend}: {name}", error, ORACLE_TOLERANCE, "largest error against the dense masked softmax")
            check(f"{backend}: dense limit", dense_limit_error(settings.model, device, settings.seed, backend),
                  ORACLE_TOLERANCE, "error against SDPA when the window covers everything")
            bar.update()
        check("causality", causality_error(model, settings.seed), 1e-3, "how far later tokens move earlier logits")
        bar.update()
    content = {
        "schema": SCHEMA, "device": str(device), "parameters": parameters, "checks": checks,
        "passed": all(c["passed"] for c in checks), "blocks": settings.model.weight_tied_layers,
        "ponder_steps": settings.model.n_ponder_steps, "n_buckets": settings.model.resolved_n_buckets,
    }
    write_json(run.file("model_summary.json"), content)
    failed = [c for c in checks if not c["passed"]]
    if failed:
        raise AssertionError("; ".join(f"{c['name']}: {c['value']:.3g} is above {c['allowed']:.3g}" for c in failed))
    return content


def _draw(config: ModelConfig, length: int, device: torch.device, seed: int) -> list[Tensor]:
    """q, k, v, grad and bucket ids at the model's head shapes, one batch row."""
    g = torch.Generator().manual_seed(seed)
    heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
    q, k, v = (torch.randn(1, h, length, config.head_dim, generator=g).to(device).requires_grad_() for h in heads)
    grad = torch.randn(q.shape, generator=g).to(device)
    n = max(1, length // config.bucket_size)
    ids = [torch.randint(0, n, (1, h, config.n_rounds, length), generator=g).to(device) for h in heads[:2]]
    return [q, k, v, grad, *ids]


def oracle_errors(config: ModelConfig, device: torch.device, seed: int, backend: str) -> dict[str, float]:
    """Largest relative error of out, dq, dk, dv: a backend on this machine against the reference."""
    q, k, v, grad, q_ids, k_ids = _draw(config, min(3 * config.window + 37, 900), device, seed)
    results = []
    for chosen in (backend, "reference"):
        out = lsh_attention(
            q, k, v, q_ids, k_ids, n_buckets=int(q_ids.max()) + 1, bucket_size=config.bucket_size, window=config.window,
            n_global=config.n_global, backend=chosen,
        )
        results.append([out, *torch.autograd.grad(out, (q, k, v), grad)])
    names = ("out", "dq", "dk", "dv")
    return {n: _relative(a, b) for n, a, b in zip(names, *results, strict=True)}


def dense_limit_error(config: ModelConfig, device: torch.device, seed: int, backend: str) -> float:
    """With a window over the whole input, LSH attention is dense attention."""
    q, k, v, _, q_ids, k_ids = _draw(config, 200, device, seed)
    ours = lsh_attention(q, k, v, q_ids, k_ids, n_buckets=int(q_ids.max()) + 1, bucket_size=8, window=200,
                         backend=backend)
    dense = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return _relative(ours, dense)


@torch.no_grad()
def causality_error(model: LSHModel, seed: int) -> float:
    """Largest change of earlier logits when all later tokens change, over the logits' own scale."""
    # long enough for the backend of long inputs, where the model allows it
    long = MASKED_UP_TO + 128
    length = min(model.config.max_seq_len, max(long, 2 * model.config.window))
    g = torch.Generator().manual_seed(seed)
    ids, other = (torch.randint(0, model.config.vocab_size, (1, length), generator=g) for _ in range(2))
    half = length // 2
    other[:, :half] = ids[:, :half]
    device = next(model.parameters()).device
    model.eval()
    ours, changed = (model(x.to(device)).logits[:, :half] for x in (ids, other))
    model.train()
    return _relative(ours, changed)


@torch.no_grad()
def example_pattern(settings: Settings, length: int) -> Tensor:
    """What head 0 of the untrained model's first block sees of random tokens: bool [T,T], on the CPU."""
    config = settings.model.twin("lsh")
    model = LSHModel(config, settings.seed).eval()
    g = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(0, config.vocab_size, (1, length), generator=g)
    block = model.blocks[0]
    assert isinstance(block, Block)
    angles = rotary_angles(length, config, ids.device)
    q_ids, k_ids = block.attention.hash(*block.prepare(model.embedding(ids), *angles)[3:])
    return visible_set(
        q_ids[:, :1], k_ids[:, :1], bucket_size=config.bucket_size, window=config.window, n_global=config.n_global
    )[0, 0]


def _relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-6)).item()
