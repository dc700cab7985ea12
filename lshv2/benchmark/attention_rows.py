"""One row of the operator's benchmark: makes its inputs, lets everybody run, and says of everybody else why not."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch

from lshv2.benchmark import attention_contenders as who
from lshv2.benchmark import attention_inputs as shapes
from lshv2.benchmark import attention_timing as timing
from lshv2.trainer import pick_device

PROBE_LENGTH = {"cuda": 16_384, "cpu": 4_096}  # long enough that its time is arithmetic and may be scaled up
BREAKDOWN_SAMPLES = 3
Mode = Literal["eager", "given ids", "graph"]


@dataclass(frozen=True)
class Case:
    """One row to measure."""

    mode: Mode
    seq_len: int
    batch_size: int = 1


class Bench:
    """Measures cases on one device and remembers what the opponents cost, for the predictions."""

    def __init__(self, lengths: Sequence[int], dtype: str, samples: int, limit_ms: float, seed: int,
                 quick: bool) -> None:
        """dtype: a torch dtype's name; limit_ms: longest predicted call of a dense opponent; quick: compile nothing."""
        self.device = pick_device()
        self.dtype = getattr(torch, dtype)
        self.limits = timing.Limits(most=samples)
        self.longest, self.limit_ms, self.seed, self.quick = max(lengths), limit_ms, seed, quick
        self.expand: dict[str, bool] = {}  # dense opponents that run here, and how
        self.costs: dict[str, list[tuple[float, float]]] = {}  # name -> (batch·T², milliseconds) measured
        self.unusable: dict[str, str] = {}

    def inputs(self, case: Case, data: str = "uniform") -> shapes.Inputs:
        return shapes.make_inputs(case.seq_len, case.batch_size, data, self.device, self.dtype, self.seed)

    def probe(self) -> None:
        """Which dense opponents run here and how; the memory-efficient one stands in where no other does."""
        length = min(PROBE_LENGTH[self.device.type], self.longest)
        inputs = self.inputs(Case("eager", length))

        def time_both(contender: who.Contender) -> float:
            timing.sample(contender, self.device)
            return min(timing.sample(contender, self.device)["both"] for _ in range(3))

        for name, (_, device) in who.DENSE.items():
            if device != self.device.type:
                self.unusable[name] = f"only timed on {device}"
            elif name == "sdpa_efficient" and self.expand:
                self.unusable[name] = f"not needed: {', '.join(self.expand)} runs here"
            else:
                try:
                    self.expand[name], taken = who.probe_dense(name, inputs, time_both)
                    self.costs[name] = [(length**2, taken)]
                except who.Unusable as error:
                    self.unusable[name] = str(error)

    def row(self, case: Case) -> dict[str, Any]:
        began = time.monotonic()
        row: dict[str, Any] = {**asdict(case), "n_buckets": shapes.buckets_for(case.seq_len)}
        try:
            measured = {"eager": self.eager, "given ids": self.given_ids, "graph": self.graph}[case.mode](case)
        except Exception as error:  # such as no memory for the inputs: this row's result, and the next is tried
            measured = {"lsh": not_measured(timing.reason(error))}
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return {**row, "seconds": round(time.monotonic() - began, 2), "contenders": measured}

    def eager(self, case: Case) -> dict[str, Any]:
        uniform = self.inputs(case)
        clustered = self.inputs(case, "clustered")
        lsh = [who.lsh("lsh", uniform), who.lsh("lsh_clustered", clustered),
               who.lsh("lsh_inverted_file", uniform, inverted_file=True),
               who.lsh("lsh_inverted_file_clustered", clustered, inverted_file=True)]
        dense, results = self.dense(case, uniform)
        sparse = []
        for name, make in (("flex_window", partial(self.flex, case)), ("peer", who.peer)):
            try:
                sparse.append(make(uniform))
            except Exception as error:  # a compiler's errors are of every kind, a foreign package's too
                results[name] = not_measured(timing.reason(error))
        contenders = [*lsh, *dense, *sparse]
        results = results_of(timing.measure(contenders, self.device, self.limits), contenders) | results
        for contender in contenders:
            entry = results[contender.name]
            if entry["status"] != "ok":
                continue
            if contender.name in self.expand:
                self.costs[contender.name].append((case.batch_size * case.seq_len**2, entry["both_ms"]))
            if self.device.type == "cuda":
                entry |= timing.peak_memory(contender, uniform.bytes, self.device)
            if contender in lsh:
                samples = min(BREAKDOWN_SAMPLES, entry["n_samples"])
                entry["breakdown"] = timing.breakdown(contender, self.device, samples)
        return results

    def dense(self, case: Case, inputs: shapes.Inputs) -> tuple[list[who.Contender], dict[str, Any]]:
        """The dense opponents within the limit, and the reasons of the others."""
        found, left = [], {name: not_measured(reason) for name, reason in self.unusable.items()}
        for name, expand in self.expand.items():
            work = case.batch_size * case.seq_len**2
            predicted = predict(self.costs[name], work)
            if predicted > self.limit_ms:
                left[name] = not_measured(f"predicted {predicted:,.0f} ms a call, above {self.limit_ms:,.0f}")
            else:
                found.append(who.dense(name, inputs, expand))
        return found, left

    def flex(self, case: Case, inputs: shapes.Inputs) -> who.Contender:
        if self.quick:
            raise who.Unusable("left out by --quick: it is compiled for every length")
        if case.batch_size > 1:
            raise who.Unusable("only timed at batch 1: it is compiled for every shape")
        return who.flex_window(inputs)

    def given_ids(self, case: Case) -> dict[str, Any]:
        inputs = self.inputs(case)
        ids = shapes.given_ids(case.seq_len, case.batch_size, inputs.n_buckets, self.device, self.seed)
        contenders = [who.lsh(name, inputs, pair) for name, pair in ids.items()]
        return results_of(timing.measure(contenders, self.device, self.limits), contenders)

    def graph(self, case: Case) -> dict[str, Any]:
        inputs = self.inputs(case)
        dense, results = self.dense(case, inputs)
        lsh = [who.lsh("lsh", inputs), who.lsh("lsh_inverted_file", inputs, inverted_file=True)]
        contenders, steps = [*lsh, *dense], {}
        for contender in contenders:
            try:
                steps[contender.name] = timing.graph_step(contender, self.device)
            except Exception as error:  # what a capture refuses comes as errors of every kind
                results[contender.name] = not_measured(timing.reason(error))
        return results_of(timing.in_turn(steps, self.limits), contenders) | results


def not_measured(reason: str) -> dict[str, Any]:
    return {"status": "not measured", "reason": reason}


def results_of(taken: timing.Taken, contenders: list[who.Contender]) -> dict[str, Any]:
    """A row's entries by contender: figures, or the reason why there are none."""
    notes = {contender.name: contender.note for contender in contenders}
    return {
        name: not_measured(have) if isinstance(have, str)
        else {"status": "ok", "reason": None, "note": notes[name], **timing.figures(have)}
        for name, have in taken.items()
    }


def predict(costs: list[tuple[float, float]], work: float) -> float:
    """Milliseconds for work = batch·T², in proportion to the largest measured one not above it, else to the least."""
    known, taken = max((cost for cost in costs if cost[0] <= work), default=min(costs))
    return taken * work / known
