"""The package: one zip from which a stranger can check a run's figures and rebuild its model.

    python -m lshv2.package make runs/quick          # writes runs/quick/lsh_v2_complete_package.zip
    python -m lshv2.package check FILE.zip           # verifies every sha256, rebuilds the model, reproduces the loss

In it: settings, metrics, profiles, benchmark, manifest, plots, logs, executed notebooks, tokenizer, the package's own
sources, the newest language-model weights without the optimizer (`model.safetensors`), and the very windows of
held-out text that the eval loss is the mean over (`eval_windows.npy`, [windows, tokens]). `MANIFEST.json` holds the
sha256 of every member and the expected loss.

The expected loss is the one that training reported for these weights; where their step was not evaluated, it is
computed while packing. It is reproduced within TOLERANCE of the wider dtype. In float32 only the order of summation
differs between machines: 1e-6 nats in the mean, and about 1e-5 when a rounded tie puts a token into another bucket
or lets it halt a step later; 1e-3 leaves room for hundreds of those and still tells any other weights. bfloat16 keeps
eight bits of each product, so with it on either side the mean moves by some 1e-3: 2e-2.

Left out: the optimizer's state and the training text, so a package is for checking and use, not for resuming.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from lshv2 import __version__
from lshv2.checkpoint import find_checkpoint, load_model, read_checkpoint
from lshv2.data import language_dataset, load_token_bytes
from lshv2.errors import UserError
from lshv2.evaluation import Evaluation, evaluate
from lshv2.machine import source_hashes
from lshv2.model import LSHModel
from lshv2.runs import SCHEMA, Run, atomic_path, load_run, read_json, repo_root
from lshv2.trainer import pick_device
from lshv2.unpack import MANIFEST, unpack

NAME = "lsh_v2_complete_package.zip"
WEIGHTS, WINDOWS, BYTES = "model.safetensors", "eval_windows.npy", "data/token_bytes.npy"
RUN_FILES = ("*.json", "*.jsonl", "*.png", "logs/*.log", "notebooks/*.ipynb", "data/data.json", "data/tokenizer.json",
             BYTES)
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # nats a token
DATE = (1980, 1, 1, 0, 0, 0)  # the same content gives the same zip


def make_package(run: Run) -> Path:
    """Write the zip, atomically, from whatever the run has; without weights or text it has no loss to check."""
    path = run.file(NAME)
    listed: dict[str, dict[str, Any]] = {}
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:

        def add(name: str, content: bytes) -> None:
            stored = name.endswith((".safetensors", ".png"))  # nothing to gain there
            info = zipfile.ZipInfo(name, DATE)
            info.compress_type = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
            info.external_attr = 0o100644 << 16
            archive.writestr(info, content)
            listed[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

        for name, content in (*_run_members(run), *_source_members()):
            add(name, content)
        expected = None
        for name, content, expectation in _model_members(run):
            add(name, content)
            expected = expectation
        manifest = {"schema": SCHEMA, "lshv2": __version__, "run": run.name, "expected": expected,
                    "members": listed.copy()}
        add(MANIFEST, (json.dumps(manifest, indent=1, allow_nan=False) + "\n").encode())
    return path


def _run_members(run: Run) -> Iterator[tuple[str, bytes]]:
    found = {path for pattern in RUN_FILES for path in run.path.glob(pattern)}
    for path in sorted(found):
        if path.is_file() and not path.name.startswith(".") and path != run.progress:
            yield path.relative_to(run.path).as_posix(), path.read_bytes()


def _source_members() -> Iterator[tuple[str, bytes]]:
    for name in [*source_hashes(), "pyproject.toml"]:
        if (repo_root() / name).is_file():
            yield name, (repo_root() / name).read_bytes()


def _model_members(run: Run) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """Weights and eval windows with the expected loss; nothing where the run lacks either."""
    path, notes = find_checkpoint(run.checkpoints / "language_model")
    print(*notes, sep="\n", end="\n" if notes else "")
    if path is None or not (run.data / "eval.bin").is_file():
        print("packing no weights: the run has no checkpoint or no held-out text")
        return
    tensors, state = read_checkpoint(path)
    weights = {name: x.contiguous() for name, x in tensors.items() if name.startswith("model.")}
    kept = {name: state[name] for name in ("step", "ponder_share") if name in state}
    windows = _eval_windows(run)
    expected = _expected(run, state, weights, windows)
    yield WEIGHTS, save(weights, metadata={"state": json.dumps({"task": "language_model", **kept})}), expected
    yield WINDOWS, windows, expected


def _eval_windows(run: Run) -> bytes:
    """The evaluated windows as the bytes of an .npy file."""
    dataset = language_dataset(run, "eval")
    rows = np.stack([dataset[i][0].numpy() for i in range(len(dataset))]).astype(dataset.tokens.dtype)
    buffer = io.BytesIO()
    np.save(buffer, rows)
    return buffer.getvalue()


def _expected(run: Run, state: dict[str, Any], weights: dict[str, Tensor], windows: bytes) -> dict[str, Any]:
    """What a check must find, and where it is from."""
    step = state["step"]
    metrics, _ = read_json(run.file("training_metrics.json"))
    metrics = metrics if isinstance(metrics, dict) else {}
    reported = dict(zip(metrics.get("eval_step", []), metrics.get("loss_eval", []), strict=False)).get(step)
    device, dtype = _precision(run)
    if reported is not None:
        bits = dict(zip(metrics["eval_step"], metrics.get("bits_per_byte", []), strict=False)).get(step)
        loss, how = reported, "reported by training (training_metrics.json) at this step"
    else:
        result = _evaluate(run, weights, state, np.load(io.BytesIO(windows)), load_token_bytes(run))
        loss, bits = result.loss, result.bits_per_byte
        how = "computed while packing: training did not evaluate this step"
    return {"loss_eval": loss, "bits_per_byte": bits, "step": step, "how": how, "dtype": dtype, "device": device,
            "unit": "nats a token, mean over eval_windows.npy in batches of train.batch_size"}


def _precision(run: Run) -> tuple[str, str]:
    """(device type, dtype) that an evaluation of this run uses here."""
    device, precision = pick_device().type, run.settings.train.precision
    return device, "bfloat16" if precision == "bfloat16" or (precision, device) == ("auto", "cuda") else "float32"


def _evaluate(
    run: Run, tensors: dict[str, Tensor], state: dict[str, Any], windows: np.ndarray, token_bytes: np.ndarray
) -> Evaluation:
    """The run's model with a checkpoint's tensors on these windows [n, T], by the evaluation that training uses."""
    device, dtype = _precision(run)
    model = LSHModel(run.settings.model, run.settings.seed)
    load_model(model, tensors, Path(WEIGHTS), state)
    rows = torch.from_numpy(windows.astype("int64")).split(run.settings.train.batch_size)
    half = dtype == "bfloat16"
    return evaluate(
        model.to(device), ((batch, batch) for batch in rows),
        lambda: torch.autocast(device, torch.bfloat16) if half else contextlib.nullcontext(),
        torch.from_numpy(token_bytes),
    )


def check_package(path: Path) -> dict[str, Any]:
    """Verify a package; returns `members` (how many), `changed_sources` (packed files that differ from the running
    code) and, with weights, `loss_eval bits_per_byte expected difference tolerance`.

    Raises UserError on a file that is no whole zip, an unsafe or unlisted or missing member, the first member whose
    sha256 differs, or a loss that is not reproduced.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory(prefix="lshv2-check-") as folder:
        manifest = unpack(path, Path(folder))
        members = manifest["members"]
        here = source_hashes()
        packed = {name: entry["sha256"] for name, entry in members.items() if name.startswith("lshv2/")}
        changed = sorted(name for name, digest in packed.items() if here.get(name) != digest)
        result = {"members": len(members), "changed_sources": changed}
        if manifest["expected"] is None:
            return result
        return result | _check_loss(path, Path(folder), manifest["expected"])


