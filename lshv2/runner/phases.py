"""What each phase depends on and what it must leave behind.

A phase's settings are named by section (`data`) or key (`model.vocab_size`); its artifacts by path below the run
folder, where `*` stands for one or more files. An artifact is checked by reading it, by its suffix.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from lshv2.runs import Run, digest, read_json, read_jsonl, sha256


def always(run: Run) -> bool:
    return True


def beside(metrics: str) -> Callable[[Run], bool]:
    """Needed when the file that it draws is there."""
    return lambda run: run.file(metrics).exists()


@dataclass(frozen=True)
class Artifact:
    path: str
    needed: Callable[[Run], bool] = always
    hashed: bool = True  # False: written again after the phase, so its content proves nothing
    carries: bool = True  # False: holds clock times; what later phases read lies in the other artifacts
    foreign: tuple[str, ...] = ()  # keys of a .json that another phase writes


@dataclass(frozen=True)
class Phase:
    """A notebook and its terms.

    after: phases whose results it reads, where they exist. resumable: what a half-done phase goes on from; removed
    when the phase was completed before or its settings have changed, so that no old weights pass for new ones.
    keyed: the one of them whose lines, as all that goes with them, say themselves what they were made with: changed
    settings and plugins take nothing away then, nor do lines that others have added.
    """

    name: str
    settings: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    artifacts: tuple[Artifact, ...] = ()
    resumable: tuple[str, ...] = ()
    keyed: str = ""


def trained(run: Run) -> bool:
    return (run.checkpoints / "language_model" / "last.json").exists()


PHASE_TABLE = (
    Phase("01_model", ("model", "seed"), (), (Artifact("model_summary.json"),)),
    Phase(
        "02_data",
        ("data", "recall", "model.vocab_size", "train.seq_length", "train.num_train_sequences",
         "train.num_eval_sequences", "seed"),
        (),
        (
            Artifact("data/data.json", carries=False),
            Artifact("data/tokenizer.json"),
            Artifact("data/train.bin", lambda run: not run.settings.data.stream),
            Artifact("data/shards.json", lambda run: run.settings.data.stream),
            Artifact("data/eval.bin"),
            Artifact("data/*.npy"),
            *(Artifact(f"data/synthetic/{task}_*.jsonl") for task in ("recall", "copy", "needle")),
        ),
    ),
    Phase(
        "03_train",
        ("model", "train", "recall", "seed"),
        ("02_data",),
        (
            Artifact("training_metrics.json"),
            Artifact("component_profiles.json", lambda run: run.settings.train.profile_components),
            Artifact("metrics.jsonl"),
            Artifact("checkpoints/language_model/last.json"),
            Artifact("checkpoints/recall/last.json"),
            # hundreds of megabytes in full: that they are there is asked at each rerun, their sha256 when they are read
            Artifact("checkpoints/language_model/**/*.safetensors", hashed=False),
            Artifact("checkpoints/recall/**/*.safetensors", hashed=False),
        ),
        resumable=("checkpoints", "metrics.jsonl", "training_metrics.json"),
    ),
    Phase(
        "04_benchmark",
        ("model", "benchmark", "train.gradient_checkpoint", "train.precision", "seed"),
        ("02_data", "03_train"),
        (Artifact("benchmark_summary.json", foreign=("arena",)),),
    ),
    Phase(
        "04_arena",
        ("arena", "seed"),
        (),
        (Artifact("arena.jsonl"), Artifact("arena.png")),
        resumable=("arena", "arena.jsonl"),
        keyed="arena.jsonl",
    ),
    Phase(
        "05_report",
        ("model", "data", "train", "recall", "benchmark", "arena", "seed", "preset"),
        ("01_model", "02_data", "03_train", "04_benchmark", "04_arena"),
        (
            Artifact("pipeline_results.json", hashed=False),
            Artifact("training_metrics.png", beside("training_metrics.json")),
            Artifact("component_profiles.png", beside("component_profiles.json")),
            Artifact("benchmark_summary.png", beside("benchmark_summary.json")),
            Artifact("lsh_v2_complete_package.zip", trained),
        ),
    ),
)


def find_artifacts(phase: Phase, run: Run) -> tuple[list[Path], list[str]]:
    """`(the files there are, a line for each artifact that is missing)`."""
    found: list[Path] = []
    missing: list[str] = []
    for artifact in phase.artifacts:
        if artifact.needed(run):
            paths = sorted(p for p in run.path.glob(artifact.path) if p.is_file())
            found += paths
            if not paths:
                missing.append(f"artifact {artifact.path} is missing")
    return found, missing


def hash_outputs(phase: Phase, run: Run) -> dict[str, str]:
    """Path below the run folder -> sha256, for every artifact whose content is the phase's own."""
    hashes: dict[str, str] = {}
    for artifact in phase.artifacts:
        if artifact.hashed:
            for path in find_artifacts(replace(phase, artifacts=(artifact,)), run)[0]:
                hashes[str(path.relative_to(run.path))] = _own_hash(path, artifact.foreign)
    return hashes


def _own_hash(path: Path, foreign: tuple[str, ...]) -> str:
    """sha256 of a file, of a JSON object without what another phase writes there."""
    content = read_json(path)[0] if foreign else None
    if not isinstance(content, dict):
        return sha256(path)
    own = {name: value for name, value in content.items() if name not in foreign}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def check_artifact(path: Path) -> str | None:
    """What is wrong with this file, or None."""
    problem: str | None = None
    if path.stat().st_size == 0:
        problem = "is empty"
    elif path.name == "last.json":
        problem = _check_checkpoint(path)
    elif path.suffix == ".json":
        problem = read_json(path)[1]
    elif path.suffix == ".jsonl":
        records, problem = read_jsonl(path)
        problem = problem or (None if records else "has no readable record")
    elif path.suffix == ".png":
        content = path.read_bytes()
        whole = content.startswith(b"\x89PNG\r\n\x1a\n") and content[-8:-4] == b"IEND"
        problem = None if whole else "is not a whole PNG picture"
    elif path.suffix == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            problem = f"has a broken member {broken}" if broken else None
        except (zipfile.BadZipFile, OSError) as error:
            problem = f"is not a readable zip: {error}"
    return problem


def _check_checkpoint(path: Path) -> str | None:
    """`last.json` names a file and its sha256; both must be true."""
    content, problem = read_json(path)
    if problem:
        return problem
    try:
        name, expected = content["file"], content["sha256"]
    except (KeyError, TypeError):
        return f"does not name its file and sha256: {json.dumps(content)[:80]}"
    target = path.parent / name
    if not target.exists():
        return f"names {name}, which is missing"
    return None if digest(target) == expected else f"names {name}, whose sha256 is another"
