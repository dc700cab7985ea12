"""PonderNet's parity task (Banino, Balaguer & Blundell 2021): does the halting loss buy steps where they are needed?

    python -m lshv2.parity --out parity.json --task extrapolation --steps 100000 --seeds 0 1 2

A vector of `size` elements, k of them +1 or −1 by chance, the others 0; is the number of +1 odd? More non-zero elements
are harder. Interpolation trains and tests on k = 1 .. size; extrapolation trains on 1 .. size/2 and tests above.
One GRU cell reads the whole vector in every step, or with `--look M` the M elements that come first in a learned order
and were not read yet (`lshv2.parity_networks`); after step n its state gives an answer and the halting logit, and
`lshv2.ponder` weighs them, with the distribution and the divergence that train the language model. `--max-steps 1` is
the control without pondering. Not as in the paper: the learning rate falls to zero over the last quarter. Further from
it, and off by default: `--look`; `--reach` wires each unit to few elements; `--mastery` begins with one or two non-zero
elements and two steps, and gives more of both as they are learned (a curriculum, Bengio et al. 2009). What was found
stands in CONTRIBUTING; the reference is

    python -m lshv2.parity --out parity.json --task extrapolation --look 6 --hidden 64 --mastery 0.95 \
        --learning-rate 2e-3 --steps 2500 --vary-steps 1 --seeds 0 1 2 3 4 5 6 7

The report holds, for each seed and k, the accuracy and steps of sampled halting as exact expectations under p (no draw:
Σ p_n over the right answers), and those of the deterministic rule at `THRESHOLD`.
Left out on purpose: resuming; a run takes minutes. The host never waits for the device but to write a line.
Legend: N steps, B batch, S size, h hidden width.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from lshv2.graphs import GraphedStep, rate_setter
from lshv2.machine import environment
from lshv2.parity_networks import PonderGRU, PonderReader
from lshv2.parity_report import draw as picture
from lshv2.ponder import expected_steps, ponder_loss
from lshv2.runs import atomic_path, read_json, write_json

THRESHOLD = 0.5  # of the cumulative halting probability
CLIP = 1.0  # gradient norm
CURVE_POINTS = 50
TEST_VECTORS = 1000  # for each number of non-zero elements
LOOK_EVERY, LOOKED_AT = 50, 256  # steps between looks at whether the hardest are learned; vectors of a look
HARDEST = 3  # fewer than the most non-zero elements, at most, in every other batch
SCHEMA = 3
Network = PonderGRU | PonderReader


def draw(count: int, low: int, high: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x [count,S] with low to high non-zero elements, and whether its number of +1 is odd, float [count]."""
    device = generator.device
    k = torch.randint(low, high + 1, (count, 1), generator=generator, device=device)
    order = torch.rand(count, size, generator=generator, device=device).argsort(-1)
    sign = 2 * torch.randint(0, 2, (count, size), generator=generator, device=device) - 1
    x = torch.where(order < k, sign, 0)
    return x.float(), ((x == 1).sum(-1) % 2).float()


def loss_of(
    model: Network, x: Tensor, odd: Tensor, prior: float, beta: float, steps: int | None = None
) -> Tensor:
    """`ponder_loss` of binary cross entropies."""
    answers = model(x, steps)
    nats = binary_cross_entropy_with_logits(answers.odd, odd.expand(answers.odd.shape), reduction="none")
    scored = torch.ones(1, len(x), dtype=torch.bool, device=x.device)
    return ponder_loss(nats, answers.log_p, scored, prior=prior, beta=beta)


@torch.no_grad()
def measure(
    model: Network, low: int, high: int, size: int, count: int, generator: torch.Generator, steps: int | None = None
) -> list[dict[str, Any]]:
    """For each number of non-zero elements: `nonzero accuracy steps` of sampled halting, and `threshold_...`."""
    rows = []
    for k in range(low, high + 1):
        x, odd = draw(count, k, k, size, generator)
        answers = model(x, steps)
        right = ((answers.odd > 0) == (odd > 0)).float()  # [N,1,B]
        p = answers.log_p.exp()
        first = (p.cumsum(0) >= THRESHOLD).float().argmax(0, keepdim=True)
        figures = {
            "accuracy": (p * right).sum(0), "steps": expected_steps(answers.log_p),
            "threshold_accuracy": right.gather(0, first), "threshold_steps": first.float() + 1,
        }
        rows.append({"nonzero": k, **{name: round(value.mean().item(), 6) for name, value in figures.items()}})
    return rows


def mean_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Every k counting alike."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0] if name != "nonzero"}


