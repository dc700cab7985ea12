"""What LSH attention sees of what dense attention would weigh: the code behind notebooks/explore_attention.ipynb.

    explorer = Explorer(open_subject(run_dir="", length=256, seed=0))     # the newest trained run, or untrained weights
    pattern = explorer.pattern(**explorer.start)                          # numbers
    explorer.draw(**explorer.start)                                       # pictures

subject says which model and text, pattern what a setting sees and catches, figures how it is drawn (plotly).
"""

from __future__ import annotations

import functools
from typing import Any

import pandas as pd
import torch
from IPython.display import HTML, display
from torch import Tensor

from lshv2.attention import visible_set
from lshv2.config import ModelConfig
from lshv2.data.tokenizer import encode
from lshv2.errors import UserError
from lshv2.explore.figures import LINES, bucket_map, caught_figure, mass_figure
from lshv2.explore.pattern import MAX_ROUNDS, Pattern, hash_tables, round_ids
from lshv2.explore.subject import MAX_LENGTH, Subject, capture, open_subject

__all__ = ["MAX_ROUNDS", "Explorer", "Pattern", "Subject", "open_subject"]


class Explorer:
    """Patterns of a subject by the notebook's controls; the forward of a text is kept, so that a change is quick."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._layers = functools.lru_cache(maxsize=2)(lambda ids: capture(subject.model, torch.tensor([ids])))

    @property
    def config(self) -> ModelConfig:
        return self.subject.model.config

    def ids(self, text: str, own_text: str = "") -> Tensor:
        """Token ids [1,T] of the typed text, cut to the length, or of the chosen one."""
        if own_text.strip() and self.subject.tokenizer:
            ids = next(encode(self.subject.tokenizer, [own_text]))[: self.subject.length]
            if len(ids) < 2:
                raise UserError(f"own text {own_text!r} is one token: type more")
            return torch.tensor([ids])
        if text not in self.subject.texts:
            raise UserError(f"text={text!r} is unknown; allowed: {', '.join(self.subject.texts)}")
        return self.subject.texts[text]

    @torch.no_grad()
    def pattern(
        self, *, text: str, own_text: str = "", layer: int, head: int, n_rounds: int, n_buckets: int, bucket_size: int,
        window: int, hashing: str,
    ) -> Pattern:
        """The pattern of one head. Raises UserError on a choice that the model or the text does not have."""
        layers = self._layers(tuple(self.ids(text, own_text)[0].tolist()))
        for name, value, low, high in (
            ("head", head, 0, self.config.n_heads - 1), ("n_rounds", n_rounds, 0, MAX_ROUNDS),
            ("layer", layer, 0, self.config.n_layers - 1), ("bucket_size", bucket_size, 1, MAX_LENGTH),
            ("window", window, 1, MAX_LENGTH),
        ):
            if not low <= value <= high:
                raise UserError(f"{name}={value} is not between {low} and {high}")
        chosen = layers[layer]
        tables, own = hash_tables(chosen.attention, n_buckets, hashing, self.subject.seed)
        kv = head * self.config.n_kv_heads // self.config.n_heads
        q_ids, k_ids = round_ids(chosen.attention, hashing, tables, kv, chosen.q[head], chosen.k[kv])
        limits: dict[str, Any] = dict(bucket_size=bucket_size, window=window)
        none = q_ids[:, :, :0]
        seen = [visible_set(none, none, n_global=self.config.n_global, **limits)[0, 0]]
        for r in range(MAX_ROUNDS):
            q_round, k_round = q_ids[:, :, r : r + 1], k_ids[:, :, r : r + 1]
            seen.append(seen[-1] | visible_set(q_round, k_round, n_global=0, **limits)[0, 0])
        local = visible_set(none, none, n_global=0, **limits)[0, 0]
        return Pattern(chosen.mass(head), local, torch.stack(seen), q_ids[0, 0], k_ids[0, 0], n_rounds, own, n_buckets)

    @property
    def start(self) -> dict[str, Any]:
        """The first choice: the model's own setting, but with window and W at most a quarter of the text.

        Otherwise the local window alone would see a short text whole, and there would be nothing to find.
        """
        config, most = self.config, max(1, self.subject.length // 4)
        return dict(
            text=next(iter(self.subject.texts)), own_text="", layer=0, head=0, hashing=config.hashing,
            n_rounds=min(config.n_rounds, MAX_ROUNDS), n_buckets=config.resolved_n_buckets,
            bucket_size=min(config.bucket_size, most), window=min(config.window, most),
        )

    def draw(self, **choice: Any) -> None:
        """Display caption, numbers and figures of a choice (as `pattern` takes it), or the line that is wrong."""
        try:
            pattern = self.pattern(**choice)
        except UserError as error:
            print(error)
            return
        display(HTML(f"<p>{pattern.caption()}</p>"))
        table = pd.DataFrame(pattern.records()).set_index("share").map("{:.1%}".format)
        display(table.rename(columns={key: name for key, (name, _, _) in LINES.items()}).rename_axis(None))
        for figure in (mass_figure(pattern), caught_figure(pattern), bucket_map(pattern)):
            display(figure)
