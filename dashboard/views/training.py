"""Loss, bits per byte and recall of the selected runs, with what the optimizer did."""

import math
from dataclasses import replace

import streamlit as st
from ui.data import downloads
from ui.page import live, loaded, looks, selected
from ui.style import quantity, show, table
from ui.training_charts import Runs, View, curve_chart, level

from lshv2.curves import read_training

entries = selected()
look = looks(entries)
st.title("Training")
with st.container(horizontal=True, vertical_alignment="bottom"):
    x = st.segmented_control("x axis", ["steps", "tokens"], default="steps", required=True, key="x",
                             bind="query-params", persist_state="session")
    log_x = st.toggle("log x", key="log_x", bind="query-params", persist_state="session")
    log_y = st.toggle("log y", key="log_y", bind="query-params", persist_state="session")
    smoothing = st.slider("Smoothing", 0.0, 0.99, 0.0, 0.01, key="smoothing", bind="query-params", width=260,
                          persist_state="session", help="Weight of the past in the moving average over logged points. "
                          "The raw values stay visible behind it.")
view = View(x or "steps", log_x, log_y, smoothing)


def draw() -> None:
    runs: Runs = [(entry, look[entry.key], training) for entry, training in loaded(read_training, entries)]
    language = [run for run in runs if not run[2].language_model.empty]
    recall = [run for run in runs if not run[2].recall.empty]
    if language:
        language_model(language)
    elif runs:
        st.info("No language-model training in the selected runs yet.")
    if recall:
        associative_recall(recall)
    if language:
        optimizer(language)
        last_values(runs)


def language_model(runs: Runs) -> None:
    left, right = st.columns(2)
    with left:
        st.subheader("Language model: loss")
        chart = curve_chart(runs, "language_model", "loss_train", "loss_eval", "loss (nats per token)", view)
        show(chart, "loss", "Training and evaluation loss against training progress")
        st.caption("Line: training loss; dots: loss on held-out documents. Evaluation that rises while training falls "
                   "is overfitting. Source: `metrics.jsonl`, `training_metrics.json`.")
    with right:
        st.subheader("Language model: bits per byte")
        chart = curve_chart(runs, "language_model", None, "bits_per_byte", "bits per byte (eval)", view)
        levels = {round(t.order2_bits_per_byte, 3) for _, _, t in runs if math.isfinite(t.order2_bits_per_byte)}
        for value in sorted(levels):
            level(chart, value, f"order-2 byte model {value:.3f}")
        show(chart, "bits", "Evaluation bits per byte, with the order-2 byte model as a dashed line")
        st.caption("Lower is better, and comparable across tokenizers. Dashed: an order-2 byte model fitted on the "
                   "same training text; a model above it has learnt little. Source: `training_metrics.json`.")


def associative_recall(runs: Runs) -> None:
    left, right = st.columns(2)
    with left:
        st.subheader("Recall: accuracy")
        chart = curve_chart(runs, "recall", None, "accuracy", "accuracy (eval)", view)
        if not view.log_y:
            chart.update_yaxes(range=[-0.03, 1.05], tickformat=".0%")
        for value in sorted({round(t.chance, 4) for _, _, t in runs if math.isfinite(t.chance)}):
            level(chart, value, f"chance {value:.2%}")
        show(chart, "accuracy", "Recall accuracy on held-out sequences, with chance as a dashed line")
        st.caption("Share of queried keys whose value the model names, on unseen sequences. Dashed: guessing. "
                   "Source: `training_metrics.json` → `recall`.")
    with right:
        st.subheader("Recall: loss")
        chart = curve_chart(runs, "recall", "loss_train", "loss_eval", "loss (nats per answer)", view)
        show(chart, "recall_loss", "Recall training and evaluation loss")
        st.caption("A plateau followed by a fall is the usual picture: retrieval is found, then sharpened.")


def optimizer(runs: Runs) -> None:
    st.subheader("How the training went")
    parts = (("tokens_per_sec", "tokens per second"), ("learning_rate", "learning rate"),
             ("grad_norm", "gradient norm"), ("ponder_steps", "ponder steps (mean)"))
    for pair in (parts[:2], parts[2:]):
        for column, (name, title) in zip(st.columns(2), pair, strict=True):
            with column:
                chosen = replace(view, smoothing=0.0) if name == "learning_rate" else view  # a schedule has no noise
                chart = curve_chart(runs, "language_model", name, None, title, chosen, height=230, legend=False)
                show(chart, name, f"{title} against training progress")
    st.caption("Colours as above. Gradient norm is before clipping; ponder steps are the mean number of passes over "
               "the tied blocks. Source: `metrics.jsonl`, `training_metrics.json`.")


def last_values(runs: Runs) -> None:
    st.subheader("Last values")
    table([
        {
            "run": entry.key, "read from": training.source, "device": training.device or "—",
            "steps": quantity(training.language_model.last("step"), digits=8),
            "loss, train": quantity(training.language_model.last("loss_train")),
            "loss, eval": quantity(training.language_model.last("loss_eval")),
            "bits per byte": quantity(training.language_model.last("bits_per_byte")),
            "order-2 byte model": quantity(training.order2_bits_per_byte),
            "recall accuracy": quantity(training.recall.last("accuracy")),
            "tokens/s, median": quantity(training.tokens_per_sec_median),
        }
        for entry, _, training in runs
    ], "last values")


live(draw)
downloads(entries, ("metrics.jsonl", "training_metrics.json"))
