"""Settings: typed, frozen and strict, with the usage guide's keys and defaults.

Each section owns one part of a run; `lshv2.presets.make_settings` builds them all from a preset and overrides.
A section built by hand raises pydantic's ValidationError; `make_settings` turns that into one line.

Left out on purpose: no environment variables and no configuration files besides the run's own `config.json`.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


def parse_size(text: str) -> int:
    """`"100M"` -> 100_000_000; K, M and B are allowed."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB])", text)
    if not match or float(match[1]) == 0:
        raise ValueError(f"size {text!r} is not a number with K, M or B, such as 100M")
    return int(float(match[1]) * {"K": 1e3, "M": 1e6, "B": 1e9}[match[2]])


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class ModelConfig(Section):
    """The model's shape. Defaults are the documented 100M configuration (about 101 M distinct parameters)."""

    vocab_size: PositiveInt = 32_000
    d_model: PositiveInt = 768
    n_layers: PositiveInt = 24
    n_heads: PositiveInt = 12
    n_kv_heads: PositiveInt = 4
    max_seq_len: PositiveInt = 131_072
    bucket_size: PositiveInt = 128
    use_ponder: bool = True
    weight_tied_layers: PositiveInt = 6
    d_ff: PositiveInt = Field(3072, description="hidden width of the SwiGLU feed-forward")
    n_rounds: PositiveInt = Field(4, description="hash rounds R; of an inverted file the cells a query looks in")
    window: PositiveInt = Field(256, description="tokens every query sees just before it, itself included")
    n_global: NonNegativeInt = Field(4, description="attention sinks: first tokens of a document that all see")
    n_buckets: PositiveInt | None = Field(
        None, description="buckets per round, a power of two; None takes the one nearest max_seq_len / bucket_size"
    )
    attention: Literal["lsh", "dense", "window"] = Field("lsh", description="dense and window are the twins")
    softmax_scale: Literal["constant", "log_length"] = Field(
        "constant", description="log_length, of attention=dense alone: logits grow with the logarithm of how many keys "
        "a query sees, so that it looks as sharply beyond the lengths it was trained at"
    )
    hashing: Literal["codebooks", "cross_polytope", "inverted_file"] = "inverted_file"
    centroids: Literal["unit", "mean"] = Field(
        "unit", description="of an inverted file: queries look for the cells whose mean key, or whose direction alone, "
        "they point along most"
    )
    hash_positions: bool = Field(
        False, description="bucket ids are of queries and keys as they are weighed, with positions in the heads that "
        "have them, or of what the tokens are alone"
    )
    codebook_decay: Fraction = Field(0.99, description="exponential average that moves the hash codebooks")
    short_conv: NonNegativeInt = Field(
        0, description="earlier tokens that attention's input is mixed with, channel by channel; 0: none"
    )
    rotary_heads: Fraction = Field(
        0.5, description="part of the key/value heads, with their queries, that carries positions, rounded up; the "
        "others weigh by content alone"
    )
    rotary_fraction: Fraction = Field(1.0, description="part of such a head's dimensions that turns with the position")
    rotary_base: PositiveFloat = 10_000.0
    ponder_prior: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(0.3, description="λ_p of the geometric prior")
    ponder_beta: NonNegativeFloat = Field(
        0.03, description="weight of the KL to that prior; at 0.01 from the start every token learns to stop at the "
        "first step"
    )
    ponder_threshold: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.45, description="a token halts at the first step whose cumulative halting probability reaches this"
    )

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}")
        if (self.d_model // self.n_heads) % 4:
            raise ValueError(f"head dimension {self.head_dim} (d_model / n_heads) is not a multiple of 4")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if self.n_layers % self.weight_tied_layers:
            raise ValueError(
                f"n_layers={self.n_layers} is not a multiple of weight_tied_layers={self.weight_tied_layers}"
            )
        if self.softmax_scale == "log_length" and self.attention != "dense":
            raise ValueError(f"softmax_scale=log_length is for attention=dense: with {self.attention} a query sees the "
                             "same number of keys at any length")
        if self.n_buckets is not None and self.n_buckets & (self.n_buckets - 1):
            raise ValueError(f"n_buckets={self.n_buckets} is not a power of two")
        return self

    def twin(self, attention: str, **changes: Any) -> ModelConfig:
        """The same model with another attention, and other changes; what the new one cannot have is left out."""
        scale = self.softmax_scale if attention == "dense" else "constant"
        return ModelConfig(**{**self.model_dump(), "softmax_scale": scale, **changes, "attention": attention})

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def n_content_kv_heads(self) -> int:
        """Key/value heads without positions: the first ones."""
        return self.n_kv_heads - math.ceil(self.n_kv_heads * self.rotary_heads)

    @property
    def tokens_before(self) -> int:
        """Earlier inputs that an attention layer's key is made of, beside the token's own."""
        return self.short_conv + 1

    @property
    def n_ponder_steps(self) -> int:
        """How often the distinct blocks are applied."""
        return self.n_layers // self.weight_tied_layers

    @property
    def mean_cells(self) -> bool:
        """Whether there are cells, and queries rank them by the mean of their keys."""
        return self.hashing == "inverted_file" and self.centroids == "mean"

    @property
    def resolved_n_buckets(self) -> int:
        """Buckets per round: a property of the capacity, never of the number of tokens seen so far."""
        if self.n_buckets is not None:
            return self.n_buckets
        return 2 ** max(1, round(math.log2(max(2.0, self.max_seq_len / self.bucket_size))))


class DataConfig(Section):
    """What phase 2 prepares: real text for the language model, synthetic sequences for the probes."""

    source: str | None = Field(
        None,
        description="a .txt/.md/.py/.jsonl file, a folder of them or a glob; None: Python's standard library sources",
    )
    stream: bool = Field(
        False, description="read the shards of `source` (.jsonl.gz too) while training, none of it prepared but eval"
    )
    shuffle_buffer: PositiveInt = Field(
        16, description="windows that each worker of a stream holds and draws from; a resume rereads up to two such"
    )
    eval_fraction: Annotated[float, Field(gt=0.0, lt=0.5)] = Field(0.05, description="part of the documents held out")
    max_bytes: PositiveInt | None = Field(
        None, description="use at most this much text, whole documents in seeded order; None: all. Not of a stream"
    )
    synthetic_seq_length: PositiveInt = Field(4096, description="tokens in a copy or needle sequence")
    num_synthetic_train: PositiveInt = Field(1_000, description="copy and needle sequences each, train split")
    num_synthetic_eval: PositiveInt = Field(100, description="copy and needle sequences each, eval split")

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.stream and self.source is None:
            raise ValueError("stream=true needs a source of shards: DATA=<folder or glob>")
        return self


Recompute = bool | Literal["block", "feed_forward"]


class TrainingConfig(Section):
    """Language-model training (guide: TrainingConfig)."""

    model_size: str = Field("100M", description='distinct parameters, such as "1M" or "1.5B"; sets the shape')
    seq_length: PositiveInt = 131_072
    batch_size: PositiveInt = 1
    num_epochs: PositiveInt = 5
    learning_rate: PositiveFloat = 1e-4
    num_train_sequences: PositiveInt = 1_000
    num_eval_sequences: PositiveInt = 100
    gradient_checkpoint: Recompute = Field(
        True, description="what the backward computes again: true all but attention, block that too, feed_forward what "
        "follows attention"
    )
    compile: bool = Field(True, description="torch.compile the blocks' training; on a GPU only")
    profile_components: bool = True
    num_workers: NonNegativeInt = 2
    min_learning_rate_ratio: Fraction = Field(0.1, description="end of the cosine, over learning_rate")
    warmup_fraction: Fraction = 0.02
    ponder_from: Fraction = Field(
        0.25, description="part of the training that answers at full depth alone, for the halting that comes after it"
    )
    ponder_to: Fraction = Field(
        0.75, description="part of the training from which on the loss is PonderNet's; between the two it moves there"
    )
    weight_decay: NonNegativeFloat = 0.1
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.95
    grad_clip: PositiveFloat = 1.0
    log_every: PositiveInt = Field(10, description="steps between lines of metrics.jsonl")
    eval_every: PositiveInt = Field(250, description="steps between evaluations")
    checkpoint_every: PositiveInt = Field(250, description="steps between checkpoints")
    keep_checkpoints: PositiveInt = Field(2, description="newest checkpoints kept, besides the best (lowest loss_eval)")
    keep_every: PositiveInt | None = Field(None, description="steps between checkpoints kept for good; None: none is")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 on a GPU")

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        parse_size(self.model_size)
        if self.ponder_from > self.ponder_to:
            raise ValueError(f"ponder_from={self.ponder_from} is after ponder_to={self.ponder_to}")
        return self


class RecallConfig(Section):
    """Multi-query associative recall: a small model of the same code, trained on synthetic sequences."""

    seq_length: PositiveInt = 256
    n_pairs: PositiveInt = 16
    vocab_size: Annotated[int, Field(ge=8)] = 512
    d_model: PositiveInt = 128
    n_layers: PositiveInt = 2
    n_heads: PositiveInt = 4
    n_kv_heads: PositiveInt = 4
    window: PositiveInt = 16
    bucket_size: PositiveInt = 16
    n_buckets: PositiveInt = 16
    batch_size: PositiveInt = 64
    num_train_sequences: PositiveInt = 100_000
    num_eval_sequences: PositiveInt = 512
    learning_rate: PositiveFloat = 1e-3
    eval_every: PositiveInt = 200

    @model_validator(mode="after")
    def _check(self) -> RecallConfig:
        if 4 * self.n_pairs > self.seq_length:
            raise ValueError(f"n_pairs={self.n_pairs} needs a seq_length of at least {4 * self.n_pairs}")
        if self.n_pairs > self.vocab_size // 2 - 1:
            raise ValueError(f"n_pairs={self.n_pairs} needs a vocab_size above {2 * self.n_pairs + 1}")
        return self


class BenchmarkConfig(Section):
    """Long-Arena: cost by length, each length in its own process (guide: BenchmarkConfig)."""

    sequence_lengths: tuple[PositiveInt, ...] = (1_024, 2_048, 4_096, 8_192, 16_384, 32_768, 65_536, 131_072)
    num_samples_per_length: PositiveInt = 10
    max_memory_gb: PositiveFloat = 16.0
    timeout_seconds: PositiveFloat = 300
    attentions: tuple[Literal["lsh", "dense", "window"], ...] = ("lsh", "dense")
    batch_size: PositiveInt = 1
    fixed_tokens: PositiveInt | None = Field(
        131_072, description="each length again with as many sequences as make so many tokens; None: not measured"
    )
    processes_per_length: PositiveInt = Field(
        3, description="fresh processes that measure a length, where one takes little of timeout_seconds"
    )

    @model_validator(mode="before")
    @classmethod
    def _tuples(cls, values: Any) -> Any:
        if isinstance(values, dict):  # JSON has no tuples; strict validation wants one
            return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return values

    @model_validator(mode="after")
    def _check(self) -> BenchmarkConfig:
        lengths = self.sequence_lengths
        if not lengths or list(lengths) != sorted(set(lengths)):
            raise ValueError(f"sequence_lengths={list(lengths)} must be increasing and not empty")
        if not self.attentions:
            raise ValueError("attentions must name at least one of lsh, dense, window")
        return self


ArenaAttention = Literal["lsh", "dense", "dense_scaled", "window"]  # dense_scaled: dense with softmax_scale=log_length


class ArenaConfig(Section):
    """The arena: what models can do with their context, by length. Recipes (`lshv2.arena.recipes`) decide the rest."""

    tasks: tuple[str, ...] = Field((), description="names that `python -m lshv2.arena --help` lists; empty: all")
    attentions: tuple[ArenaAttention, ...] = get_args(ArenaAttention)
    seeds: PositiveInt = Field(3, description="models of each kind; seeds count from the run's")
    lengths: tuple[PositiveInt, ...] | None = Field(None, description="judged; None: the recipe's")
    sequences: PositiveInt | None = Field(None, description="judged at each length; None: the recipe's")
    steps: PositiveInt | None = Field(None, description="of training; None: the recipe's")
    small: bool = Field(False, description="laptop sizes: trained at 64 tokens, but for a plugin's own recipe")
    jobs_a_gpu: PositiveInt = Field(2, description="models that train side by side on a GPU")
    plugins: tuple[str, ...] = Field((), description="Python files with tasks of your own")

    @model_validator(mode="before")
    @classmethod
    def _tuples(cls, values: Any) -> Any:
        if isinstance(values, dict):
            listed = {k: v.split(",") if isinstance(v, str) else v for k, v in values.items()}
            if isinstance(lengths := values.get("lengths"), str | int):
                listed["lengths"] = [int(n) if n.isdecimal() else n for n in str(lengths).split(",")]
            return {k: tuple(v) if isinstance(v, list) else v for k, v in listed.items()}
        return values


class ParallelConfig(Section):
    """Processes that train together. No result depends on it but for rounding: another choice reruns no phase."""

    nproc: PositiveInt = Field(1, description="processes, a GPU each where there are GPUs; NPROC=")
    sequence: PositiveInt | None = Field(
        None, description="processes that share each sequence, up to n_kv_heads; the others have sequences of their own"
        "; None: as few as train.batch_size, which is the sequences of a step over all processes, allows"
    )


class TrackingConfig(Section):
    """Where the metrics are mirrored. No result depends on it: another choice reruns no phase."""

    trackers: tuple[Literal["wandb", "mlflow", "tensorboard"], ...] = Field(
        (), description="one or several, such as wandb,tensorboard; their packages: pip install -e '.[tracking]'"
    )
    project: str = Field("lsh_v2", min_length=1, description="the W&B project, the MLflow experiment")
    mlflow_uri: str | None = Field(
        None, description="an MLflow store; None: $MLFLOW_TRACKING_URI, else SQLite in the run folder"
    )

    @model_validator(mode="before")
    @classmethod
    def _names(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("trackers"), str | list):  # as typed; as JSON
            given = values["trackers"]
            names = [name for name in given.split(",") if name] if isinstance(given, str) else given
            return {**values, "trackers": tuple(dict.fromkeys(names))}
        return values


class Settings(Section):
    """All that determines a run, besides the machine and the code."""

    preset: Literal["quick", "full", "test"] = "full"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainingConfig = TrainingConfig()
    recall: RecallConfig = RecallConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()
    arena: ArenaConfig = ArenaConfig()
    parallel: ParallelConfig = ParallelConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="before")
    @classmethod
    def _former(cls, values: Any) -> Any:
        """Run folders made before there was a section `parallel` have their `nproc` beside the sections."""
        if isinstance(values, dict) and "nproc" in values and "parallel" not in values:
            return {**{k: v for k, v in values.items() if k != "nproc"}, "parallel": {"nproc": values["nproc"]}}
        return values

    @property
    def recall_model(self) -> ModelConfig:
        """The recall probe's model: the same attention and hashing as the run's, at its own size, at full depth."""
        recall = self.recall
        own = dict(
            vocab_size=recall.vocab_size, d_model=recall.d_model, n_layers=recall.n_layers, n_heads=recall.n_heads,
            n_kv_heads=recall.n_kv_heads, max_seq_len=recall.seq_length, bucket_size=recall.bucket_size,
            n_buckets=recall.n_buckets, window=recall.window, d_ff=2 * recall.d_model, use_ponder=False,
            weight_tied_layers=recall.n_layers,
        )
        return ModelConfig(**{**self.model.model_dump(), **own})  # validated again: model_copy would not
