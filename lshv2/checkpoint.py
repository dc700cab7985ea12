"""Checkpoints: one safetensors file a step, written atomically, found through `last.json`, verified by sha256.

Several processes write a folder `step_<n>.pieces` instead, a file each (`lshv2.parallel.saving`) and `state.json`.
Either is read by any number of processes, also by one.

Kept are the newest `keep`, the one of the lowest `loss_eval`, and every one at a multiple of `every` steps: at most
keep + 1 + steps // every files (keep + 1 without `every`), and one more, under a temporary name, while it is written.

Tensors `model.<name>`, `optimizer.<index>.<key>`, `rng.cpu` (and `rng.cuda`); everything that is not a tensor is JSON
in the file's metadata under "state". safetensors holds no code and no pickles, but accepts flipped bits: hence the
sha256 in `last.json`. A damaged newest file falls back to the one before, and says so.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lshv2.errors import UserError
from lshv2.parallel.ranks import ALONE, Ranks
from lshv2.runs import atomic_path, digest, read_json, write_json

LAST, STATE = "last.json", "state.json"
Entry = dict[str, Any]  # of last.json


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int,
    *, every: int | None = None, loss_eval: float | None = None, suffix: str = "", ranks: Ranks = ALONE,
) -> Path:
    """Write `step_<n><suffix>.safetensors`, then `last.json`; delete what the policy does not keep.

    Of several `ranks` each must call it, with the same state; they write `step_<n><suffix>.pieces`.

    loss_eval: of this step, None where it was not evaluated. suffix: tells a second file of the same step from the
    first, which then stays whole until `last.json` names the second.
    """
    tensors = {f"model.{name}": x for name, x in model.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": x for key, x in values.items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    state = {**state, "step": step}
    path = folder / f"step_{step:08d}{suffix}.{'safetensors' if ranks.world == 1 else 'pieces'}"
    if ranks.world == 1:
        with atomic_path(path) as temporary:
            packed = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
            save_file(packed, temporary, metadata={"state": json.dumps(state)})
    else:
        _write_folder(path, tensors, state, ranks)
    if ranks.first:
        _settle(folder, path, step, loss_eval, keep, every)
    ranks.wait()  # what is listed is the same for all
    return path


def _write_folder(path: Path, tensors: dict[str, Tensor], state: dict[str, Any], ranks: Ranks) -> None:
    """All processes' pieces into a folder beside `path`, which takes its place when everything is in it."""
    temporary = path.with_name(f".{path.name}.tmp")
    if ranks.first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    ranks.wait()
    from lshv2.parallel.saving import write_pieces  # half a second, which one process need not wait for

    write_pieces(temporary, tensors)
    ranks.wait()
    if ranks.first:
        write_json(temporary / STATE, state)
        if path.exists():  # passed over as damaged, and computed again
            path.rename(path.with_name(f".{path.name}.old.tmp"))
        os.replace(temporary, path)


def _settle(folder: Path, path: Path, step: int, loss_eval: float | None, keep: int, every: int | None) -> None:
    """The new checkpoint into `last.json`, and away with what is no longer kept."""
    older = [e for e in listed_checkpoints(folder) if e["step"] < step and (folder / e["file"]).exists()]
    entry = {"file": path.name, "sha256": digest(path), "step": step, "loss_eval": loss_eval}
    history = _kept([*older, entry], keep, every)
    _write_list(folder, history)
    kept = {folder / e["file"] for e in history}
    # a kill while writing leaves a temporary one, as large as a checkpoint
    for stale in [*folder.glob(".step_*.tmp"), *(set(folder.glob("step_*")) - kept)]:
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()


def listed_checkpoints(folder: Path) -> list[Entry]:
    """The entries of `last.json`, oldest first: `file sha256 step loss_eval`. Empty where none was ever written."""
    if not (folder / LAST).exists():
        return []
    listed, problem = read_json(folder / LAST)
    if not isinstance(listed, dict) or "history" not in listed:
        raise UserError(f"{folder / LAST} is damaged ({problem or 'no history'}): mend it, or start again with FORCE=1")
    return listed["history"]


