"""The command line of the study: see `lshv2.ablation`. Needs no torch by itself: each worker chooses its GPU first."""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

import lshv2.ablation
from lshv2.ablation.pool import run_pool
from lshv2.ablation.report import write_report
from lshv2.ablation.variants import TASKS, VARIANTS, plan
from lshv2.errors import UserError
from lshv2.machine import environment
from lshv2.presets import parse_override


def visible_gpus() -> list[str | None]:
    """A CUDA_VISIBLE_DEVICES for each GPU that this process may use; [None] without any: one worker on the CPU."""
    import torch

    count = torch.cuda.device_count()
    names = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")
    return list(names[:count]) or [None]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lshv2.ablation", description=lshv2.ablation.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="folder of results.jsonl and the report; an earlier one is gone on with")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help=f"of {', '.join(TASKS)}, or other lengths")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--set", nargs="+", default=[], metavar="section.key=value", help="settings of every job")
    parser.add_argument("--data", type=Path, help="where prepared data lies (default: OUT/data)")
    parser.add_argument("--time-limit", type=float, default=math.inf, metavar="SECONDS")
    parser.add_argument("--jobs-a-gpu", type=int, choices=range(1, 9), default=1, metavar="N", help=
                        "small models leave a GPU waiting: more jobs an hour, but no step times when above 1")
    parser.add_argument("--report", action="store_true", help="train nothing, write the report anew")
    arguments = parser.parse_args()
    try:
        if arguments.report:
            print(write_report(arguments.out))
            return
        extra = {f"{section}.{key}": value for section, key, value in map(parse_override, arguments.set)}
        tiers = plan(arguments.tasks, arguments.variants, arguments.seeds, arguments.steps, extra)
        if not any(tiers):
            raise UserError(f"no job: the study has none of {' '.join(arguments.tasks)}; name --variants for others")
        for tier in tiers:
            for job in tier:
                job.settings()  # a mistake stops before anything runs
        arguments.out.mkdir(parents=True, exist_ok=True)
        data = arguments.data or arguments.out / "data"
        data.mkdir(parents=True, exist_ok=True)
        gpus = visible_gpus() * arguments.jobs_a_gpu
        left = run_pool(tiers, arguments.out, data.resolve(), gpus, arguments.time_limit)
        print(write_report(arguments.out, environment()))
    except UserError as error:
        sys.exit(f"error: {error}")
    if left:
        sys.exit(f"{left} jobs are left: run the same command again")


if __name__ == "__main__":
    main()
