"""The study: which models are trained and judged, and what is there already.

    for job in plan(tasks, attentions, seeds): missing(job, rows_of(folder))     # [(setting, length), ...]

A job trains one model and judges it at each length; each length is a line of `arena.jsonl` (`lshv2.arena.job`).
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lshv2.arena.recipes import ASKED_WITH, ATTENTIONS, LENGTHS, RECIPES, VARIANTS, Attention, Recipe, recipe
from lshv2.arena.registry import get_task, load_plugins
from lshv2.arena.task import ArenaTask
from lshv2.config import ModelConfig
from lshv2.errors import UserError
from lshv2.runs import read_jsonl
from lshv2.sizes import count_parameters
from lshv2.tolerant import number

ARENA = "arena.jsonl"
# Of a model without pondering nothing reads these: they count as they were when the first rows were written.
UNUSED = {"ponder_prior": 0.3, "ponder_beta": 0.1, "ponder_threshold": 0.5}
# Settings that came later count where they are used.
LATER = {"softmax_scale": "constant", "centroids": "unit", "hash_positions": False}
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One model: its task, attention and seed, the recipe, and how it is judged.

    settings: name -> model settings that only the judging changes ("" for none: {}). label: of a model that is not its
    task's usual one, in its rows' `setting`. asked: which sequences it is judged by: 0 the reported ones, other numbers
    others, to choose a recipe by; the rows' `setting` says so.
    """

    task: str
    model: Attention
    seed: int
    recipe: Recipe
    lengths: tuple[int, ...]
    settings: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = (("", ()),)
    plugins: tuple[str, ...] = ()
    label: str = ""
    asked: int = 0

    @property
    def config(self) -> ModelConfig:
        longest = max(*self.lengths, *self.recipe.lengths)
        return self.recipe.model(get_task(self.task).vocab_size, self.model, longest)

    @property
    def trained_as(self) -> str:
        """What decides the weights; a changed recipe or task trains anew."""
        return self._hash(self.seed)

    @property
    def trained_by(self) -> str:
        """The same but for the seed: what is averaged has it in common."""
        return self._hash(None)

    def _hash(self, seed: int | None) -> str:
        task = get_task(self.task)
        name = self.task if task.version == 1 else f"{self.task} {task.version}"
        name += (f" of {task.source}" if task.source else "") + (f" by {task.code}" if task.code else "")
        config = self.config.model_dump(exclude={"max_seq_len"})
        config |= {} if self.config.use_ponder else UNUSED
        config = {name: value for name, value in config.items() if (name, value) not in LATER.items()}
        of = {name: value for name, value in asdict(self.recipe).items()
              if name not in ("judged", "sequences") and (name != "lsh" or value)}
        return hashlib.sha256(json.dumps([name, seed, config, of], sort_keys=True).encode()).hexdigest()[:16]


def workplace(folder: Path, task: ArenaTask) -> Path:
    """Where a task prepares what it draws from, below an arena's folder: a plugin's by what its file was, since what
    another one made would be taken for its own. That is removed."""
    if not task.code:
        return folder
    mine = folder / f"{task.name}-{task.code}"
    if not mine.exists():
        for other in folder.glob(f"{task.name}-" + "[0-9a-f]" * len(task.code)):
            shutil.rmtree(other)
        mine.mkdir(parents=True)
    return mine


def recipe_of(task: ArenaTask, small: bool = False) -> Recipe:
    """Its own, else that of the task it is like."""
    return recipe(task.name if task.name in RECIPES else task.like, small)


