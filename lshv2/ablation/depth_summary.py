"""Does pondering pay? From the rows of `depth-N` jobs to a verdict: fewer steps, at what cost, against a fixed depth.

A Ponder model is judged at one point of its curve: of the thresholds that save a quarter (`SAVED`) of full depth's
steps the best on *training* text, so that no held-out bit decides which point is shown. More steps are not always
better: tokens trained to halt can be worse off at full depth. Each seed is compared with its own full depth, and with
its own fixed depths interpolated at the same mean steps. Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from lshv2.ablation.depth_variants import DEEPEST, FIXED, FULL, PONDER
from lshv2.plots import OTHER, REFERENCE, new_figure

Rows = list[dict[str, Any]]

SAVED = 0.25  # of full depth's steps, at least
WORSE = 0.01  # in bits per byte, at most
SEEDS = 3  # fewer are a lead
DRAWN = 8.0  # % over full depth; what is far worse hides where the lines part
# Okabe and Ito's, and two more: a colour a variant
HUES = ("#0072B2", "#D55E00", "#009E73", "#56B4E9", "#999933", "#CC79A7", "#E69F00", "#444444")
COLOURS = dict(zip(PONDER, HUES, strict=True))


def judged(row: dict[str, Any]) -> dict[str, float]:
    """`judged_bits_per_byte` and `judged_steps`: a fixed depth's are its own; {} where no threshold saves enough."""
    points = row["curve"]
    if row["variant"] in PONDER:
        points = [point for point in points if point["ponder_steps"] <= (1 - SAVED) * DEEPEST]
    if not points:
        return {}
    best = min(points, key=lambda point: point["train_bits_per_byte"])
    return {"judged_bits_per_byte": best["bits_per_byte"], "judged_steps": best["ponder_steps"]}


def of_variant(rows: Rows, task: str, name: str) -> dict[int, dict[str, Any]]:
    """Its rows by seed."""
    return {row["seed"]: row for row in rows if (row["task"], row["variant"]) == (task, name)}


def fixed_depths(rows: Rows, task: str, seed: int) -> dict[int, float]:
    """Bits per byte by how often the blocks are applied, of the depths that this seed has."""
    found = {times: of_variant(rows, task, name).get(seed) for times, name in FIXED.items()}
    return {times: row["bits_per_byte"] for times, row in found.items() if row}


def interpolated(depths: dict[int, float], steps: float) -> float | None:
    """A fixed depth's bits per byte at `steps` between two neighbouring depths, linearly; None where one is missing."""
    low = min(int(steps), DEEPEST - 1)
    if steps in depths:
        return depths[int(steps)]
    if low not in depths or low + 1 not in depths:
        return None
    return depths[low] + (steps - low) * (depths[low + 1] - depths[low])


@dataclass(frozen=True)
class Against:
    """A seed of a model against the same seed's fixed depths; excesses are relative, in bits per byte.

    whole: its own full depth over the model trained for full depth. saved: part of full depth's steps, at the point
    that is judged; excess: there, over full depth; control: there, over fixed depths at as many steps. None: no
    threshold saves enough, or no such fixed depth was measured.
    """

    seed: int
    whole: float
    saved: float | None
    excess: float | None
    control: float | None


def against(rows: Rows, task: str, name: str) -> list[Against]:
    """A line a seed that both `name` and full depth have."""
    ours, full = of_variant(rows, task, name), of_variant(rows, task, FULL)
    found = []
    for seed in sorted(set(ours) & set(full)):
        reference = full[seed]["bits_per_byte"]
        saved = excess = control = None
        if point := judged(ours[seed]):
            bits, steps = point["judged_bits_per_byte"], point["judged_steps"]
            shallow = interpolated(fixed_depths(rows, task, seed), steps)
            saved, excess = 1 - steps / DEEPEST, bits / reference - 1
            control = None if shallow is None else bits / shallow - 1
        found.append(Against(seed, ours[seed]["bits_per_byte"] / reference - 1, saved, excess, control))
    return found


