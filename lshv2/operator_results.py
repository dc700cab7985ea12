"""Reader of the attention operator's benchmark, `attention.json`: who took how long at which length, and the targets.

    result, problems = read_operator(folder)
    for row in result.of("eager", batch_one=True): row.contenders["lsh"].get("both_ms")

Same tolerance and same return as `lshv2.readers`. Files of schema 1 (LSH and torch's own choice of dense attention,
forward + backward at batch 1) are read into the same rows; what they do not hold is NaN, None or empty.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lshv2.tolerant import NAN, Problem, Problems, mapping, number, objects, read_object, text

FILE = "attention.json"
ONE_TABLE = ", one table"  # ends the names of bucket ids of one table
MODES = ("eager", "given ids", "graph")
NAMES = {  # contenders by name, in the order of tables, with the words for them
    "lsh": "LSH", "lsh_clustered": "LSH, clustered data", "lsh_inverted_file": "LSH, inverted file",
    "lsh_inverted_file_clustered": "inverted file, clustered data", "sdpa_cudnn": "dense, cuDNN",
    "sdpa_flash": "dense, flash",
    "sdpa_efficient": "dense, memory-efficient", "sdpa": "dense, SDPA", "flex_window": "window + sinks, FlexAttention",
    "peer": "Reformer, reformer-pytorch",
}


@dataclass(frozen=True)
class Contender:
    """One attention of one row. `values`: every number by its name (NaN: not measured); `parts`: LSH's time in ms by
    "forward" and "backward", then by region."""

    status: str
    reason: str
    note: str
    values: dict[str, float]
    parts: dict[str, dict[str, float]]

    def get(self, key: str) -> float:
        return self.values.get(key, NAN)


@dataclass(frozen=True)
class OperatorRow:
    mode: str
    seq_len: int
    batch_size: int
    contenders: dict[str, Contender]


@dataclass(frozen=True)
class Speedup:
    """The fastest dense opponent's time over LSH's on the slower data, forward + backward."""

    mode: str
    seq_len: int
    batch_size: int
    dense: str
    factor: float


@dataclass(frozen=True)
class Target:
    """`met` and `stretch_met` None: not measured."""

    name: str
    target: str
    stretch: str
    value: float
    unit: str
    met: bool | None
    stretch_met: bool | None
    detail: str


@dataclass(frozen=True)
class OperatorResult:
    device: str
    dtype: str
    state: str
    environment: dict[str, str]
    rows: tuple[OperatorRow, ...]
    speedups: tuple[Speedup, ...] = ()
    targets: tuple[Target, ...] = ()
    left_out: tuple[str, ...] = field(default=())

    def of(self, mode: str, batch_one: bool) -> list[OperatorRow]:
        """Rows of a mode by length: at batch 1, or those of as many tokens in all as the longest batched one has."""
        mine = sorted((row for row in self.rows if row.mode == mode), key=lambda row: row.seq_len)
        if batch_one:
            return [row for row in mine if row.batch_size == 1]
        tokens = max((row.seq_len * row.batch_size for row in mine if row.batch_size > 1), default=0)
        return [row for row in mine if row.seq_len * row.batch_size == tokens]


def find_operator_results(runs: Path) -> list[Path]:
    """Folders below `runs` with an `attention.json`, those of a CPU last."""
    found = {path.parent for pattern in (f"*/{FILE}", f"reference-*/*/{FILE}") for path in runs.glob(pattern)}
    return sorted(found, key=lambda folder: ("-cpu" in folder.parent.name, folder.as_posix()))


def read_operator(folder: Path) -> tuple[OperatorResult | None, Problems]:
    content, problems = read_object(folder, FILE)
    if problems:
        return None, problems
    raw, problems = objects(content, "rows", FILE)
    rows = [row for item in raw if (row := _row_of_schema_1(item) if content.get("schema") == 1 else _row(item))]
    if len(rows) < len(raw):
        problems += (Problem(FILE, f"rows: {len(raw) - len(rows)} of {len(raw)} have no mode, seq_len or contenders"),)
    environment = mapping(content, "environment")
    gpus = environment.get("gpus")
    processor = text(gpus[0] if isinstance(gpus, list) and gpus else environment.get("cpu"), 80)
    derived = mapping(content, "derived")
    if content.get("schema") == 1:
        kind = "cuda" if gpus else "cpu"
        dtypes = {text(item.get("dtype"), 40).removeprefix("torch.") for item in raw}
        speedups = [Speedup("eager", row.seq_len, 1, "sdpa", number(item.get("speedup")))
                    for row, item in zip(rows, raw, strict=False)]
        return OperatorResult(f"{kind} ({processor})", ", ".join(sorted(dtypes)), "done", _texts(environment),
                              tuple(rows), tuple(speedups)), problems
    return OperatorResult(
        text(content.get("device"), 120), text(content.get("dtype"), 40), text(content.get("state"), 40),
        _texts(environment), tuple(rows),
        tuple(Speedup(text(item.get("mode"), 20), int(number(item.get("seq_len"))), int(number(item.get("batch_size"))),
                      text(item.get("dense"), 40), number(item.get("speedup")))
              for item in objects(derived, "speedups", FILE)[0]
              if number(item.get("seq_len")) >= 1 and number(item.get("batch_size")) >= 1),
        tuple(_target(item) for item in objects(content, "targets", FILE)[0]),
        tuple(_left_out(item) for item in objects(content, "left_out", FILE)[0]),
    ), problems


def _texts(environment: dict[str, Any]) -> dict[str, str]:
    return {text(key, 60): text(value, 200) for key, value in environment.items()}


def _row(item: dict[str, Any]) -> OperatorRow | None:
    length, batch = number(item.get("seq_len")), number(item.get("batch_size"))
    entries = {text(name, 80): entry for name, entry in mapping(item, "contenders").items() if isinstance(entry, dict)}
    if not (length >= 1 and batch >= 1) or item.get("mode") not in MODES or not entries:
        return None
    return OperatorRow(item["mode"], int(length), int(batch), {name: _entry(e) for name, e in entries.items()})


def _row_of_schema_1(item: dict[str, Any]) -> OperatorRow | None:
    length = number(item.get("seq_len"))
    if not length >= 1:
        return None
    entries = {"lsh": item.get("lsh_ms"), "sdpa": item.get("dense_ms")}
    return OperatorRow("eager", int(length), 1, {
        name: Contender("ok", "", "", {"both_ms": number(value)}, {}) for name, value in entries.items()
    })


def _entry(item: dict[str, Any]) -> Contender:
    parts = {}
    for half, regions in mapping(item, "breakdown").items():
        if isinstance(regions, dict):
            parts[text(half, 20)] = {text(name, 40): number(value) for name, value in regions.items()
                                     if number(value) >= 0}
    values = {key: number(value) for key, value in item.items() if isinstance(value, int | float)}
    return Contender(text(item.get("status"), 40), text(item.get("reason"), 300), text(item.get("note"), 120), values,
                     parts)


def _left_out(item: dict[str, Any]) -> str:
    length, batch = number(item.get("seq_len")), number(item.get("batch_size"))
    return f"{text(item.get('mode'), 20)}, {batch:.0f} × {length:,.0f} tokens: {text(item.get('reason'), 120)}"


def _target(item: dict[str, Any]) -> Target:
    met, stretch_met = (item[key] if isinstance(item.get(key), bool) else None for key in ("met", "stretch_met"))
    name, target, stretch, unit = (text(item.get(key), 120) for key in ("name", "target", "stretch", "unit"))
    detail = text(item.get("detail"), 200)
    return Target(name, target, stretch, number(item.get("value")), unit, met, stretch_met, detail)


def verdict(target: Target) -> str:
    """A target in words: met with or without its stretch, missed, or not measured."""
    if target.met is None:
        return "not measured"
    return "missed" if not target.met else "met, stretch too" if target.stretch_met else "met"


def shown(value: float, unit: str) -> str:
    """`22.64 ×`, `16,384 tokens`."""
    return f"{value:,.0f} {unit}".rstrip() if abs(value) >= 1000 else f"{value:,.4g} {unit}".rstrip()
