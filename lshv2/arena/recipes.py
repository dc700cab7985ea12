"""What each task's models are and how they learn: one table, from which twins differ by their attention alone.

Trained lengths are drawn step by step, each step having about `tokens` tokens or, of a longer one, one sequence. The
index has cells for 131,072 tokens from the start: a cell holds what it holds at every length, so it must be fine enough
for the longest. Two to four layers of 128 or 256; trees have six, and a tracker that ponders four steps of two blocks.
What each choice is worth was tried with one seed (NOTES.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, get_args

from lshv2.config import ArenaAttention as Attention
from lshv2.config import ModelConfig

LONGEST = 131_072
LENGTHS = tuple(1 << e for e in range(10, 18))  # what is judged
ATTENTIONS: tuple[Attention, ...] = get_args(Attention)
BASE: dict[str, Any] = {
    "d_model": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "d_ff": 256, "window": 64, "bucket_size": 64,
    "n_rounds": 4, "n_buckets": 1024, "short_conv": 3, "use_ponder": False,
}


@dataclass(frozen=True)
class Recipe:
    """lengths: trained ones; steps, tokens a step; settings: what the model has of its own; judged: lengths to judge
    (None: LENGTHS); sequences: how many at each; lsh: settings that LSH alone reads, and its twins' rows do not hang
    on.
    """

    lengths: tuple[int, ...]
    steps: int = 2000
    tokens: int = 8192
    learning_rate: float = 3e-3
    settings: dict[str, Any] = field(default_factory=dict)
    judged: tuple[int, ...] | None = None
    sequences: int = 60
    lsh: dict[str, Any] = field(default_factory=dict)

    def model(self, vocab_size: int, attention: Attention, longest: int) -> ModelConfig:
        """A model's shape; longest: the longest sequence it will see."""
        shape = {**BASE, **self.settings, **self.lsh}
        shape.setdefault("weight_tied_layers", shape["n_layers"])
        kind: dict[str, Any] = {"attention": attention}
        if attention == "dense_scaled":
            kind = {"attention": "dense", "softmax_scale": "log_length"}
        return ModelConfig(vocab_size=vocab_size, max_seq_len=longest, **kind, **shape)

    def twin(self, attention: Attention) -> Recipe:
        """The recipe of a twin: a window sees as many keys as LSH may, all of them the most recent."""
        if attention == "lsh":
            return self
        if attention != "window":
            return replace(self, lsh={})
        shape = {**BASE, **self.settings}
        window = shape["window"] + shape["n_rounds"] * shape["bucket_size"]
        return replace(self, settings={**shape, "window": window}, lsh={})


