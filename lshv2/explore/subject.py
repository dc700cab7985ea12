"""What to look at: a model (the newest trained run's, or an untrained one), texts, and q, k of every layer for a text.

Legend: H query heads, K key/value heads, T tokens, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from lshv2.checkpoint import find_checkpoint, load_model, read_checkpoint
from lshv2.data.packing import read_stream
from lshv2.data.tokenizer import decode, read_tokenizer
from lshv2.errors import UserError
from lshv2.layers import Attention, rotary_angles
from lshv2.model import LSHModel
from lshv2.presets import make_settings
from lshv2.runs import Run, list_runs, load_run, runs_root
from lshv2.softmax import scaled

MAX_LENGTH = 512  # tokens: a [T,T] picture beyond it is neither readable nor immediate
N_TEXTS = 8  # evaluation windows to choose from


@dataclass(frozen=True)
class Subject:
    """A model (on the CPU, in eval mode) and texts to look at: int64 [1,T] by label. `about`: which ones, in words."""

    model: LSHModel
    about: str
    texts: dict[str, Tensor]
    tokenizer: Tokenizer | None
    length: int
    seed: int


def open_subject(run_dir: str = "", *, length: int = 256, seed: int = 0) -> Subject:
    """The newest run with a language-model checkpoint below `runs/`, or `run_dir` (a path or a name there).

    Without any: the quick preset's model, untrained, on synthetic ids. Raises UserError when `run_dir` has no usable
    checkpoint, or when `length` is not in 2..512 or above the model's max_seq_len.
    """
    if not 2 <= length <= MAX_LENGTH:
        raise UserError(f"length={length} is not between 2 and {MAX_LENGTH}")
    chosen, notes = _chosen(run_dir)
    config = chosen[0].settings.model if chosen else make_settings("quick").model
    if length > config.max_seq_len:
        raise UserError(f"length={length} is above this model's max_seq_len={config.max_seq_len}: choose a smaller one")
    model = LSHModel(config, seed).eval()
    about = "untrained weights of the quick preset: no run here has a sound language_model checkpoint"
    if chosen:
        run, path = chosen
        tensors, state = read_checkpoint(path)
        load_model(model, tensors, path, state)
        about = f"run {run.name}, checkpoint of step {state['step']}"
    if chosen and (run.data / "tokenizer.json").is_file() and (run.data / "eval.bin").is_file():
        tokenizer = read_tokenizer(run.data / "tokenizer.json")
        texts = _eval_texts(run, tokenizer, length)
        about += ", on held-out text"
    else:
        tokenizer, texts = None, _synthetic_texts(config.vocab_size, length, seed)
        about += ", on synthetic ids"
    return Subject(model, "; ".join([about, *notes]), texts, tokenizer, length, seed)


def _chosen(run_dir: str) -> tuple[tuple[Run, Path] | None, list[str]]:
    """The run to look at and its checkpoint (None: none is trained), and a line for each that was passed over."""
    if run_dir:
        run = load_run(runs_root() / run_dir)
        path, notes = find_checkpoint(run.checkpoints / "language_model")
        if path is None:
            raise UserError(f"{run.path} has no language_model checkpoint: train it, or leave run_dir empty")
        return (run, path), notes
    notes = []
    for folder in list_runs():
        try:
            path, damaged = find_checkpoint(folder / "checkpoints" / "language_model")
            if path:
                return (load_run(folder), path), [*notes, *damaged]
        except UserError as error:
            notes.append(f"passed over {folder.name}: {error}")
    return None, notes


def _eval_texts(run: Run, tokenizer: Tokenizer, length: int) -> dict[str, Tensor]:
    tokens = read_stream(run.data / "eval.bin", run.settings.model.vocab_size)
    last = max(0, len(tokens) - length)
    texts = {}
    for i, start in enumerate(sorted({last * n // N_TEXTS for n in range(N_TEXTS)})):
        ids = torch.tensor(tokens[start : start + length].astype("int64"))
        opening = " ".join(decode(tokenizer, ids[:24].tolist()).split())
        texts[f"{i + 1}: {opening[:60]}"] = ids[None]
    return texts


def _synthetic_texts(vocab_size: int, length: int, seed: int) -> dict[str, Tensor]:
    """Random ids that repeat with a period: the same token must find itself, even with untrained weights."""
    ids = torch.randint(0, vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))
    texts = {"random ids": ids}
    for period in (length // 2, length // 4, length // 8):
        if period > 1:
            texts[f"random ids, repeated every {period}"] = ids[:, torch.arange(length) % period]
    return texts


@dataclass(frozen=True)
class Layer:
    """One application of a block's attention: what is hashed (`q` [H,T,D], `k` [K,T,D]: normalised, with positions
    where `model.hash_positions` says so) and what is weighed (`weighed_q`, `weighed_k`: with rotary positions and the
    head's temperature, of a dense model by `softmax_scale` too)."""

    attention: Attention
    q: Tensor
    k: Tensor
    weighed_q: Tensor
    weighed_k: Tensor

    def mass(self, head: int) -> Tensor:
        """Dense causal attention's softmax weights of one head: [T,T], rows sum to 1."""
        config = self.attention.config
        k = self.weighed_k[head * config.n_kv_heads // config.n_heads]
        scores = self.weighed_q[head] @ k.T * config.head_dim**-0.5
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        return scores.masked_fill(future, float("-inf")).softmax(-1)


@torch.no_grad()
def capture(model: LSHModel, ids: Tensor) -> list[Layer]:
    """q and k of every layer application for ids [1,T]. No token halts, as in training: every layer has every query."""
    layers: list[Layer] = []

    def note(attention: Attention, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        x, cos, sin = inputs
        q, k, _ = attention.project(x)
        weighed_q, weighed_k = placed = attention.place(q, k, cos, sin)
        q, k = attention.sought((q, k), placed)
        layers.append(Layer(attention, q[0], k[0], scaled(weighed_q, attention.config)[0], weighed_k[0]))

    hooks = [module.register_forward_pre_hook(note) for module in model.modules() if isinstance(module, Attention)]
    angles, x = rotary_angles(ids.shape[1], model.config, ids.device), model.embedding(ids)
    try:
        for n in range(model.config.n_ponder_steps):
            x = model.step_of_all(x, n, angles)
    finally:
        for hook in hooks:
            hook.remove()
    return layers
