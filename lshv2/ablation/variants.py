"""What is compared: attention variants, tasks, and the order in which a study runs them.

A variant is the product's model with other settings; what its settings do not offer (`special`) is a subclass in
`lshv2.ablation.heads`. All variants of a task have the same parameters (but for the taps of a convolution, a tenth of a
percent), data, steps and learning rate. `dense_*` are
the twins that LSH is held against, with the same token shift, QK-norm, learned temperature and rotary choices.

Tasks: `language-N`, bytes of real text in windows of N tokens, 32,768 tokens a step; `recall-N`, associative recall
trained at N tokens and asked at 1, 2, 4 and 8 times that, its buckets made for the longest (a model's capacity);
`depth-N`, the same text as language, for pondering against fixed depths (`lshv2.ablation.depth_variants`).
Needs no torch: the README's table reads this.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lshv2.ablation import depth_variants
from lshv2.config import RecallConfig, Settings
from lshv2.errors import UserError
from lshv2.presets import make_settings

TOKENS_A_STEP = 32_768
RECALL_LENGTHS = (1, 2, 4, 8)  # times the training length
SHORT = 2048  # tokens of the windows that come first where long ones are hard to start with
CUT = 4096  # tokens: what a longer context gains is measured against so many
BYTE_VOCABULARY = 257  # all bytes and the end of a document

Special = Literal["", "no_shift", "centred", "two_way", "budget"]


@dataclass(frozen=True)
class Variant:
    """settings: what differs from the task's base. special: the subclass that stands in for the product's attention.

    far: rotary fraction outside the window, of `two_way` (inside it is the settings').
    finer: buckets in multiples of T / W, the settings' own choice.
    first: the first half of the steps reads the same tokens in windows of so many; 0: in the task's, like the rest.
    only: the tasks that this variant is meant for, by the start of their name; empty: all.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    special: Special = ""
    far: float = 0.5
    finer: int = 1
    first: int = 0
    only: str = ""

    @property
    def attention(self) -> str:
        return self.settings.get("model.attention", "lsh")


def _dense(rotary: float, heads: float = 1.0, **more: Any) -> Variant:
    return Variant(
        {"model.attention": "dense", "model.rotary_fraction": rotary, "model.rotary_heads": heads}, **more
    )


def _rotary(fraction: float, heads: float = 1.0, **more: Any) -> Variant:
    return Variant({"model.rotary_fraction": fraction, "model.rotary_heads": heads}, **more)


def _shape(rounds: int, bucket_size: int, window: int = 256, base: dict[str, Any] | None = None) -> Variant:
    shape = {"model.n_rounds": rounds, "model.bucket_size": bucket_size, "model.window": window}
    return Variant({**(base or {}), **shape}, only="language")


CROSS_POLYTOPE = {"model.hashing": "cross_polytope"}
INVERTED_FILE = {"model.hashing": "inverted_file"}
MIXED = {"model.rotary_heads": 0.5}  # the first half of the heads carries no positions
CONTENT_CELLS = {**INVERTED_FILE, "model.rotary_fraction": 0.25}
FINE = {"model.n_rounds": 8, "model.bucket_size": 32}  # as many keys in smaller pieces
CONVOLVED = {"model.short_conv": 3}
MEANS = {"model.centroids": "mean"}
VARIANTS: dict[str, Variant] = {
    "codebooks_half": Variant(),
    "dense_full": _dense(1.0),
    "dense_half": _dense(0.5),
    "cross_polytope_half": Variant(CROSS_POLYTOPE),
    "centred_half": Variant(CROSS_POLYTOPE, "centred"),
    "window_half": Variant({"model.attention": "window"}),
    # the keys of R·W + window, all of them the most recent: what finding has to beat
    "window_512_half": Variant({"model.attention": "window", "model.window": 512}, only="language"),
    "inverted_file_half": Variant(INVERTED_FILE),
    "inverted_file_quarter": Variant(CONTENT_CELLS),
    "inverted_file_content": Variant({**INVERTED_FILE, "model.rotary_fraction": 0.0}),
    "inverted_file_r8": Variant({**INVERTED_FILE, **FINE}, only="language"),
    "inverted_file_r8_quarter": Variant({**CONTENT_CELLS, **FINE}, only="language"),
    "inverted_file_fine_quarter": Variant(CONTENT_CELLS, finer=2, only="language"),
    "inverted_file_mix_full": Variant({**INVERTED_FILE, **MIXED, "model.rotary_fraction": 1.0}),
    "inverted_file_r8_mix_full": Variant(
        {**INVERTED_FILE, **FINE, **MIXED, "model.rotary_fraction": 1.0}, only="language"
    ),
    "inverted_file_mix_full_conv": Variant(
        {**INVERTED_FILE, **MIXED, **CONVOLVED, "model.rotary_fraction": 1.0}, only="language"
    ),
    "inverted_file_r8_mix_full_conv": Variant(
        {**INVERTED_FILE, **FINE, **MIXED, **CONVOLVED, "model.rotary_fraction": 1.0}, only="language"
    ),
    # queries look for the mean key of a cell, not for its direction alone
    "inverted_file_r8_mix_full_means": Variant(
        {**INVERTED_FILE, **FINE, **MIXED, **MEANS, "model.rotary_fraction": 1.0}, only="language"
    ),
    # cells of keys as they are weighed, with their positions
    "inverted_file_r8_mix_full_placed": Variant(
        {**INVERTED_FILE, **FINE, **MIXED, "model.rotary_fraction": 1.0, "model.hash_positions": True}, only="language"
    ),
    "inverted_file_r8_mix_full_placed_means": Variant(
        {**INVERTED_FILE, **FINE, **MIXED, **MEANS, "model.rotary_fraction": 1.0, "model.hash_positions": True},
        only="language",
    ),
    "inverted_file_r8_mix_quarter": Variant({**CONTENT_CELLS, **FINE, **MIXED}, only="language"),
    # what the full-size model sees: 512 and 1,024 found keys
    "inverted_file_w128_quarter": _shape(4, 128, base=CONTENT_CELLS),
    "inverted_file_r8_w64_quarter": _shape(8, 64, base=CONTENT_CELLS),
    "inverted_file_r8_w128_quarter": _shape(8, 128, base=CONTENT_CELLS),
    "inverted_file_coarse": Variant({**INVERTED_FILE, "model.n_buckets": 16}, only="language-2048"),
    "centred_quarter": Variant({**CROSS_POLYTOPE, "model.rotary_fraction": 0.25}, "centred"),
    "codebooks_full": _rotary(1.0),
    "codebooks_quarter": _rotary(0.25),
    "codebooks_content": _rotary(0.0),
    "codebooks_mix_full": _rotary(1.0, 0.5),
    "codebooks_mix_half": _rotary(0.5, 0.5),
    "codebooks_two_way_half": _rotary(1.0, special="two_way", far=0.5),
    "codebooks_two_way_content": _rotary(1.0, special="two_way", far=0.0),
    "codebooks_centred_half": Variant({}, "centred"),
    "codebooks_no_shift": Variant({}, "no_shift"),
    # the same R·W + window keys, counted without overlaps: 4·64 + 256
    "codebooks_r2_w128": _shape(2, 128),
    "codebooks_r8_w32": _shape(8, 32),
    "codebooks_r3_w128_window128": _shape(3, 128, 128),
    # buckets for the training length alone, to see what a capacity costs or gives
    "codebooks_few_buckets": Variant({"model.n_buckets": 16}, only="recall"),
    "cross_polytope_few_buckets": Variant({**CROSS_POLYTOPE, "model.n_buckets": 16}, only="recall"),
    "dense_quarter": _dense(0.25),
    "dense_content": _dense(0.0),
    "dense_mix_full": _dense(1.0, 0.5),
    "dense_mix_half": _dense(0.5, 0.5),
    "dense_mix_full_conv": Variant(
        {"model.attention": "dense", **MIXED, **CONVOLVED, "model.rotary_fraction": 1.0}, only="language"
    ),
    # a dense layer learns late where windows are long and few a step: each choice with short ones first
    "dense_half_short_first": _dense(0.5, first=SHORT, only="language-16384"),
    "dense_mix_full_short_first": _dense(1.0, 0.5, first=SHORT, only="language-16384"),
    "inverted_file_r8_mix_full_short_first": Variant(
        {**INVERTED_FILE, **FINE, **MIXED, "model.rotary_fraction": 1.0}, first=SHORT, only="language-16384"
    ),
    "dense_two_way_half": _dense(1.0, special="two_way", far=0.5),
    "dense_no_shift": _dense(0.5, special="no_shift"),
    **{
        name: Variant(settings, "budget" if name == depth_variants.BUDGET else "", only="depth")
        for name, settings in depth_variants.SETTINGS.items()
    },
}

_CORE = ("inverted_file_r8_quarter", "dense_half", "inverted_file_r8_mix_full", "dense_mix_full",
         "inverted_file_mix_full", "dense_quarter", "codebooks_quarter", "inverted_file_quarter", "window_512_half")
# The most informative comparison first, for all seeds, before the next begins.
TIERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("language-2048", _CORE),
    ("language-2048", ("inverted_file_r8_mix_full_conv", "dense_mix_full_conv", "inverted_file_mix_full_conv")),
    ("language-2048", ("inverted_file_r8_mix_full_means", "inverted_file_r8_mix_full_placed",
                       "inverted_file_r8_mix_full_placed_means")),
    ("recall-256", ("inverted_file_quarter", "inverted_file_content", "codebooks_quarter", "codebooks_content",
                    "dense_half", "dense_quarter", "dense_content", "inverted_file_half", "codebooks_half")),
    ("language-8192", (*_CORE, "inverted_file_fine_quarter", "inverted_file_w128_quarter",
                       "inverted_file_r8_w64_quarter", "inverted_file_r8_w128_quarter")),
    ("language-2048", ("inverted_file_r8", "inverted_file_fine_quarter", "codebooks_half", "inverted_file_half",
                       "codebooks_r8_w32", "dense_full", "window_half")),
    ("language-2048", ("cross_polytope_half", "centred_half", "centred_quarter", "codebooks_centred_half",
                       "inverted_file_coarse")),
    ("recall-256", ("cross_polytope_half", "centred_half", "codebooks_centred_half", "window_half", "dense_full",
                    "codebooks_mix_half", "codebooks_mix_full", "codebooks_few_buckets", "codebooks_full")),
    ("language-2048", ("inverted_file_r8_mix_quarter", "dense_mix_half", "codebooks_full", "codebooks_mix_full",
                       "codebooks_no_shift", "dense_no_shift")),
    ("language-2048", ("codebooks_r2_w128", "codebooks_r3_w128_window128")),
    ("recall-256", ("codebooks_two_way_half", "codebooks_two_way_content", "codebooks_no_shift",
                    "cross_polytope_few_buckets", "dense_mix_full", "dense_mix_half", "dense_no_shift")),
    ("language-2048", ("codebooks_two_way_half", "codebooks_two_way_content", "dense_two_way_half")),
    ("language-2048", ("codebooks_content", "inverted_file_content", "codebooks_mix_half", "dense_content")),
    ("language-16384", ("inverted_file_r8_mix_full", "dense_half", "dense_half_short_first",
                        "dense_mix_full_short_first", "inverted_file_mix_full",
                        "inverted_file_r8_mix_full_short_first", "dense_mix_full")),
    *(("depth-2048", names) for names in depth_variants.TIERS),
)
TASKS = tuple(dict.fromkeys(task for task, _ in TIERS))


