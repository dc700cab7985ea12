"""One job of the study: a model trained, judged at each length that is missing, a line of `arena.jsonl` for each.

    for job in plan(tasks, attentions, seeds): run_job(job, folder)     # side by side: `lshv2.arena.pool.run_pool`

Lines are written when they are there. The weights lie in `arena/` beside them, with what they were trained with, and
until there are any, checkpoints of the training: a killed study loses a minute.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lshv2.arena.registry import get_task, load_plugins
from lshv2.arena.study import ARENA, Job, Row, missing, named, rows_of, workplace
from lshv2.arena.task import ArenaTask
from lshv2.config import ModelConfig
from lshv2.errors import UserError
from lshv2.machine import git_state, torch_version
from lshv2.runs import append_jsonl, atomic_path

SCHEMA = 1


def shown(row: Row) -> str:
    """A row's value, or why there is none."""
    return f"- ({row['status']}: {row['reason']})" if row["value"] is None else f"{row['value']:.4f}"


def say(row: Row) -> None:
    about = f"{row['task']} {row['model']} seed {row['seed']} {row['setting']} {row['seq_len']}"
    print(f"{about}: {row['metric']} {shown(row)}", flush=True)


def run_job(
    job: Job, folder: Path, report: Callable[[Row], None] = say, command: str = "",
    on_step: Callable[[int, float], None] = lambda step, loss: None, shared: bool = False,
) -> int:
    """Train the model, unless its weights are there, and judge what is missing; returns the number of new rows.

    report: called with each new row. on_step: see `learn.train`. shared: others use the GPU at the same time.
    """
    load_plugins(job.plugins)
    todo = missing(job, rows_of(folder))
    if not todo:
        return 0
    task = get_task(job.task)
    task.prepare(workplace(folder / "arena", task))
    model, fixed = _trained(job, task, folder / "arena", on_step)
    for setting, length in todo:
        judged_with = {named(job, name): dict(changed) for name, changed in job.settings}
        _configure(model, job.config.model_copy(update=judged_with[setting]))
        row = {**fixed, "setting": setting, "seq_len": length, **_judged(job, task, model, length, not shared),
               "shared": shared, "command": command}
        append_jsonl(folder / ARENA, row)
        report(row)
    return len(todo)


def _trained(job: Job, task: ArenaTask, folder: Path, on_step: Callable[[int, float], None]) -> tuple[Any, Row]:
    """The model, from `folder` if it lies there, and what all its rows say."""
    import torch

    from lshv2.arena.learn import train
    from lshv2.benchmark.worker import device_name
    from lshv2.model import LSHModel
    from lshv2.trainer import pick_device

    device = pick_device()
    model = LSHModel(job.config, job.seed).to(device)
    label = re.sub(r"\W+", "-", f"-{job.label}") if job.label else ""
    weights = folder / f"{job.task}-{job.model}-{job.seed}{label}.pt"
    half = weights.with_suffix(".half.pt")

    def save(path: Path, content: dict[str, Any]) -> None:
        with atomic_path(path) as temporary:
            torch.save({"trained_as": job.trained_as, **content}, temporary)

    if state := _state(weights, job, "figures", "model"):
        model.load_state_dict(state["model"])
    else:
        task.split = "train"
        if kept := _state(half, job, "model", "optimizer", "losses", "seconds"):
            steps = f"{len(kept['losses']):,} of {job.recipe.steps:,}"
            print(f"{job.task} {job.model} seed {job.seed}: goes on after step {steps}", flush=True)
        figures = train(model, task, job.recipe, job.seed, device, on_step, job.plugins, kept, partial(save, half))
        state = {"figures": figures, "model": model.state_dict()}
        save(weights, state)
    half.unlink(missing_ok=True)
    return model, {
        "schema": SCHEMA, "task": job.task, "model": job.model, "seed": job.seed, "trained_as": job.trained_as,
        "trained_by": job.trained_by, "trained_len": max(job.recipe.lengths), "steps": state["figures"]["steps"],
        "train_seconds": state["figures"]["train_seconds"], "parameters": model.count_parameters(),
        "device": device_name(device), "dtype": "bfloat16" if device.type == "cuda" else "float32",
        "torch": torch_version(), **git_state(),
    }


def _state(weights: Path, job: Job, *parts: str) -> dict[str, Any]:
    """What lies there with these parts; empty where nothing does, nothing readable, or what another job made."""
    import torch

    if not weights.is_file():
        return {}
    content = io.BytesIO(weights.read_bytes())  # a disk that fails ends the job: what lies there may be whole
    try:
        state = torch.load(content, map_location="cpu", weights_only=True)
        if set(state) >= {"trained_as", *parts}:
            return dict(state) if state["trained_as"] == job.trained_as else {}
        problem = "not an arena model"
    except Exception as error:  # a torn file raises anything: KeyError, EOFError, OSError, UnpicklingError
        problem = f"{type(error).__name__}: {str(error)[:80]}".splitlines()[0]
    print(f"{weights.name} is unreadable ({problem}): its model is trained anew", flush=True)
    return {}


def _judged(job: Job, task: ArenaTask, model: Any, length: int, timed: bool) -> Row:
    """What was found at one length; a null value where it does not fit into memory, or the task has no such length.
    timed: what a sequence costs too, which beside other jobs would tell nothing."""
    import torch

    from lshv2.arena.cost import cost
    from lshv2.arena.judge import judge

    config: ModelConfig = model.config
    device = next(model.parameters()).device
    task.split = "eval"
    try:
        result = {"status": "ok", **judge(model, task, length, job.recipe.sequences, device, job.asked),
                  **(cost(model, task, length, device) if timed else {})}
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        result = {"metric": task.metric, "value": None, "status": "out of memory", "reason": str(error)[:200],
                  "sequences": job.recipe.sequences}
    except UserError as error:
        result = {"metric": task.metric, "value": None, "status": "not run", "reason": str(error)[:200],
                  "sequences": job.recipe.sequences}
    return {
        **result, "rounds": config.n_rounds, "bucket_size": config.bucket_size,
        "n_buckets": config.resolved_n_buckets, "window": config.window, "keys_a_query": _keys(config),
        **({"centroids": config.centroids} if config.attention == "lsh" else {}),
        "time": time.time(),
    }


def _keys(config: ModelConfig) -> int | None:
    """Keys that a query sees at most; None: all."""
    if config.attention == "dense":
        return None
    found = config.n_rounds * config.bucket_size if config.attention == "lsh" else 0
    return config.window + config.n_global + found


def _configure(model: Any, config: ModelConfig) -> None:
    """Another number of probes, or bucket size, of a trained model."""
    model.config = config
    for block in model.blocks:
        block.attention.config = config
