"""The arena's command line: see `lshv2.arena`."""

from __future__ import annotations

import argparse
import math
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from textwrap import fill

import lshv2.arena
from lshv2.arena.phase import publish
from lshv2.arena.pool import run_pool, visible_gpus
from lshv2.arena.recipes import ATTENTIONS
from lshv2.arena.registry import load_plugins, task_names
from lshv2.arena.study import Job, plan, training_flops, unfinished
from lshv2.arena.sweep import TASKS as SWEPT
from lshv2.arena.sweep import sweep_jobs
from lshv2.arena.trial import try_draws
from lshv2.errors import UserError
from lshv2.estimate import check_arena_time
from lshv2.runs import hold


def main() -> None:
    arguments = _parser().parse_args()
    before = signal.signal(signal.SIGTERM, _interrupt)  # as `timeout` and batch systems send it
    try:
        jobs = _jobs(arguments)
        command = shlex.join(["python", "-m", "lshv2.arena", *sys.argv[1:]])
        if not arguments.yes:
            todo = unfinished(jobs, arguments.out)
            small = "" if arguments.small else "--small"
            check_arena_time(training_flops(todo), len(todo), command=command, yes="--yes", small=small)
        out = _writable(arguments.out)
        with hold(out, command):
            try_draws(unfinished(jobs, out), out / "arena")
            gpus = (visible_gpus() or [""]) * arguments.jobs_a_gpu
            left = run_pool(jobs, out, gpus, arguments.time_limit, command)
            publish(out)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as interrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(128 + (interrupt.args or (signal.SIGINT,))[0])
    finally:
        signal.signal(signal.SIGTERM, before)
    if left:
        sys.exit(f"{left} of {len(jobs)} jobs are left, those that FAILED above or were not started in time: the same "
                 "command tries them again")


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lshv2.arena", description=lshv2.arena.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=fill(f"tasks: {', '.join(task_names())}", 100, break_on_hyphens=False),
    )
    positive = _whole(1)
    parser.add_argument("out", type=Path, help="folder of arena.jsonl and its pictures; an earlier one is gone on with")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="see below; default: all of them")
    parser.add_argument("--attentions", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=_whole(0), default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--lengths", nargs="+", type=positive, help="judged; default: the recipe's, mostly 1,024 to "
                        "131,072 in powers of two")
    parser.add_argument("--sequences", type=positive, help="judged at each length; default: the recipe's")
    parser.add_argument("--asked", type=_whole(0), default=0, metavar="N", help="judge by other sequences than the "
                        "reported ones (0): what a recipe is chosen by")
    parser.add_argument("--steps", type=positive, help="of training, instead of the recipes'")
    parser.add_argument("--plugins", nargs="+", default=[], metavar="FILE.py", help="files with tasks of your own")
    parser.add_argument("--sweep", action="store_true", help="the quality curve: rounds, bucket size and cells instead")
    parser.add_argument("--small", action="store_true", help="laptop sizes: trained at 64 tokens (or the fewest "
                        "a task takes), judged to 4,096; a plugin's own recipe stays what it is")
    parser.add_argument("--yes", action="store_true", help="without a GPU: however long it takes")
    parser.add_argument("--time-limit", type=float, default=math.inf, metavar="SECONDS",
                        help="after which no model is begun; default: none")
    parser.add_argument("--jobs-a-gpu", type=int, choices=range(1, 9), default=1, metavar="N",
                        help="models side by side on each, 1 to 8; default: 1")
    return parser


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and int(text) >= least):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        return int(text)

    return read


def _jobs(arguments: argparse.Namespace) -> list[Job]:
    load_plugins(arguments.plugins)
    plugins = [str(Path(path).expanduser().resolve()) for path in arguments.plugins]
    changes = {name: value for name in ("sequences", "steps") if (value := getattr(arguments, name))}
    if arguments.sweep:
        jobs = sweep_jobs(arguments.tasks or SWEPT, arguments.seeds, arguments.lengths, arguments.small, changes,
                          plugins)
    else:
        jobs = plan(arguments.tasks or task_names(), arguments.attentions, arguments.seeds, arguments.lengths,
                    arguments.small, plugins, changes)
    return [replace(job, asked=arguments.asked) for job in jobs]


def _writable(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path.resolve()
    except OSError as error:
        raise UserError(f"{path}: nothing can be written there ({error.strerror}); name another folder") from None


if __name__ == "__main__":
    main()