@dataclass(frozen=True)
class Job:
    """One training: a variant on a task with a seed; `extra`: overrides of every job of this study, in `--set` form."""

    variant: str
    task: str
    seed: int
    steps: int
    extra: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> tuple[str, str, int]:
        return self.variant, self.task, self.seed

    @property
    def kind(self) -> str:
        """Jobs of one kind take about the same time."""
        variant = VARIANTS[self.variant]
        if self.task.startswith("depth"):
            return "depth"
        return "two_way" if variant.special == "two_way" else variant.attention

    @property
    def length(self) -> int:
        """Tokens of a training sequence."""
        return int(self.overrides()["train.seq_length"])

    def base(self) -> dict[str, Any]:
        """What all variants of the study share; raises `UserError` for an unknown task."""
        name, _, text = self.task.partition("-")
        bases = {"language": _language, "recall": _recall, "depth": _depth}
        if name not in bases or not text.isdigit():
            known = ", ".join(f"{name}-<tokens>" for name in bases)
            raise UserError(f"task {self.task!r} is unknown; allowed: {known}")
        base = bases[name](int(text))
        values = {**base, **dict(self.extra)}
        return {**values, "train.num_train_sequences": self.steps * values["train.batch_size"]}

    def overrides(self) -> dict[str, Any]:
        """All that differs from the documented settings; two rows with the same ones are the same measurement."""
        variant = VARIANTS[self.variant]
        values = {**self.base(), **variant.settings}
        if variant.finer > 1:
            values["model.n_buckets"] = variant.finer * make_settings("full", values).model.resolved_n_buckets
        return values

    def settings(self) -> Settings:
        """Validated settings; raises `UserError` with one line."""
        return make_settings("full", self.overrides(), seed=self.seed)


