"""Phase 4's benchmark without notebooks and markers: `python -m lshv2.benchmark --config runs/<run>/config.json`.

Goes on where a killed one was. Exit status 2 and one line for a mistake.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lshv2.benchmark.suite import run_benchmark
from lshv2.errors import UserError
from lshv2.runs import hold, run_of_config


def main(arguments: list[str]) -> int:
    """Measure the run folder of a `config.json`; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lshv2.benchmark", description="Benchmark a run, or go on with it.")
    parser.add_argument("--config", required=True, type=Path, help="the config.json of a run folder")
    path = parser.parse_args(arguments).config
    try:
        run = run_of_config(path)
        with hold(run.path, "python -m lshv2.benchmark"):
            run_benchmark(run)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