@dataclass(frozen=True)
class Experiment:
    """Which task, and how it is learned; learning_rate is Adam's in the first three quarters.

    look: see `PonderReader`; 0: the paper's network. reach: see `PonderGRU`; prior and beta: see `ponder_loss`.
    mastery: the accuracy at the most non-zero elements in training from which on there may be more, from 2 on, one in
    eight at a time; every other batch is of the hardest few until all are there. 0: all from the start. test_steps:
    ponder steps at most in the test; 0: `max_steps`.
    vary_steps: 1 lets each batch have any number of ponder steps from its own to `max_steps`, by chance, so that no
    answer can wait for a last step that is known.
    """

    task: str = "interpolation"
    steps: int = 100_000
    seed: int = 0
    size: int = 96
    hidden: int = 128
    max_steps: int = 20
    test_steps: int = 0
    look: int = 0
    reach: int = 0
    prior: float = 0.2
    beta: float = 0.01
    batch_size: int = 128
    learning_rate: float = 3e-4
    mastery: float = 0.0
    vary_steps: int = 0

    def steps_for(self, most: int) -> tuple[int, int]:
        """Fewest and most ponder steps in training with so many non-zero elements: with mastery their share of what
        training comes to.

        Were there more than the easy ones need, they would be used: steps cost little at the paper's β.
        """
        share = math.ceil(self.max_steps * most / self.trained[1]) if self.mastery else self.max_steps
        fewest = min(self.max_steps, max(2, share))
        return fewest, self.max_steps if self.vary_steps else fewest

    def network(self) -> Network:
        """The network before any training."""
        if self.look:
            return PonderReader(self.size, self.hidden, self.max_steps, self.look, self.prior, self.seed)
        return PonderGRU(self.size, self.hidden, self.max_steps, self.reach, self.prior, self.seed)

    @property
    def trained(self) -> tuple[int, int]:
        """Fewest and most non-zero elements in training."""
        return 1, self.size // 2 if self.task == "extrapolation" else self.size

    @property
    def tested(self) -> tuple[int, int]:
        """The same in the test."""
        return (self.size // 2 + 1, self.size) if self.task == "extrapolation" else (1, self.size)


def train(what: Experiment, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Train and test: `device seconds`, means `trained` and `tested` over k, `by_nonzero` rows, `curve`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = what.network().to(device)
    data = torch.Generator(device).manual_seed(what.seed)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    every, since = max(1, what.steps // CURVE_POINTS), 0
    curve: list[dict[str, Any]] = []
    lowest, highest = what.trained
    most = min(2, highest) if what.mastery else highest
    set_rate, ends = rate_setter(optimizer, device), random.Random(what.seed)
    asked = what.test_steps or what.max_steps

    def one(steps: int, x: Tensor, odd: Tensor) -> Tensor:
        loss = loss_of(model, x, odd, what.prior, what.beta, steps)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.cut()
        return loss.detach()

    # by ponder steps: on a GPU each number of them is a graph of its own
    steppers = {n: GraphedStep(partial(one, n), device) for n in range(1, what.max_steps + 1)}
    total, began = torch.zeros((), device=device), time.perf_counter()
    for step in range(1, what.steps + 1):
        least = max(lowest, most - HARDEST) if most < highest and step % 2 else lowest
        x, odd = draw(what.batch_size, least, most, what.size, data)
        set_rate(what.learning_rate * min(1.0, 4 * (1 - (step - 1) / what.steps)))  # constant, then linearly to zero
        loss = steppers[ends.randint(*what.steps_for(most))](x, odd)
        if most < highest and step % LOOK_EVERY == 0:
            hardest, = measure(model, most, most, what.size, LOOKED_AT, data, what.steps_for(most)[1])
            most = min(highest, most + max(1, most // 8)) if hardest["accuracy"] >= what.mastery else most
        total += loss
        since += 1
        if step % every == 0 or step == what.steps:
            seen, test = (mean_of(measure(model, *span, what.size, 64, data, asked))
                          for span in (what.trained, what.tested))
            curve.append(
                {"step": step, "most_nonzero": most, "loss": total.item() / since, "trained": seen, "tested": test}
            )
            report(
                f"step {step}, {time.perf_counter() - began:.0f} s, up to {most} elements: loss "
                f"{curve[-1]['loss']:.4f}, accuracy where trained {seen['accuracy']:.3f} in {seen['steps']:.1f} steps, "
                f"tested {test['accuracy']:.3f} in {test['steps']:.1f}"
            )
            total.zero_()
            since = 0
    seconds = time.perf_counter() - began
    fresh = torch.Generator(device).manual_seed(what.seed + 2**30)
    rows = measure(model, 1, what.size, what.size, TEST_VECTORS, fresh, asked)
    trained, tested = (mean_of(rows[low - 1 : high]) for low, high in (what.trained, what.tested))
    return {
        "device": str(device), "seconds": seconds, "trained": trained, "tested": tested, "by_nonzero": rows,
        "curve": curve,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lshv2.parity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help=
                        "the report, JSON, its picture beside it; one that is there gains these runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one after the other; default: 0")
    for field in fields(Experiment):
        if field.name == "seed":
            continue
        choices = ("interpolation", "extrapolation") if field.name == "task" else None
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default, choices=choices,
            help=f"default: {field.default}",
        )
    arguments = vars(parser.parse_args())
    out, seeds = arguments.pop("out"), arguments.pop("seeds")
    if out.suffix != ".json":
        parser.error(f"--out {out}: not a .json file")
    if arguments["look"] > arguments["size"]:
        parser.error(f"--look {arguments['look']}: more than the {arguments['size']} elements there are (--size)")
    if arguments["look"] and arguments["reach"]:
        parser.error("--reach wires the network that sees all elements: not with --look")
    before, _ = read_json(out)
    there = before.get("runs") if isinstance(before, dict) and before.get("schema") == SCHEMA else None
    if out.exists() and not isinstance(there, list):
        parser.error(f"--out {out} is there and no report of this kind: name another file, or delete it")
    content: dict[str, Any] = {"schema": SCHEMA, "runs": list(there or [])}
    for seed in seeds:
        what = Experiment(**arguments, seed=seed)
        run = {"settings": asdict(what), "environment": environment(), **train(what, partial(print, flush=True))}
        same = (run["settings"], run["device"])
        content["runs"] = [one for one in content["runs"] if (one["settings"], one["device"]) != same] + [run]
        write_json(out, content)
        with atomic_path(out.with_suffix(".png")) as temporary:
            picture(content["runs"]).savefig(temporary, format="png", dpi=110, metadata={"Software": None})
        print(f"{what.task}, seed {seed}: {content['runs'][-1]['tested']}", flush=True)


if __name__ == "__main__":
    main()