# Stated for every job, so that a study's variants stay what they are when the product's defaults move.
ALL: dict[str, Any] = {
    "model.hashing": "codebooks", "model.rotary_fraction": 0.5, "model.rotary_heads": 1.0, "model.n_rounds": 4,
    "model.short_conv": 0,
}


def _language(length: int) -> dict[str, Any]:
    batch = max(1, TOKENS_A_STEP // length)
    return {
        "model.vocab_size": BYTE_VOCABULARY, "model.d_model": 256, "model.n_layers": 4, "model.weight_tied_layers": 4,
        "model.n_heads": 4, "model.n_kv_heads": 4, "model.d_ff": 1024, "model.use_ponder": False,
        "model.max_seq_len": length, "model.window": 256, "model.bucket_size": 64, "train.seq_length": length,
        "train.batch_size": batch, "train.num_eval_sequences": 16 * batch, "train.learning_rate": 3e-3,
        "train.gradient_checkpoint": False, **ALL,
    }


def _depth(length: int) -> dict[str, Any]:
    return depth_variants.base(_language(length))


def _recall(length: int) -> dict[str, Any]:
    """The product's recall probe, with the capacity for the longest evaluation: window and W 16, 4 rounds."""
    probe = RecallConfig()
    shape = {name: getattr(probe, name) for name in (
        "vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "window", "bucket_size")}
    return {
        **{f"model.{name}": value for name, value in shape.items()}, "model.d_ff": 2 * probe.d_model,
        "model.weight_tied_layers": probe.n_layers, "model.use_ponder": False, "model.n_buckets": None,
        "model.max_seq_len": length * RECALL_LENGTHS[-1], "train.seq_length": length, "train.batch_size": 64,
        "train.num_eval_sequences": 256, "train.learning_rate": 3e-3, "train.gradient_checkpoint": False,
        "recall.n_pairs": probe.n_pairs, **ALL,
    }


def plan(
    tasks: list[str], variants: list[str] | None, seeds: list[int], steps: int, extra: dict[str, Any]
) -> list[list[Job]]:
    """Tiers of jobs, the first to run first. variants: None takes the tiers' own, else these on every task that they
    are meant for."""
    tiers = TIERS if variants is None else tuple((task, tuple(variants)) for task in tasks)
    return [
        [
            Job(name, task, seed, steps, tuple(sorted(extra.items())))
            for seed in seeds for name in names if task.startswith(VARIANTS[name].only)
        ]
        for task, names in tiers if task in tasks
    ]