def lowest(entries: list[Entry]) -> Entry | None:
    """The entry of the lowest loss_eval, of equal ones the earliest; None where none was evaluated."""
    evaluated = [e for e in entries if e.get("loss_eval") is not None]
    return min(evaluated, key=lambda e: (e["loss_eval"], e["step"]), default=None)


def _kept(entries: list[Entry], keep: int, every: int | None) -> list[Entry]:
    best = lowest(entries)
    return [
        e for i, e in enumerate(entries)
        if i >= len(entries) - keep or e is best or (every is not None and e["step"] > 0 and e["step"] % every == 0)
    ]


def _write_list(folder: Path, history: list[Entry]) -> None:
    write_json(folder / LAST, {**history[-1], "best": lowest(history), "history": history})


def find_checkpoint(folder: Path, *, best: bool = False) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose sha256 holds (best: of the lowest loss_eval), and a line for each one passed over.

    None where none was ever written, or, for the best, evaluated. Raises `UserError` when some were and none is sound:
    nothing is thrown away.
    """
    entries = listed_checkpoints(folder)
    if best:
        entries = [e for e in entries if e.get("loss_eval") is not None]
        entries.sort(key=lambda e: (-e["loss_eval"], -e["step"]))
    notes: list[str] = []
    for entry in reversed(entries):
        path = folder / entry["file"]
        if path.exists() and digest(path) == entry["sha256"]:
            return path, notes
        state = "damaged" if path.exists() else "missing"
        notes.append(f"checkpoint {path} is {state}: falling back to the {'next best' if best else 'one before'}")
    if notes:
        raise UserError(f"no sound checkpoint is left in {folder} ({'; '.join(notes)}): start again with FORCE=1")
    return None, notes


def forget_newer(folder: Path, path: Path) -> None:
    """Strike from `last.json` what comes after `path`: passed over as damaged, and about to be computed again."""
    entries = listed_checkpoints(folder)
    names = [e["file"] for e in entries]
    if names[-1] != path.name:
        _write_list(folder, entries[: names.index(path.name) + 1])


def read_checkpoint(path: Path, like: Mapping[str, Tensor] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors by name, and the state. Raises `UserError` when the file or folder is not a checkpoint of ours.

    like: see `read_pieces`.
    """
    try:
        if path.is_dir():
            from lshv2.parallel.saving import read_pieces

            return read_pieces(path, like or {}), json.loads((path / STATE).read_text(encoding="utf-8"))
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["state"])  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a readable checkpoint ({error}): delete it and rerun the training") from None


def owners(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Checkpoint name of each weight and of each moment -> the parameter that it belongs to."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    own = {f"model.{name}": x for name, x in model.state_dict().items()}
    return own | {f"optimizer.{i}.{key}": p for i, p in enumerate(parameters) for key in ("exp_avg", "exp_avg_sq")}


def load_model(
    model: nn.Module, tensors: dict[str, Tensor], source: Path, state: dict[str, Any] | None = None
) -> None:
    """Weights into the model; `UserError` naming the first tensor that does not fit.

    With the checkpoint's state the model answers as it did then: at full depth as long as training asked for no more.
    """
    own = model.state_dict()
    weights = {name.removeprefix("model."): x for name, x in tensors.items() if name.startswith("model.")}
    for name in own.keys() | weights.keys():
        if name not in weights or name not in own or weights[name].shape != own[name].shape:
            raise UserError(
                f"{source} was made with another model shape (tensor {name}): use its settings, or FORCE=1 to retrain"
            )
    model.load_state_dict({name: _as_own(x, own[name]) for name, x in weights.items()})
    if state is not None:
        model.ponder_share = state.get("ponder_share", 1.0)


def _as_own(x: Tensor, own: Tensor) -> Tensor:
    if type(own) in (Tensor, nn.Parameter):
        return x
    from lshv2.parallel.saving import as_own

    return as_own(x, own)


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Optimizer moments and the RNG states as they were when the checkpoint was written."""
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, x in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            own = parameters[int(index)]
            state.setdefault(int(index), {})[key] = _as_own(x, own) if x.shape == own.shape else x
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["rng.cpu"])
    if torch.cuda.is_available() and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"])
