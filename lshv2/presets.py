"""Presets and overrides: from what a person types to validated, frozen `Settings`.

    settings = make_settings("quick", overrides=["train.learning_rate=3e-4", "model.n_layers=4"], seed=1)

Three presets run the same code at three sizes: `full` is the guide's configuration exactly, `quick` fits a
laptop in minutes, `test` fits a unit test in seconds. An unknown key or a bad value raises `UserError` with one
line that names the key, the value and what is allowed.
"""

from __future__ import annotations

import difflib
import json
import re
from typing import Any

from pydantic import BaseModel, ValidationError

from lshv2.config import Section, Settings, parse_size
from lshv2.errors import UserError
from lshv2.sizes import SHAPE_KEYS, shape_for

# What each preset changes; everything else is the guide's.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "full": {},
    "quick": {
        "model": dict(
            vocab_size=2048, d_model=128, n_layers=4, n_heads=4, n_kv_heads=2, max_seq_len=16_384, d_ff=512,
            weight_tied_layers=2, bucket_size=64, window=64, n_buckets=64,
        ),
        "data": dict(max_bytes=16_000_000, shuffle_buffer=256, synthetic_seq_length=512, num_synthetic_train=200,
                     num_synthetic_eval=20),
        "train": dict(
            model_size="1M", seq_length=512, batch_size=4, num_epochs=1, learning_rate=6e-3, num_train_sequences=520,
            num_eval_sequences=32, gradient_checkpoint=False, num_workers=0, eval_every=65, checkpoint_every=65,
            ponder_from=0.0, ponder_to=0.0,  # in 130 steps an early answer teaches more than it costs
        ),
        "recall": dict(
            seq_length=128, n_pairs=8, vocab_size=256, d_model=64, batch_size=32, num_train_sequences=5_760,
            num_eval_sequences=128, n_buckets=8, learning_rate=1e-2, eval_every=60,
        ),
        "benchmark": dict(sequence_lengths=(1_024, 2_048, 4_096, 8_192, 16_384), num_samples_per_length=3,
                          max_memory_gb=4.0, timeout_seconds=90.0, fixed_tokens=None, processes_per_length=1),
        "arena": dict(tasks=("induction",), attentions=("lsh", "dense"), seeds=1, small=True),
    },
    "test": {
        "model": dict(
            vocab_size=320, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, max_seq_len=512, d_ff=64,
            weight_tied_layers=1, bucket_size=16, window=16,
        ),
        "data": dict(max_bytes=200_000, synthetic_seq_length=64, num_synthetic_train=4, num_synthetic_eval=2),
        "train": dict(
            model_size="30K", seq_length=288, batch_size=2, num_epochs=1, learning_rate=3e-3, num_train_sequences=16,
            num_eval_sequences=4, gradient_checkpoint=False, num_workers=0, eval_every=4, checkpoint_every=4,
            log_every=2,
        ),
        "recall": dict(
            seq_length=32, n_pairs=2, vocab_size=32, d_model=16, n_heads=2, n_kv_heads=1, batch_size=4,
            num_train_sequences=32, num_eval_sequences=8, n_buckets=2, window=8, bucket_size=8, eval_every=4,
        ),
        "benchmark": dict(sequence_lengths=(64, 128, 256), num_samples_per_length=2, max_memory_gb=4.0,
                          timeout_seconds=60.0, fixed_tokens=None, processes_per_length=1),
        "arena": dict(tasks=("induction",), attentions=("lsh", "dense"), seeds=1, lengths=(64, 128), sequences=4,
                      steps=4, small=True),
    },
}


