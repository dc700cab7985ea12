"""What follows from the operator benchmark's rows: speed-ups, crossovers, exponents, and the targets judged.

    summary = derive(rows)                # {"speedups": [...], "crossover": {...}, "alpha": {...}, ...}
    targets(rows, "cuda")                 # [{"name", "target", "stretch", "value", "met", "stretch_met", "detail"}]

Times are medians of forward + backward of the whole operator. A row's dense opponent is the fastest one measured in it.
Where LSH was timed on uniform and on clustered data the slower counts. Both forms of LSH, R tables and an inverted
file, are judged by the same targets. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lshv2.operator_results import ONE_TABLE
from lshv2.scaling import fit_power

Rows = Sequence[dict[str, Any]]
TABLES, INVERTED_FILE = "lsh", "lsh_inverted_file"  # the forms, as contenders on uniform data
TOKENS = 131_072  # of every fixed-tokens row; its batch-1 row belongs to both layouts
ALPHA_FROM, ALPHA_TO, MILLION = 32_768, 131_072, 1_048_576


def both(row: dict[str, Any], name: str) -> float | None:
    """Median forward + backward of a contender in milliseconds."""
    value = row["contenders"].get(name, {}).get("both_ms")
    return float(value) if value else None


def fastest_dense(row: dict[str, Any]) -> tuple[str, float] | None:
    found = [(ms, name) for name in row["contenders"] if name.startswith("sdpa") and (ms := both(row, name))]
    if not found:
        return None
    ms, name = min(found)
    return name, ms


def _names(form: str) -> tuple[str, str]:
    return form, f"{form}_clustered"


def slower_lsh(row: dict[str, Any], form: str = TABLES) -> float | None:
    return max((ms for name in _names(form) if (ms := both(row, name))), default=None)


def speedups(rows: Rows, form: str = TABLES) -> list[dict[str, Any]]:
    """One entry a row with both sides: dense over LSH, above 1 where LSH is faster; `speedup` is of the slower data."""
    found = []
    for row in rows:
        dense, slower = fastest_dense(row), slower_lsh(row, form)
        if dense is None or slower is None:
            continue
        entry = {key: row[key] for key in ("mode", "seq_len", "batch_size")}
        entry |= {"dense": dense[0], "dense_ms": dense[1], "speedup": dense[1] / slower}
        entry |= {name: dense[1] / ms for name in _names(form) if (ms := both(row, name))}
        found.append(entry)
    return sorted(found, key=lambda entry: (entry["mode"], entry["batch_size"], entry["seq_len"]))


def _layout(entries: Rows, mode: str, fixed_tokens: bool) -> list[dict[str, Any]]:
    """Entries of a layout by length: batch 1, or TOKENS in all."""
    chosen = [e for e in entries if e["mode"] == mode
              and (e["batch_size"] * e["seq_len"] == TOKENS if fixed_tokens else e["batch_size"] == 1)]
    return sorted(chosen, key=lambda entry: entry["seq_len"])


def crossover(entries: Rows) -> dict[str, Any] | None:
    """Where LSH overtakes dense: entries ascending with `seq_len` and `speedup`; None without entries.

    `first_faster`: the shortest measured length from which on LSH is faster at every measured one (None: at none).
    `interpolated`: the length of speed-up 1 between the last slower length and that, on logarithms; None where there
    is no slower one, or no faster.
    """
    if not entries:
        return None
    faster = [entry["speedup"] > 1 for entry in entries]
    last_slower = max((i for i, is_faster in enumerate(faster) if not is_faster), default=-1)
    result: dict[str, Any] = {"first_faster": None, "interpolated": None, "shortest": entries[0]["seq_len"],
                              "longest": entries[-1]["seq_len"]}
    if last_slower == len(entries) - 1:
        return result
    above = entries[last_slower + 1]
    result["first_faster"] = above["seq_len"]
    if last_slower >= 0:
        below = entries[last_slower]
        low, high = math.log(below["speedup"]), math.log(above["speedup"])
        share = -low / (high - low)
        result["interpolated"] = math.exp(
            math.log(below["seq_len"]) + share * (math.log(above["seq_len"]) - math.log(below["seq_len"])))
    return result


def derive(rows: Rows, form: str = TABLES) -> dict[str, Any]:
    """Everything computed from rows for one form of LSH; what the rows do not hold is None."""
    entries = speedups(rows, form)
    eager = {row["seq_len"]: row for row in rows if row["mode"] == "eager" and row["batch_size"] == 1}
    times = {length: ms for length, row in eager.items() if (ms := both(row, form))}
    fitted = {length: ms for length, ms in times.items() if ALPHA_FROM <= length <= ALPHA_TO}
    hurt: dict[str, float] = {}
    for row in rows:
        one_table = form == INVERTED_FILE
        even = "uniform" + ONE_TABLE * one_table
        if (row["mode"], row["seq_len"]) == ("given ids", TOKENS) and (uniform := both(row, even)):
            hurt = {name: ms / uniform for name in row["contenders"]
                    if name != even and name.endswith(ONE_TABLE) == one_table and (ms := both(row, name))}
    memory = {name: eager[TOKENS]["contenders"].get(name, {}).get("extra_memory_ratio") for name in _names(form)
              } if TOKENS in eager else {}
    return {
        "speedups": entries,
        "crossover": {f"{mode}, {layout}": crossover(_layout(entries, mode, layout == "fixed tokens"))
                      for mode in ("eager", "graph") for layout in ("batch 1", "fixed tokens")},
        "alpha": asdict(fit_power(list(fitted), list(fitted.values()))) if len(fitted) >= 2 else None,
        "adversarial": hurt,  # at 131,072 tokens, over uniform ids
        "extra_memory_ratio": max((ratio for ratio in memory.values() if ratio is not None), default=None),
        "million_over_131072": times[MILLION] / times[TOKENS] if {MILLION, TOKENS} <= times.keys() else None,
    }


def targets(rows: Rows, device: str) -> list[dict[str, Any]]:
    """The project's targets for this device ("cuda" or "cpu") with the measured value; `met` None: not measured. First
    of the form with R tables, then, where it was timed, of the inverted file."""
    judged = _targets(rows, device, TABLES)
    if any(both(row, INVERTED_FILE) for row in rows):
        judged += [{**target, "name": f"{target['name']}, inverted file"}
                   for target in _targets(rows, device, INVERTED_FILE)]
    return judged


def _targets(rows: Rows, device: str, form: str) -> list[dict[str, Any]]:
    summary = derive(rows, form)
    speed = {entry["seq_len"]: entry for entry in _layout(summary["speedups"], "eager", fixed_tokens=False)}

    def faster(length: int, target: float, stretch: float) -> dict[str, Any]:
        entry = speed.get(length)
        detail = f"against {entry['dense']}, the slower of both data" if entry else ""
        value = entry["speedup"] if entry else None
        return _judge(f"speed-up at {length:,}", ">=", target, stretch, value, "×", detail)

    def crosses(layout: str, target: float, stretch: float | None) -> dict[str, Any]:
        found = {mode: summary["crossover"][f"{mode}, {layout}"] for mode in ("eager", "graph")}
        return _judge(f"crossover, {layout}", "<=", target, stretch, _crossing(found["eager"], target), "tokens",
                      "; ".join(f"{mode}: {_said(where)}" for mode, where in found.items() if where))

    if device == "cpu":
        return [crosses("batch 1", 8192, None), faster(16_384, 2, 4), _extrapolated(rows, form, faster(65_536, 8, 16))]
    alpha, worst = summary["alpha"], max(summary["adversarial"].items(), key=lambda item: item[1], default=None)
    long = [row for row in rows if (row["mode"], row["seq_len"]) == ("eager", MILLION)]
    million = long[0]["contenders"].get(form, {}) if long else {}
    ratio = summary["million_over_131072"]
    return [
        faster(131_072, 20, 30), faster(65_536, 10, 15), faster(16_384, 2, 4),
        crosses("fixed tokens", 4096, 2048), crosses("batch 1", 8192, 4096),
        _judge("α over 32k to 131k, upper 95 % bound", "<=", 1.08, 1.03, alpha and alpha["high"], "",
               f"α = {alpha['exponent']:.3f} over {alpha['n']} lengths" if alpha else ""),
        _judge("worst adversarial ids against uniform", "<=", 4, 2, worst and worst[1], "×", worst[0] if worst else ""),
        _judge("extra memory at 131,072 over q, k, v, o and gradients", "<=", 1.5, 0.75, summary["extra_memory_ratio"],
               "× their bytes", "the larger of both data"),
        {**_judge("1,048,576 tokens against the time of 131,072", "<=", None, 9, ratio, "×", ""),
         "target": "runs", "met": million.get("status") == "ok" if million else None,
         "detail": million.get("reason") or ""},
    ]


def _crossing(where: dict[str, Any] | None, target: float) -> float | None:
    """The first faster length, infinite where LSH is slower up to the target; None where the rows do not tell."""
    if where is None:
        return None
    if where["first_faster"] is None:
        return math.inf if where["longest"] >= target else None
    known = where["interpolated"] is not None or where["first_faster"] <= target
    return float(where["first_faster"]) if known else None


def _said(where: dict[str, Any]) -> str:
    if where["first_faster"] is None:
        return f"not faster up to {where['longest']:,}"
    if where["interpolated"] is None:
        return f"faster from {where['first_faster']:,}, the shortest measured"
    return f"equal at {where['interpolated']:,.0f}, faster at {where['first_faster']:,}"


def _judge(name: str, sign: str, target: float | None, stretch: float | None, value: float | None, unit: str,
           detail: str) -> dict[str, Any]:
    def passed(bound: float | None) -> bool | None:
        if bound is None or value is None:
            return None
        return value >= bound if sign == ">=" else value <= bound

    shown = {">=": "≥", "<=": "≤"}[sign]
    words = [None if bound is None else f"{shown} {bound:,g} {unit}".rstrip() for bound in (target, stretch)]
    finite = value if value is not None and math.isfinite(value) else None
    return {"name": name, "target": words[0], "stretch": words[1], "value": finite, "unit": unit,
            "met": passed(target), "stretch_met": passed(stretch), "detail": detail}


def _extrapolated(rows: Rows, form: str, judged: dict[str, Any]) -> dict[str, Any]:
    """On a CPU: dense at 65,536 as four times its 32,768 where it was not timed itself, and said so."""
    have = {row["seq_len"]: row for row in rows if row["mode"] == "eager" and row["batch_size"] == 1}
    short, long = have.get(32_768), have.get(65_536)
    dense, slower = short and fastest_dense(short), long and slower_lsh(long, form)
    if judged["met"] is not None or not dense or not slower:
        return judged
    return _judge(judged["name"], ">=", 8, 16, 4 * dense[1] / slower, "×",
                  f"{dense[0]} extrapolated: four times its 32,768 tokens")
