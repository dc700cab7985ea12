"""The arena's command line: see `lshv2.arena`."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import lshv2.arena
from lshv2.arena.pool import run_pool, visible_gpus
from lshv2.arena.recipes import ATTENTIONS
from lshv2.arena.registry import load_plugins, task_names
from lshv2.arena.study import plan
from lshv2.arena.sweep import TASKS as SWEPT
from lshv2.arena.sweep import sweep_jobs
from lshv2.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lshv2.arena", description=lshv2.arena.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="folder of arena.jsonl; an earlier one is gone on with")
    parser.add_argument("--tasks", nargs="+", help="default: all of them")
    parser.add_argument("--attentions", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lengths", nargs="+", type=int, help="default: 1,024 to 131,072 in powers of two")
    parser.add_argument("--sequences", type=int, help="judged at each length")
    parser.add_argument("--asked", type=int, default=0, metavar="N", help="judge by other sequences than the reported "
                        "ones (0): what a recipe is chosen by")
    parser.add_argument("--steps", type=int, help="of training, instead of the recipes'")
    parser.add_argument("--plugins", nargs="+", default=[], metavar="FILE.py", help="files with tasks of your own")
    parser.add_argument("--sweep", action="store_true", help="the quality curve: rounds, bucket size and cells instead")
    parser.add_argument("--small", action="store_true", help="laptop sizes")
    parser.add_argument("--time-limit", type=float, default=math.inf, metavar="SECONDS")
    parser.add_argument("--jobs-a-gpu", type=int, choices=range(1, 9), default=1, metavar="N")
    arguments = parser.parse_args()
    try:
        load_plugins(arguments.plugins)
        changes = {name: getattr(arguments, name) for name in ("sequences", "steps") if getattr(arguments, name)}
        if arguments.sweep:
            tasks = arguments.tasks or SWEPT
            jobs = sweep_jobs(tasks, arguments.seeds, arguments.lengths, arguments.small, changes)
        else:
            plugins = [str(Path(path).resolve()) for path in arguments.plugins]
            jobs = plan(arguments.tasks or task_names(), arguments.attentions, arguments.seeds, arguments.lengths,
                        arguments.small, plugins, changes)
        jobs = [replace(job, asked=arguments.asked) for job in jobs]
        arguments.out.mkdir(parents=True, exist_ok=True)
        gpus = (visible_gpus() or [""]) * arguments.jobs_a_gpu
        command = shlex.join(["python", "-m", "lshv2.arena", *sys.argv[1:]])
        left = run_pool(jobs, arguments.out.resolve(), gpus, arguments.time_limit, command)
    except UserError as error:
        sys.exit(f"error: {error}")
    if left:
        sys.exit(f"{left} jobs are left: run the same command again")


if __name__ == "__main__":
    main()
