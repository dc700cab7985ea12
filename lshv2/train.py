"""Phase 3: train the language model on real text, then the recall probe on synthetic sequences.

    train_run(run)      # resumes by itself; writes metrics.jsonl, training_metrics.json, component_profiles.json
    sample_text(run)    # what the trained model writes

    python -m lshv2.train --config runs/<run>/config.json    # the same without notebooks and markers
    torchrun --nproc_per_node=N -m lshv2.train --config runs/<run>/config.json    # on N GPUs, or N processes

`parallel.nproc` above 1 (NPROC=) starts torchrun by itself, on this machine. Several machines, and restarts after one
is lost, are torchrun's: --nnodes, --rdzv-endpoint, --max-restarts, with the run folder on a disk that all share.

The command's exit status: 0 done, 2 a mistake that the person can mend, 128 + signal (SIGTERM 143, SIGINT 130) when
it stopped after a checkpoint; the last two say one line on standard error. torchrun makes 1 of them all.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lshv2.batches import Task
from lshv2.checkpoint import find_checkpoint, load_model, read_checkpoint
from lshv2.data import (
    chance,
    ensure,
    language_dataset,
    language_stream,
    load_token_bytes,
    load_tokenizer,
    synthetic_dataset,
)
from lshv2.data.packing import read_stream
from lshv2.data.tokenizer import decode
from lshv2.errors import UserError
from lshv2.machine import environment
from lshv2.metrics import write_training_metrics
from lshv2.model import LSHModel
from lshv2.parallel.launch import run_torchrun, tell_outcome, told_to, under_torchrun
from lshv2.parallel.layout import WHOLE, Layout, language_layout, recall_layout
from lshv2.parallel.ranks import ALONE, Ranks, join
from lshv2.runs import SCHEMA, Run, hold, read_json, run_of_config, write_json
from lshv2.stopping import Stopped
from lshv2.trainer import Trainer, pick_device

LANGUAGE_MODEL, RECALL = "language_model", "recall"


def language_task(run: Run, layout: Layout = WHOLE, ranks: Ranks = ALONE) -> Task:
    """The language model's task, as the run's settings say; of a stream, this process's share."""
    train = run.settings.train
    place = ranks.rank // layout.sequence
    return Task(
        LANGUAGE_MODEL,
        language_stream(run, place, layout.data) if run.settings.data.stream else language_dataset(run, "train"),
        language_dataset(run, "eval"), train.batch_size,
        train.num_epochs, train.learning_rate, train.eval_every, torch.from_numpy(load_token_bytes(run)),
        profile=train.profile_components, gradient_checkpoint=train.gradient_checkpoint,
        compile=train.compile,
    )


def recall_task(run: Run) -> Task:
    """Multi-query associative recall at its training length, scored at the answers only."""
    recall = run.settings.recall
    return Task(
        RECALL, synthetic_dataset(run, "recall", "train"), synthetic_dataset(run, "recall", "eval"), recall.batch_size,
        1, recall.learning_rate, recall.eval_every,
    )


def train_run(run: Run) -> dict[str, Any]:
    """Train both tasks from where they stand; returns the content of `training_metrics.json`.

    With `parallel.nproc` above 1, in processes of its own. Raises `Stopped` after a signal and its checkpoint.
    """
    if run.settings.parallel.nproc == 1:
        return train_together(run, ALONE)
    outcome = run_torchrun("lshv2.train", ["--config", str(run.config)], run.settings.parallel.nproc)
    if outcome.get("signal"):
        raise Stopped(outcome["line"], outcome["signal"])
    if outcome.get("line"):
        raise UserError(outcome["line"])
    return read_json(run.file("training_metrics.json"))[0]


def train_together(run: Run, ranks: Ranks) -> dict[str, Any]:
    """`train_run` in each of the processes that train together; only the first writes results."""
    settings = run.settings
    layouts = [layout(settings, ranks.world) for layout in (language_layout, recall_layout)]
    if ranks.first:
        ensure(run)
    ranks.wait()
    data = ensure(run)
    language = Trainer(
        run, language_task(run, layouts[0], ranks), LSHModel(settings.model, settings.seed), ranks, layouts[0]
    )
    scalars = {
        "device": _device_name(ranks.device), "parameters": language.parameters, "processes": ranks.world,
        "threads": torch.get_num_threads(), "order2_bits_per_byte": data["order2_bits_per_byte"],
        "environment": environment(),
    }
    if ranks.first and not run.file("training_metrics.json").is_file():
        write_training_metrics(run, "running", scalars, {})  # a run that is stopped says on what it ran
    _enable_trackers(language)
    language.fit()
    scalars["seconds"] = language.seconds
    if settings.train.profile_components and ranks.first:
        write_profile(run, language)
    if ranks.first:
        write_training_metrics(run, "running", scalars, {})
    probe = Trainer(run, recall_task(run), LSHModel(settings.recall_model, settings.seed), ranks, layouts[1])
    _enable_trackers(probe)
    probe.fit()
    recall = {
        "parameters": probe.parameters, "seconds": probe.seconds,
        "chance": chance("recall", settings.recall.vocab_size),
    }
    return write_training_metrics(run, "done", scalars, recall) if ranks.first else {}


