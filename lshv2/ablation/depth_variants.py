"""What the study of depth compares: does pondering pay on language? Settings by name, and nothing else.

`depth-N`: bytes of real text in windows of N tokens, two tied blocks applied up to four times, the product's
attention. `full_depth` always applies them four times; `fixed_k` only k times, trained so: the control that any rule
for halting has to beat at the same mean number of steps. `ponder_*` train all four steps' answers by PonderNet's loss,
and are asked at full depth and at thresholds (`lshv2.ablation.depth`); `ponder_late...` and `ponder_later...` begin at
full depth alone and come to that loss.

The prior is a geometric one truncated at four steps and renormalised, so its mean never exceeds 2.5 (λ_p 0.05: 2.44;
0.3: 2.07); how many steps are taken is chosen by the threshold afterwards. With β 0.01 from the start every token
learns to stop at the first step, which is the first to answer well (attention/NOTES.md): `..._weak` come to it from
full depth. `ponder_late_mild` is how the product trains.

`ponder_budget` is a lead and not the product's loss: the KL of the tokens' *mean* halting distribution, so that the
budget is kept by all tokens together and one token may differ. On one core (width 64, dense attention, 1,500 steps of
2,048 bytes, one seed) its tokens differed more and it was behind `ponder_flat`: 2.031 against 2.005 held-out bits per
byte at 2.5 mean steps. Hence it comes second.
"""

from __future__ import annotations

from typing import Any

BLOCKS, DEEPEST = 2, 4  # distinct blocks; how often they are applied
FULL, BUDGET = "full_depth", "ponder_budget"


def _fixed(times: int) -> dict[str, Any]:
    return {"model.use_ponder": False, "model.n_layers": BLOCKS * times}


def _ponder(prior: float, beta: float, begin: float = 0.0, end: float = 0.0) -> dict[str, Any]:
    return {"model.use_ponder": True, "model.ponder_prior": prior, "model.ponder_beta": beta,
            "train.ponder_from": begin, "train.ponder_to": end}


# Applications of the blocks -> name; the deepest is what saving is counted from.
FIXED: dict[int, str] = {1: "fixed_1", 2: "fixed_2", 3: "fixed_3", DEEPEST: FULL}
PONDER: dict[str, dict[str, Any]] = {
    "ponder_flat": _ponder(0.05, 0.1),  # nearly every step as likely: the later ones are trained as much as the first
    "ponder_product": _ponder(0.3, 0.1),  # the product's, until the late ones were measured
    "ponder_late": _ponder(0.3, 0.1, 0.25, 0.75),  # at full depth alone, then ever more by PonderNet's loss
    "ponder_later": _ponder(0.3, 0.1, 0.5, 0.9),
    "ponder_late_mild": _ponder(0.3, 0.03, 0.25, 0.75),
    "ponder_late_weak": _ponder(0.3, 0.01, 0.25, 0.75),  # and hard tokens may keep nearly all of p at the last step
    "ponder_later_weak": _ponder(0.3, 0.01, 0.5, 0.9),
    BUDGET: _ponder(0.05, 1.0),
}
SETTINGS: dict[str, dict[str, Any]] = {**{name: _fixed(times) for times, name in FIXED.items()}, **PONDER}
# What decides first; then the other ways to train, and how much the first steps are worth.
TIERS: tuple[tuple[str, ...], ...] = (
    (FULL, "fixed_3", "fixed_2", "ponder_late_mild", "ponder_late_weak", "ponder_later_weak", "ponder_late",
     "ponder_later"),
    ("ponder_product", "ponder_flat", "fixed_1", BUDGET),
)


def base(language: dict[str, Any]) -> dict[str, Any]:
    """What all share: the language task's settings with the product's attention, stated, and tied blocks at full depth.

    No threshold is stated: none is used in training, and what is asked at each is in the row.
    """
    return {
        **language, "model.hashing": "inverted_file", "model.rotary_fraction": 1.0, "model.rotary_heads": 0.5,
        "model.n_rounds": 4, "model.n_layers": BLOCKS * DEEPEST, "model.weight_tied_layers": BLOCKS,
        "model.ponder_prior": 0.3, "model.ponder_beta": 0.1, "train.ponder_from": 0.0, "train.ponder_to": 0.0,
    }