SHORT = (32, 64, 128, 256, 512, 1024, 2048)  # in the shortest the window alone shows what is asked: where it begins
WHOLE = (*SHORT[2:], 8192, 32_768, 131_072)  # trained where they are judged: at 131,072 tokens keys have closer rivals
FARTHEST = (*WHOLE, *(131_072,) * 3)  # what has to be found many times in a row, most often where it is hardest
CONTENT = {"rotary_heads": 0.0}  # positions beyond the trained lengths mean nothing
# without a convolution MQAR is learnt sooner; a cell holds 32 keys of 131,072, and W = 64 are visible
RECALL = {**CONTENT, "short_conv": 0, "n_buckets": 4096}
FINER = {"n_buckets": 16_384}  # on the quality curve four times as many cells find all there is to find
# 16 cells of 1,024 hold what one of 64 would, and closer; heads look on their own, so eight miss less than four
SEARCH = {**CONTENT, "n_layers": 3, "n_heads": 8, "n_kv_heads": 8, "n_rounds": 16, "bucket_size": 256}
WIDE = {**SEARCH, "d_model": 256}  # heads of 32 tell 131,072 keys apart that heads of 16 confuse
COPY = {**SEARCH, "n_buckets": 64, "bucket_size": 128, "window": 256}  # blanks fill cells; what counts lies in few
MEANS = {"centroids": "mean"}  # tracking gains much by it, text no more than training again moves it
TWICE = {**CONTENT, "n_layers": 3, "n_buckets": 16}
COPIED = (48, *SHORT[1:], 4096, 4096, 4096)
TREE_LENGTHS = (16, *SHORT[:-1], *(2001,) * 8)  # what counts is how many whole trees were seen
TREES = {"d_model": 256, "n_layers": 6, "d_ff": 512, "n_rounds": 8, "bucket_size": 128, "window": 256}
RECIPES: dict[str, Recipe] = {
    "mqar": Recipe(SHORT, 4000, 16_384, settings=RECALL, lsh=FINER),
    "mqar_dense_pairs": Recipe(SHORT, 4000, 16_384, settings=RECALL, lsh=FINER),
    "duplication": Recipe(SHORT[:-1], 10_000, settings={**TWICE, "short_conv": 5}, judged=(1024,), sequences=100),
    "induction": Recipe((64, 128, 256), 2000, settings={**CONTENT, "short_conv": 0}),
    "selective_copying": Recipe(COPIED, 8000, settings=COPY, sequences=200),
    "selective_copying_dense": Recipe(COPIED, 8000, settings=COPY, sequences=200),
    "passkey": Recipe(  # each digit sees the marker
        (16, 32, 64, *WHOLE), 5000, settings={**WIDE, "short_conv": 5}, sequences=200
    ),
    "kv_needle": Recipe((24, 32, 64, *WHOLE), 5000, settings=SEARCH, sequences=200),
    "uuid_needle": Recipe(
        (48, 64, 96, *FARTHEST), 10_000, settings={**WIDE, "n_rounds": 32, "short_conv": 5}, sequences=200
    ),
    "variable_tracking": Recipe((24, 48, 96, 192, *WHOLE), 6000, 8192, 2e-3, {**SEARCH, "n_layers": 4}, lsh=MEANS),
    "listops": Recipe(TREE_LENGTHS, 15_000, 16_384, 2e-3, TREES, (2001,), 1000),
    "listops_long": Recipe((*SHORT, 4096), 6000, 16_384, 2e-3, TREES, (4096, 8192, 16_384), 200),
    "bytes": Recipe(
        (16_384,), 2000, 32_768, settings={"d_model": 256, "n_layers": 4, "d_ff": 1024, "window": 256},
        sequences=64, lsh=MEANS,
    ),
}
DEFAULT = Recipe((256, 512, 1024, 2048))  # of a task of one's own
OURS = dict(RECIPES)  # what a plugin adds is used as its author wrote it, also at laptop sizes
# The quality curve's points are many and lie far apart: half of the steps tell them from each other.
# Text is judged where it is trained: beyond, dense attention loses to any window, whatever is found.
LIGHTER: dict[str, dict[str, Any]] = {
    "duplication": {"steps": 5000, "settings": TWICE, "sequences": 60},
    "bytes": {"steps": 1000, "judged": (16_384,)},
}
# Other models of a task, LSH alone: label -> settings. Steps of two blocks that a token may stop after.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "variable_tracking": {"pondering": {"n_layers": 8, "weight_tied_layers": 2, "use_ponder": True}},
}
# What LSH is judged with too, beside what it was trained with: what finding costs, and what it misses.
ASKED_WITH: dict[str, tuple[dict[str, Any], ...]] = {
    "duplication": ({"n_rounds": 1}, {"n_rounds": 2}, {"n_rounds": 8}, {"attention": "dense"}),
    "variable_tracking": ({"attention": "dense"},),
}

# Laptop sizes: what `make quick` and the tests have time for.
SMALL: dict[str, Any] = {
    "d_model": 64, "n_buckets": 64, "window": 16, "bucket_size": 16, "n_layers": 2, "d_ff": 128, "short_conv": 0,
}


SMALL_LENGTHS = (256, 1024, 4096)


def recipe(task: str, small: bool = False) -> Recipe:
    """A task's recipe; small: for a laptop's CPU, trained at 64 tokens; a plugin's own recipe stays what it is."""
    full = RECIPES.get(task, DEFAULT)
    if not small or full is not OURS.get(task, DEFAULT):
        return full
    quick = replace(full, lengths=(64,), steps=250, tokens=2048, learning_rate=6e-3, sequences=32, judged=SMALL_LENGTHS)
    return replace(quick, settings=SMALL, lsh={})