def _check_loss(path: Path, folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
    run = load_run(folder)
    tensors, state = read_checkpoint(folder / WEIGHTS)
    result = _evaluate(run, tensors, state, np.load(folder / WINDOWS), np.load(folder / BYTES))
    tolerance = max(TOLERANCE[expected["dtype"]], TOLERANCE[_precision(run)[1]])
    difference = abs(result.loss - expected["loss_eval"])
    if not difference <= tolerance:
        raise UserError(
            f"{path}: the packed weights give an eval loss of {result.loss:.6f} nats, expected "
            f"{expected['loss_eval']:.6f} within {tolerance:g}: weights, code or reported figure are not of one run"
        )
    return {"loss_eval": result.loss, "bits_per_byte": result.bits_per_byte, "expected": expected["loss_eval"],
            "difference": difference, "tolerance": tolerance}


def main(arguments: list[str]) -> int:
    """`make RUN_DIR` or `check FILE.zip`; exit code 2 with one line on a mistake."""
    try:
        if len(arguments) != 2 or arguments[0] not in ("make", "check"):
            raise UserError("usage: python -m lshv2.package make RUN_DIR, or: python -m lshv2.package check FILE.zip")
        command, target = arguments
        print(make_package(load_run(target)) if command == "make" else json.dumps(check_package(Path(target))))
    except UserError as error:
        print(f"lshv2.package: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
