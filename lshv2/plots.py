"""The three pictures beside a run's metrics files, as PNG bytes; nothing is measured or fitted here.

    Image(plot_png(run.path, "benchmark_summary"))      # in a notebook

Figures are matplotlib `Figure` objects on the Agg canvas: no pyplot, hence no global state and no display. Colours are
Okabe and Ito's, which colour-blind readers can tell apart; LSH is always blue and dense always orange.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from lshv2.axes import length_ticks, short
from lshv2.benchmark_results import Benchmark, Row, read_benchmark
from lshv2.curves import Curves, Training, read_training
from lshv2.errors import UserError
from lshv2.readers import Profile, read_profile

COLOURS = {"lsh": "#0072B2", "dense": "#D55E00", "dense_scaled": "#999933", "window": "#009E73"}
MARKERS = {"lsh": "o", "dense": "s", "dense_scaled": "D", "window": "^"}
TRAIN, EVAL, REFERENCE, OTHER = "#0072B2", "#D55E00", "#555555", "#BBBBBB"
ATTENTION_PARTS = ("hashing_ms", "bucket_attn_ms", "global_ms")  # the guide's three, in its order


def plot_png(run: Path, name: str) -> bytes:
    """The plot of `<name>.json` in the run folder. Raises UserError when that file is missing or unusable."""
    content, problems = READERS[name](run)
    if content is None:
        reason = problems[0] if problems else f"{name}.json is empty"
        raise UserError(f"{run}: no plot of {name}: {reason}: run the phase that writes it")
    buffer = io.BytesIO()
    figure = DRAWERS[name](content)
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def new_figure(columns: int, title: str, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels side by side, row after row."""
    figure = Figure(figsize=(4.9 * columns, 4.3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10, color="#333333")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for axis in axes:
        axis.grid(True, color="#E5E5E5", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_training(training: Training) -> Figure:
    """Loss, bits per byte against the order-2 model, and recall against chance."""
    size = f"{training.parameters / 1e6:.2f} M parameters" if training.parameters > 0 else ""
    about = [size, training.device, training.state if training.state != "done" else ""]
    figure, (loss, bits, recall) = new_figure(3, "  ·  ".join(part for part in about if part))
    language = training.language_model
    loss.plot(language.train["step"], language.train["loss_train"], color=TRAIN, linewidth=1.1, label="train")
    dots: dict[str, Any] = {"color": EVAL, "marker": "o", "markersize": 4}
    loss.plot(language.eval["eval_step"], language.eval["loss_eval"], **dots, label="eval")
    label(loss, "language model: loss", "step", "nats a token")
    bits.plot(language.eval["eval_step"], language.eval["bits_per_byte"], **dots,
              label=f"eval, now {language.last('bits_per_byte'):.3f}")
    order2 = training.order2_bits_per_byte
    if math.isfinite(order2):
        bits.axhline(order2, color=REFERENCE, linestyle="--", linewidth=1.2, label=f"order-2 byte model, {order2:.3f}")
    label(bits, "language model: bits per byte", "step", "bits a byte of held-out text")
    _draw_recall(recall, training.recall, training.chance)
    return figure


def _draw_recall(axis: Axes, recall: Curves, chance: float) -> None:
    axis.plot(recall.eval["eval_step"], 100 * recall.eval["accuracy"], color=EVAL, marker="o", markersize=4,
              label=f"eval, now {100 * recall.last('accuracy'):.1f} %")
    axis.axhline(90, color=REFERENCE, linestyle="--", linewidth=1.2, label="target, 90 %")
    if math.isfinite(chance):
        axis.axhline(100 * chance, color=REFERENCE, linestyle=":", linewidth=1.2, label=f"chance, {100 * chance:.2g} %")
    axis.set_ylim(-3, 103)
    label(axis, "associative recall: accuracy", "step", "% of answers right")


def draw_profile(profile: Profile) -> Figure:
    """Milliseconds and share of the step of each part, the attention's three first, then by size."""
    figure, (axis,) = new_figure(1, "")
    named = [part for part in ATTENTION_PARTS if part in profile.components_ms]
    rest = sorted(profile.components_ms.keys() - set(named), key=lambda part: -profile.components_ms[part])
    values = {part: profile.components_ms[part] for part in named + rest}
    unaccounted = profile.step_ms - profile.sum_ms
    if unaccounted > 0:
        values["in no part_ms"] = unaccounted
    figure.set_size_inches(8.2, 1.6 + 0.36 * len(values))
    colours = [TRAIN if part in named else OTHER for part in values]
    places = np.arange(len(values))
    axis.barh(places, list(values.values()), color=colours, height=0.7)
    for place, value in zip(places, values.values(), strict=True):
        share = 100 * value / profile.step_ms
        axis.text(value, float(place), f"  {value:,.2f} ms   {share:.1f} %", va="center", fontsize=9)
    axis.set_yticks(places, [part.removesuffix("_ms").replace("_", " ") for part in values])
    axis.invert_yaxis()
    axis.margins(x=0.24)
    axis.grid(False, axis="y")
    axis.set_xlabel("milliseconds of a training step")
    whole = f"step {profile.step_ms:,.1f} ms, parts add up to {100 * profile.coverage:.1f} %"
    axis.set_title(f"{whole} (LSH attention: blue)", fontsize=10, loc="left")
    figure.suptitle(f"{profile.batch_size:g} x {profile.seq_length:,.0f} tokens, {profile.dtype}, {profile.device}",
                    fontsize=10, color="#333333")
    return figure


def draw_benchmark(benchmark: Benchmark) -> Figure:
    """Latency of the model and of attention alone, and activation memory against length, log-log, with the fits; a
    row of panels at the batch size, one at fixed tokens where that was measured, and every doubling's ratio below."""
    layouts = [benchmark, *([benchmark.fixed_tokens] if benchmark.fixed_tokens else [])]
    panels = [
        ("latency", "latency_ms", "forward", "milliseconds"),
        ("train_latency", "train_latency_ms", "forward + backward", "milliseconds"),
        ("attention_train_latency", "attention_train_latency_ms", "attention alone, with backward", "milliseconds"),
        ("memory", "activation_mb", "memory over the fixed cost", "MB"),
    ]
    panels = [panel for panel in panels
              if panel[0] != "attention_train_latency" or any(row.get(panel[1]) > 0 for row in benchmark.rows)]
    figure, axes = new_figure(len(panels), f"{benchmark.device}, {benchmark.dtype}; bars: 20th to 80th percentile; "
                              "band: 95 % interval of the exponent", len(layouts))
    for i, axis in enumerate(axes):
        layout, (measure, column, title, unit) = layouts[i // len(panels)], panels[i % len(panels)]
        of = "" if layout is benchmark else f", {layout.tokens:,.0f} tokens a batch"
        _draw_lengths(axis, layout, measure, column)
        label(axis, f"{title}{of}", "tokens of a sequence" if of else "tokens", f"{unit} a sequence" if of else unit)
    if lines := [line for layout in layouts for line in _doubling_lines(layout)]:
        head = "forward + backward over that at half the length (2: linear, 4: quadratic)"
        figure.supxlabel("\n".join([head, *lines]), x=0.01, ha="left", fontsize=9, color="#333333")
    return figure


def _doubling_lines(benchmark: Benchmark) -> list[str]:
    """`lsh: 2k 1.91, 4k 1.98 (1.95 to 2.02), ...` for each attention, with intervals where there are such."""
    lines = []
    for attention in COLOURS:
        found = benchmark.scaling.get((attention, "train_latency"))
        shown = [f"{short(one.seq_len)} {one.ratio:.2f}"
                 + (f" ({one.low:.2f} to {one.high:.2f})" if math.isfinite(one.low + one.high) else "")
                 for one in (found.doublings if found else ())]
        of = "" if math.isnan(benchmark.tokens) else f", {benchmark.tokens:,.0f} tokens a batch"
        lines += [f"{attention}{of}: {',  '.join(shown)}"] if shown else []
    return lines


def _draw_lengths(axis: Axes, benchmark: Benchmark, measure: str, column: str) -> None:
    """All attentions in one panel."""
    axis.set_yscale("log")
    for attention in COLOURS:
        rows = [row for row in benchmark.rows if row.attention == attention]
        if rows:
            _draw_scaling(axis, benchmark, rows, measure, column)
    length_axis(axis, [row.seq_len for row in benchmark.rows])
    axis.margins(y=0.18)
    bottom, top = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if top < 100 * bottom else (1,), numticks=15))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _draw_scaling(axis: Axes, benchmark: Benchmark, rows: list[Row], measure: str, column: str) -> None:
    """One attention in one panel: points with their spread, the fit over its range, and lengths that failed."""
    name, colour = rows[0].attention, COLOURS[rows[0].attention]
    good = [row for row in rows if row.status == "ok" and row.get(column) > 0]
    x = np.array([row.seq_len for row in good], dtype=float)
    y = np.array([row.get(column) for row in good])
    fit = benchmark.fits.get((name, measure))
    label = name if fit is None else f"{name}: n^{fit.exponent:.2f}"
    if fit is not None and math.isfinite(fit.low):
        label += f" ({fit.low:.2f} to {fit.high:.2f})"
    low, high = (np.array([row.get(f"{column}_p{p}") for row in good]) for p in (20, 80))
    spread = None if not len(good) or np.isnan(low).any() else np.maximum([y - low, high - y], 0)
    axis.errorbar(x, y, yerr=spread, fmt=MARKERS[name], color=colour, markersize=5, capsize=3, linestyle="none",
                  label=label)
    if fit is not None:
        _draw_fit(axis, fit.exponent, fit.low, fit.high, x, y, (fit.min_seq_len, fit.max_seq_len), colour)
    for row in rows:
        if row.status not in ("ok", "skipped"):
            axis.axvline(row.seq_len, color=colour, linewidth=0.8, linestyle=":")
            axis.annotate(f"{name}: {row.status}", (row.seq_len, 0.02), xycoords=("data", "axes fraction"), rotation=90,
                          color=colour, fontsize=8, ha="right", va="bottom")


def _draw_fit(axis: Axes, exponent: float, low: float, high: float, x: np.ndarray, y: np.ndarray,
              span: tuple[float, float], colour: str) -> None:
    """The fitted line within the lengths that it was fitted on, and the exponent's interval around their centre."""
    inside = (x >= span[0]) & (x <= span[1])
    centre_x, centre_y = np.log(x[inside]).mean(), np.log(y[inside]).mean()
    line = np.linspace(math.log(span[0]), math.log(span[1]), 50)
    axis.plot(np.exp(line), np.exp(centre_y + exponent * (line - centre_x)), color=colour, linewidth=1.2)
    if math.isfinite(low):
        edges = [np.exp(centre_y + slope * (line - centre_x)) for slope in (low, high)]
        axis.fill_between(np.exp(line), *edges, color=colour, alpha=0.12, linewidth=0)


def label(
    axis: Axes, title: str, x: str, y: str, beneath: bool = False, elsewhere: Container[str] = ()
) -> None:
    """Title, axis titles, and a legend where there are labelled lines; beneath: under the axes, where it hides none.
    elsewhere: names that another legend has."""
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    lines = zip(*axis.get_legend_handles_labels(), strict=True)
    named = [(line, name) for line, name in lines if name not in elsewhere]
    if named and beneath:
        axis.legend(*zip(*named, strict=True), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2,
                    edgecolor="none")
    elif named:  # readable where it lies on a line
        axis.legend(*zip(*named, strict=True), fontsize=8, loc="best", edgecolor="none", framealpha=0.8)


def length_axis(axis: Axes, lengths: Iterable[int]) -> None:
    """Logarithmic, with the ticks of `lshv2.axes`."""
    ticks = length_ticks(lengths)
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.tick_params(axis="x", labelrotation=45 if len(ticks) > 6 else 0)


READERS: dict[str, Callable] = {
    "training_metrics": read_training, "component_profiles": read_profile, "benchmark_summary": read_benchmark,
}
DRAWERS: dict[str, Callable] = {
    "training_metrics": draw_training, "component_profiles": draw_profile, "benchmark_summary": draw_benchmark,
}