def statements(rows: Rows, task: str) -> list[str]:
    """What depth is worth by itself, then each Ponder training."""
    shallow = {times: against(rows, task, name) for times, name in FIXED.items() if times != DEEPEST}
    ponder = {name: against(rows, task, name) for name in PONDER}
    return [
        *(_fixed(times, lines) for times, lines in shallow.items() if lines),
        *(_verdict(name, lines) for name, lines in ponder.items() if lines),
    ]


def _fixed(times: int, lines: list[Against]) -> str:
    """A target that a shallower model meets too says little about pondering."""
    excess = [line.whole for line in lines]
    too = times <= (1 - SAVED) * DEEPEST and mean(excess) <= WORSE
    return (f"{times} of {DEEPEST} applications, always: {_percent(excess)} bits per byte against full depth, "
            f"{_seeds(len(lines))}{': within the target without any pondering' if too else ''}.")


def _verdict(name: str, lines: list[Against]) -> str:
    saved = [line.saved for line in lines if line.saved is not None]
    excess = [line.excess for line in lines if line.excess is not None]
    control = [line.control for line in lines if line.control is not None]
    head = f"`{name}`, {_seeds(len(lines))}: at full depth {_percent([line.whole for line in lines])} bits per byte"
    if len(saved) < len(lines):
        return f"{head}; on {len(lines) - len(saved)} of them no threshold asked saves {SAVED:.0%}: missed."
    lead = ", a lead" if len(lines) < SEEDS else ""
    met = "met" if mean(excess) <= WORSE else "missed"
    said = (f"{head}; {_percent(saved, '.1f')} fewer mean steps for {_percent(excess)}: target (at least {SAVED:.0%} "
            f"for at most {WORSE:+.0%}) {met}{lead}")
    if len(control) < len(lines):
        return f"{said}; against fixed depths at the same mean steps: not measured."
    better = sum(value < 0 for value in control)
    ranking = "ahead" if better == len(lines) else "no ranking" if better else "behind"
    return (f"{said}; {_percent(control)} against fixed depths at the same mean steps, better on {better} of "
            f"{len(lines)}: {ranking}{lead}.")


def _percent(values: list[float], form: str = "+.2f") -> str:
    """"+0.43 % (+0.40 to +0.45)": the mean, and the range where there is one."""
    center, low, high = (f"{100 * value:{form}}" for value in (mean(values), min(values), max(values)))
    return f"{center} %" if low == high else f"{center} % ({low} to {high})"


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def draw(rows: Rows, tasks: list[str]) -> Figure:
    """A panel a task: % bits per byte over the seed's own full depth, by mean steps; a line a seed: the thresholds of a
    Ponder model, or the fixed depths."""
    figure, axes = new_figure(len(tasks), "Depth on language: a line a seed; shaded: the target")
    for axis, task in zip(axes, tasks, strict=True):
        full = {seed: row["bits_per_byte"] for seed, row in of_variant(rows, task, FULL).items()}
        lines = [("fixed depths", REFERENCE, seed, sorted(fixed_depths(rows, task, seed).items())) for seed in full]
        for name, colour in COLOURS.items():
            for seed, row in of_variant(rows, task, name).items():
                points = sorted((point["ponder_steps"], point["bits_per_byte"]) for point in row["curve"])
                lines += [(name, colour, seed, points)] if seed in full else []
        named: set[str] = set()
        for name, colour, seed, points in lines:
            steps, excess = [x for x, _ in points], [100 * (bits / full[seed] - 1) for _, bits in points]
            marker = "s-" if name == "fixed depths" else "o-"
            label = None if name in named else name
            axis.plot(steps, excess, marker, color=colour, markersize=4, linewidth=1, label=label)
            named.add(name)
        lowest, highest = axis.get_ylim()
        bottom, top = max(lowest, -DRAWN / 4), min(highest, DRAWN)
        axis.fill_between([1, (1 - SAVED) * DEEPEST], bottom, 100 * WORSE, color=OTHER, alpha=0.3)
        axis.set_ylim(bottom, top)
        axis.set_title(task, fontsize=9)
        axis.set_xlabel("mean applications of the blocks a token")
        axis.set_ylabel("held-out bits per byte over full depth, %")
        if named:
            axis.legend(fontsize=7)
    return figure