def parse_override(text: str) -> tuple[str, str, Any]:
    """`"train.learning_rate=3e-4"` -> `("train", "learning_rate", 3e-4)`; values are JSON, else plain strings."""
    match = re.fullmatch(r"([A-Za-z_]\w*)\.([A-Za-z_]\w*)=(.*)", text, re.S)
    if not match:
        raise UserError(f"setting {text!r} is not of the form section.key=value, such as train.learning_rate=3e-4")
    section, key, raw = match.groups()
    try:
        value = json.loads(raw)
    except json.JSONDecodeError:
        value = {"True": True, "False": False, "None": None}.get(raw, raw)
    return section, key, value


def sections() -> dict[str, type[Section]]:
    """Section name -> its class, in the order of `Settings`."""
    return {
        name: field.annotation
        for name, field in Settings.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }


def make_settings(
    preset: str = "quick",
    overrides: list[str] | tuple[str, ...] | dict[str, Any] = (),
    *,
    seed: int = 0,
    data: str | None = None,
) -> Settings:
    """Build the settings of a run, or raise `UserError` with one line.

    overrides: `["section.key=value", ...]` or `{"section.key": value}`; data: shorthand for `data.source`.
    A `train.model_size` among the overrides resizes the model; `model.*` overrides are kept.
    """
    if preset not in PRESETS:
        raise UserError(f"PRESET={preset!r} is unknown; allowed: {', '.join(PRESETS)}")
    values: dict[str, dict[str, Any]] = {name: dict(PRESETS[preset].get(name, {})) for name in sections()}
    given: dict[str, Any] = {}
    items = (
        [(*_split_key(k), v) for k, v in overrides.items()]
        if isinstance(overrides, dict)
        else [parse_override(text) for text in overrides]
    )
    for section, key, value in items:
        _check_key(section, key)
        values[section][key] = _coerce(section, key, value)
        given[f"{section}.{key}"] = value
    if data is not None:
        values["data"]["source"] = data
    if "train.model_size" in given:
        _resize(values, given)
    return validate({"preset": preset, "seed": seed, **values})


def validate(values: dict[str, Any]) -> Settings:
    """`Settings` from plain values (a run's `config.json`), or `UserError` with one line."""
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise UserError(_one_line(error)) from None
    try:
        _ = settings.recall_model
    except ValidationError as error:
        raise UserError(f"recall.{_one_line(error)}") from None
    if settings.train.seq_length > settings.model.max_seq_len:
        raise UserError(
            f"train.seq_length={settings.train.seq_length} is above model.max_seq_len={settings.model.max_seq_len}"
        )
    return settings


def _split_key(name: str) -> tuple[str, str]:
    section, _, key = name.partition(".")
    return section, key


def _check_key(section: str, key: str) -> None:
    known = sections()
    if section not in known:
        raise UserError(f"unknown setting {section}.{key}: sections are {', '.join(known)}")
    if key not in known[section].model_fields:
        near = difflib.get_close_matches(key, known[section].model_fields, 1)
        hint = f"did you mean {section}.{near[0]}? " if near else ""
        raise UserError(
            f"unknown setting {section}.{key}: {hint}allowed in {section}: {', '.join(known[section].model_fields)}"
        )


def _coerce(section: str, key: str, value: Any) -> Any:
    """Integers may stand where a float is wanted, and lists where a tuple is; nothing else is converted."""
    annotation = str(sections()[section].model_fields[key].annotation)
    if isinstance(value, int) and not isinstance(value, bool) and "float" in annotation:
        return float(value)
    return tuple(value) if isinstance(value, list) else value


def _resize(values: dict[str, dict[str, Any]], given: dict[str, Any]) -> None:
    fixed = {k: v for k, v in values["model"].items() if k not in SHAPE_KEYS or f"model.{k}" in given}
    try:
        values["model"] = {**values["model"], **shape_for(parse_size(values["train"]["model_size"]), **fixed)}
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"train.model_size={values['train']['model_size']!r}: {error}") from None


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "settings"
    message = first["msg"].removeprefix("Value error, ")
    got = "" if isinstance(first["input"], dict | BaseModel) else f"={first['input']!r}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}{got}: {message}{more}"
