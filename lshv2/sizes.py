"""Parameter counts in closed form, and the shape that a named size such as "100M" stands for.

Importing this needs no torch. A test holds `count_parameters` equal to the built model's count.
"""

from __future__ import annotations

from typing import Any

from lshv2.config import ModelConfig
from lshv2.errors import UserError

SHAPE_KEYS = ("d_model", "n_heads", "n_kv_heads", "d_ff")  # what a named size decides
TOLERANCE = 0.05  # a named size resolves within this fraction, or is refused
WIDTHS = (*range(16, 256, 16), *range(256, 4096 + 1, 64))  # d_model of a named size


def count_parameters(config: ModelConfig) -> int:
    """Distinct trainable parameters (a tied block counts once, embeddings and output head are untied)."""
    d, head_dim = config.d_model, config.head_dim
    attention = 2 * d * config.n_heads * head_dim + 2 * d * config.n_kv_heads * head_dim
    mixing = (3 + config.short_conv) * d + config.n_heads  # two norms, token shift, taps, head temperatures
    block = attention + 3 * d * config.d_ff + mixing
    ponder = (config.n_ponder_steps * d + d + 1) if config.use_ponder else 0  # step embedding, halting head
    return 2 * config.vocab_size * d + config.weight_tied_layers * block + d + ponder


def shape_for(target: int, **fixed: Any) -> dict[str, int]:
    """The `d_model, n_heads, n_kv_heads, d_ff` whose count comes nearest to `target` parameters.

    fixed: any ModelConfig values to keep (vocab_size, n_layers, ...). The documented shape wins where it fits,
    so `shape_for(100_000_000)` is the documented configuration. Raises `UserError` if none is within 5 %.
    """
    documented = ModelConfig(**fixed)
    if _error(documented, target) <= TOLERANCE:
        return {key: getattr(documented, key) for key in SHAPE_KEYS}
    best: ModelConfig | None = None
    for d_model in WIDTHS:
        for candidate in _candidates(d_model, fixed, target):
            if best is None or _rank(candidate, target) < _rank(best, target):
                best = candidate
    if best is None or _error(best, target) > TOLERANCE:
        vocab = documented.vocab_size
        nearest = "none" if best is None else f"{count_parameters(best):,}"
        what = f"the two embeddings alone take 2 x {vocab} x d_model: choose a larger size or a smaller vocabulary"
        if target > 2 * vocab * WIDTHS[-1]:
            what = f"widths end at {WIDTHS[-1]:,}: choose a smaller size, or more distinct blocks (weight_tied_layers)"
        raise UserError(f"no shape with vocab_size={vocab} has {target:,} parameters within {TOLERANCE:.0%} (nearest: "
                        f"{nearest}); {what}")
    return {key: getattr(best, key) for key in SHAPE_KEYS}


def _candidates(d_model: int, fixed: dict[str, Any], target: int) -> list[ModelConfig]:
    """At this width: heads near 64 wide in groups of three or less, and the feed-forward that meets the target."""
    head_dim = 64 if d_model % 64 == 0 and d_model >= 256 else 32 if d_model % 32 == 0 else 16
    n_heads = fixed.get("n_heads", d_model // head_dim)
    n_kv_heads = fixed.get("n_kv_heads", next(k for g in (3, 4, 2, 1) if n_heads % g == 0 for k in [n_heads // g]))
    found = []
    try:
        base = {**fixed, "d_model": d_model, "n_heads": n_heads, "n_kv_heads": n_kv_heads}
        if "d_ff" in fixed:
            return [ModelConfig(**base)]
        empty = ModelConfig(**base, d_ff=1)
        per_ff = 3 * d_model * empty.weight_tied_layers
        want = (target - count_parameters(empty)) / per_ff
        step = 16 if d_model < 256 else 64
        d_ff = round(want / step) * step
        if d_model <= d_ff <= 8 * d_model:  # outside this the shape is no longer a transformer that one would train
            found.append(ModelConfig(**base, d_ff=d_ff))
    except ValueError:
        pass
    return found


def _rank(config: ModelConfig, target: int) -> tuple[bool, float]:
    """Within tolerance first, then the feed-forward ratio nearest to the documented 4."""
    error = _error(config, target)
    return (error > TOLERANCE, error if error > TOLERANCE else abs(config.d_ff / config.d_model - 4))


def _error(config: ModelConfig, target: int) -> float:
    return abs(count_parameters(config) - target) / target