def _enable_trackers(trainer: Trainer) -> None:
    """Those that the settings name."""
    tracking = trainer.run.settings.tracking
    for name in tracking.trackers:
        if name == "wandb":
            trainer.enable_wandb(tracking.project)
        elif name == "mlflow":
            trainer.enable_mlflow(tracking.mlflow_uri, tracking.project)
        else:
            trainer.enable_tensorboard()


def sample_text(run: Run, *, n_prompt: int = 48, n_new: int = 48) -> tuple[str, str]:
    """The beginning of the held-out text, and how the trained language model goes on from there.

    Drawn at temperature 0.8 from the nucleus of 0.9, seeded by the run. UserError without a checkpoint or data.
    """
    path, _ = find_checkpoint(run.checkpoints / LANGUAGE_MODEL)
    if path is None:
        raise UserError(f"{run.path} has no {LANGUAGE_MODEL} checkpoint: run phase 03_train first")
    model = LSHModel(run.settings.model, run.settings.seed)
    tensors, state = read_checkpoint(path)
    load_model(model, tensors, path, state)
    tokenizer = load_tokenizer(run)
    prompt = read_stream(run.data / "eval.bin", run.settings.model.vocab_size)[:n_prompt].tolist()
    generator = torch.Generator().manual_seed(run.settings.seed)
    new = model.to(pick_device()).eval().generate([prompt], n_new, temperature=0.8, top_p=0.9, generator=generator)
    return decode(tokenizer, prompt), decode(tokenizer, new[0].tolist())


def write_profile(run: Run, trainer: Trainer) -> dict[str, Any]:
    """`component_profiles.json`: the median of the profiled training steps and its exclusive parts, in milliseconds.

    A part is its share of all these steps: medians of parts miss what a busy machine adds to another one each time, and
    do not add up to a step.
    """
    names = dict.fromkeys(name for profile in trainer.profiles for name in profile if name != "step")
    step = median(p["step"] for p in trainer.profiles)
    scale = step / sum(p["step"] for p in trainer.profiles)
    parts = {f"{name}_ms": scale * sum(p.get(name, 0.0) for p in trainer.profiles) for name in names}
    train = run.settings.train
    content = {
        "schema": SCHEMA, "device": _device_name(trainer.device),
        "dtype": "float32" if trainer.autocast_dtype is None else str(trainer.autocast_dtype).removeprefix("torch."),
        "seq_length": train.seq_length, "batch_size": train.batch_size, "n_steps": len(trainer.profiles),
        "step_ms": step, "step_samples_ms": [p["step"] for p in trainer.profiles],
        # absent where the backend has no such part: the dense mask of short inputs computes all of it at once
        **{f"{name}_ms": parts.get(f"{name}_ms") for name in ("hashing", "bucket_attn", "global")},
        "components_ms": parts, "sum_ms": sum(parts.values()), "coverage": sum(parts.values()) / step,
    }
    write_json(run.file("component_profiles.json"), content)
    return content


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def main(arguments: list[str]) -> int:
    """Train the run folder of a `config.json`, with torchrun's other processes if there are any; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lshv2.train", description="Train a run folder, or go on with it.")
    parser.add_argument("--config", required=True, help="the config.json of a run folder")
    path = Path(parser.parse_args(arguments).config)
    first = os.environ.get("RANK", "0") == "0"
    try:
        run = run_of_config(path)
        # one writer a run folder: the first process, unless whoever started torchrun is it
        with hold(run.path, "python -m lshv2.train") if first and not told_to() else nullcontext(), join() as ranks:
            if under_torchrun():
                train_together(run, ranks)
            else:
                train_run(run)
    except UserError as error:
        return _end(2, str(error), 0, first)
    except Stopped as stopped:
        return _end(128 + stopped.number, str(stopped), stopped.number, first)
    return 0


def _end(status: int, line: str, signalled: int, first: bool) -> int:
    if first:
        print(line, file=sys.stderr)
        tell_outcome(line, signalled)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
