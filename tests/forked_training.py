"""Trainings in processes of their own that end by a real signal at a chosen place."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from lshv2.runs import Run

# Trains in a forked process for each line of its input, and says how that ended. A process ends by itself, with a real
# signal, at the n-th time that it comes to a place. Forked, because importing torch takes longer than training here.
TRAINER = """
import json, os, signal, subprocess, sys, time
import torch
from lshv2 import checkpoint, train, trainer, training_state

def at(module, name, act, n):
    real, calls = getattr(module, name), []
    def wrapped(*given, **named):
        calls.append(1)
        return act(real, *given, **named) if len(calls) == n else real(*given, **named)
    setattr(module, name, wrapped)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def half_a_file(real, tensors, path, metadata):
    real(tensors, path, metadata)
    os.truncate(path, os.path.getsize(path) // 2)
    die()

def half_a_line(real, path, record):
    real(path, record)
    os.truncate(path, os.path.getsize(path) - 20)
    die()

def before(real, *given, **named):
    die()

def after(real, *given, **named):
    real(*given, **named)
    die()

def stop_the_group(real, *given, **named):
    # from outside, as a supervisor does it: torch lets a worker go without a word when its parent is the sender
    subprocess.run(["sh", "-c", f"kill -TERM -{os.getpgrp()}"], start_new_session=True, check=True)
    time.sleep(0.3)
    return real(*given, **named)

PLACES = {
    "a checkpoint half written": (checkpoint, "save_file", half_a_file),
    "a checkpoint not listed": (checkpoint, "write_json", before),
    "a checkpoint listed, the old one not deleted": (checkpoint, "write_json", after),
    "a line half written": (training_state, "append_jsonl", half_a_line),
    "between two steps": (trainer.Trainer, "_train_step", after),
    "SIGTERM in a step": (trainer.Trainer, "_train_step", stop_the_group),
    "SIGTERM in an evaluation": (trainer, "evaluate", stop_the_group),
}
for line in sys.stdin:
    config, output, place, n = json.loads(line)
    child = os.fork()
    if not child:
        os.setsid()
        said = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1), os.dup2(said, 2)
        torch.use_deterministic_algorithms(torch.cuda.is_available())
        if torch.cuda.is_available() and not os.path.exists(os.path.join(os.path.dirname(config), "checkpoints")):
            torch.cuda.manual_seed(1)  # torch draws this seed from the machine; a resumed run has to restore it
        if place:
            at(*PLACES[place], n)
        sys.exit(train.main(["--config", config]))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

class Forks:
    """The process that forks: `train(run, place, n)` -> (exit status, what was said)."""

    def __init__(self) -> None:
        changed = {**os.environ, "OMP_NUM_THREADS": "1", "LSHV2_RUNNER": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", TRAINER], env=changed, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def train(self, run: Run, place: str | None = None, n: int = 0) -> tuple[int, str]:
        assert self.process.stdin and self.process.stdout
        output = run.path / "logs" / "said"
        self.process.stdin.write(json.dumps([str(run.config), str(output), place, n]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()), output.read_text()
