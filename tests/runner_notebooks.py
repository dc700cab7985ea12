"""Throw-away phases for the runner's tests: real notebooks, executed by real kernels."""

from __future__ import annotations

from pathlib import Path

from lshv2.runner import Pipeline
from lshv2.runner.phases import Artifact, Phase

PARAMETERS = 'run_dir = ""\npreset = "quick"\noverrides = {}\nseed = 0\ndata = None'
WRITE_A = "from pathlib import Path\nPath(run_dir, 'a.json').write_text('{\"seed\": %d}' % seed)"
WRITE_B = "from pathlib import Path\nPath(run_dir, 'b.json').write_text(Path(run_dir, 'a.json').read_text())"


def write_notebook(path: Path, *cells: str, parameters: str = PARAMETERS) -> None:
    import nbformat

    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3",
                                                                 "language": "python"}})
    notebook.cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    notebook.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


def pipeline(root: Path, *cells: str, parameters: str = PARAMETERS, **changes: object) -> Pipeline:
    """A pipeline of the one phase `01_a` with these cells, which must leave `a.json`."""
    if cells:
        write_notebook(root / "notebooks" / "01_a.ipynb", *cells, parameters=parameters)
    table = (Phase("01_a", settings=("train.learning_rate", "seed"), artifacts=(Artifact("a.json"),)),)
    defaults = {"run_dir": root / "run", "preset": "test", "chosen": ("01_a",), "table": table,
                "notebooks": root / "notebooks", "report": None, "resume": "make again"}
    return Pipeline(**{**defaults, **changes})  # type: ignore[arg-type]


def two_phases(root: Path, **changes: object) -> Pipeline:
    """`01_a` writes a.json, `02_b` reads it and writes b.json."""
    write_notebook(root / "notebooks" / "01_a.ipynb", WRITE_A)
    write_notebook(root / "notebooks" / "02_b.ipynb", WRITE_B)
    table = (
        Phase("01_a", settings=("seed",), artifacts=(Artifact("a.json"),)),
        Phase("02_b", settings=("train.learning_rate",), after=("01_a",), artifacts=(Artifact("b.json"),)),
    )
    return pipeline(root, **{"table": table, "chosen": ("01_a", "02_b"), **changes})