def plan(
    tasks: Sequence[str], attentions: Sequence[Attention] = ATTENTIONS, seeds: Sequence[int] = (0,),
    lengths: Sequence[int] | None = None, small: bool = False, plugins: Sequence[str] = (),
    changes: dict[str, Any] | None = None, variants: bool = True,
) -> list[Job]:
    """Jobs; `run_pool` decides their order. Raises UserError for an unknown task, or where nothing is to be done.

    lengths: None takes the recipe's; those too short for a task are left out. changes: of every recipe, fields by name.
    variants: `recipes.VARIANTS` too, beside "lsh". attentions: of "dense_scaled" there are none but where lengths
    beyond the trained ones are judged: elsewhere nothing is to be made up for.
    """
    load_plugins(plugins)
    jobs = []
    for name in tasks:
        task = get_task(name)
        how = replace(recipe_of(task, small), **(changes or {}))
        judged = tuple(n for n in lengths or how.judged or LENGTHS if n >= task.min_length)
        if not judged:
            raise UserError(f"arena: no length is long enough for {name}, which takes {task.min_length} tokens or more")
        trained = tuple(n for n in how.lengths if n >= task.min_length) or (task.min_length,)
        how = replace(how, lengths=trained)
        for seed in seeds:
            for attention in attentions:
                if attention == "dense_scaled" and max(judged) <= max(trained):
                    continue
                twin = how.twin(attention)
                jobs.append(Job(name, attention, seed, twin, judged, _settings(name, attention), tuple(plugins)))
            if "lsh" in attentions and variants and not small:
                for label, settings in VARIANTS.get(name, {}).items():
                    other = replace(how, settings={**how.settings, **settings})
                    jobs.append(Job(name, "lsh", seed, other, judged, plugins=tuple(plugins), label=label))
    if not jobs:
        raise UserError(f"arena: no model to train of {', '.join(tasks)} with {', '.join(attentions)}: dense_scaled is "
                        "there where longer sequences are judged than trained")
    return jobs


def _settings(task: str, attention: str) -> tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]:
    """LSH is asked with other numbers of probes too than it was trained with (Kitaev et al. 2020, table 2), or to look
    at everything: then what is still wrong was not learned, and the rest was not found."""
    asked = ASKED_WITH.get(task, ()) if attention == "lsh" else ()
    return (("", ()), *(
        (", ".join(f"{name.removeprefix('n_')}={value}" for name, value in changes.items()), tuple(changes.items()))
        for changes in asked
    ))


def key(row: Row) -> tuple[Any, ...]:
    """Rows of one key are one measurement: the later counts."""
    return tuple(row.get(name) for name in ("task", "model", "seed", "setting", "seq_len", "trained_as"))


def training_flops(jobs: Sequence[Job]) -> float:
    """Operations to train them, from below: a multiply and an add a weight and token, forward and twice that backward;
    without attention, and with the fewest tokens a step has."""
    return sum(6.0 * (count_parameters(job.config) - job.config.vocab_size * job.config.d_model)
               * job.recipe.tokens * job.recipe.steps for job in jobs)


def rows_of(folder: Path) -> dict[tuple[Any, ...], Row]:
    """The rows there are, by `key`."""
    rows, _ = read_jsonl(folder / ARENA)
    return {key(row): row for row in rows}


def missing(job: Job, rows: dict[tuple[Any, ...], Row], since: float = math.inf) -> list[tuple[str, int]]:
    """(setting, length) still to be judged. Too little memory is an answer only where no other job had some of it, and
    a length that a source did not have only if it was asked for after `since` (Unix seconds): files change."""
    wanted = [(named(job, name), n) for name, _ in job.settings for n in job.lengths]
    there = {(row.get("setting"), row.get("seq_len")) for row in rows.values()
             if row.get("trained_as") == job.trained_as and number(row.get("sequences")) >= job.recipe.sequences
             and not (row.get("status") == "out of memory" and row.get("shared"))
             and not (row.get("status") == "not run" and number(row.get("time")) < since)}
    return [each for each in wanted if each not in there]


def unfinished(jobs: Sequence[Job], folder: Path) -> list[Job]:
    """Those of which something is `missing` there."""
    rows = rows_of(folder)
    return [job for job in jobs if missing(job, rows)]


def named(job: Job, setting: str) -> str:
    """What a row's `setting` says: how the model differs, and what the judging changed."""
    return ", ".join(part for part in (job.label, setting, f"sequences {job.asked}" if job.asked else "") if part)
